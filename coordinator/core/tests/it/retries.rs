//! What becomes of a task after each reason: whose budget pays, how long it waits, where it goes.

use helix_core::command::{Command, Outcome};
use helix_core::record::Policy;
use helix_core::{Reply, command as cmd};
use helix_model::{BuildSpec, Fault, Reason};

use crate::story::*;

const EVER: u64 = 100_000;

/// A build on a worker that is never quarantined, and how its attempts end until it has.
fn attempts(retries: u32, infra_retries: u32, reasons: impl IntoIterator<Item = Reason>) -> (usize, String) {
    let mut story = Story::new();
    let policy = Policy { infra_retries, quarantine_after: 0, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    story.worker("w1", 1);
    story.submit_as("b", BuildSpec { retries, ..spec() });
    for (place, reason) in reasons.into_iter().enumerate() {
        let attempt = format!("b.0.{}", place + 1);
        story.wait(EVER);
        if story.assign(&attempt, "w1") != Reply::Done {
            break;
        }
        assert_eq!(story.finish(&attempt, "w1", failed(reason)), Reply::Done);
        let shown = story.show("b");
        assert!(shown.starts_with("running: waits") || shown.starts_with("failed"), "{shown}");
    }
    let ran = story.record("b").unwrap().tasks[0].attempts.len();
    (ran, story.show("b"))
}

#[test]
fn every_reason_is_paid_by_its_own_budget() {
    for reason in Reason::ALL.iter().copied() {
        let forever = || std::iter::repeat(reason);
        let (user, infra) = (attempts(3, 0, forever()).0 - 1, attempts(0, 2, forever()).0 - 1);
        let expected = match reason {
            // Trying again changes nothing about these.
            Reason::NoCommand | Reason::Policy => (0, 0),
            // Only the registry cancels: from an agent it means that the agent had to go.
            Reason::Cancelled => (0, 2),
            _ if reason.fault() == Fault::User => (3, 0),
            _ => (0, 2),
        };
        assert_eq!((user, infra), expected, "{reason}");
        // By default nothing of the user's is tried again, and ours twice.
        let default = attempts(0, Policy::default().infra_retries, forever()).0;
        assert_eq!(default, 1 + expected.1, "{reason}");
    }
}

#[test]
fn who_outgrows_what_it_asked_for_pays_itself() {
    // What was asked for, the user's budget, and how many attempts ran with two retries of ours.
    for (asked, retries, expected) in [(1 << 20, 0, 1), (1 << 20, 1, 2), (0, 0, 3), (0, 5, 3)] {
        let mut story = Story::new();
        story.worker("w1", 1);
        let resources = helix_model::Resources { disk_bytes: asked, ..helix_model::Resources::default() };
        story.submit_as("b", BuildSpec { retries, resources, ..spec() });
        let mut ran = 0;
        loop {
            let attempt = format!("b.0.{}", ran + 1);
            story.wait(EVER);
            if story.assign(&attempt, "w1") != Reply::Done {
                break;
            }
            ran += 1;
            story.apply(outgrown(finish(&attempt, "w1", "data1.boot1", failed(Reason::DiskFull))));
        }
        assert_eq!(ran, expected, "{asked} {retries}");
        assert!(story.show("b").starts_with("failed (disk_full)"), "{}", story.show("b"));
    }
}

#[test]
fn budgets_are_apart() {
    use Reason::{DiskFull, Exit, Internal, Timeout};
    let (ran, shown) = attempts(2, 2, [Exit, DiskFull, Timeout, Internal, Exit]);
    assert_eq!((ran, shown.as_str()), (5, "failed (exit): failed (exit) after 5"));
    let (ran, shown) = attempts(2, 2, [Exit, DiskFull, Timeout, Internal, DiskFull]);
    assert_eq!((ran, shown.as_str()), (5, "failed (disk_full): failed (disk_full) after 5"));
}

#[test]
fn back_off_doubles_over_both_budgets_up_to_a_minute() {
    let mut story = Story::new();
    let policy = Policy { infra_retries: 9, quarantine_after: 0, ..Policy::default() };
    story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }));
    story.worker("w1", 1);
    story.submit_as("b", BuildSpec { retries: 9, ..spec() });
    let mut waits = Vec::new();
    for number in 1..9 {
        let attempt = format!("b.0.{number}");
        story.assign(&attempt, "w1");
        let reason = if number % 2 == 0 { Reason::Exit } else { Reason::DiskFull };
        story.finish(&attempt, "w1", failed(reason));
        let (_, from) = story.show("b").split_once("waits from ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let from: u64 = from.split(' ').next().unwrap().parse().unwrap();
        waits.push((from - story.now) / 1_000);
        story.now = from;
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
}

#[test]
fn between_attempts_the_build_runs_and_nothing_is_counted_as_running() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit("b");
    let totals = |story: &Story| {
        let totals = story.state.totals();
        (totals.queued, totals.running, totals.load)
    };
    assert_eq!(totals(&story), (1, 0, 0));
    story.assign("b.0.1", "w1");
    assert_eq!(totals(&story), (0, 1, 1));
    story.finish("b.0.1", "w1", failed(Reason::DiskFull));
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    assert_eq!(totals(&story), (1, 0, 0));
    story.wait(1_000).assign("b.0.2", "w1");
    assert_eq!(totals(&story), (0, 1, 1));
    story.finish("b.0.2", "w1", Outcome::Stopped);
    story.cancel("b");
    assert_eq!(totals(&story), (0, 0, 0));
}

#[test]
fn a_failed_store_never_hides_the_exit_code() {
    let mut story = Story::new();
    story.worker("w1", 1);
    story.submit("b");
    for number in 1..=3 {
        let attempt = format!("b.0.{number}");
        story.wait(EVER).assign(&attempt, "w1");
        let Command::FinishAttempt(report) = finish(&attempt, "w1", "data1.boot1", failed(Reason::Artifact)) else {
            panic!()
        };
        story.apply(Command::FinishAttempt(cmd::FinishAttempt { exit_code: Some(0), ..report }));
    }
    let end = story.record("b").unwrap().tasks[0].attempts[2].end.clone().unwrap();
    assert_eq!((end.reason, end.exit_code), (Some(Reason::Artifact), Some(0)));
}
