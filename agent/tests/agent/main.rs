//! The whole agent, real binaries, against a coordinator of the test's own: assignment to report, stop, restart, detach,
//! drain, sources, outputs.

#![allow(clippy::unwrap_used)]

mod cluster;
mod cut_off;
mod disks;
mod host;
mod limits;
mod outlived;
mod secrets;
#[allow(unreachable_pub)] // Another crate exports it.
#[path = "../../../tests/src/skip.rs"]
mod skip;
mod unproven;

use std::path::Path;
use std::process::Command as Process;

use helix_model::{BuildSpec, Command, Digest, Outputs, Source};
use helix_proto::agent::{
    AttemptId, Commit, DetachAck, Forget, Settings, Stop, StoreAgain, agent_message, coordinator_message::Message,
};
use sha2::{Digest as _, Sha256};

use cluster::{Cluster, Seen, line};
use host::{Host, eventually};

struct World {
    cluster: Cluster,
    host: Host,
    _dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(dir.path()).await;
        let host = Host::new(dir.path(), &cluster);
        let world = Self { cluster, host, _dir: dir };
        world.hellos(1).await;
        world
    }

    async fn hellos(&self, count: usize) {
        self.cluster.wait_for("a hello", |seen| (seen.hellos.len() >= count).then_some(())).await;
    }

    async fn forget(&self, id: &AttemptId) {
        self.cluster.say(Message::Forget(Forget { id: Some(id.clone()) })).await;
        let name = format!("{}.0.1", id.build_id);
        eventually("the spool is removed", || !self.host.names_in("attempts").contains(&name)).await;
    }

    fn dir(&self) -> &Path {
        &self.host.dir
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_run_reported_and_forgotten() {
    let world = World::new().await;
    // What is over before the agent hears of a line is not shown on while it grows.
    let heard = world.dir().join("heard");
    let command = format!(
        "echo to stdout; echo to stderr >&2; until test -e {}; do sleep 0.01; done; printf result > \"$HELIX_OUTPUT\"; \
         test \"$HELIX_BUILD_ID\" = b1",
        heard.display()
    );
    let spec = BuildSpec { outputs: Outputs::Default, ..line(&command) };
    let id = world.cluster.assign("b1", &spec).await;
    let lines = || world.cluster.live_lines(&id);
    eventually("its lines are shown on", || lines().len() == 2).await;
    std::fs::write(heard, "").unwrap();
    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.exit_code), ("succeeded", Some(0)), "{finished:?}");
    assert!(world.host.workdirs().is_empty(), "the workdir is there when the end is seen");
    let digest = Digest(Sha256::digest(b"result").into());
    assert_eq!(finished.image_tag, format!("helix/b1@sha256:{digest}"));
    assert_eq!((finished.digest.to_vec(), finished.size), (digest.0.to_vec(), 6));
    assert_eq!(finished.artifacts[0].name, "artifact.out");
    assert_eq!(world.cluster.seen().blobs[&digest.0.to_vec()], "result");
    let mut sealed = world.cluster.sealed_log(&id).await;
    sealed.sort();
    assert_eq!(sealed, ["to stderr", "to stdout"]);
    world.cluster.wait_for("the live log's end", |seen| seen.logs_ended.contains(&"b1".to_owned()).then_some(())).await;
    let mut live = lines();
    live.sort();
    assert_eq!(live, sealed);
    world.forget(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_reasons_and_last_words() {
    let world = World::new().await;
    let with = |outputs: &str| Outputs::Named(vec![outputs.to_owned()]);
    let table = [
        ("exit", line("exit 3"), "exit", Some(3)),
        ("signal", line("kill -9 $$"), "signal", None),
        ("missing", BuildSpec { outputs: Outputs::Default, ..line("true") }, "artifact_missing", Some(0)),
        ("link", BuildSpec { outputs: with("x"), ..line("ln -s /etc/passwd x") }, "artifact_missing", Some(0)),
        ("timeout", BuildSpec { timeout_ms: 200, ..line("sleep 1000") }, "timeout", None),
        ("silence", BuildSpec { silence_timeout_ms: 200, ..line("sleep 1000") }, "silence", None),
        ("nocommand", BuildSpec { repo_url: "file:///r".to_owned(), ..BuildSpec::default() }, "no_command", None),
        (
            "program",
            BuildSpec { command: Some(Command::Argv(vec!["/no/such/program".to_owned()])), ..line("") },
            "exit",
            Some(127),
        ),
        ("norepo", BuildSpec { repo_url: "file:///no/such".to_owned(), ..line("true") }, "source", None),
    ];
    for (build, spec, reason, code) in &table {
        let id = world.cluster.assign(build, spec).await;
        let finished = world.cluster.finished(&id).await;
        assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", *reason), "{finished:?}");
        assert_eq!(finished.exit_code, *code, "{finished:?}");
        let sealed = world.cluster.sealed_log(&id).await;
        let last = sealed.last().unwrap();
        assert!(last.starts_with(&format!("failed ({reason})")), "{build}: {last}");
        world.forget(&id).await;
    }
    assert!(world.host.workdirs().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_further_attempt_opens_its_log_with_the_end_of_the_one_before() {
    let world = World::new().await;
    let id = AttemptId { build_id: "again".to_owned(), task: 0, attempt: 2 };
    let previous = "the attempt before ended on w2 as disk_full: no room".to_owned();
    let spec = Some(helix_proto::convert::spec_to_wire(&line("echo now")));
    let assign = helix_proto::agent::Assign { id: Some(id.clone()), spec, previous, ..Default::default() };
    world.cluster.say(Message::Assign(assign)).await;
    world.cluster.finished(&id).await;
    let sealed = world.cluster.sealed_log(&id).await;
    assert_eq!(sealed, ["the attempt before ended on w2 as disk_full: no room", "now"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_reaches_a_daemon_and_proves_its_death() {
    let world = World::new().await;
    let pid_file = world.dir().join("daemon.pid");
    let daemon = format!(
        "(env -i setsid sh -c 'trap \"\" TERM; echo $$ > {}; while :; do sleep 1; done' &) ; echo started; sleep 1000",
        pid_file.display()
    );
    let id = world.cluster.assign("daemon", &line(&daemon)).await;
    eventually("the daemon runs", || std::fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n'))).await;
    world.cluster.say(Message::Stop(Stop { id: Some(id.clone()), reason: "cancelled".to_owned() })).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "stopped", "{finished:?}");
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "the daemon lives");
    assert!(world.host.workdirs().is_empty());
    let unknown = AttemptId { build_id: "never".to_owned(), task: 0, attempt: 1 };
    world.cluster.say(Message::Stop(Stop { id: Some(unknown.clone()), reason: "cancelled".to_owned() })).await;
    world
        .cluster
        .wait_for("proof for what never ran", |seen| {
            let proof = |message: &agent_message::Message| {
                matches!(message, agent_message::Message::ProvenDead(dead) if dead.id.as_ref() == Some(&unknown))
            };
            seen.messages.iter().any(proof).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_freezes_its_runner_is_stopped_all_the_same() {
    let world = World::new().await;
    let pids = world.dir().join("pids");
    // Again and again: waking the runner once is not enough.
    let script = format!("echo $$ > {}; trap '' TERM; while :; do kill -STOP $PPID; done; sleep 1000", pids.display());
    let id = world.cluster.assign("frozen", &line(&script)).await;
    eventually("it runs", || std::fs::read_to_string(&pids).is_ok_and(|text| text.ends_with('\n'))).await;
    world.cluster.say(Message::Stop(Stop { id: Some(id.clone()), reason: "cancelled".to_owned() })).await;
    let pid = std::fs::read_to_string(&pids).unwrap();
    let dead = || !Path::new("/proc").join(pid.trim()).exists();
    eventually("the command is dead", dead).await;
    world.forget(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_comes_back_to_the_same_attempt_with_every_line_once() {
    let mut world = World::new().await;
    let gate = world.dir().join("gate");
    let runs = world.dir().join("runs");
    let script = format!(
        "echo run >> {}; for i in 1 2 3 4 5; do echo before $i; done; while ! test -e {}; do sleep 0.02; done; \
         for i in 1 2 3 4 5; do echo after $i; done; echo x > \"$HELIX_OUTPUT\"",
        runs.display(),
        gate.display()
    );
    let id = world.cluster.assign("again", &BuildSpec { outputs: Outputs::Default, ..line(&script) }).await;
    let five = |seen: &cluster::Seen| (seen.lines.len() >= 5).then_some(());
    world.cluster.wait_for("the first lines", five).await;
    let instance = world.cluster.seen().hellos[0].instance.clone();
    world.host.kill();
    std::fs::write(&gate, "").unwrap();
    world.host.start();
    world.hellos(2).await;
    let hello = world.cluster.seen().hellos[1].clone();
    assert_eq!(hello.instance, instance);
    assert_eq!(hello.attempts[0].id.as_ref(), Some(&id));
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    let expected: Vec<String> =
        ["before", "after"].iter().flat_map(|word| (1..=5).map(move |number| format!("{word} {number}"))).collect();
    assert_eq!(world.cluster.sealed_log(&id).await, expected);
    world
        .cluster
        .wait_for("the live log's end", |seen| seen.logs_ended.contains(&"again".to_owned()).then_some(()))
        .await;
    assert_eq!(world.cluster.live_lines(&id), expected);
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n");
    // What was reported and not forgotten is reported by the next agent too, and the workdir stays gone.
    world.host.kill();
    world.cluster.seen().messages.clear();
    world.host.start();
    let repeated = world.cluster.finished(&id).await;
    assert_eq!(repeated, finished);
    assert!(world.host.workdirs().is_empty());
    world.forget(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_log_that_is_not_taken_disturbs_no_other() {
    let world = World::new().await;
    let gate = world.dir().join("gate");
    let script = format!("echo 1; while [ ! -e {} ]; do echo more; sleep 0.02; done; echo last", gate.display());
    let mut ids = Vec::new();
    for build in ["good", "refused", "forgotten"] {
        ids.push(world.cluster.assign(build, &line(&script)).await);
    }
    let begun = |seen: &cluster::Seen| {
        let lines = |build: &str| seen.lines.keys().filter(|(other, ..)| other == build).count();
        (seen.refusals > 0 && seen.asked_again && lines("good") > 5 && lines("forgotten") > 5).then_some(())
    };
    world.cluster.wait_for("lines of the others", begun).await;
    std::fs::write(&gate, "").unwrap();
    for id in &ids {
        world.cluster.finished(id).await;
        let sealed = world.cluster.sealed_log(id).await;
        assert_eq!((sealed.first().unwrap().as_str(), sealed.last().unwrap().as_str()), ("1", "last"));
        let live = world.cluster.live_lines(id);
        if id.build_id == "refused" {
            assert!(live.is_empty() && world.cluster.seen().refusals < 10, "it is pushed on and on");
        } else {
            let ended = |seen: &cluster::Seen| seen.logs_ended.contains(&id.build_id).then_some(());
            world.cluster.wait_for("the live log's end", ended).await;
            assert_eq!(world.cluster.live_lines(id), sealed, "{}", id.build_id);
        }
    }
    assert_eq!(world.cluster.seen().push_streams, 1, "the stream was ended for one of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_agent_leaves_its_builds_running() {
    let mut world = World::new().await;
    let gate = world.dir().join("gate");
    let script = format!("echo begun; while ! test -e {}; do sleep 0.02; done; echo done", gate.display());
    let id = world.cluster.assign("upgrade", &line(&script)).await;
    world.cluster.wait_for("the first line", |seen| (!seen.lines.is_empty()).then_some(())).await;
    let detached = {
        let (cluster, host) = (&world.cluster, &world.host);
        let acknowledge = async {
            let asked = |seen: &cluster::Seen| {
                let detaching =
                    |message: &agent_message::Message| matches!(message, agent_message::Message::Detaching(_));
                seen.messages.iter().any(detaching).then_some(())
            };
            cluster.wait_for("the detach", asked).await;
            cluster.say(Message::DetachAck(DetachAck {})).await;
        };
        tokio::join!(acknowledge, host.detach()).1
    };
    assert!(detached && world.host.exited().await);
    std::fs::write(&gate, "").unwrap();
    world.host.start();
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    assert_eq!(world.cluster.sealed_log(&id).await, ["begun", "done"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_told_to_go_finishes_first_and_told_twice_stops_everything() {
    let mut world = World::new().await;
    let gate = world.dir().join("gate");
    let script = format!("while ! test -e {}; do sleep 0.02; done", gate.display());
    let id = world.cluster.assign("final", &line(&script)).await;
    eventually("it runs", || !world.host.workdirs().is_empty()).await;
    world.host.terminate();
    let leaving = |seen: &cluster::Seen| {
        let leaves = |message: &agent_message::Message| matches!(message, agent_message::Message::Leaving(_));
        seen.messages.iter().any(leaves).then_some(())
    };
    world.cluster.wait_for("the farewell", leaving).await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
    world.forget(&id).await;
    assert!(world.host.exited().await);

    world.host.start();
    world.hellos(2).await;
    let id = world.cluster.assign("drained", &line("sleep 1000")).await;
    eventually("it runs", || !world.host.workdirs().is_empty()).await;
    world.host.terminate();
    world.cluster.seen().messages.retain(|message| !matches!(message, agent_message::Message::Leaving(_)));
    eventually("the first signal arrived", || world.host.log().matches("SIGTERM").count() >= 2).await;
    world.host.terminate();
    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "drained"), "{finished:?}");
    world.forget(&id).await;
    assert!(world.host.exited().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_told_twice_to_go_waits_no_longer_for_who_does_not_answer() {
    let mut world = World::new().await;
    // Reported, and nobody said that it was heard.
    let mut owed = Vec::new();
    for number in 0..12 {
        owed.push(world.cluster.assign(&format!("owed{number}"), &line("exit 3")).await);
    }
    for id in &owed {
        assert_eq!(world.cluster.finished(id).await.reason, "exit");
    }
    let id = world.cluster.assign("unheard", &line("trap '' TERM; while :; do sleep 1; done")).await;
    eventually("it runs", || !world.host.workdirs().is_empty()).await;
    world.host.terminate();
    eventually("the first signal arrived", || world.host.log().contains("SIGTERM")).await;
    let told = std::time::Instant::now();
    world.host.terminate();
    assert!(world.host.exited().await);
    assert!(told.elapsed() < std::time::Duration::from_secs(10), "{:?}", told.elapsed());
    // Nothing is lost: the next agent reports what the first one stopped, and what it said in vain.
    world.cluster.seen().messages.clear();
    world.host.start();
    assert_eq!(world.cluster.finished(&id).await.reason, "drained");
    for id in &owed {
        assert_eq!(world.cluster.finished(id).await.reason, "exit");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_holds_any_more_is_sealed_again() {
    let world = World::new().await;
    let id = world.cluster.assign("again", &line("echo kept; exit 1")).await;
    let sealed = |seen: &Seen| {
        seen.messages.iter().any(|message| matches!(message, agent_message::Message::LogSealed(_))).then_some(())
    };
    world.cluster.wait_for("its log", sealed).await;
    let before = world.cluster.sealed_log(&id).await;
    assert!(before.iter().any(|said| said == "kept"), "{before:?}");
    {
        let mut seen = world.cluster.seen();
        seen.blobs.clear();
        seen.messages.clear();
    }
    world.cluster.say(Message::StoreAgain(StoreAgain { id: Some(id.clone()) })).await;
    world.cluster.wait_for("its log once more", sealed).await;
    assert_eq!(world.cluster.sealed_log(&id).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_not_stored_yet_outlives_the_next_attempt_of_its_task() {
    let world = World::new().await;
    world.cluster.holders.send_replace(Vec::new());
    let first = world.cluster.assign_attempt("twice", 1, &line("echo first; exit 1")).await;
    assert!(world.cluster.finished(&first).await.log.is_none(), "its log could not be stored");
    let second = world.cluster.assign_attempt("twice", 2, &line("echo second; exit 1")).await;
    assert!(world.cluster.finished(&second).await.log.is_none(), "its log could not be stored");
    world.cluster.holders.send_replace(vec![1]);
    for (id, said) in [(&first, "first"), (&second, "second")] {
        let sealed = world.cluster.sealed_log(id).await;
        assert_eq!(sealed.first().map(String::as_str), Some(said), "{sealed:?}");
    }
    let kept = world.host.names_in("attempts");
    assert!(kept.contains(&"twice.0.1".to_owned()), "it was let go of before the registry did: {kept:?}");
    world.forget(&first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_too_few_coordinators_hold_is_not_stored_yet() {
    let world = World::new().await;
    let two_copies = Settings { copies: 2, ..cluster::settings(&world.cluster.endpoint) };
    world.cluster.say(Message::Settings(two_copies)).await;
    let large = "head -c 2000000 /dev/zero > large; echo done > small";
    let outputs = Outputs::Named(vec!["large".to_owned(), "small".to_owned()]);
    let id = world.cluster.assign("short", &BuildSpec { outputs, ..line(large) }).await;
    // Each of the three, log included, is offered again and again.
    world.cluster.wait_for("many uploads", |seen| (seen.uploads >= 9).then_some(())).await;
    let reported = |message: &agent_message::Message| matches!(message, agent_message::Message::Finished(_));
    assert!(!world.cluster.seen().messages.iter().any(reported), "it is said to be stored");
    world.cluster.holders.send_replace(vec![1, 2]);
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    let blobs = finished.artifacts.iter().filter_map(|artifact| artifact.blob.as_ref());
    for blob in blobs.chain(finished.log.as_ref().and_then(|log| log.blob.as_ref())) {
        assert_eq!(blob.holders, [1, 2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_success_that_cannot_be_stored_again_in_time_is_none_and_its_log_follows() {
    let world = World::new().await;
    let id = world.cluster.assign("lost", &line("echo done")).await;
    assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
    world.cluster.seen().messages.clear();
    // Before the registry knew of it, a coordinator went, and no other has room.
    let strict = Settings { copies: 2, store_deadline_ms: 1_000, ..cluster::settings(&world.cluster.endpoint) };
    world.cluster.say(Message::Settings(strict)).await;
    world.cluster.say(Message::StoreAgain(StoreAgain { id: Some(id.clone()) })).await;
    let failed = |seen: &Seen| {
        seen.messages.iter().find_map(|message| match message {
            agent_message::Message::Finished(said) if said.outcome == "failed" => Some(said.clone()),
            _ => None,
        })
    };
    let said = world.cluster.wait_for("its end", failed).await;
    assert_eq!((said.reason.as_str(), said.artifacts.len()), ("artifact", 0), "{said:?}");
    assert_eq!(world.cluster.sealed_log(&id).await, ["done"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ref_is_resolved_agreed_on_and_built() {
    let world = World::new().await;
    let repository = world.dir().join("repository");
    std::fs::create_dir(&repository).unwrap();
    let git = |args: &[&str]| {
        let mut git = Process::new("git");
        git.args(["-c", "user.name=t", "-c", "user.email=t@t"]).args(args).current_dir(&repository);
        let output = git.env("GIT_CONFIG_GLOBAL", "/dev/null").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    git(&["init", "-q", "-b", "main"]);
    let mut commits = Vec::new();
    for text in ["one", "two"] {
        std::fs::write(repository.join("file"), text).unwrap();
        git(&["add", "-A"]);
        git(&["commit", "-q", "-m", text]);
        commits.push(git(&["rev-parse", "HEAD"]));
    }
    let url = format!("file://{}", repository.display());
    let spec =
        BuildSpec { repo_url: url, git_ref: "main".to_owned(), ..line("cat file; echo \" $SOURCE_DATE_EPOCH\"") };
    let id = world.cluster.assign("repo", &spec).await;
    let resolved = world
        .cluster
        .wait_for("the commit", |seen| {
            seen.messages.iter().find_map(|message| match message {
                agent_message::Message::SourceResolved(resolved) => Some(resolved.commit.clone()),
                _ => None,
            })
        })
        .await;
    assert_eq!(resolved, commits[1]);
    // Another attempt was first, with an older commit: that one counts.
    world.cluster.say(Message::Commit(Commit { id: Some(id.clone()), commit: commits[0].clone() })).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    let sealed = world.cluster.sealed_log(&id).await;
    assert!(sealed.last().unwrap().starts_with("one 1"), "{sealed:?}");
    assert!(sealed.iter().any(|said| said.contains(&format!("checking out {}", commits[0]))), "{sealed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uploaded_source_is_unpacked_and_directories_become_artifacts() {
    let world = World::new().await;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    tar.append_data(&mut header, "dir/input", &b"given"[..]).unwrap();
    let archive = zstd::encode_all(tar.into_inner().unwrap().as_slice(), 1).unwrap();
    let digest = Digest(Sha256::digest(&archive).into());
    let source = Some(Source { digest, size: archive.len() as u64 });
    world.cluster.seen().blobs.insert(digest.0.to_vec(), archive.into());
    let outputs = Outputs::Named(vec!["out".to_owned(), "big".to_owned()]);
    let script = "mkdir out; cp dir/input out/copy; head -c 300000 /dev/zero > big";
    let id = world.cluster.assign("upload", &BuildSpec { source, outputs, ..line(script) }).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    let blob = |index: usize| {
        let stored = finished.artifacts[index].blob.clone().unwrap();
        world.cluster.seen().blobs[&stored.sha256.to_vec()].clone()
    };
    assert_eq!(blob(1).len(), 300_000);
    let tar = blob(0);
    let mut archive = tar::Archive::new(tar.as_ref());
    let names: Vec<String> =
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect();
    assert_eq!(names, ["copy"]);

    let wrong = Some(Source { digest: Digest([1; 32]), size: 1 });
    let id = world.cluster.assign("nosource", &BuildSpec { source: wrong, ..line("true") }).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.reason, "source", "{finished:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_builds_at_once_each_run_once() {
    const BUILDS: usize = 100;
    let world = World::new().await;
    let count = world.dir().join("count");
    let script = format!("echo x >> {}", count.display());
    let started = std::time::Instant::now();
    for number in 0..BUILDS {
        world.cluster.assign(&format!("b{number}"), &line(&script)).await;
    }
    for number in 0..BUILDS {
        let id = AttemptId { build_id: format!("b{number}"), task: 0, attempt: 1 };
        assert_eq!(world.cluster.finished(&id).await.outcome, "succeeded");
        world.cluster.say(Message::Forget(Forget { id: Some(id) })).await;
    }
    eprintln!("{BUILDS} builds in {:?}", started.elapsed());
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), BUILDS);
    eventually("all spools are removed", || world.host.names_in("attempts").is_empty()).await;
    assert!(world.host.workdirs().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_large_goes_through_in_little_memory() {
    let world = World::new().await;
    let outputs = Outputs::Named(vec!["big".to_owned(), "tree".to_owned()]);
    let script = "head -c 300000000 /dev/zero > big; mkdir tree; head -c 100000000 /dev/zero > tree/x; \
                  yes 'a line of some length that is printed over and over again' | head -n 400000";
    let id = world.cluster.assign("large", &BuildSpec { outputs, ..line(script) }).await;
    let finished = world.cluster.finished(&id).await;
    assert_eq!(finished.outcome, "succeeded", "{finished:?}");
    assert_eq!(finished.log.unwrap().lines, 400_000);
    assert_eq!(world.cluster.sealed_log(&id).await.len(), 400_000);
    let peak = world.host.peak_memory_bytes();
    assert!(peak < 200 << 20, "the agent took {peak} bytes");
    eprintln!("peak memory {} MiB", peak >> 20);
}
