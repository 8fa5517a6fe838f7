//! A whole cluster in one thread on a virtual clock: the real cores of coordinators and agents over a simulated log, with
//! models of the shells around them, of hosts, disks and clients. One seed decides everything, so a failure can be replayed.
//!
//! First everything goes wrong that can: leaders change and lose what was not committed, coordinators crash, restart from
//! their rows, install snapshots and lose their disks, agents crash, hosts boot, data directories vanish, networks lose,
//! repeat and delay, operators drain. Then all is healed and every build must come to its end. The invariants are checked
//! after every entry, and an oracle that knows what clients were told, what hosts really ran and what disks really hold
//! checks the rest. A bug can be planted, to see that it is found.

mod agent;
mod attempt;
mod blobs;
mod bug;
mod client;
mod explain;
mod faults;
mod host;
mod leader;
mod oracle;
mod random;
mod registry;
mod sabotage;
mod session;
mod store;
mod trace;
mod wire;
mod words;
mod world;

use std::fmt;
use std::ops::AddAssign;

pub use bug::Bug;
pub use trace::Line;

use trace::Keep;
use world::World;

/// What a run that held did: too little of it would prove nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Of everything that happened, in order: equal runs have equal ones.
    pub digest: u64,
    /// Log entries.
    pub entries: u64,
    /// Builds that ended well, badly, cancelled.
    pub succeeded: u64,
    /// See `succeeded`.
    pub failed: u64,
    /// See `succeeded`.
    pub cancelled: u64,
    /// Builds that were purged.
    pub purged: u64,
    /// Leaders that were elected.
    pub terms: u64,
    /// Proposals that were lost with their leaders.
    pub lost_proposals: u64,
    /// Attempts that were begun beyond each task's first.
    pub reruns: u64,
    /// Workers that were declared lost.
    pub losses: u64,
    /// Attempts that were stopped by agents that were cut off for too long.
    pub cut_off: u64,
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
    /// Snapshots that were walked to their end.
    pub snapshots: u64,
    /// Snapshots that were installed by a node too far behind.
    pub installs: u64,
    /// Coordinators' blobs that were lost.
    pub disks_lost: u64,
    /// Coordinators that were lost whole, and replaced.
    pub replaced: u64,
    /// Copies made of blobs that were short of them.
    pub repaired: u64,
    /// Blobs collected.
    pub collected: u64,
    /// Puts of bytes that were there already.
    pub reused: u64,
    /// Copies of blobs that are held at the end.
    pub blobs: u64,
}

impl AddAssign for Summary {
    /// Of the digest, whatever tells the order of what was added.
    fn add_assign(&mut self, other: Self) {
        self.digest = self.digest.rotate_left(1) ^ other.digest;
        self.entries += other.entries;
        self.succeeded += other.succeeded;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.purged += other.purged;
        self.terms += other.terms;
        self.lost_proposals += other.lost_proposals;
        self.reruns += other.reruns;
        self.losses += other.losses;
        self.cut_off += other.cut_off;
        self.unverified += other.unverified;
        self.unproven += other.unproven;
        self.probes += other.probes;
        self.indexes += other.indexes;
        self.claims += other.claims;
        self.snapshots += other.snapshots;
        self.installs += other.installs;
        self.disks_lost += other.disks_lost;
        self.replaced += other.replaced;
        self.repaired += other.repaired;
        self.collected += other.collected;
        self.reused += other.reused;
        self.blobs += other.blobs;
    }
}

/// What did not hold, and how it came about.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Virtual milliseconds from the start.
    pub at_ms: u64,
    /// What did not hold.
    pub why: String,
    /// The digest of all that happened until then.
    pub digest: u64,
    /// All that happened.
    pub lines: Vec<Line>,
}

/// Lines at the end of a failure that is not explained.
const TAIL: usize = 40;

impl Failure {
    /// How it came about: the lines about whoever the verdict names.
    #[must_use]
    pub fn story(&self) -> Vec<Line> {
        explain::story(&self.why, &self.lines)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines[self.lines.len().saturating_sub(TAIL)..] {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "seed {} failed at {} ms: {}", self.seed, self.at_ms, self.why)?;
        write!(f, "its story: cargo sim --seed {} --explain", self.seed)
    }
}

/// Runs one seed.
///
/// # Errors
/// [`Failure`] when something did not hold.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Summary, Box<Failure>> {
    let outcome = World::new(seed, bug, Keep::Digest).run();
    if outcome.wrong.is_none() {
        return Ok(outcome.summary);
    }
    // The same once more, with words.
    let outcome = World::new(seed, bug, Keep::Words).run();
    let why = outcome.wrong.unwrap_or_else(|| "it failed once and held when it was replayed".to_owned());
    let (at_ms, digest, lines) = (outcome.at_ms, outcome.summary.digest, outcome.lines);
    Err(Box::new(Failure { seed, at_ms, why, digest, lines }))
}

#[cfg(test)]
mod tests;
