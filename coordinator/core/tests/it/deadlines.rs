//! What becomes due as time passes: leases and the brake, expiries, unproven ends, retention.

use helix_core::command::{self as cmd, Command, Outcome};
use helix_core::record::{Pinned, Policy};
use helix_core::{InFlight, Liveness, Reply, SessionState, due};
use helix_model::{BuildSpec, LogTime, Reason};

use crate::story::*;

fn lost(story: &mut Story) -> Vec<String> {
    let due = story.due();
    let lost = due.into_iter().filter_map(|command| match command {
        Command::LoseWorker(c) => Some(c.worker.to_string()),
        _ => None,
    });
    lost.collect()
}

fn workers(count: usize) -> Story {
    let mut story = Story::new();
    for number in 0..count {
        story.worker(&format!("w{number}"), 1);
    }
    story
}

fn hear_all_but(story: &mut Story, count: usize, silent: usize) {
    for number in silent..count {
        story.hear(&format!("w{number}"), "data1.boot1");
    }
}

#[test]
fn a_lease_lapses_after_its_whole_length() {
    let mut story = workers(2);
    story.wait(14_999);
    story.hear("w1", "data1.boot1");
    assert_eq!(lost(&mut story), Vec::<String>::new());
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(16_000)));
    story.wait(1);
    assert_eq!(lost(&mut story), ["w0"]);
    let mut in_flight = InFlight::default();
    in_flight.workers.insert(worker("w0"));
    assert_eq!(due::due(&story.state, &in_flight, &story.liveness, LogTime(story.now)), []);
}

#[test]
fn a_new_leader_gives_everybody_a_full_lease() {
    let mut story = workers(2);
    story.wait(100_000);
    story.liveness = helix_core::Liveness { leader_since: LogTime(story.now), ..Default::default() };
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(15_000);
    assert_eq!(lost(&mut story), ["w0", "w1"]);
}

#[test]
fn half_of_five_is_lost_at_once_and_more_than_half_is_held_back() {
    let mut story = workers(5);
    story.wait(15_000);
    hear_all_but(&mut story, 5, 2);
    assert_eq!(lost(&mut story), ["w0", "w1"]);
    let mut story = workers(5);
    story.wait(15_000);
    hear_all_but(&mut story, 5, 3);
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(59_999);
    hear_all_but(&mut story, 5, 3);
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(1);
    assert_eq!(lost(&mut story), ["w0"], "then one a lease");
    story.apply(lose("w0", "data1.boot1"));
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(15_000);
    hear_all_but(&mut story, 5, 3);
    assert_eq!(lost(&mut story), ["w1"]);
}

#[test]
fn the_brake_is_released_when_most_are_back() {
    let mut story = workers(6);
    story.wait(15_000);
    hear_all_but(&mut story, 6, 5);
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(2_000);
    hear_all_but(&mut story, 6, 1);
    assert_eq!(lost(&mut story), ["w0"]);
}

fn detached() -> Story {
    let mut story = workers(1);
    let gone = cmd::DetachWorker { worker: worker("w0"), instance: instance("data1.boot1") };
    story.apply(Command::DetachWorker(gone));
    story
}

#[test]
fn a_detached_worker_is_lost_when_it_stays_away() {
    let mut story = detached();
    story.wait(299_999);
    assert_eq!(lost(&mut story), Vec::<String>::new());
    story.wait(1);
    assert_eq!(lost(&mut story), ["w0"]);
    assert_eq!(story.apply(lose("w0", "data1.boot1")), Reply::Done);
}

#[test]
fn a_detached_worker_has_a_lease_to_find_a_new_leader() {
    let mut story = detached();
    // Nobody led when its time was over.
    story.wait(400_000);
    story.liveness = Liveness { leader_since: LogTime(story.now), ..Liveness::default() };
    assert_eq!(lost(&mut story), Vec::<String>::new());
    let lease = Policy::default().worker_lease_ms;
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(story.now + lease)));
    story.wait(lease);
    assert_eq!(lost(&mut story), ["w0"]);
}

fn running(spec: BuildSpec) -> Story {
    let mut story = workers(1);
    story.submit_as("b", spec);
    story.assign("b.0.1", "w0");
    story
}

#[test]
fn wall_clock_limits_are_enforced_after_a_grace() {
    let mut story = running(BuildSpec { timeout_ms: 5_000, ..spec() });
    story.wait(14_999);
    assert_eq!(story.due(), []);
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(16_000)));
    story.wait(1);
    story.hear("w0", "data1.boot1");
    assert_eq!(story.due(), [expire("b.0.1", Reason::Timeout)]);
    assert_eq!(story.apply(expire("b.0.1", Reason::Timeout)), Reply::Done);
    assert_eq!(story.due(), []);
    let mut story = running(spec());
    story.wait(Policy::default().timeout_default_ms + 10_000);
    story.hear("w0", "data1.boot1");
    assert_eq!(story.due(), [expire("b.0.1", Reason::Timeout)]);
}

#[test]
fn silence_is_enforced_from_what_agents_report() {
    let mut story = running(BuildSpec { silence_timeout_ms: 5_000, ..spec() });
    let silent = |story: &mut Story, ms| {
        let live = story.liveness.workers.get_mut(&worker("w0")).unwrap();
        live.silent_ms.insert(key("b.0.1"), ms);
        story.due()
    };
    assert_eq!(silent(&mut story, 14_999), []);
    let heard = story.liveness.workers[&worker("w0")].last_seen;
    assert_eq!(due::next(&story.state, &story.liveness), Some(heard.plus_ms(1)));
    // One that says nothing more asks for no look at the clock but for its lease.
    let mut silenced = story.liveness.clone();
    silenced.workers.get_mut(&worker("w0")).unwrap().session = SessionState::Late;
    let lease = Policy::default().worker_lease_ms;
    assert_eq!(due::next(&story.state, &silenced), Some(heard.plus_ms(lease)));
    assert_eq!(silent(&mut story, 15_000), [expire("b.0.1", Reason::Silence)]);
    assert_eq!(story.apply(expire("b.0.1", Reason::Silence)), Reply::Done);
    story.finish("b.0.1", "w0", Outcome::Stopped);
    assert_eq!(story.show("b"), "failed (silence): failed (silence) after 1");
}

#[test]
fn a_drain_deadline_stops_what_still_runs() {
    let mut story = running(spec());
    story.apply(drain("w0", Some(2_000)));
    assert_eq!(story.due(), []);
    story.wait(1_000);
    assert_eq!(story.due(), [expire("b.0.1", Reason::Drained)]);
    assert_eq!(due::next(&story.state, &story.liveness), Some(LogTime(2_000)));
    story.apply(expire("b.0.1", Reason::Drained));
    story.finish("b.0.1", "w0", Outcome::Stopped);
    story.wait(1_000);
    story.hear("w0", "data1.boot1");
    // A drain that is over and has nothing left to end asks for no look at the clock.
    assert!(due::next(&story.state, &story.liveness).is_none_or(|next| next.0 > story.now));
}

#[test]
fn a_stop_ends_unproven_only_on_a_lost_worker() {
    let mut story = running(spec());
    story.cancel("b");
    story.wait(60_000);
    story.hear("w0", "data1.boot1");
    assert_eq!(story.due(), []);
    story.apply(lose("w0", "data1.boot1"));
    assert_eq!(story.due(), [end_unverified("b.0.1")]);
}

#[test]
fn retention_takes_the_oldest_over_number_or_age_and_never_pinned_ones() {
    let mut story = Story::new();
    for id in ["a", "b", "c", "d"] {
        story.wait(10).submit(id);
        story.cancel(id);
    }
    story.apply(pin("a", Pinned::Yes));
    assert_eq!(story.due(), []);
    let policy = Policy { retain_builds: 2, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    let over = purge(&["b"], 1_020);
    assert_eq!(story.due(), std::slice::from_ref(&over));
    assert_eq!(story.apply(over), Reply::Purged(1));
    assert_eq!(story.due(), []);
    story.now = 1_030 + Policy::default().retain_ms;
    let aged = story.due();
    assert_eq!(
        aged,
        [purge(&["c"], 1_030), Command::ExpireTombstones(cmd::ExpireTombstones { builds: vec![build("b")] })]
    );
    for command in aged {
        assert_eq!(story.apply(command), Reply::Purged(1));
    }
}
