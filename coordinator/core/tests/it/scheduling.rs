//! Who gets what, and why something waits.

use std::collections::{BTreeMap, BTreeSet};

use expect_test::expect;
use helix_core::command::{AssignTask, Command, SecretFor, WorkerOffer};
use helix_core::{InFlight, Reply, SessionState, Unfit, explain, schedule};
use helix_model::{BuildSpec, LogTime, Reason, Resources};

use crate::story::*;

#[test]
fn higher_priority_first_then_older_to_the_worker_with_most_room() {
    let mut story = Story::new();
    story.worker("w1", 2);
    story.worker("w2", 3);
    for (id, priority) in [("old", 0), ("urgent", 5), ("young", 0), ("idle", -1), ("last", 0)] {
        let id = if id == "last" { "young2" } else { id };
        story.submit_as(id, BuildSpec { priority, ..spec() });
    }
    expect![[r#"
        [
            "urgent.0.1@w2",
            "old.0.1@w1",
            "young.0.1@w2",
            "young2.0.1@w1",
            "idle.0.1@w2",
        ]
    "#]]
    .assert_debug_eq(&story.scheduled(9));
    assert_eq!(story.scheduled(2).len(), 2);
    assert_eq!(story.schedule(9), 5);
    assert_eq!(story.scheduled(9), Vec::<String>::new());
}

#[test]
fn what_nobody_fits_does_not_stand_in_the_way_of_others() {
    let mut story = Story::new();
    story.worker("w1", 1);
    let platforms = vec![platform("linux/arm64")];
    story.submit_as("arm", BuildSpec { platforms, priority: 9, ..spec() });
    let big = Resources { memory_bytes: 1 << 40, ..Resources::default() };
    let small = WorkerOffer { resources: Resources { memory_bytes: 1 << 30, ..big }, ..offer(1) };
    story.worker_life("w1", "data1.boot1", small);
    story.submit_as("big", BuildSpec { resources: big, priority: 8, ..spec() });
    story.submit("plain");
    assert_eq!(story.scheduled(9), ["plain.0.1@w1"]);
}

#[test]
fn labels_and_platforms_choose_the_worker() {
    let mut story = Story::new();
    story.worker("w1", 9);
    let labels = BTreeMap::from([("zone".to_owned(), "b".to_owned())]);
    story.worker_life("w2", "data1.boot1", WorkerOffer { labels: labels.clone(), ..offer(1) });
    story.submit_as("b", BuildSpec { requires: labels, ..spec() });
    story.submit("any");
    assert_eq!(story.scheduled(9), ["b.0.1@w2", "any.0.1@w1"]);
}

#[test]
fn only_open_sessions_of_the_right_life_get_work() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit("b");
    for session in [SessionState::Late, SessionState::Closed] {
        story.liveness.workers.get_mut(&worker("w1")).unwrap().session = session;
        assert_eq!(story.scheduled(9), Vec::<String>::new());
    }
    story.hear("w1", "data2.boot1");
    assert_eq!(story.scheduled(9), Vec::<String>::new());
    story.hear("w1", "data1.boot1");
    assert_eq!(story.scheduled(9), ["b.0.1@w1"]);
    story.liveness.workers.clear();
    assert_eq!(story.scheduled(9), Vec::<String>::new());
}

#[test]
fn a_worker_whose_host_is_short_of_something_gets_nothing_new() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit("b");
    story.liveness.workers.get_mut(&worker("w1")).unwrap().pressure = "disk,memory".to_owned();
    assert_eq!(story.scheduled(9), Vec::<String>::new());
    let told = explain::explain(&story.state, &story.liveness, &build("b"), LogTime(story.now));
    assert_eq!(told.tasks[0].verdicts, [(worker("w1"), Some(Unfit::Pressure("disk,memory".to_owned())))]);
    story.hear("w1", "data1.boot1");
    assert_eq!(story.scheduled(9), ["b.0.1@w1"]);
}

#[test]
fn a_task_goes_elsewhere_after_a_failure_if_anyone_else_fits() {
    let mut story = Story::new();
    story.worker("w1", 9);
    story.submit("b");
    story.assign("b.0.1", "w1");
    story.finish("b.0.1", "w1", failed(Reason::DiskFull));
    assert_eq!(story.scheduled(9), Vec::<String>::new(), "it rests");
    story.wait(1_000);
    assert_eq!(story.scheduled(9), ["b.0.2@w1"]);
    story.worker("w2", 1);
    assert_eq!(story.scheduled(9), ["b.0.2@w2"]);
}

#[test]
fn rested_tasks_take_their_place_in_the_order() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit_as("first", BuildSpec { priority: 1, ..spec() });
    story.assign("first.0.1", "w1");
    story.submit("second");
    story.finish("first.0.1", "w1", failed(Reason::DiskFull));
    assert_eq!(story.scheduled(9), ["second.0.1@w1"]);
    story.now += 1_000;
    assert_eq!(story.scheduled(9), ["first.0.2@w1"], "log time has not moved, the leader's has");
}

#[test]
fn assignments_under_way_are_neither_repeated_nor_forgotten() {
    let mut story = Story::new();
    story.worker("w1", 2);
    story.worker("w2", 2);
    for id in ["a", "b", "c", "d", "e"] {
        story.submit(id);
    }
    let mut in_flight = InFlight::default();
    let mut seen = Vec::new();
    for _ in 0..6 {
        let next = schedule::schedule(&story.state, &in_flight, &story.liveness, LogTime(story.now), 1);
        for command in next {
            let Command::AssignTask(AssignTask { key, worker, .. }) = &command else { panic!() };
            in_flight.assigning.insert((key.build.clone(), key.task), worker.clone());
            seen.push(format!("{key}@{worker}"));
        }
    }
    assert_eq!(seen, ["a.0.1@w1", "b.0.1@w2", "c.0.1@w1", "d.0.1@w2"]);
}

#[test]
fn a_build_without_a_command_goes_where_there_is_one_or_anywhere_to_fail() {
    let mut story = Story::new();
    story.worker("w1", 5);
    let bare = BuildSpec { command: None, repo_url: "https://h/p".to_owned(), ..spec() };
    story.submit_as("b", bare.clone());
    assert_eq!(story.scheduled(9), ["b.0.1@w1"]);
    assert_eq!(explain::could_ever_run(&story.state, &bare), Ok(()));
    story.worker_life("w2", "data1.boot1", WorkerOffer { has_own_command: true, ..offer(1) });
    assert_eq!(story.scheduled(9), ["b.0.1@w2"]);
    story.apply(drain("w2", None));
    assert_eq!(story.scheduled(9), Vec::<String>::new(), "it waits for the one that has a command");
    story.wait(1).apply(Command::RemoveWorker(helix_core::command::RemoveWorker { worker: worker("w2") }));
    assert_eq!(story.scheduled(9), ["b.0.1@w1"]);
}

#[test]
fn many_tasks_spread_evenly_and_never_beyond_capacity() {
    let mut story = Story::new();
    for number in 0..10 {
        story.worker(&format!("w{number}"), 3);
    }
    for number in 0..40 {
        story.submit(&format!("b{number}"));
    }
    assert_eq!(story.schedule(100), 30);
    for number in 0..10 {
        assert_eq!(story.state.load_of(&worker(&format!("w{number}"))), 3);
    }
}

#[test]
fn explain_names_place_verdicts_and_back_off() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit("a");
    story.schedule(9);
    story.submit("b");
    story.submit("c");
    let tell = |story: &Story, id: &str| {
        let told = explain::explain(&story.state, &story.liveness, &build(id), LogTime(story.now));
        let verdicts: Vec<_> = told.tasks.iter().flat_map(|task| task.verdicts.clone()).collect();
        (told.words, verdicts)
    };
    assert_eq!(tell(&story, "a").0, "runs on w1");
    let full = Some(Unfit::Full { capacity: 1 });
    let words = "waits for room: 1 ahead, 1 of 1 workers fit and are full".to_owned();
    assert_eq!(tell(&story, "c"), (words, vec![(worker("w1"), full)]));
    story.liveness.workers.clear();
    story.finish("a.0.1", "w1", failed(Reason::DiskFull));
    let words = tell(&story, "a").0;
    assert!(words.starts_with("waits for a pause to end after attempt 1 on w1 ended as disk_full"), "{words}");
    assert_eq!(tell(&story, "b").1, [(worker("w1"), Some(Unfit::Unhealthy))]);
    assert_eq!(tell(&story, "nobody").0, "no such build");
    story.cancel("c");
    assert_eq!(tell(&story, "c").0, "it has ended: cancelled");
    story.apply(purge(&["c"], story.now));
    assert_eq!(tell(&story, "c").0, "it ended as cancelled, and was purged");
}

#[test]
fn what_could_never_run_is_known_at_submit_unless_nobody_is_registered() {
    let mut story = Story::new();
    let arm = BuildSpec { platforms: vec![platform("linux/amd64"), platform("linux/arm64")], ..spec() };
    assert_eq!(explain::could_ever_run(&story.state, &arm), Ok(()));
    story.worker("w1", 1);
    story.apply(lose("w1", "data1.boot1"));
    let unfit = Unfit::Platform { asked: "linux/arm64".to_owned(), has: "linux/amd64".to_owned() };
    assert_eq!(explain::could_ever_run(&story.state, &arm), Err(vec![(worker("w1"), unfit)]));
    assert_eq!(explain::could_ever_run(&story.state, &spec()), Ok(()));
    let platforms = BTreeSet::from([platform("linux/arm64")]);
    assert_eq!(story.worker_life("w2", "data1.boot1", WorkerOffer { platforms, ..offer(1) }), Reply::Done);
    assert_eq!(explain::could_ever_run(&story.state, &arm), Ok(()));
}

#[test]
fn a_secret_is_had_from_a_worker_that_offers_it_or_does_not_say() {
    let mut story = Story::new();
    let wants = BuildSpec { secrets: BTreeSet::from(["token".to_owned()]), ..spec() };
    let names = |names: &[&str]| Some(names.iter().map(|name| ((*name).to_owned(), SecretFor::Anybody)).collect());
    story.worker_life("w1", "data1.boot1", WorkerOffer { secrets: names(&["other"]), ..offer(9) });
    let refused = explain::could_ever_run(&story.state, &wants);
    assert_eq!(refused, Err(vec![(worker("w1"), Unfit::Secret("token".to_owned()))]));
    story.submit_as("waits", wants.clone());
    assert_eq!(story.schedule(9), 0);
    let explained = explain::explain(&story.state, &story.liveness, &build("waits"), LogTime(story.now));
    assert_eq!(explained.tasks[0].verdicts, [(worker("w1"), Some(Unfit::Secret("token".to_owned())))]);
    story.worker_life("w2", "data1.boot1", WorkerOffer { secrets: names(&["other", "token"]), ..offer(1) });
    assert_eq!(story.schedule(9), 1);
    // The agent's secrets were read again: the same life offers something else.
    story.worker_life("w2", "data1.boot1", WorkerOffer { secrets: names(&[]), ..offer(1) });
    story.submit_as("again", wants.clone());
    assert_eq!(story.schedule(9), 0);
    story.worker_life("w3", "data1.boot1", offer(1));
    assert_eq!(explain::could_ever_run(&story.state, &wants), Ok(()));
    assert_eq!(story.schedule(9), 1);
}
