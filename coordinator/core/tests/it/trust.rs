//! Workers with failures of their own: quarantined, probed, trusted again.

use helix_core::command::{self as cmd, Command};
use helix_core::record::{Policy, Trust};
use helix_core::{Rejection, Reply, Unfit, due, explain};
use helix_model::{LogTime, Reason};

use crate::story::*;

const MINUTE: u64 = 60_000;

fn trust(story: &Story) -> String {
    match &story.state.worker(&worker("w1")).unwrap().trust {
        Trust::Full { failed } => format!("full {}", failed.len()),
        Trust::Quarantined { until, round } => format!("until {} round {round}", until.0),
        Trust::Probing { round, .. } => format!("probing round {round}"),
    }
}

/// Runs one attempt of a new build on w1 and ends it so; `None` is a success.
fn ends(story: &mut Story, id: &str, reason: Option<Reason>) {
    story.submit(id);
    let attempt = format!("{id}.0.1");
    assert_eq!(story.assign(&attempt, "w1"), Reply::Done);
    story.finish(&attempt, "w1", reason.map_or_else(success, failed));
}

fn fail(story: &mut Story, ids: &[&str]) {
    for id in ids {
        ends(story, id, Some(Reason::DiskFull));
    }
}

fn probe() -> Command {
    Command::ProbeWorker(cmd::ProbeWorker { worker: worker("w1") })
}

fn world() -> Story {
    let mut story = Story::new();
    story.worker("w1", 4);
    story
}

#[test]
fn every_reason_speaks_for_the_host_against_it_or_not_at_all() {
    for reason in Reason::ALL.iter().copied() {
        let mut story = world();
        fail(&mut story, &["a"]);
        ends(&mut story, "b", Some(reason));
        let expected = match reason {
            Reason::Exit | Reason::ArtifactMissing => "full 0",
            Reason::DiskFull | Reason::Internal | Reason::WorkerLost => "full 2",
            Reason::Signal
            | Reason::Timeout
            | Reason::Silence
            | Reason::Oom
            | Reason::NoCommand
            | Reason::Policy
            | Reason::Source
            | Reason::Cancelled
            | Reason::ImagePull
            | Reason::Push
            | Reason::Artifact
            | Reason::Drained => "full 1",
        };
        assert_eq!(trust(&story), expected, "{reason}");
    }
    let mut story = world();
    fail(&mut story, &["a", "b"]);
    ends(&mut story, "c", None);
    assert_eq!(trust(&story), "full 0");
}

#[test]
fn one_build_counts_once_however_often_it_fails() {
    let mut story = world();
    story.submit("bad");
    for number in 1..=3 {
        let attempt = format!("bad.0.{number}");
        story.wait(MINUTE).assign(&attempt, "w1");
        story.finish(&attempt, "w1", failed(Reason::DiskFull));
    }
    assert_eq!(story.show("bad"), "failed (disk_full): failed (disk_full) after 3");
    assert_eq!(trust(&story), "full 1");
}

#[test]
fn a_build_that_outgrew_a_limit_of_its_own_says_nothing_of_the_host() {
    let mut story = world();
    fail(&mut story, &["a"]);
    for id in ["b", "c", "d"] {
        story.submit(id);
        let attempt = format!("{id}.0.1");
        story.assign(&attempt, "w1");
        story.apply(outgrown(finish(&attempt, "w1", "data1.boot1", failed(Reason::DiskFull))));
    }
    assert_eq!(trust(&story), "full 1");
    // Whatever else an agent says so of counts as ever.
    story.submit("e");
    story.assign("e.0.1", "w1");
    story.apply(outgrown(finish("e.0.1", "w1", "data1.boot1", failed(Reason::Internal))));
    assert_eq!(trust(&story), "full 2");
}

#[test]
fn a_worker_that_fails_builds_is_quarantined_probed_and_trusted_again() {
    let mut story = world();
    story.submit("long");
    story.assign("long.0.1", "w1");
    fail(&mut story, &["a", "b", "c"]);
    assert_eq!(trust(&story), "until 61000 round 0");
    story.submit("next");
    assert_eq!(story.scheduled(9), Vec::<String>::new());
    let unfit = Unfit::Quarantined { until: LogTime(61_000) };
    let refused = Rejection::WorkerUnfit { worker: worker("w1"), why: unfit.clone() };
    assert_eq!(story.assign("next.0.1", "w1"), Reply::Rejected(refused.clone()));
    assert_eq!(story.apply(probe()), Reply::Rejected(refused));
    let told = explain::explain(&story.state, &story.liveness, &build("next"), LogTime(story.now));
    assert_eq!(told.tasks[0].verdicts, [(worker("w1"), Some(unfit))]);
    // What ran before it says nothing, and neither does a registration.
    story.finish("long.0.1", "w1", success());
    story.worker_life("w1", "data1.boot2", offer(4));
    assert_eq!(trust(&story), "until 61000 round 0");
    assert_eq!(story.due(), []);
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(2_000)), "a back-off comes first");
    story.wait(MINUTE);
    story.hear("w1", "data1.boot2");
    assert_eq!(story.due(), [probe()]);
    story.apply(probe());
    assert_eq!(story.apply(probe()), Reply::Unchanged);
    assert_eq!(trust(&story), "probing round 0");
    assert_eq!(story.schedule(9), 1, "one at a time");
    let tried = Rejection::WorkerUnfit { worker: worker("w1"), why: Unfit::Probing };
    assert_eq!(story.apply(assign("next.0.1", "w1", "data1.boot2")), Reply::Rejected(tried));
    // The probe fails: twice as long.
    story.apply(finish("a.0.2", "w1", "data1.boot2", failed(Reason::Internal)));
    assert_eq!(trust(&story), "until 181000 round 1");
    story.wait(2 * MINUTE).apply(probe());
    story.hear("w1", "data1.boot2");
    // One that says nothing is followed by another.
    assert_eq!(story.schedule(9), 1);
    story.cancel("a");
    let first = if story.show("a").starts_with("running") { "a.0.3" } else { "b.0.2" };
    story.apply(finish(first, "w1", "data1.boot2", failed(Reason::ImagePull)));
    assert_eq!(trust(&story), "probing round 1");
    assert_eq!(story.schedule(9), 1);
    let probed = story.state.running_on(&worker("w1")).next().unwrap().to_string();
    story.apply(finish(&probed, "w1", "data1.boot2", success()));
    assert_eq!(trust(&story), "full 0");
    assert!(story.schedule(9) > 1, "trusted");
}

#[test]
fn quarantine_doubles_up_to_an_hour() {
    let mut story = world();
    fail(&mut story, &["a", "b", "c"]);
    let mut lengths = Vec::new();
    for number in 0..9 {
        let Trust::Quarantined { until, .. } = story.state.worker(&worker("w1")).unwrap().trust else { panic!() };
        lengths.push((until.0 - story.now) / 1_000);
        story.now = until.0;
        story.apply(probe());
        fail(&mut story, &[&format!("p{number}")]);
    }
    assert_eq!(lengths, [60, 120, 240, 480, 960, 1_920, 3_600, 3_600, 3_600]);
}

#[test]
fn losses_count_once_each_and_only_where_something_ran() {
    let mut story = world();
    for id in ["a", "b", "c", "d"] {
        story.submit(id);
        story.assign(&format!("{id}.0.1"), "w1");
    }
    story.apply(lose("w1", "data1.boot1"));
    assert_eq!(trust(&story), "full 1");
    story.worker("w1", 4);
    story.apply(lose("w1", "data1.boot1"));
    assert_eq!(trust(&story), "full 1", "it was idle");
    // A host that crashes with whatever it is given.
    for (id, life) in [("x", "data1.boot2"), ("y", "data1.boot3")] {
        story.submit(id);
        let before = story.state.worker(&worker("w1")).unwrap().instance.to_string();
        story.worker_life("w1", &before, offer(4));
        story.apply(assign(&format!("{id}.0.1"), "w1", &before));
        story.worker_life("w1", life, offer(4));
    }
    assert_eq!(trust(&story), "until 61000 round 0");
}

#[test]
fn an_operator_ends_a_quarantine_and_policy_forbids_it() {
    let mut story = world();
    fail(&mut story, &["a", "b", "c"]);
    let undrain = Command::UndrainWorker(cmd::UndrainWorker { worker: worker("w1") });
    assert_eq!(story.apply(undrain.clone()), Reply::Done);
    assert_eq!(trust(&story), "full 0");
    assert_eq!(story.apply(undrain), Reply::Unchanged);
    let policy = Policy { quarantine_after: 0, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    fail(&mut story, &["d", "e", "f", "g"]);
    assert_eq!(trust(&story), "full 0");
    let policy = Policy { quarantine_after: 101, ..Policy::default() };
    let refused = story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    assert!(matches!(refused, Reply::Rejected(Rejection::PolicyInvalid(_))));
}
