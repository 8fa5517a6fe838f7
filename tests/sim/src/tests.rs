//! The simulation proves something: it holds, much happens in it, it repeats itself, and it finds what is wrong.

use super::{Bug, Failure, Keep, Summary, World, run};

#[test]
fn seeds_hold_and_something_happens_in_them() {
    let mut sum = Summary::default();
    for seed in 0..200 {
        sum += run(seed, None).unwrap_or_else(|failure| panic!("{failure}"));
    }
    // A run in which little goes wrong proves little.
    assert!(sum.succeeded > 1_000 && sum.failed > 300 && sum.cancelled > 300 && sum.purged > 1_000, "{sum:#?}");
    assert!(sum.terms > 500 && sum.lost_proposals > 30 && sum.reruns > 300 && sum.losses > 100, "{sum:#?}");
    assert!(sum.unverified > 10 && sum.unproven > 50 && sum.probes > 50 && sum.claims > 50, "{sum:#?}");
    assert!(sum.cut_off > 50, "{sum:#?}");
    assert!(sum.indexes > 50 && sum.snapshots > 1_000 && sum.installs > 100, "{sum:#?}");
    assert!(sum.disks_lost > 100 && sum.replaced > 40 && sum.repaired > 500, "{sum:#?}");
    assert!(sum.collected > 500 && sum.reused > 500, "{sum:#?}");
}

#[test]
fn equal_seeds_do_the_same_to_the_last_event() {
    let mut digests = std::collections::BTreeSet::new();
    for seed in [1, 77, 4242] {
        let first = run(seed, None).unwrap();
        assert_eq!(first, run(seed, None).unwrap());
        // Keeping the words changes nothing.
        assert_eq!(first, World::new(seed, None, Keep::Words).run().summary);
        digests.insert(first.digest);
    }
    assert_eq!(digests.len(), 3, "different seeds do different things");
}

fn find(bug: Bug, budget: u64) -> Box<Failure> {
    let found = (0..budget).find_map(|seed| run(seed, Some(bug)).err());
    found.unwrap_or_else(|| panic!("{bug:?} was not found in {budget} seeds"))
}

#[test]
fn every_planted_bug_is_found_within_its_budget() {
    for (bug, budget) in Bug::ALL {
        find(bug, budget);
    }
}

#[test]
fn a_failure_is_the_same_when_it_is_replayed_and_has_a_story() {
    let failure = find(Bug::StaleResult, 10);
    let again = run(failure.seed, Some(Bug::StaleResult)).unwrap_err();
    assert_eq!((&failure.why, failure.at_ms, failure.digest), (&again.why, again.at_ms, again.digest));
    let story = failure.story();
    assert!(!story.is_empty() && story.len() * 2 < failure.lines.len(), "{} of {}", story.len(), failure.lines.len());
    let build = failure.why.split_whitespace().find(|word| word.starts_with('c')).unwrap();
    let build = build.split('.').next().unwrap();
    let told = |what: &str| story.iter().any(|line| line.text.contains(what));
    assert!(told(&format!("submit {build}")) && told(&format!("assign {build}.0.1")), "{failure}");
    assert_eq!(story.last(), failure.lines.iter().rev().find(|line| line.text.contains(build)));
}

#[test]
fn the_table_of_bugs_is_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let text = std::fs::read_to_string(path).unwrap();
    for (bug, budget) in Bug::ALL {
        let name = format!("| `{bug:?}` |");
        let row = text.lines().find(|line| line.starts_with(&name));
        let told = row.is_some_and(|row| row.ends_with(&format!("| {budget} |")));
        assert!(told, "tests/README.md does not say that {bug:?} is found within {budget} seeds");
    }
}
