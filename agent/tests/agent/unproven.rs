//! Runners that are killed on a host without cgroups: what they leave cannot be proven dead, and the agent says so.

use helix_proto::agent::coordinator_message::Message;
use helix_proto::agent::{AttemptId, Finished, Stop};
use rustix::process::{Pid, Signal, kill_process};

use super::cluster::{Cluster, line};
use super::host::{Host, eventually};

struct World {
    cluster: Cluster,
    host: Host,
    dir: tempfile::TempDir,
}

impl World {
    async fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(dir.path()).await;
        let Some(host) = Host::without_cgroups(dir.path(), &cluster) else {
            super::skip::skip(test, "a mount namespace cannot be made");
            return None;
        };
        cluster.wait_for("a hello", |seen| (!seen.hellos.is_empty()).then_some(())).await;
        assert!(host.log().contains("no writable cgroup v2"), "cgroups are there: {}", host.log());
        Some(Self { cluster, host, dir })
    }

    /// A command that runs, and that its runner's death does not end.
    async fn running(&self, build: &str) -> (AttemptId, u32) {
        let pids = self.dir.path().join(format!("{build}.pids"));
        let script = format!("sleep 1000 & echo $PPID $! > {}; wait", pids.display());
        let id = self.cluster.assign(build, &line(&script)).await;
        let read = || std::fs::read_to_string(&pids).unwrap_or_default();
        eventually("it runs", || read().ends_with('\n')).await;
        let numbers: Vec<u32> = read().split_whitespace().map(|word| word.parse().unwrap()).collect();
        kill(numbers[0]);
        (id, numbers[1])
    }

    async fn finished(&self, id: &AttemptId) -> Finished {
        let finished = self.cluster.finished(id).await;
        assert!(self.host.workdirs().is_empty());
        finished
    }
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
}

/// Whether a process is alive; one that nobody waits for yet is dead.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_runner_is_a_failure_that_says_what_it_cannot_prove() {
    let Some(world) = World::new("a_killed_runner").await else { return };
    let (id, child) = world.running("natural").await;
    let finished = world.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "internal"), "{finished:?}");
    assert!(finished.unproven && !lives(child), "{finished:?}");
    let log = world.cluster.sealed_log(&id).await;
    assert!(log.last().unwrap().contains("may still run"), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_of_what_a_killed_runner_left_ends_without_a_proof_and_says_so_again_after_a_restart() {
    let Some(mut world) = World::new("a_stop_of_what_a_killed_runner_left").await else { return };
    // Frozen, so that it is alive when the stop comes, and killed then.
    let pids = world.dir.path().join("pids");
    let script = format!("sleep 1000 & echo $PPID $! > {}; kill -STOP $PPID; wait", pids.display());
    let id = world.cluster.assign("stopped", &line(&script)).await;
    let read = || std::fs::read_to_string(&pids).unwrap_or_default();
    eventually("it runs", || read().ends_with('\n')).await;
    let numbers: Vec<u32> = read().split_whitespace().map(|word| word.parse().unwrap()).collect();
    let cancelling = |message: &helix_proto::agent::agent_message::Message| match message {
        helix_proto::agent::agent_message::Message::Heartbeat(beat) => {
            beat.attempts.iter().any(|attempt| attempt.phase == "cancelling")
        }
        _ => false,
    };
    world.cluster.say(Message::Stop(Stop { id: Some(id.clone()), reason: "cancelled".to_owned() })).await;
    let seen = |seen: &super::cluster::Seen| seen.messages.iter().any(cancelling).then_some(());
    world.cluster.wait_for("the stop to arrive", seen).await;
    kill(numbers[0]);
    let finished = world.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.unproven), ("stopped", true), "{finished:?}");
    assert!(!lives(numbers[1]));
    // The report is on disk as it was said.
    world.host.kill();
    world.cluster.seen().messages.clear();
    world.host.start();
    assert!(world.cluster.finished(&id).await.unproven);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_whose_order_is_damaged_ends_without_a_proof_and_not_never() {
    let mut world = super::World::new().await;
    let pids = world.dir().join("pids");
    let script = format!("sleep 1000 & echo $PPID $! > {}; wait", pids.display());
    let id = world.cluster.assign("damaged", &line(&script)).await;
    let read = || std::fs::read_to_string(&pids).unwrap_or_default();
    eventually("it runs", || read().ends_with('\n')).await;
    let numbers: Vec<u32> = read().split_whitespace().map(|word| word.parse().unwrap()).collect();
    world.host.kill();
    kill(numbers[0]);
    eventually("its runner is dead", || !lives(numbers[0])).await;
    let attempts = world.dir().join("data/attempts");
    let directory = std::fs::read_dir(attempts).unwrap().next().unwrap().unwrap().path();
    let dir = helix_runner::AttemptDir::new(&directory);
    helix_runner::journal::append(&dir, helix_runner::journal::Kind::Order, b"damaged").unwrap();
    world.host.start();

    let finished = world.cluster.finished(&id).await;
    assert_eq!((finished.outcome.as_str(), finished.reason.as_str()), ("failed", "internal"), "{finished:?}");
    assert!(finished.unproven, "{finished:?}");
    let log = world.cluster.sealed_log(&id).await;
    assert!(log.last().unwrap().contains("may still run"), "{log:?}");
    // What the damaged order would have named is not ours to find: the test clears up.
    if lives(numbers[1]) {
        kill(numbers[1]);
    }
}
