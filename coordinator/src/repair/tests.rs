//! Silence and passes as values, and passes over clusters of three whose consensus is real, and whose blobs are names.

pub(crate) mod copies;

use std::collections::BTreeSet;
use std::time::Duration;

use helix_model::NodeId;
use tokio::time::Instant;

use super::keep::Done;
use super::silence::{Silence, Turn};
use super::{Pace, Plan, Schedule};

fn nodes<const COUNT: usize>(ids: [u64; COUNT]) -> BTreeSet<NodeId> {
    BTreeSet::from(ids.map(NodeId))
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_voter_is_left_out_once_after_it_was_silent_for_long_and_is_back_once() {
    let (began, voters, patience) = (Instant::now(), nodes([1, 2, 3]), 10 * MINUTE);
    let mut silence = Silence::default();
    let mut note = |minute: u32, answered| {
        let turns = silence.note(&voters, &answered, began + minute * MINUTE, patience);
        (turns, silence.awaited(), silence.left_out().clone())
    };
    assert_eq!(note(0, nodes([1, 2, 3])), (vec![], None, nodes([])));
    // How long it may have been silent before it was asked says nothing.
    assert_eq!(note(60, nodes([1, 2])), (vec![], Some(NodeId(3)), nodes([])));
    assert_eq!(note(69, nodes([1, 2])), (vec![], Some(NodeId(3)), nodes([])));
    // A minute of answers begins anew.
    assert_eq!(note(70, nodes([1, 2, 3])), (vec![], None, nodes([])));
    assert_eq!(note(71, nodes([1, 2, 3])), (vec![], None, nodes([])));
    assert_eq!(note(72, nodes([1, 2])), (vec![], Some(NodeId(3)), nodes([])));
    // One answer now and then does not: whoever waited for that one would wait for ever.
    assert_eq!(note(75, nodes([1, 2, 3])), (vec![], None, nodes([])));
    assert_eq!(note(76, nodes([1, 2])), (vec![], Some(NodeId(3)), nodes([])));
    assert_eq!(note(82, nodes([1, 2])), (vec![Turn::LeftOut(NodeId(3))], None, nodes([3])));
    assert_eq!(note(83, nodes([1, 2, 3])), (vec![], None, nodes([3])));
    assert_eq!(note(84, nodes([1, 2])), (vec![], None, nodes([3])));
    // Another is waited for as long.
    assert_eq!(note(85, nodes([1])), (vec![], Some(NodeId(2)), nodes([3])));
    assert_eq!(note(86, nodes([1, 2, 3])), (vec![], None, nodes([3])));
    assert_eq!(note(87, nodes([1, 2, 3])), (vec![Turn::Back(NodeId(3))], None, nodes([])));
    assert_eq!(note(88, nodes([1, 2, 3])), (vec![], None, nodes([])));
}

#[test]
fn nothing_is_said_of_one_that_was_removed_while_it_was_silent() {
    let began = Instant::now();
    let mut silence = Silence::default();
    silence.note(&nodes([1, 2, 3]), &nodes([1, 2]), began, MINUTE);
    assert_eq!(silence.note(&nodes([1, 2, 3]), &nodes([1, 2]), began + MINUTE, MINUTE), [Turn::LeftOut(NodeId(3))]);
    assert_eq!(silence.note(&nodes([1, 2]), &nodes([1, 2]), began + 2 * MINUTE, MINUTE), []);
    assert_eq!((silence.awaited(), silence.left_out()), (None, &nodes([])));
}

#[test]
fn a_pass_suffices_for_an_hour_and_one_that_left_something_undone_for_ten_minutes() {
    let schedule = Schedule::default();
    let plan =
        |keepers, silent, wanted| Plan { keepers, silent, leaving: None, copies: 2, wanted, pace: Pace::Background };
    let (whole, part) = (|| plan(nodes([1, 2, 3]), nodes([]), 2), || plan(nodes([1, 2]), nodes([3]), 2));
    let at = Instant::now();
    let suffices = |done: Plan, short, plan: &Plan, minutes: u32| {
        Done { plan: done, short, at }.suffices(plan, at + minutes * MINUTE, &schedule)
    };
    for (done, short, plan, minutes, expected) in [
        (whole(), 0, whole(), 59, true),
        (whole(), 0, whole(), 60, false),
        (whole(), 1, whole(), 9, true),
        (whole(), 1, whole(), 10, false),
        (part(), 0, part(), 9, true),
        (part(), 0, part(), 10, false),
        // At once: one fell silent, is back, was removed; copies changed, even if there is nobody for one more.
        (whole(), 0, part(), 0, false),
        (part(), 0, whole(), 0, false),
        (part(), 0, plan(nodes([1, 2]), nodes([]), 2), 0, false),
        (part(), 0, plan(nodes([1, 2]), nodes([3]), 3), 0, false),
    ] {
        let seen = suffices(done, short, &plan, minutes);
        assert_eq!(seen, expected, "{short} short, {minutes} minutes, without {:?}", plan.silent);
    }
}
