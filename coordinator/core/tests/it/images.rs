//! Images of several platforms and their index: one attempt pushes it, of images that are final, whatever is lost or repeated.

use std::collections::BTreeMap;

use helix_core::command::{Command, WorkerOffer};
use helix_core::effect::Effect;
use helix_core::record::{Policy, TaskRecord};
use helix_core::{Rejection, Reply, command as cmd};
use helix_model::{AttemptKey, BuildSpec, Digest, Executor, Platform, Reason};
use proptest::prelude::*;

use crate::story::*;

const LIFE: &str = "data1.boot1";
const EVER: u64 = 100_000;
const PLATFORMS: [&str; 3] = ["linux/amd64", "linux/arm64", "linux/riscv64"];

fn pushed(platforms: usize) -> BuildSpec {
    BuildSpec {
        executor: Some(Executor::Podman),
        command: None,
        push: "registry:5000/app:1".to_owned(),
        platforms: PLATFORMS[..platforms].iter().map(|text| platform(text)).collect(),
        ..spec()
    }
}

fn site(platforms: usize) -> Story {
    let mut story = Story::new();
    let policy = Policy { infra_retries: 20, quarantine_after: 0, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    for name in ["w1", "w2", "w3"] {
        story.worker_life(name, LIFE, podman_offer());
    }
    story.submit_as("b", pushed(platforms));
    story
}

fn podman_offer() -> WorkerOffer {
    let platforms = PLATFORMS.iter().map(|text| platform(text)).collect();
    WorkerOffer { platforms, executors: [Executor::Podman].into(), ..offer(9) }
}

/// What the last command had said to attempts about images: `ATTEMPT: DIGESTS`.
fn said(story: &Story) -> Vec<String> {
    let told = |effect: &Effect| match effect {
        Effect::SendImages { key, worker, images } => {
            let images: Vec<String> =
                images.iter().map(|(platform, digest)| format!("{platform}={}", digest.0[0])).collect();
            Some(format!("{key}@{worker}: {}", images.join(" ")))
        }
        _ => None,
    };
    story.effects.iter().filter_map(told).collect()
}

fn record(story: &mut Story, attempt: &str, worker: &str, byte: u8) -> (Reply, Vec<String>) {
    let reply = story.apply(record_image(attempt, worker, LIFE, image(byte)));
    (reply, said(story))
}

fn finish_as(story: &mut Story, attempt: &str, worker: &str, byte: u8, index: Option<u8>) -> Reply {
    story.apply(finish_image(attempt, worker, LIFE, image(byte), index.map(digest)))
}

fn lines(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| (*line).to_owned()).collect()
}

#[test]
fn the_last_image_waits_for_the_others_success_and_then_pushes_the_index() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    assert_eq!(record(&mut story, "b.0.1", "w1", 1), (Reply::Done, lines(&["b.0.1@w1: "])));
    // Both at once: the order of the log decides, and the second has to wait for the first.
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Done, vec![]));
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Unchanged, vec![]));
    assert_eq!(record(&mut story, "b.0.1", "w1", 1), (Reply::Unchanged, lines(&["b.0.1@w1: "])));
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 1, None), Reply::Done);
    let push = lines(&["b.1.1@w2: linux/amd64=1 linux/arm64=2"]);
    assert_eq!(said(&story), push);
    // The word may have been lost.
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Unchanged, push));
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, Some(9)), Reply::Done);
    assert_eq!(story.show("b"), "succeeded: succeeded after 1, succeeded after 1");
    let index = |task: usize| story.record("b").unwrap().tasks[task].attempts[0].end.as_ref().unwrap().index;
    assert_eq!((index(0), index(1)), (None, Some(digest(9))));
    // Late repeats of everything.
    let ended = Rejection::AttemptEnded(key("b.1.1"));
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Rejected(ended.clone()), vec![]));
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, Some(9)), Reply::Rejected(ended));
}

#[test]
fn an_image_counts_from_the_current_attempt_alone() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    let before = story.state.clone();
    let stale = |key: &str, current| Rejection::StaleAttempt { key: self::key(key), current: attempt(current) };
    for (attempt, worker, life, rejection) in [
        ("b.0.2", "w1", LIFE, stale("b.0.2", 1)),
        ("b.0.1", "w2", LIFE, stale("b.0.1", 1)),
        ("b.0.1", "w1", "data1.boot2", stale("b.0.1", 1)),
        ("b.1.1", "w1", LIFE, stale("b.1.1", 0)),
        ("b.7.1", "w1", LIFE, Rejection::TaskUnknown(key("b.7.1"))),
        ("c.0.1", "w1", LIFE, Rejection::BuildUnknown(build("c"))),
    ] {
        let reply = story.apply(record_image(attempt, worker, life, image(1)));
        assert_eq!(reply, Reply::Rejected(rejection), "{attempt} {worker} {life}");
        assert_eq!(story.state, before);
    }
    assert_eq!(record(&mut story, "b.0.1", "w1", 1).0, Reply::Done);
    story.finish("b.0.1", "w1", failed(Reason::Push));
    assert_eq!(record(&mut story, "b.0.1", "w1", 1).0, Reply::Rejected(Rejection::AttemptEnded(key("b.0.1"))));
    assert!(story.record("b").unwrap().tasks[0].attempts[0].image.is_none());
}

/// A build for one platform, or one that pushes nothing, has no index: whoever asks goes on.
#[test]
fn without_an_index_everybody_goes_on() {
    let (one, kept) = (pushed(1), BuildSpec { push: String::new(), ..pushed(2) });
    for spec in [one, kept] {
        let mut story = site(2);
        story.submit_as("c", spec);
        story.assign("c.0.1", "w1");
        assert_eq!(record(&mut story, "c.0.1", "w1", 1), (Reply::Done, lines(&["c.0.1@w1: "])));
        let wrong = Reply::Rejected(Rejection::ReportInvalid("an index of a build that has none"));
        assert_eq!(finish_as(&mut story, "c.0.1", "w1", 1, Some(3)), wrong);
        assert_eq!(finish_as(&mut story, "c.0.1", "w1", 1, None), Reply::Done);
    }
}

#[test]
fn reports_that_do_not_fit_are_refused() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    let wrong = |why| Reply::Rejected(Rejection::ReportInvalid(why));
    let unrecorded = wrong("a success whose image was not recorded");
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 1, None), unrecorded);
    record(&mut story, "b.0.1", "w1", 1);
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 7, None), unrecorded);
    let not_its = wrong("an index that somebody else is to push, or too early");
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 1, Some(9)), not_its);
    record(&mut story, "b.1.1", "w2", 2);
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 1, Some(9)), not_its);
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, Some(9)), not_its);
    let impatient = wrong("a success that did not wait for the other platforms");
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, None), impatient);
    finish_as(&mut story, "b.0.1", "w1", 1, None);
    let without = wrong("a success without the index that it was to push");
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, None), without);
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, Some(9)), Reply::Done);
}

#[test]
fn who_waits_goes_on_when_another_platforms_worker_is_lost() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    record(&mut story, "b.0.1", "w1", 1);
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Done, vec![]));
    story.apply(lose("w1", LIFE));
    assert_eq!(said(&story), lines(&["b.1.1@w2: "]));
    assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Unchanged, lines(&["b.1.1@w2: "])));
    story.wait(EVER);
    story.assign("b.0.2", "w3");
    // Before the other has ended: now this one is the last.
    assert_eq!(record(&mut story, "b.0.2", "w3", 3), (Reply::Done, vec![]));
    assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, None), Reply::Done);
    assert_eq!(said(&story), lines(&["b.0.2@w3: linux/amd64=3 linux/arm64=2"]));
    assert_eq!(finish_as(&mut story, "b.0.2", "w3", 3, Some(9)), Reply::Done);
    assert_eq!(story.show("b"), "succeeded: succeeded after 2, succeeded after 1");
}

#[test]
fn whoever_makes_up_for_a_lost_pusher_pushes() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    record(&mut story, "b.0.1", "w1", 1);
    record(&mut story, "b.1.1", "w2", 2);
    finish_as(&mut story, "b.0.1", "w1", 1, None);
    // It dies between the push of the index and its report; or the registry of images did not take it.
    story.finish("b.1.1", "w2", failed(Reason::Push));
    story.wait(EVER);
    story.assign("b.1.2", "w3");
    let push = lines(&["b.1.2@w3: linux/amd64=1 linux/arm64=4"]);
    assert_eq!(record(&mut story, "b.1.2", "w3", 4), (Reply::Done, push));
    // An agent that began again has pushed again, and another digest came of it.
    let push = lines(&["b.1.2@w3: linux/amd64=1 linux/arm64=5"]);
    assert_eq!(record(&mut story, "b.1.2", "w3", 5), (Reply::Done, push));
    assert_eq!(finish_as(&mut story, "b.1.2", "w3", 5, Some(9)), Reply::Done);
    assert_eq!(story.show("b"), "succeeded: succeeded after 1, succeeded after 2");
}

#[test]
fn a_platform_that_failed_for_good_leaves_no_index() {
    for failed_first in [true, false] {
        let mut story = site(2);
        story.assign("b.0.1", "w1");
        story.assign("b.1.1", "w2");
        record(&mut story, "b.0.1", "w1", 1);
        if !failed_first {
            assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Done, vec![]));
        }
        story.finish("b.0.1", "w1", failed(Reason::Policy));
        let goes_on = lines(&["b.1.1@w2: "]);
        if failed_first {
            assert_eq!(record(&mut story, "b.1.1", "w2", 2), (Reply::Done, goes_on));
        } else {
            assert_eq!(said(&story), goes_on);
        }
        assert_eq!(finish_as(&mut story, "b.1.1", "w2", 2, None), Reply::Done);
        assert_eq!(story.show("b"), "failed (policy): failed (policy) after 1, succeeded after 1");
    }
}

#[test]
fn a_cancel_leaves_no_index() {
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    record(&mut story, "b.0.1", "w1", 1);
    record(&mut story, "b.1.1", "w2", 2);
    story.cancel("b");
    finish_as(&mut story, "b.0.1", "w1", 1, None);
    // It was stopped, and its word that it had pushed the index comes too late.
    finish_as(&mut story, "b.1.1", "w2", 2, Some(9));
    assert_eq!(story.show("b"), "cancelled (cancelled): cancelled (cancelled) after 1, cancelled (cancelled) after 1");
    let record = story.record("b").unwrap();
    let attempts = record.tasks.iter().flat_map(|task| &task.attempts);
    assert!(attempts.into_iter().all(|it| it.image.is_none() && it.end.as_ref().unwrap().index.is_none()));
}

/// A success as agents reported it that knew of no index.
fn finish_of_old(story: &mut Story, attempt: &str, worker: &str) -> Reply {
    match finish_image(attempt, worker, LIFE, image(1), None) {
        Command::FinishAttempt(c) => story.apply(Command::FinishAttempt(cmd::FinishAttempt { image: None, ..c })),
        other => panic!("no report: {other:?}"),
    }
}

/// What was committed before there were indexes means what it meant: whatever others of the build say of images.
#[test]
fn a_report_without_any_image_means_what_it_did_before_there_were_indexes() {
    for (first, second) in [(None, None), (None, Some(2)), (Some(1), None)] {
        let mut story = site(2);
        story.assign("b.0.1", "w1");
        story.assign("b.1.1", "w2");
        for (attempt, worker, recorded) in [("b.0.1", "w1", first), ("b.1.1", "w2", second)] {
            let reply = match recorded {
                Some(byte) => {
                    assert_eq!(
                        record(&mut story, attempt, worker, byte),
                        (Reply::Done, vec![format!("{attempt}@{worker}: ")])
                    );
                    finish_as(&mut story, attempt, worker, byte, None)
                }
                None => finish_of_old(&mut story, attempt, worker),
            };
            assert_eq!(reply, Reply::Done, "{attempt} of {first:?} {second:?}");
        }
        assert_eq!(story.show("b"), "succeeded: succeeded after 1, succeeded after 1");
    }
    // Who has recorded an image says so in its report; who waited for somebody that reports like this goes on.
    let mut story = site(2);
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w2");
    record(&mut story, "b.0.1", "w1", 1);
    let wrong = Rejection::ReportInvalid("a success whose image was not recorded");
    assert_eq!(finish_of_old(&mut story, "b.0.1", "w1"), Reply::Rejected(wrong));
    assert_eq!(finish_of_old(&mut story, "b.1.1", "w2"), Reply::Done);
    assert_eq!(finish_as(&mut story, "b.0.1", "w1", 1, None), Reply::Done);
}

/// What an honest agent knows of its attempt.
#[derive(Clone, PartialEq, Debug)]
enum Stage {
    Builds,
    Waits,
    GoesOn,
    Pushes(Vec<(Platform, Digest)>),
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Schedule,
    Record,
    /// The answer is lost.
    RecordUnheard,
    /// Another digest: the agent began again.
    RecordAnew,
    Finish,
    Fail,
    Lose,
}

/// Honest agents in a world that is not.
struct Agents {
    story: Story,
    /// Of each attempt that runs.
    stages: BTreeMap<AttemptKey, (Stage, u8)>,
    images: u8,
    /// The last index that was pushed, and what it named.
    index: Option<(Digest, Vec<(Platform, Digest)>)>,
}

impl Agents {
    fn new(platforms: usize) -> Self {
        Self { story: site(platforms), stages: BTreeMap::new(), images: 0, index: None }
    }

    fn ended(&self) -> bool {
        self.story.record("b").is_some_and(|build| build.state.is_terminal())
    }

    /// The running attempts of the build, and who runs them.
    fn running(&self) -> Vec<(AttemptKey, String)> {
        let build = self.story.record("b").unwrap();
        let of_task = |(index, task): (_, &TaskRecord)| {
            let attempt = task.running()?;
            Some((build.attempt_key(index, attempt.number), attempt.worker.to_string()))
        };
        build.indexed_tasks().filter_map(of_task).collect()
    }

    fn new_image(&mut self) -> u8 {
        self.images += 1;
        self.images
    }

    fn hear(&mut self) {
        for effect in self.story.effects.clone() {
            if let Effect::SendImages { key, images, .. } = effect
                && let Some((stage @ Stage::Waits, _)) = self.stages.get_mut(&key)
            {
                *stage = if images.is_empty() { Stage::GoesOn } else { Stage::Pushes(images) };
            }
        }
    }

    fn record(&mut self, key: &AttemptKey, worker: &str, heard: bool) {
        let (stage, byte) = self.stages.get_mut(key).unwrap();
        if *stage == Stage::Builds {
            *stage = Stage::Waits;
        }
        let command = record_image(&key.to_string(), worker, LIFE, image(*byte));
        assert!(!matches!(self.story.apply(command), Reply::Rejected(_)));
        if heard {
            self.hear();
        }
    }

    fn finish(&mut self, key: &AttemptKey, worker: &str) {
        let (stage, byte) = self.stages[key].clone();
        let index = match stage {
            Stage::Builds | Stage::Waits => return,
            Stage::GoesOn => None,
            Stage::Pushes(images) => {
                let digest = digest(200 - self.new_image());
                self.index = Some((digest, images));
                Some(digest)
            }
        };
        let command = finish_image(&key.to_string(), worker, LIFE, image(byte), index);
        assert_eq!(self.story.apply(command), Reply::Done, "an honest success is taken: {key}");
        self.hear();
    }

    fn act(&mut self, act: Act, which: usize) {
        if self.ended() {
            return;
        }
        if let Act::Schedule = act {
            self.story.wait(EVER);
            for name in ["w1", "w2", "w3"] {
                self.story.worker_life(name, LIFE, podman_offer());
            }
            self.story.schedule(1 + which);
        }
        let running = self.running();
        for (key, _) in &running {
            if !self.stages.contains_key(key) {
                let byte = self.new_image();
                self.stages.insert(key.clone(), (Stage::Builds, byte));
            }
        }
        let Some((key, worker)) = running.get(which % running.len().max(1)) else { return };
        match act {
            Act::Schedule => {}
            Act::Record => self.record(key, worker, true),
            Act::RecordUnheard => self.record(key, worker, false),
            Act::RecordAnew => {
                let byte = self.new_image();
                self.stages.insert(key.clone(), (Stage::Builds, byte));
                self.record(key, worker, true);
            }
            Act::Finish => self.finish(key, worker),
            Act::Fail => {
                self.story.finish(&key.to_string(), worker, failed(Reason::Push));
                self.hear();
            }
            Act::Lose => {
                self.story.apply(lose(worker, LIFE));
                self.hear();
            }
        }
    }
}

fn any_act() -> impl Strategy<Value = (Act, usize)> {
    let act = prop_oneof![
        3 => Just(Act::Schedule),
        6 => Just(Act::Record),
        2 => Just(Act::RecordUnheard),
        1 => Just(Act::RecordAnew),
        6 => Just(Act::Finish),
        1 => Just(Act::Fail),
        1 => Just(Act::Lose),
    ];
    (act, 0..3usize)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is lost, repeated or done again: nobody waits for ever, and the index names what the tasks report.
    #[test]
    fn a_build_ends_and_its_index_names_its_images(
        platforms in 2..4usize,
        acts in prop::collection::vec(any_act(), 0..60),
    ) {
        let mut agents = Agents::new(platforms);
        for (act, which) in acts {
            agents.act(act, which);
        }
        // From here on nothing fails any more.
        for round in 0..40 {
            agents.act(Act::Schedule, 2);
            for which in 0..3 {
                agents.act(Act::Record, which);
                agents.act(Act::Finish, which + round);
            }
        }
        let shown = agents.story.show("b");
        prop_assert!(agents.ended(), "nobody gets on: {}", shown);
        let build = agents.story.record("b").unwrap();
        let last = |task: &TaskRecord| task.attempts.last().unwrap().clone();
        let indexes: Vec<Digest> =
            build.tasks.iter().filter_map(|task| last(task).end.unwrap().index).collect();
        if shown.starts_with("succeeded") {
            let named = |task: &TaskRecord| (task.platform.clone().unwrap(), last(task).image.unwrap().digest);
            let images: Vec<(Platform, Digest)> = build.tasks.iter().map(named).collect();
            let (digest, of) = agents.index.unwrap();
            prop_assert_eq!(indexes, vec![digest]);
            prop_assert_eq!(of, images);
        } else {
            prop_assert_eq!(indexes, vec![]);
        }
    }
}
