//! Log time on the leader: monotonic, and moved to the wall clock only where most coordinators' clocks agree.
//!
//! Peers' wall clocks arrive with consensus messages. Invariant: what [`Clock::stamp`] answers never runs backwards
//! on one node, nor below the last stamp applied. By how much it leaps is known, so that nobody takes that for time that passed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_common::wall;
use helix_model::{LogTime, NodeId};

/// Clocks further apart than this do not agree.
const AGREEMENT_MS: u64 = 10_000;

/// A peer's clock counts for so long after it was heard.
const SAMPLE_AGE_MAX: Duration = Duration::from_secs(30);

/// Steps smaller than this are a clock's drift, which is time that passed.
const LEAP_MS_MIN: u64 = 200;

/// The leader's clock, and what is known of the others'.
#[derive(Debug)]
pub struct Clock {
    own: NodeId,
    inner: Mutex<Inner>,
    skewed: AtomicBool,
    leapt_ms: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    base: LogTime,
    base_at: Instant,
    samples: BTreeMap<NodeId, (u64, Instant)>,
}

impl Clock {
    /// A clock that begins at the beginning of time, until [`Self::stamp`] learns better.
    #[must_use]
    pub fn new(own: NodeId) -> Self {
        let inner = Inner { base: LogTime(0), base_at: Instant::now(), samples: BTreeMap::new() };
        Self { own, inner: Mutex::new(inner), skewed: AtomicBool::new(false), leapt_ms: AtomicU64::new(0) }
    }

    /// Takes note of a peer's wall clock.
    pub fn observe(&self, node: NodeId, wall_ms: u64) {
        if node != self.own && wall_ms > 0 {
            self.lock().samples.insert(node, (wall_ms, Instant::now()));
        }
    }

    /// The log time now: at least `applied`, at least what was answered before.
    pub fn stamp(&self, applied: LogTime, voters: &BTreeSet<NodeId>) -> LogTime {
        self.stamp_at(applied, voters, Instant::now(), wall::now_ms())
    }

    fn stamp_at(&self, applied: LogTime, voters: &BTreeSet<NodeId>, now: Instant, wall: u64) -> LogTime {
        let mut inner = self.lock();
        let elapsed = u64::try_from(now.saturating_duration_since(inner.base_at).as_millis()).unwrap_or(u64::MAX);
        let steady = inner.base.plus_ms(elapsed);
        let mut time = steady.max(applied);
        let agreed = inner.majority_agrees(self.own, voters, now, wall);
        if agreed {
            time = time.max(LogTime(wall));
        }
        inner.base = time;
        // What is left of a millisecond counts next time: many stamps in one must not stop the clock.
        inner.base_at += Duration::from_millis(elapsed);
        let leap_ms = time.since_ms(steady);
        if leap_ms >= LEAP_MS_MIN {
            // Within the lock: whoever sees a time sees the leap that led there.
            self.leapt_ms.fetch_add(leap_ms, Ordering::SeqCst);
        }
        drop(inner);
        // Of a single voter there is nobody to disagree; a voter that is not heard from is silent, not skewed.
        if self.skewed.swap(!agreed, Ordering::Relaxed) == agreed {
            if agreed {
                tracing::info!("clocks of a majority agree again: log time follows the wall clock");
            } else {
                tracing::warn!(
                    code = "clock_skew",
                    "no majority of coordinators agrees with this clock: log time goes on by itself"
                );
            }
        }
        time
    }

    /// Whether log time goes on by itself because the coordinators' clocks do not agree.
    #[must_use]
    pub fn is_skewed(&self) -> bool {
        self.skewed.load(Ordering::Relaxed)
    }

    /// By how much log time has leapt ahead of the time that passed, ever: to the wall clock, or to what others had stamped.
    #[must_use]
    pub fn leapt_ms(&self) -> u64 {
        self.leapt_ms.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn majority_agrees(&self, own: NodeId, voters: &BTreeSet<NodeId>, now: Instant, wall: u64) -> bool {
        let agreeing = voters.iter().filter(|voter| **voter == own || self.agrees(**voter, now, wall)).count();
        agreeing * 2 > voters.len()
    }

    fn agrees(&self, voter: NodeId, now: Instant, wall: u64) -> bool {
        let Some((theirs, heard)) = self.samples.get(&voter) else { return false };
        let age = now.saturating_duration_since(*heard);
        let theirs = theirs.saturating_add(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        age <= SAMPLE_AGE_MAX && theirs.abs_diff(wall) <= AGREEMENT_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR_MS: u64 = 365 * 86_400_000;

    fn voters(count: u64) -> BTreeSet<NodeId> {
        (1..=count).map(NodeId).collect()
    }

    #[test]
    fn a_single_node_follows_its_own_clock_and_never_runs_backwards() {
        let clock = Clock::new(NodeId(1));
        let start = Instant::now();
        assert_eq!(clock.stamp_at(LogTime(5), &voters(1), start, 1_000), LogTime(1_000));
        let later = start + Duration::from_millis(50);
        assert_eq!(clock.stamp_at(LogTime(5), &voters(1), later, 10), LogTime(1_050));
        assert_eq!(clock.stamp_at(LogTime(9_000), &voters(1), later, 10), LogTime(9_000));
    }

    #[test]
    fn a_leap_is_told_from_time_that_passes() {
        let clock = Clock::new(NodeId(1));
        let start = Instant::now();
        assert_eq!(clock.stamp_at(LogTime(5_000), &voters(3), start, 9_000), LogTime(5_000));
        let before = clock.leapt_ms();
        // Nobody was heard so far; then somebody is, who agrees.
        clock.lock().samples = BTreeMap::from([(NodeId(2), (9_100, start))]);
        assert_eq!(
            clock.stamp_at(LogTime(5_000), &voters(3), start + Duration::from_millis(100), 9_100),
            LogTime(9_100)
        );
        assert_eq!(clock.leapt_ms() - before, 4_000);
        assert_eq!(clock.stamp_at(LogTime(5_000), &voters(3), start + Duration::from_secs(9), 18_050), LogTime(18_050));
        assert_eq!(clock.leapt_ms() - before, 4_000, "drift is no leap");
    }

    #[test]
    fn many_stamps_in_a_millisecond_do_not_stop_the_clock() {
        let clock = Clock::new(NodeId(1));
        let start = Instant::now();
        clock.stamp_at(LogTime(1_000), &voters(3), start, 0);
        for number in 1..=10_000 {
            clock.stamp_at(LogTime(0), &voters(3), start + Duration::from_micros(100) * number, 0);
        }
        assert_eq!(clock.stamp_at(LogTime(0), &voters(3), start + Duration::from_secs(1), 0), LogTime(2_000));
    }

    #[test]
    fn one_node_a_year_ahead_does_not_move_log_time() {
        let clock = Clock::new(NodeId(1));
        let start = Instant::now();
        let truth = 50 * YEAR_MS;
        clock.lock().samples = BTreeMap::from([(NodeId(2), (truth, start)), (NodeId(3), (truth, start))]);
        let ahead = truth + YEAR_MS;
        assert_eq!(clock.stamp_at(LogTime(truth), &voters(3), start, ahead), LogTime(truth));
        assert!(clock.is_skewed());
        let later = start + Duration::from_secs(1);
        assert_eq!(clock.stamp_at(LogTime(truth), &voters(3), later, ahead), LogTime(truth + 1_000));
        assert_eq!(clock.stamp_at(LogTime(truth), &voters(3), later, truth + 4_000), LogTime(truth + 4_000));
        assert!(!clock.is_skewed());
    }
}
