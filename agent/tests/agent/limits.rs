//! What builds may use, from a build's wish to the reason it ends with, and that nothing is left of it.

use helix_model::{BuildSpec, Resources};

use super::cluster::{Cluster, line};
use super::host::{Host, eventually};

struct World {
    cluster: Cluster,
    host: Host,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new(limits: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(dir.path()).await;
        let host = Host::with(dir.path(), &cluster, limits);
        cluster.wait_for("a hello", |seen| (!seen.hellos.is_empty()).then_some(())).await;
        Self { cluster, host, _dir: dir }
    }

    /// Whether cgroups enforce this limit here. Where they do not the test can show nothing: it says so, and fails where skips
    /// are forbidden.
    fn has(&self, limit: &str) -> bool {
        let words = self.cluster.seen().hellos[0].offer.clone().unwrap().limits;
        let has = words.split(", ").any(|word| word.starts_with(&format!("{limit} cgroup")));
        if !has {
            super::skip::skip("a test of limits", format!("no cgroup limits {limit} here: {words}"));
        }
        has
    }

    /// Cgroups of this agent, in all trees.
    fn cgroups(&self) -> Vec<std::path::PathBuf> {
        let id: String = self.cluster.seen().hellos[0].instance.chars().take(8).collect();
        let prefixes = [format!("helix-{id}-"), format!("helix-{id}.")];
        let host = helix_runner::cgroup::Host::find();
        prefixes.iter().flat_map(|prefix| host.named(prefix)).collect()
    }
}

fn asking(resources: Resources, text: &str) -> BuildSpec {
    BuildSpec { resources, ..line(text) }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_ran_out_is_its_own_reason_and_nothing_is_left() {
    let world = World::new("[limits]\nmemory_bytes_max = 100000000\n").await;
    if !world.has("memory") {
        return;
    }
    let asked = Resources { memory_bytes: 32 << 20, ..Resources::default() };
    let id = world.cluster.assign("oom", &asking(asked, "dd if=/dev/zero of=/dev/null bs=256M count=1")).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "oom"), "{finished:?}");
    let asked = Resources { memory_bytes: 1 << 30, ..Resources::default() };
    let id = world.cluster.assign("greedy", &asking(asked, "true")).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.reason, "policy", "{finished:?}");
    assert!(finished.message.contains("limits.memory_bytes_max"), "{finished:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_end_at_the_limit_for_one_build_and_not_for_its_neighbour() {
    let mut world = World::new("[limits]\nprocesses = 64\n").await;
    if !world.has("processes") {
        return;
    }
    let gate = world.host.dir.join("gate");
    let forks = format!(
        "i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; while ! test -e {}; do read x; done",
        gate.display()
    );
    let many = world.cluster.assign("many", &line(&forks)).await;
    // The shell gives up when it cannot fork.
    let finished = world.cluster.finished(&many).await;
    assert_eq!(finished.reason, "exit", "{finished:?}");
    let few = "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done; echo had 40";
    let ids = [world.cluster.assign("few1", &line(few)).await, world.cluster.assign("few2", &line(few)).await];
    for id in &ids {
        let finished = world.cluster.finished(id).await;
        assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    }
    for id in [many].iter().chain(&ids) {
        let forget = helix_proto::agent::Forget { id: Some(id.clone()) };
        world.cluster.say(helix_proto::agent::coordinator_message::Message::Forget(forget)).await;
    }
    eventually("the spools are removed", || world.host.names_in("attempts").is_empty()).await;
    world.host.terminate();
    assert!(world.host.exited().await);
    assert_eq!(world.cgroups(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_agent_and_runner_left_is_put_away_at_the_next_start() {
    let mut world = World::new("").await;
    if !world.has("processes") {
        return;
    }
    let asked = Resources { memory_bytes: 1 << 30, cpu_milli: 500, ..Resources::default() };
    let pids = world.host.dir.join("pids");
    let script = format!("(setsid sleep 1000 & echo $PPID $! > {}); sleep 1000", pids.display());
    world.cluster.assign("left", &asking(asked, &script)).await;
    let read = || std::fs::read_to_string(&pids).unwrap_or_default();
    eventually("it runs", || read().ends_with('\n')).await;
    let numbers: Vec<i32> = read().split_whitespace().map(|word| word.parse().unwrap()).collect();
    world.host.kill();
    let kill = |pid: i32| {
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL)
    };
    kill(numbers[0]).unwrap();
    // Not even what the agent knew of it is left.
    std::fs::remove_dir_all(world.host.dir.join("data/attempts/left.0.1")).unwrap();
    assert!(!world.cgroups().is_empty(), "there is nothing to put away");
    world.host.start();
    world.cluster.wait_for("a second hello", |seen| (seen.hellos.len() >= 2).then_some(())).await;
    eventually("all but slots is put away", || {
        world.cgroups().iter().all(|path| path.to_string_lossy().contains(".slot-"))
    })
    .await;
    eventually("its process is dead", || !std::path::Path::new("/proc").join(numbers[1].to_string()).exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workdir_over_its_limit_is_a_full_disk() {
    let world = World::new("").await;
    let asked = Resources { disk_bytes: 2 << 20, ..Resources::default() };
    let script = "i=0; while :; do head -c 65536 /dev/zero > f$i; i=$((i+1)); done";
    let id = world.cluster.assign("large", &asking(asked, script)).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "disk_full"), "{finished:?}");
    assert!(world.host.workdirs().is_empty());
    let log = world.cluster.sealed_log(&id).await;
    assert!(log.iter().any(|line| line.contains("its limit is 2097152 bytes")), "{log:?}");
}
