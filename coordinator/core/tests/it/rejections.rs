//! Every rejection, with the command that meets it. A rejection changes nothing; the story checks that each time.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::{self as cmd, Authority, Command, SecretFor, WorkerOffer};
use helix_core::record::{BlobRef, Policy, SealedLog};
use helix_core::{Applied, Rejection, Reply, Unfit};
use helix_model::{BuildSpec, BuildState, ErrorCode, Measure, NodeId, Reason, Resources};

use crate::story::*;

/// `r` runs on w1, `q` waits, `s` succeeded, `c` was cancelled, `p` was purged; w1 has room for one more.
fn world() -> Story {
    let mut story = Story::new();
    story.worker("w1", 2);
    for id in ["r", "q", "s", "c", "p"] {
        story.submit(id);
    }
    story.assign("s.0.1", "w1");
    story.finish("s.0.1", "w1", success());
    story.assign("p.0.1", "w1");
    story.finish("p.0.1", "w1", success());
    story.cancel("c");
    story.apply(purge(&["p"], story.now));
    story.assign("r.0.1", "w1");
    story
}

fn rejected(story: &mut Story, command: Command) -> Rejection {
    match story.apply(command.clone()) {
        Reply::Rejected(rejection) => rejection,
        other => panic!("{command:?} was answered with {other:?}"),
    }
}

#[test]
fn submits() {
    let mut story = world();
    let other = BuildSpec { priority: 9, ..spec() };
    for id in ["q", "s", "p"] {
        let rejection = rejected(&mut story, submit(id, other.clone()));
        assert_eq!(rejection, Rejection::IdTaken(build(id)));
        assert_eq!(rejection.code(), ErrorCode::IdTaken);
    }
    let policy = Policy { queue_max: 2, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    assert_eq!(rejected(&mut story, submit("new", spec())), Rejection::QueueFull { queue_max: 2 });
    let platforms = (0..17).map(|n| platform(&format!("linux/a{n}"))).collect();
    let mut story = world();
    let absurd = submit("new", BuildSpec { platforms, ..spec() });
    assert!(matches!(rejected(&mut story, absurd), Rejection::ReportInvalid(_)));
}

#[test]
fn cancels() {
    let mut story = world();
    assert_eq!(rejected(&mut story, cancel("nobody")), Rejection::BuildUnknown(build("nobody")));
    assert_eq!(rejected(&mut story, cancel("p")), Rejection::BuildPurged(build("p")));
    let (from, to) = (BuildState::Succeeded, BuildState::Cancelled);
    assert_eq!(rejected(&mut story, cancel("s")), Rejection::WrongState { from, to });
    for id in ["r", "s"] {
        let authority = Authority::Owner("client/bob".to_owned());
        let stranger = cmd::CancelBuild { build: build(id), authority, reason: String::new() };
        let owner = "client/ann".to_owned();
        let expected = Rejection::NotOwner { build: build(id), owner };
        assert_eq!(rejected(&mut story, Command::CancelBuild(stranger)), expected);
    }
}

#[test]
fn assignments() {
    let mut story = world();
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(assign("nobody.0.1", "w1", "data1.boot1"), Rejection::BuildUnknown(build("nobody")));
    expect(assign("p.0.1", "w1", "data1.boot1"), Rejection::BuildPurged(build("p")));
    expect(assign("s.0.2", "w1", "data1.boot1"), Rejection::TaskNotWaiting(key("s.0.2")));
    expect(assign("r.0.2", "w1", "data1.boot1"), Rejection::TaskNotWaiting(key("r.0.2")));
    expect(assign("q.7.1", "w1", "data1.boot1"), Rejection::TaskUnknown(key("q.7.1")));
    expect(assign("q.0.2", "w1", "data1.boot1"), Rejection::StaleAttempt { key: key("q.0.2"), current: attempt(0) });
    expect(assign("r.0.1", "w1", "data1.boot1"), Rejection::StaleAttempt { key: key("r.0.1"), current: attempt(1) });
    expect(assign("q.0.0", "w1", "data1.boot1"), Rejection::StaleAttempt { key: key("q.0.0"), current: attempt(0) });
    expect(assign("q.0.1", "w9", "data1.boot1"), Rejection::WorkerUnknown(worker("w9")));
    expect(assign("q.0.1", "w1", "data2.boot1"), Rejection::InstanceStale(worker("w1")));
    story.finish(
        "r.0.1",
        "w1",
        helix_core::command::Outcome::Failed { reason: Reason::DiskFull, message: String::new() },
    );
    let early = rejected(&mut story, assign("r.0.2", "w1", "data1.boot1"));
    assert_eq!(early, Rejection::TaskNotWaiting(key("r.0.2")));
}

#[test]
fn unfit_workers() {
    let unfit = |offer: WorkerOffer, spec: BuildSpec| {
        let mut story = Story::new();
        story.worker_life("w1", "data1.boot1", offer);
        story.submit_as("q", spec);
        match rejected(&mut story, assign("q.0.1", "w1", "data1.boot1")) {
            Rejection::WorkerUnfit { why, .. } => why,
            other => panic!("{other:?}"),
        }
    };
    let arm = BuildSpec { platforms: vec![platform("linux/arm64")], ..spec() };
    let platform = |asked: &str, has: &str| Unfit::Platform { asked: asked.to_owned(), has: has.to_owned() };
    assert_eq!(unfit(offer(1), arm), platform("linux/arm64", "linux/amd64"));
    let requires = BTreeMap::from([("zone".to_owned(), "a".to_owned())]);
    assert_eq!(
        unfit(offer(1), BuildSpec { requires, ..spec() }),
        Unfit::Label { asked: "zone=a".to_owned(), has: None }
    );
    let podman = BuildSpec { executor: Some(helix_model::Executor::Podman), command: None, ..spec() };
    assert_eq!(unfit(offer(1), podman), Unfit::Executor { asked: "podman".to_owned(), why: String::new() });
    let wants = BuildSpec { secrets: BTreeSet::from(["token".to_owned()]), ..spec() };
    let has = |names: &[&str]| WorkerOffer {
        secrets: Some(names.iter().map(|name| ((*name).to_owned(), SecretFor::CertainRepositories)).collect()),
        ..offer(1)
    };
    assert_eq!(unfit(has(&["other"]), wants), Unfit::Secret("token".to_owned()));
    assert_eq!(unfit(WorkerOffer { allows_job_commands: false, ..offer(1) }, spec()), Unfit::Command);
    let resources = |memory_bytes| Resources { memory_bytes, ..Resources::default() };
    let small = WorkerOffer { resources: resources(5), ..offer(1) };
    assert_eq!(
        unfit(small, BuildSpec { resources: resources(6), ..spec() }),
        Unfit::Resources { what: Measure::Memory, asked: 6, has: 5 }
    );
}

#[test]
fn workers_in_no_condition_to_take_work() {
    let why = |change: fn(&mut Story)| {
        let mut story = world();
        change(&mut story);
        match rejected(&mut story, assign("q.0.1", "w1", "data1.boot1")) {
            Rejection::WorkerUnfit { why, .. } => why,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(why(|story| drop(story.apply(lose("w1", "data1.boot1")))), Unfit::Lost);
    assert_eq!(why(|story| drop(story.apply(drain("w1", None)))), Unfit::Draining);
    assert_eq!(why(|story| drop(story.worker("w1", 1))), Unfit::Full { capacity: 1 });
    let detach = |story: &mut Story| {
        let (worker, instance) = (worker("w1"), instance("data1.boot1"));
        story.apply(Command::DetachWorker(cmd::DetachWorker { worker, instance }));
    };
    assert_eq!(why(detach), Unfit::Detached);
    let hold = |story: &mut Story| {
        story.cancel("r");
        story.apply(lose("w1", "data1.boot1"));
        story.wait(60_000).apply(end_unverified("r.0.1"));
        story.worker("w1", 2);
    };
    assert_eq!(why(hold), Unfit::Held);
}

#[test]
fn reports_by_the_wrong_one_late_or_about_nothing() {
    let mut story = world();
    let report = |attempt: &str, name: &str, life: &str| finish(attempt, name, life, success());
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(report("nobody.0.1", "w1", "data1.boot1"), Rejection::BuildUnknown(build("nobody")));
    expect(report("p.0.1", "w1", "data1.boot1"), Rejection::BuildPurged(build("p")));
    expect(report("s.0.1", "w1", "data1.boot1"), Rejection::AttemptEnded(key("s.0.1")));
    expect(report("r.4.1", "w1", "data1.boot1"), Rejection::TaskUnknown(key("r.4.1")));
    let stale = |text: &str, current| Rejection::StaleAttempt { key: key(text), current: attempt(current) };
    expect(report("q.0.1", "w1", "data1.boot1"), stale("q.0.1", 0));
    expect(report("r.0.2", "w1", "data1.boot1"), stale("r.0.2", 1));
    expect(report("r.0.1", "w2", "data1.boot1"), stale("r.0.1", 1));
    expect(report("r.0.1", "w1", "data2.boot1"), stale("r.0.1", 1));
    let forget = helix_core::Effect::SendForget { key: key("r.0.1"), worker: worker("w1") };
    assert_eq!(story.effects, [forget]);
    story.finish("r.0.1", "w1", failed(Reason::DiskFull));
    let ended = rejected(&mut story, report("r.0.1", "w1", "data1.boot1"));
    assert_eq!(ended, Rejection::AttemptEnded(key("r.0.1")));
    assert_eq!(story.effects, [], "its log is still wanted");
}

#[test]
fn successes_without_their_bytes() {
    let mut story = world();
    let contradiction = unproven(finish("r.0.1", "w1", "data1.boot1", success()));
    assert!(matches!(rejected(&mut story, contradiction), Rejection::ReportInvalid(_)));
    let mut out = Applied::default();
    story.state.apply_membership(BTreeSet::from([NodeId(1), NodeId(2), NodeId(3)]), &mut out);
    let mut report = |change: fn(&mut cmd::FinishAttempt)| {
        let Command::FinishAttempt(mut c) = finish("r.0.1", "w1", "data1.boot1", success()) else { panic!() };
        change(&mut c);
        rejected(&mut story, Command::FinishAttempt(c))
    };
    let few = |what: &str| Rejection::TooFewHolders { what: what.to_owned(), holders: 1, needed: 2 };
    assert_eq!(report(|c| c.log.as_mut().unwrap().blob.holders = BTreeSet::from([NodeId(1), NodeId(9)])), few("log"));
    let one = report(|c| c.artifacts[0].blob.holders = BTreeSet::from([NodeId(1), NodeId(9)]));
    assert_eq!(one, few("artifact \"artifact.out\""));
    assert!(matches!(report(|c| c.log = None), Rejection::ReportInvalid(_)));
    assert!(matches!(report(|c| c.artifacts.push(artifact("artifact.out", 1))), Rejection::ReportInvalid(_)));
    assert!(matches!(report(|c| c.artifacts = vec![artifact("x", 1); 65]), Rejection::ReportInvalid(_)));
}

#[test]
fn logs_that_come_too_early_or_from_others() {
    let mut story = world();
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(seal("nobody.0.1", "w1"), Rejection::BuildUnknown(build("nobody")));
    expect(seal("r.3.1", "w1"), Rejection::TaskUnknown(key("r.3.1")));
    expect(seal("r.0.1", "w1"), Rejection::AttemptRunning(key("r.0.1")));
    expect(seal("r.0.1", "w2"), Rejection::StaleAttempt { key: key("r.0.1"), current: attempt(1) });
    story.finish("r.0.1", "w1", failed(Reason::DiskFull));
    let blob = BlobRef { holders: BTreeSet::new(), ..blob(1) };
    let lone = cmd::SealLog { key: key("r.0.1"), worker: worker("w1"), log: SealedLog { blob, lines: 1 } };
    assert!(matches!(rejected(&mut story, Command::SealLog(lone)), Rejection::TooFewHolders { needed: 1, .. }));
}

#[test]
fn sources() {
    let mut story = world();
    let commit = "a".repeat(40);
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(pin_source("r.0.1", "w1", "HEAD"), Rejection::CommitInvalid);
    expect(pin_source("r.0.1", "w1", &"A".repeat(40)), Rejection::CommitInvalid);
    expect(pin_source("s.0.1", "w1", &commit), Rejection::AttemptEnded(key("s.0.1")));
    expect(pin_source("r.1.1", "w1", &commit), Rejection::TaskUnknown(key("r.1.1")));
    expect(pin_source("r.0.1", "w2", &commit), Rejection::StaleAttempt { key: key("r.0.1"), current: attempt(1) });
    expect(pin_source("z.0.1", "w1", &commit), Rejection::BuildUnknown(build("z")));
    story.finish("r.0.1", "w1", failed(Reason::DiskFull));
    let late = rejected(&mut story, pin_source("r.0.1", "w1", &commit));
    assert_eq!(late, Rejection::AttemptEnded(key("r.0.1")));
}

#[test]
fn expiries_and_unproven_ends() {
    let mut story = world();
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(expire("r.0.1", Reason::Timeout), Rejection::NotDue(key("r.0.1")));
    expect(expire("r.0.1", Reason::Silence), Rejection::NotDue(key("r.0.1")));
    expect(expire("r.0.1", Reason::Drained), Rejection::NotDue(key("r.0.1")));
    expect(expire("s.0.1", Reason::Timeout), Rejection::AttemptEnded(key("s.0.1")));
    expect(expire("r.0.2", Reason::Timeout), Rejection::StaleAttempt { key: key("r.0.2"), current: attempt(1) });
    expect(expire("r.9.1", Reason::Timeout), Rejection::TaskUnknown(key("r.9.1")));
    expect(end_unverified("r.0.1"), Rejection::NotDue(key("r.0.1")));
    assert!(matches!(rejected(&mut story, expire("r.0.1", Reason::Exit)), Rejection::ReportInvalid(_)));
    story.cancel("r");
    assert_eq!(rejected(&mut story, end_unverified("r.0.1")), Rejection::NotDue(key("r.0.1")));
    story.wait(60_000);
    assert_eq!(rejected(&mut story, end_unverified("r.0.1")), Rejection::AttemptRunning(key("r.0.1")));
}

#[test]
fn workers() {
    let mut story = world();
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(lose("w9", "data1.boot1"), Rejection::WorkerUnknown(worker("w9")));
    expect(lose("w1", "data2.boot1"), Rejection::InstanceStale(worker("w1")));
    expect(drain("w9", None), Rejection::WorkerUnknown(worker("w9")));
    expect(Command::RemoveWorker(cmd::RemoveWorker { worker: worker("w9") }), Rejection::WorkerUnknown(worker("w9")));
    expect(Command::UndrainWorker(cmd::UndrainWorker { worker: worker("w9") }), Rejection::WorkerUnknown(worker("w9")));
    expect(Command::ProbeWorker(cmd::ProbeWorker { worker: worker("w9") }), Rejection::WorkerUnknown(worker("w9")));
    let release = |name: &str, life: &str| {
        let (worker, instance, key) = (worker(name), instance(life), key("r.0.1"));
        Command::ReleaseHold(cmd::ReleaseHold { worker, instance, key })
    };
    expect(release("w9", "data1.boot1"), Rejection::WorkerUnknown(worker("w9")));
    expect(release("w1", "data1.boot2"), Rejection::InstanceStale(worker("w1")));
    let gone = cmd::DetachWorker { worker: worker("w1"), instance: instance("data1.boot1") };
    story.apply(Command::DetachWorker(gone));
    let why = Unfit::Detached;
    let away = rejected(&mut story, lose("w1", "data1.boot1"));
    assert_eq!(away, Rejection::WorkerUnfit { worker: worker("w1"), why });
    let long = "x".repeat(600);
    let many = (0..300).map(|n| (format!("k{n}"), String::new())).collect();
    for bad in [
        offer(0),
        offer(251),
        WorkerOffer { address: long.clone(), ..offer(1) },
        WorkerOffer { labels: BTreeMap::from([(long, String::new())]), ..offer(1) },
        WorkerOffer { labels: many, ..offer(1) },
    ] {
        let rejection = rejected(&mut story, register("w1", "data1.boot1", bad));
        assert!(matches!(rejection, Rejection::OfferInvalid(_)), "{rejection:?}");
    }
}

#[test]
fn artifacts_pins_purges_policies_nodes() {
    let mut story = world();
    story.apply(register_artifact("s", "x", 1));
    let mut expect = |command, rejection| assert_eq!(rejected(&mut story, command), rejection);
    expect(register_artifact("s", "x", 2), Rejection::ArtifactTaken("x".to_owned()));
    expect(register_artifact("p", "x", 2), Rejection::BuildPurged(build("p")));
    expect(pin("z", helix_core::record::Pinned::Yes), Rejection::BuildUnknown(build("z")));
    let ids: Vec<String> = (0..201).map(|n| format!("b{n}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    expect(purge(&ids, 0), Rejection::TooManyRows { given: 201 });
    story.apply(register_node(1, 11));
    assert_eq!(rejected(&mut story, register_node(1, 12)), Rejection::NodeEpochTaken { node: NodeId(1) });
    assert_eq!(story.apply(retire_node(1)), Reply::Done);
    assert_eq!(story.apply(retire_node(1)), Reply::Unchanged);
    assert_eq!(rejected(&mut story, register_node(1, 11)), Rejection::NodeRemoved { node: NodeId(1) });
    // One that never made itself known, too.
    assert_eq!(story.apply(retire_node(7)), Reply::Done);
    assert_eq!(rejected(&mut story, register_node(7, 1)), Rejection::NodeRemoved { node: NodeId(7) });
    assert!(matches!(rejected(&mut story, register_artifact("q", "", 1)), Rejection::ReportInvalid(_)));
    for number in 0..256 {
        story.apply(register_artifact("q", &format!("a{number}"), 1));
    }
    assert!(matches!(rejected(&mut story, register_artifact("q", "one-more", 1)), Rejection::ReportInvalid(_)));
    let breaks: [fn(&mut Policy); 9] = [
        |p| p.worker_lease_ms = 0,
        |p| p.queue_max = 0,
        |p| p.copies = 101,
        |p| p.timeout_default_ms = 0,
        |p| p.store_deadline_ms = 0,
        |p| p.log_bytes_max = 0,
        |p| p.retain_ms = u64::MAX,
        |p| p.retain_rules.extend([(rule("retain_ms[failed]"), u64::MAX)]),
        |p| p.retain_rules.extend((0..65).map(|n| (rule(&format!("retain_logs_ms[n={n}]")), 1))),
    ];
    for change in breaks {
        let mut policy = Policy::default();
        change(&mut policy);
        let rejection = rejected(&mut story, Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
        assert!(matches!(rejection, Rejection::PolicyInvalid(_)));
    }
    let policy = Policy { queue_max: 7, ..Policy::default() };
    let other = Policy { queue_max: 8, ..Policy::default() };
    let change = Command::SetPolicy(cmd::SetPolicy { policy: policy.clone(), expected: Some(other) });
    assert_eq!(rejected(&mut story, change.clone()), Rejection::PolicyChanged);
    // What was done already is done, whatever was expected.
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    assert_eq!(story.apply(change), Reply::Unchanged);
    story.state.apply_membership([NodeId(8)].into(), &mut Applied::default());
    assert_eq!(rejected(&mut story, retire_node(8)), Rejection::NodeVotes { node: NodeId(8) });
}
