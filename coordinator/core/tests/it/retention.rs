//! How long what is kept: lifetimes of builds, logs and artifacts, rules by state and label, pins; and what letting go leaves.

use std::collections::BTreeMap;

use helix_core::command::{self as cmd, Command};
use helix_core::effect::Effect;
use helix_core::record::{Pinned, Policy, RowKey};
use helix_core::retention::{Expired, Kept};
use helix_core::{InFlight, Known, Rejection, Reply, due};
use helix_model::{BuildSpec, LogTime, Reason};

use crate::story::*;

fn set(story: &mut Story, policy: Policy) {
    let set = Command::SetPolicy(cmd::SetPolicy { policy, expected: None });
    assert_ne!(story.apply(set.clone()), Reply::Unchanged, "{set:?}");
}

fn rules(named: &[(&str, u64)]) -> BTreeMap<helix_core::retention::Rule, u64> {
    named.iter().map(|(name, keep_ms)| (rule(name), *keep_ms)).collect()
}

fn labelled(label: &str) -> BuildSpec {
    let labels = label.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    BuildSpec { labels: labels.into_iter().collect(), ..spec() }
}

/// A build that ended well at 1,000 and made an artifact, and one that failed then.
fn two() -> Story {
    let mut story = Story::new();
    story.worker("w1", 4);
    for (id, outcome) in [("good", success()), ("bad", failed(Reason::Policy))] {
        story.submit_as(id, labelled(&format!("id={id}")));
        let first = format!("{id}.0.1");
        story.assign(&first, "w1");
        story.apply(register_artifact(id, "x", 1));
        story.finish(&first, "w1", outcome);
    }
    story
}

/// What is due that retention says, in words; and does it.
fn pass(story: &mut Story) -> Vec<String> {
    let mut words = Vec::new();
    for command in due::due(&story.state, &InFlight::default(), &story.liveness, LogTime(story.now)) {
        let text = |what: &str, ids: &[helix_model::BuildId]| {
            let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
            format!("{what} {}", ids.join(" "))
        };
        match &command {
            Command::PurgeBuilds(c) => words.push(text("build", &c.builds)),
            Command::ExpireBytes(c) => words.push(text(c.kept.as_str(), &c.builds)),
            _ => continue,
        }
        assert!(matches!(story.apply(command), Reply::Purged(1..)));
        assert_eq!(story.load(), story.state);
    }
    words
}

fn expired(story: &Story, id: &str) -> Expired {
    match story.state.build(&build(id)) {
        Some(Known::Finished(finished)) => finished.expired,
        other => panic!("{other:?}"),
    }
}

#[test]
fn logs_and_artifacts_go_before_their_builds_and_nothing_dangles() {
    let mut story = two();
    set(&mut story, Policy { retain_logs_ms: 500, retain_artifacts_ms: 200, retain_ms: 900, ..Policy::default() });
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(1_200)));
    story.now = 1_199;
    assert_eq!(pass(&mut story), Vec::<String>::new());
    story.now = 1_200;
    assert_eq!(pass(&mut story), ["artifacts good bad"]);
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(1_500)));
    let record = story.record("good").unwrap();
    assert!(record.artifacts.is_empty() && record.tasks[0].attempts[0].artifacts.is_empty());
    assert!(record.tasks[0].attempts[0].log.is_some(), "its log is kept");
    assert!(story.state.build(&build("good")).is_some_and(|known| matches!(known, Known::Finished(_))));
    story.now = 1_500;
    assert_eq!(pass(&mut story), ["logs good bad"]);
    assert!(story.effects.contains(&Effect::LogsExpired(build("bad"))));
    assert!(story.record("good").unwrap().tasks[0].attempts[0].log.is_none());
    assert_eq!(expired(&story, "good"), Expired { logs: Some(LogTime(1_500)), artifacts: Some(LogTime(1_200)) });
    story.now = 1_900;
    assert_eq!(pass(&mut story), ["build good bad"]);
}

#[test]
fn what_is_gone_is_not_taken_back() {
    let mut story = two();
    assert!(story.state.wants_log(&key("bad.0.1"), &worker("w1")), "its log is not sealed");
    set(&mut story, Policy { retain_logs_ms: 0, retain_artifacts_ms: 0, ..Policy::default() });
    assert_eq!(pass(&mut story), ["logs good bad", "artifacts good bad"]);
    assert!(!story.state.wants_log(&key("bad.0.1"), &worker("w1")));
    assert_eq!(story.apply(seal("bad.0.1", "w1")), Reply::Unchanged);
    let forget = Effect::SendForget { key: key("bad.0.1"), worker: worker("w1") };
    assert_eq!(story.effects, [forget], "its agent need not keep it either");
    let refused = Reply::Rejected(Rejection::Expired(build("bad"), Kept::Artifacts));
    assert_eq!(story.apply(register_artifact("bad", "y", 2)), refused);
    let addenda = story.rows.keys().filter(|key| matches!(key, RowKey::Addendum(..))).count();
    assert_eq!(addenda, 0);
}

#[test]
fn late_facts_go_with_what_they_tell_of() {
    let mut story = two();
    story.apply(seal("bad.0.1", "w1"));
    story.apply(register_artifact("bad", "late", 3));
    story.apply(pin("bad", Pinned::Yes));
    story.apply(pin("bad", Pinned::No));
    set(&mut story, Policy { retain_logs_ms: 0, ..Policy::default() });
    assert_eq!(pass(&mut story), ["logs good bad"]);
    let left: Vec<_> = story.rows.keys().filter_map(Kept::of_key).collect();
    assert_eq!(left, [Kept::Build, Kept::Artifacts], "the pin and the artifact");
}

#[test]
fn of_the_rules_that_fit_the_longest_counts() {
    let mut story = two();
    let retain_rules = rules(&[
        ("retain_ms[failed]", 300),
        ("retain_ms[id=bad]", 100),
        ("retain_ms[failed,id=bad]", 200),
        ("retain_ms[id=nobody]", 5_000),
        ("retain_logs_ms[succeeded]", 400),
    ]);
    set(&mut story, Policy { retain_rules, retain_ms: 1_000, retain_logs_ms: 700, ..Policy::default() });
    for (at, words) in
        [(1_299, vec![]), (1_300, vec!["build bad"]), (1_400, vec!["logs good"]), (2_000, vec!["build good"])]
    {
        story.now = at;
        assert_eq!(pass(&mut story), words, "{at}");
    }
}

#[test]
fn a_change_of_rules_counts_for_what_has_ended() {
    let mut story = two();
    story.now = 5_000;
    assert_eq!(pass(&mut story), Vec::<String>::new());
    set(&mut story, Policy { retain_rules: rules(&[("retain_ms[id=good]", 10)]), ..Policy::default() });
    assert_eq!(pass(&mut story), ["build good"]);
    set(&mut story, Policy { retain_rules: rules(&[("retain_logs_ms[id=bad]", 10)]), ..Policy::default() });
    // What the leader proposed by the old policy is held against the new one.
    set(&mut story, Policy::default());
    assert_eq!(story.apply(let_go(Kept::Logs, &["bad"])), Reply::Purged(0));
    assert_eq!(pass(&mut story), Vec::<String>::new());
}

#[test]
fn a_pin_keeps_all_of_a_build_and_its_end_lets_all_go() {
    let mut story = two();
    story.apply(pin("good", Pinned::Yes));
    let policy =
        Policy { retain_logs_ms: 0, retain_artifacts_ms: 10, retain_ms: 20, retain_builds: 0, ..Policy::default() };
    set(&mut story, policy);
    assert_eq!(pass(&mut story), ["build bad"]);
    story.now = 9_000;
    assert_eq!(pass(&mut story), Vec::<String>::new());
    assert_eq!(story.apply(let_go(Kept::Logs, &["good"])), Reply::Purged(0));
    assert_eq!(story.apply(purge(&["good"], 9_000)), Reply::Purged(0));
    story.apply(pin("good", Pinned::No));
    assert_eq!(pass(&mut story), ["build good"]);
}

#[test]
fn a_look_is_bounded_and_nothing_under_way_is_proposed_again() {
    let mut story = Story::new();
    for number in 0..450 {
        let id = format!("b{number:03}");
        story.state.apply(LogTime(1_000), &submit(&id, spec()), &mut helix_core::Applied::default());
        story.state.apply(LogTime(1_000), &cancel(&id), &mut helix_core::Applied::default());
    }
    let policy = Policy { retain_logs_ms: 0, ..Policy::default() };
    let set = Command::SetPolicy(cmd::SetPolicy { policy, expected: None });
    story.state.apply(LogTime(1_000), &set, &mut helix_core::Applied::default());
    let mut in_flight = InFlight::default();
    let mut seen = 0;
    for expected in [200, 200, 50, 0] {
        let due = due::due(&story.state, &in_flight, &story.liveness, LogTime(2_000));
        let mut count = 0;
        for command in due {
            let Command::ExpireBytes(c) = command else { panic!("{command:?}") };
            count += c.builds.len();
            in_flight.letting_go.extend(c.builds.into_iter().map(|id| (id, c.kept)));
        }
        assert_eq!(count, expected);
        seen += count;
    }
    assert_eq!(seen, 450);
}
