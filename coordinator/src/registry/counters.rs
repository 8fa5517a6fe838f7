//! What consensus and storage count and measure, for the metrics page. Nothing here decides anything.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of a [`Histogram`]'s buckets, in microseconds; the last bucket has none.
pub const BOUNDS_US: [u64; 15] =
    [50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000];

/// Durations in fixed buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let place = BOUNDS_US.partition_point(|bound| *bound < us);
        self.buckets[place].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Counts per bucket, not cumulated; bounds are [`BOUNDS_US`].
    #[must_use]
    pub fn buckets(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }

    /// The sum of all durations.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us.load(Ordering::Relaxed))
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets().iter().sum()
    }
}

/// A number that others read.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Replaces.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Reads.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// Flushes of the log, and how long each took.
    pub fsync: Histogram,
    /// From taking commands in hand to their replies, on the leader.
    pub commit: Histogram,
    /// Batches written to the store, and how long each took.
    pub store_write: Histogram,
    /// Commands committed by this node as the leader.
    pub commands: Number,
    /// Log entries they were in.
    pub entries: Number,
    /// Commands sent on to the leader.
    pub forwarded: Number,
    /// Rounds of confirming leadership for reads.
    pub read_rounds: Number,
    /// Reads that waited for such a round.
    pub reads: Number,
    /// The log's size on disk in bytes.
    pub log_bytes: Number,
    /// Bytes appended to the log since this process began.
    pub log_appended_bytes: Number,
    /// The last entry applied.
    pub applied_index: Number,
    /// The last entry that the store has.
    pub stored_index: Number,
    /// The store's size on disk in bytes.
    pub store_bytes: Number,
    /// Blobs that builds name and that nobody had when this node last looked as the leader.
    pub blobs_missing: Number,
    /// Blobs that builds name and that fewer voters that answer had than policy says, when this node last looked as the leader.
    pub blobs_short: Number,
    /// Rows that wait to be written to the store.
    pub store_pending: Number,
    /// Snapshots written.
    pub snapshots: Number,
    /// Snapshots received and installed.
    pub snapshots_installed: Number,
    /// Elections this node won.
    pub elections_won: Number,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_whose_bound_they_do_not_exceed() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_micros(50));
        histogram.record(Duration::from_micros(51));
        histogram.record(Duration::from_secs(3600));
        let buckets = histogram.buckets();
        assert_eq!((buckets[0], buckets[1], buckets[BOUNDS_US.len()]), (1, 1, 1));
        assert_eq!(histogram.count(), 3);
    }
}
