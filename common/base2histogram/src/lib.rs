//! The part of the crate `base2histogram` that openraft and raft-log use, computed where the original looks it up.
//!
//! The original (0.2.3) makes tables for all sixteen of its resolutions at the first use of one: 26 MiB of each coordinator, of
//! which those two use 2 KiB. Buckets are as there: up to three each value has one, above that each power of two has four, so that
//! a percentile is at most a fifth below what was recorded.

use std::fmt;
use std::marker::PhantomData;

/// Buckets in each power of two.
const STEPS: usize = 4;
const BUCKETS: usize = STEPS * 63;

/// How often values were recorded, by bucket. The parameter is there for the original's signatures.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Histogram<T = ()> {
    counts: Vec<u64>,
    samples: u64,
    data: PhantomData<T>,
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: vec![0; BUCKETS], samples: 0, data: PhantomData }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value so many times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        let bucket = &mut self.counts[bucket_of(value)];
        *bucket = bucket.saturating_add(count);
        self.samples = self.samples.saturating_add(count);
    }

    /// What stands at the usual places.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        let at = |share: f64| self.percentile(share);
        PercentileStats {
            samples: self.samples,
            p0_1: at(0.001),
            p1: at(0.01),
            p5: at(0.05),
            p10: at(0.1),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
        }
    }

    /// The least value of the bucket below or in which such a share of the values is; 0 when there are none.
    fn percentile(&self, share: f64) -> u64 {
        let rank = (share * self.samples as f64).ceil().max(1.0) as u64;
        let mut seen = 0_u64;
        let found = self.counts.iter().position(|count| {
            seen = seen.saturating_add(*count);
            seen >= rank
        });
        found.map_or(0, least_of)
    }
}

fn bucket_of(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let power = value.ilog2() as usize;
    (power - 1) * STEPS + (value >> (power - 2)) as usize % STEPS
}

fn least_of(bucket: usize) -> u64 {
    match bucket.checked_sub(STEPS) {
        Some(above) => ((STEPS + above % STEPS) as u64) << (above / STEPS),
        None => bucket as u64,
    }
}

/// Values below or at which so many per cent of a histogram's are, and how many it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names say it, and are the original's")]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p0_1, p1, p5, p10, p50, p90, p99, p99_9 } = self;
        write!(f, "[samples: {samples}, P0.1: {p0_1}, P1: {p1}, P5: {p5}, P10: {p10}, ")?;
        write!(f, "P50: {p50}, P90: {p90}, P99: {p99}, P99.9: {p99_9}]")
    }
}

/// Histograms with names; the original draws them, here each is a line.
#[derive(Clone, Debug)]
pub struct AsciiChart<T = ()> {
    series: Vec<(String, Histogram<T>)>,
}

impl<T> Default for AsciiChart<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> AsciiChart<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { series: Vec::new() }
    }

    /// One more.
    #[must_use]
    pub fn add(mut self, name: &str, histogram: Histogram<T>) -> Self {
        self.series.push((name.to_owned(), histogram));
        self
    }

    /// In words.
    pub fn detailed(&self) -> impl fmt::Display {
        let lines = self.series.iter().map(|(name, histogram)| format!("{name}: {}\n", histogram.percentile_stats()));
        lines.collect::<String>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(least_of(bucket)), bucket);
            if bucket > 0 {
                assert_eq!(bucket_of(least_of(bucket) - 1), bucket - 1);
            }
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_a_fifth_too_low_at_most() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats().p50, 0);
        (1..=1000).for_each(|value| histogram.record(value));
        histogram.record_n(1_000_000, 1000);
        let stats = histogram.percentile_stats();
        assert_eq!(stats.samples, 2000);
        let expected = [(stats.p0_1, 2), (stats.p10, 200), (stats.p50, 1000), (stats.p90, 1_000_000)];
        for (found, exact) in expected {
            assert!(found <= exact && found * 5 >= exact * 4, "{found} for {exact}");
        }
        let chart = AsciiChart::new().add("waits", histogram);
        assert!(chart.detailed().to_string().starts_with("waits: [samples: 2000, "));
    }
}
