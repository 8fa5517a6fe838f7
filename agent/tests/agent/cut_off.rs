//! An agent that no coordinator can reach: builds go on for as long as its owner allows, and are then stopped and seen dead.

use std::path::{Path, PathBuf};

use helix_agent::attempt::record;
use helix_agent_core::Assignment;
use helix_model::{AttemptKey, BuildSpec, Instance, Outputs};
use helix_proto::agent::{AttemptId, Finished, agent_message};
use helix_runner::AttemptDir;
use helix_runner::journal::Journal;

use super::World;
use super::cluster::{Cluster, Link, line};
use super::host::{Host, eventually};

/// As short as it may be.
const LIMIT: &str = "[policy]\nstop_cut_off_after_ms = 15000\n";

/// The log's last line of what was stopped so.
const LAST_LINE: &str =
    "failed (drained): the agent was cut off from all coordinators for 15s (policy.stop_cut_off_after_ms)";

/// An agent with more in its configuration, at the end of a link.
async fn linked(more: &str) -> (World, Link) {
    let dir = tempfile::tempdir().unwrap();
    let (cluster, link) = Cluster::behind_a_link(dir.path()).await;
    let host = Host::with(dir.path(), &cluster, more);
    let world = World { cluster, host, _dir: dir };
    world.hellos(1).await;
    (world, link)
}

/// A build that leaves nothing undone to live on.
struct Stubborn {
    id: AttemptId,
    pid_file: PathBuf,
}

impl Stubborn {
    async fn start(world: &World) -> Self {
        Self::start_with(world, BuildSpec::default(), "").await
    }

    /// One whose command begins with more, by a spec that asks for more.
    async fn start_with(world: &World, spec: BuildSpec, begin: &str) -> Self {
        let pid_file = world.dir().join("daemon.pid");
        let script = format!(
            "{begin}(env -i setsid sh -c 'trap \"\" TERM; echo $$ > {}; while :; do sleep 1; done' &) ; echo started; sleep 1000",
            pid_file.display()
        );
        let spec = BuildSpec { command: line(&script).command, outputs: Outputs::None, ..spec };
        let id = world.cluster.assign("stubborn", &spec).await;
        let this = Self { id, pid_file };
        eventually("it runs", || this.pid().is_some()).await;
        eventually("its line is shown on", || !world.cluster.live_lines(&this.id).is_empty()).await;
        this
    }

    fn pid(&self) -> Option<String> {
        std::fs::read_to_string(&self.pid_file).ok().and_then(|text| text.strip_suffix('\n').map(str::to_owned))
    }

    fn is_dead(&self) -> bool {
        !Path::new("/proc").join(self.pid().unwrap()).exists()
    }
}

/// Whether anything was reported.
fn is_silent(world: &World) -> bool {
    let finished = |message: &agent_message::Message| matches!(message, agent_message::Message::Finished(_));
    !world.cluster.seen().messages.iter().any(finished)
}

fn assert_cut_off(finished: &Finished) {
    assert_eq!((&*finished.outcome, &*finished.reason), ("failed", "drained"), "{finished:?}");
    assert!(finished.message.contains("cut off") && !finished.unproven, "{finished:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_where_no_coordinator_can_reach_is_stopped_and_reported_later() {
    let (world, link) = linked(LIMIT).await;
    let build = Stubborn::start(&world).await;
    link.cut();
    eventually("the daemon is dead", || build.is_dead()).await;
    eventually("the workdir is gone", || world.host.workdirs().is_empty()).await;
    assert!(is_silent(&world));
    link.mend();
    let finished = world.cluster.finished(&build.id).await;
    assert_cut_off(&finished);
    assert_eq!(world.cluster.sealed_log(&build.id).await, ["started", LAST_LINE]);
    let live = || world.cluster.live_lines(&build.id);
    eventually("readers of the live log see it", || live().last().is_some_and(|last| last == LAST_LINE)).await;
    world.forget(&build.id).await;
    // It is as good as any other again.
    let id = world.cluster.assign("after", &line("echo well")).await;
    assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_where_no_coordinator_can_reach_it_needs_none_to_stop_and_clear_up() {
    let secret = "[secrets.token]\ncommand = 'echo a-secret-value'\nrepositories = ['*']\n";
    let (mut world, link) = linked(&format!("{LIMIT}{secret}")).await;
    let shown = world.dir().join("shown");
    let spec = BuildSpec { secrets: ["token".to_owned()].into(), ..BuildSpec::default() };
    let show = format!("echo \"$HELIX_SECRETS\" > {}; ", shown.display());
    let runs = Stubborn::start_with(&world, spec, &show).await;
    let secrets = PathBuf::from(std::fs::read_to_string(&shown).unwrap().trim_end());
    assert!(secrets.join("token").exists());
    // Another one ends well meanwhile, and nobody takes what it made.
    let gate = world.dir().join("gate");
    let script =
        format!("echo waits; while ! test -e {}; do sleep 0.02; done; echo x > \"$HELIX_OUTPUT\"", gate.display());
    let ends = world.cluster.assign("ends", &BuildSpec { outputs: Outputs::Default, ..line(&script) }).await;
    eventually("it runs, too", || !world.cluster.live_lines(&ends).is_empty()).await;

    world.host.kill();
    link.cut();
    std::fs::write(gate, "").unwrap();
    world.host.start();
    eventually("the daemon is dead", || runs.is_dead()).await;
    eventually("the workdirs are gone", || world.host.workdirs().is_empty()).await;
    assert!(!secrets.exists(), "the secrets outlive the workdir");
    assert!(is_silent(&world) && world.cluster.seen().hellos.len() == 1, "the coordinator was reached");
    link.mend();
    for (id, said) in [(&runs.id, "started"), (&ends, "waits")] {
        assert_cut_off(&world.cluster.finished(id).await);
        assert_eq!(world.cluster.sealed_log(id).await, [said, LAST_LINE]);
        world.forget(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_read_again_counts_for_an_agent_that_is_cut_off_already() {
    let (world, link) = linked("").await;
    let build = Stubborn::start(&world).await;
    link.cut();
    let path = world.dir().join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text + LIMIT).unwrap();
    world.host.reload();
    eventually("the daemon is dead", || build.is_dead()).await;
    link.mend();
    assert_cut_off(&world.cluster.finished(&build.id).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_not_begun_when_the_time_was_over_does_not_begin() {
    let (mut world, link) = linked(LIMIT).await;
    let instance = Instance::new(&world.cluster.seen().hellos[0].instance).unwrap();
    world.host.kill();
    link.cut();
    // As an agent leaves them that dies between assignment and order; several, because a stop may be seen at more than one place.
    let dirs: Vec<AttemptDir> = (0..8)
        .map(|number| {
            let key: AttemptKey = format!("unbegun{number}.0.1").parse().unwrap();
            let dir = AttemptDir::new(world.dir().join("data/attempts").join(key.to_string()));
            let (spec, previous) = (line("true"), String::new());
            let assignment = Assignment { key, spec, commit: None, platform: None, previous };
            std::fs::create_dir(dir.root()).unwrap();
            record::write_assignment(&dir, &assignment, &instance).unwrap();
            dir
        })
        .collect();
    world.host.start();
    eventually("their time is over", || world.host.log().matches("an attempt is stopped").count() == dirs.len()).await;
    let is_reported = |dir: &AttemptDir| record::report(&Journal::read(dir).unwrap()).unwrap().is_some();
    eventually("their ends are on disk", || dirs.iter().all(is_reported)).await;
    eventually("the workdirs are gone", || world.host.workdirs().is_empty()).await;
    assert!(is_silent(&world));
    link.mend();
    for (number, dir) in dirs.iter().enumerate() {
        let id = AttemptId { build_id: format!("unbegun{number}"), task: 0, attempt: 1 };
        assert_cut_off(&world.cluster.finished(&id).await);
        assert_eq!(world.cluster.sealed_log(&id).await, [LAST_LINE]);
        assert!(!Journal::read(dir).unwrap().is_ordered(), "a runner was given it");
    }
}
