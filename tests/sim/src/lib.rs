//! A whole cluster in one thread on a virtual clock: the real core of the coordinators over a simulated log, and
//! small models of agents, their hosts and clients. One seed decides everything, so a failure can be replayed.
//!
//! First everything goes wrong that can: leaders change and lose what was not committed, coordinators restart from
//! their rows, agents crash, hosts boot, data directories vanish, networks split, operators drain. Then all is healed and
//! every build must come to its end. The invariants are checked after every entry, and an oracle that knows what clients
//! were told and what hosts really ran checks the rest. A bug can be planted in the models, to see that it is found.

mod agent;
mod client;
mod faults;
mod host;
mod image;
mod oracle;
mod orphan;
mod random;
mod registry;
mod world;

use std::fmt;

/// A mistake that the simulation can be told to make, and must then find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A leader acknowledges submits before they are committed.
    AckBeforeCommit,
    /// An agent says that an attempt is dead before it is.
    StoppedBeforeDead,
    /// An agent that restarts takes what it ran for a success.
    InventedSuccess,
    /// A coordinator that restarts from its rows passes over an entry of the log.
    SkippedEntry,
    /// A new leader sends nothing that the old one had promised to send.
    ForgottenEffects,
    /// An agent calls dead what it cannot see.
    ClaimedProof,
    /// An agent offers more memory than its host has.
    InflatedOffer,
    /// No leader ends a quarantine.
    NeverProbed,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::AckBeforeCommit,
        Self::StoppedBeforeDead,
        Self::InventedSuccess,
        Self::SkippedEntry,
        Self::ForgottenEffects,
        Self::ClaimedProof,
        Self::InflatedOffer,
        Self::NeverProbed,
    ];
}

/// What a run that held did: too little of it would prove nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Log entries.
    pub entries: u64,
    /// Builds that ended well, badly, cancelled.
    pub succeeded: u64,
    /// See `succeeded`.
    pub failed: u64,
    /// See `succeeded`.
    pub cancelled: u64,
    /// Leaders that were elected.
    pub terms: u64,
    /// Attempts that were begun beyond each task's first.
    pub reruns: u64,
    /// Workers that were declared lost.
    pub losses: u64,
    /// Builds that ended without proof.
    pub unverified: u64,
    /// Ends that agents reported without proof.
    pub unproven: u64,
    /// Quarantines that came to a probe.
    pub probes: u64,
    /// Builds that ended well with an index of images.
    pub indexes: u64,
    /// Ticks at which room was kept for a task.
    pub claims: u64,
}

/// What did not hold, and how to see it again.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Virtual milliseconds from the start.
    pub at_ms: u64,
    /// What did not hold.
    pub why: String,
    /// The last things that happened.
    pub tail: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.tail {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "seed {} failed at {} ms: {}", self.seed, self.at_ms, self.why)?;
        write!(f, "replay: cargo sim --seed {}", self.seed)
    }
}

/// Runs one seed.
///
/// # Errors
/// [`Failure`] when something did not hold.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Summary, Box<Failure>> {
    world::World::new(seed, bug).run()
}

#[cfg(test)]
mod tests {
    use super::{Bug, Summary, run};

    #[test]
    fn hundreds_of_seeds_hold_and_something_happens_in_them() {
        let mut sum = Summary::default();
        for seed in 0..300 {
            let one = run(seed, None).unwrap_or_else(|failure| panic!("{failure}"));
            sum.succeeded += one.succeeded;
            sum.failed += one.failed;
            sum.cancelled += one.cancelled;
            sum.terms += one.terms;
            sum.reruns += one.reruns;
            sum.losses += one.losses;
            sum.unverified += one.unverified;
            sum.unproven += one.unproven;
            sum.probes += one.probes;
            sum.claims += one.claims;
            sum.indexes += one.indexes;
        }
        // A run in which little goes wrong proves little.
        assert!(sum.succeeded > 1_000 && sum.failed > 300 && sum.cancelled > 300, "{sum:?}");
        assert!(sum.unproven > 50 && sum.probes > 50 && sum.claims > 50, "{sum:?}");
        assert!(sum.indexes > 50, "{sum:?}");
        assert!(sum.terms > 600 && sum.reruns > 300 && sum.losses > 100 && sum.unverified > 10, "{sum:?}");
    }

    #[test]
    fn equal_seeds_run_equally() {
        for seed in [1, 77, 4242] {
            assert_eq!(run(seed, None).unwrap(), run(seed, None).unwrap());
        }
    }

    #[test]
    fn every_planted_bug_is_found() {
        for bug in Bug::ALL {
            let found = (0..200).find_map(|seed| run(seed, Some(bug)).err());
            assert!(found.is_some(), "{bug:?} was not found in 200 seeds");
        }
    }
}
