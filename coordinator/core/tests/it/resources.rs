//! Cpu, memory and disk beside slots: what is asked adds up, never beyond what is offered, and much asked is not starved.

use helix_core::command::{Command, WorkerOffer};
use helix_core::{Rejection, Reply, Unfit, explain};
use helix_model::{BuildSpec, LogTime, Measure, Resources};

use crate::story::*;

const MINUTE: u64 = 60_000;

fn memory(memory_bytes: u64) -> Resources {
    Resources { memory_bytes, ..Resources::default() }
}

fn asks(memory_bytes: u64) -> BuildSpec {
    BuildSpec { resources: memory(memory_bytes), ..spec() }
}

fn worker_with(story: &mut Story, name: &str, capacity: u32, resources: Resources) {
    story.worker_life(name, "data1.boot1", WorkerOffer { resources, ..offer(capacity) });
}

#[test]
fn what_is_asked_adds_up_over_all_that_runs() {
    let mut story = Story::new();
    worker_with(&mut story, "w1", 9, Resources { cpu_milli: 4_000, memory_bytes: 100, disk_bytes: 0 });
    for (id, cpu_milli, memory_bytes) in [("a", 1_500, 60), ("b", 1_500, 41), ("c", 1_500, 40), ("d", 1_500, 0)] {
        // Of disk the worker does not tell: any amount goes.
        let resources = Resources { cpu_milli, memory_bytes, disk_bytes: u64::MAX };
        story.submit_as(id, BuildSpec { resources, ..spec() });
    }
    assert_eq!(story.scheduled(9), ["a.0.1@w1", "c.0.1@w1"]);
    assert_eq!(story.schedule(9), 2);
    let refused = |story: &mut Story, attempt: &str| match story.assign(attempt, "w1") {
        Reply::Rejected(Rejection::WorkerUnfit { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let short = Unfit::Short { what: Measure::Cpu, asked: 1_500, left: 1_000, has: 4_000 };
    assert_eq!(refused(&mut story, "d.0.1"), short);
    let told = explain::explain(&story.state, &story.liveness, &build("d"), LogTime(story.now));
    assert_eq!(told.tasks[0].verdicts, [(worker("w1"), Some(short))]);
    assert_eq!(told.words, "waits for room: 1 ahead, 1 of 1 workers fit and are full");
    story.finish("a.0.1", "w1", success());
    assert_eq!(story.scheduled(9), ["b.0.1@w1"]);
    story.cancel("c");
    story.finish("c.0.1", "w1", success());
    assert_eq!(story.scheduled(9), ["b.0.1@w1", "d.0.1@w1"]);
}

#[test]
fn among_those_that_fit_the_most_slots_decide() {
    let mut story = Story::new();
    worker_with(&mut story, "many-slots", 9, memory(10));
    worker_with(&mut story, "few-slots", 2, memory(100));
    worker_with(&mut story, "says-nothing", 1, memory(0));
    for (id, bytes) in [("small", 5), ("large", 11), ("larger", 90), ("largest", 1_000)] {
        story.submit_as(id, asks(bytes));
    }
    story.submit("plain");
    expect_test::expect![[r#"
        [
            "small.0.1@many-slots",
            "large.0.1@few-slots",
            "larger.0.1@says-nothing",
            "plain.0.1@many-slots",
        ]
    "#]]
    .assert_debug_eq(&story.scheduled(9));
}

#[test]
fn a_smaller_offer_stops_new_work_and_nothing_else() {
    let mut story = Story::new();
    worker_with(&mut story, "w1", 9, memory(100));
    story.submit_as("a", asks(80));
    story.schedule(9);
    worker_with(&mut story, "w1", 9, memory(50));
    story.submit_as("b", asks(1));
    story.submit("plain");
    assert_eq!(story.scheduled(9), ["plain.0.1@w1"], "what asks for nothing more takes a slot only");
    story.finish("a.0.1", "w1", success());
    assert_eq!(story.scheduled(9), ["b.0.1@w1", "plain.0.1@w1"]);
}

#[test]
fn what_no_worker_has_is_known_at_submit() {
    let mut story = Story::new();
    worker_with(&mut story, "w1", 1, memory(100));
    worker_with(&mut story, "w2", 1, Resources { cpu_milli: 500, ..memory(1_000) });
    assert_eq!(explain::could_ever_run(&story.state, &asks(1_000)), Ok(()));
    let lacks = |what, asked, has| Unfit::Resources { what, asked, has };
    let both = BuildSpec { resources: Resources { cpu_milli: 501, ..memory(101) }, ..spec() };
    assert_eq!(
        explain::could_ever_run(&story.state, &both),
        Err(vec![(worker("w1"), lacks(Measure::Memory, 101, 100)), (worker("w2"), lacks(Measure::Cpu, 501, 500)),])
    );
    // Load is no reason to refuse.
    story.submit_as("a", asks(1_000));
    story.schedule(9);
    assert_eq!(explain::could_ever_run(&story.state, &asks(1_000)), Ok(()));
}

/// Two workers full of small builds, and a big one that waits.
fn crowded() -> Story {
    let mut story = Story::new();
    worker_with(&mut story, "w1", 9, memory(100));
    worker_with(&mut story, "w2", 9, memory(100));
    for number in 0..10 {
        story.submit_as(&format!("s{number}"), asks(20));
    }
    assert_eq!(story.schedule(99), 10);
    story.submit_as("big", asks(100));
    story
}

/// Ends one small build on the worker and starts what the scheduler then wants; answers what that was.
fn turn(story: &mut Story, name: &str) -> Vec<String> {
    let small = story.state.running_on(&worker(name)).next().unwrap().to_string();
    story.wait(1_000);
    story.finish(&small, name, success());
    story.claim();
    let scheduled = story.scheduled(99);
    story.schedule(99);
    scheduled
}

#[test]
fn much_asked_is_served_although_small_builds_keep_coming() {
    let mut story = crowded();
    let mut number = 100;
    let mut more = |story: &mut Story| {
        number += 1;
        story.submit_as(&format!("s{number}"), asks(20));
    };
    more(&mut story);
    assert_eq!(turn(&mut story, "w1"), ["s101.0.1@w1"], "it has not waited long");
    story.wait(MINUTE);
    let mut served = false;
    for _ in 0..6 {
        more(&mut story);
        more(&mut story);
        if turn(&mut story, "w1").contains(&"big.0.1@w1".to_owned()) {
            served = true;
            break;
        }
        // The other worker goes on with what comes.
        assert_eq!(turn(&mut story, "w2").len(), 1);
        let told = explain::explain(&story.state, &story.liveness, &build("big"), LogTime(story.now));
        assert!(told.words.ends_with("; w1 is kept free for it"), "{}", told.words);
    }
    assert!(served, "{:?}", story.state.load_of(&worker("w1")));
    story.claim();
    assert!(story.liveness.claims.is_empty());
}

#[test]
fn a_claim_holds_back_only_what_stands_behind_it() {
    let mut story = crowded();
    story.wait(MINUTE).submit_as("behind", asks(20));
    story.submit_as("urgent", BuildSpec { priority: 1, ..asks(20) });
    story.submit_as("huge", asks(1_000));
    story.claim();
    assert_eq!(story.liveness.claims.len(), 1, "one that nobody could serve claims nothing");
    let small = story.state.running_on(&worker("w1")).next().unwrap().to_string();
    story.finish(&small, "w1", success());
    assert_eq!(story.scheduled(9), ["urgent.0.1@w1"]);
    let told = explain::explain(&story.state, &story.liveness, &build("behind"), LogTime(story.now));
    assert_eq!(told.tasks[0].verdicts[0], (worker("w1"), Some(Unfit::Claimed { build: build("big") })));
    // A claim of what no longer waits holds nobody back, even before the next tick.
    story.cancel("big");
    story.cancel("urgent");
    assert_eq!(story.scheduled(9), ["behind.0.1@w1"]);
    // A worker that can take nothing is let go.
    let mut story = crowded();
    story.wait(MINUTE);
    story.claim();
    story.apply(drain("w1", None));
    story.claim();
    assert_eq!(story.liveness.claims.keys().collect::<Vec<_>>(), [&worker("w2")]);
    let remove = helix_core::command::RemoveWorker { worker: worker("w2") };
    story.apply(Command::RemoveWorker(remove));
    story.claim();
    assert!(story.liveness.claims.is_empty());
}

#[test]
fn a_single_worker_is_claimed_too_and_what_asks_for_slots_alone_never() {
    let mut story = Story::new();
    worker_with(&mut story, "w1", 1, memory(100));
    story.submit("a");
    story.schedule(9);
    story.submit("b");
    story.submit_as("big", asks(100));
    story.wait(MINUTE);
    story.claim();
    assert_eq!(story.liveness.claims.len(), 1);
    story.finish("a.0.1", "w1", success());
    assert_eq!(story.scheduled(9), ["b.0.1@w1"], "it is older");
}
