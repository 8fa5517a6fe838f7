//! Waiting between attempts: exponential, full jitter, a cap.
//!
//! Full jitter (each wait is uniform between nothing and the current bound) spreads a crowd that failed together.

use std::time::Duration;

/// How long to wait before each attempt that follows a failure.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Bounds that start at `base`, double with each failure, and end at `cap`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }

    /// Counts a failure and draws the wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let bound = self.bound();
        self.failures = self.failures.saturating_add(1);
        bound.mul_f64(rand::random::<f64>())
    }

    /// The longest wait that [`Self::next_wait`] would draw now.
    #[must_use]
    pub fn bound(&self) -> Duration {
        self.base.saturating_mul(2u32.saturating_pow(self.failures)).min(self.cap)
    }

    /// Failures counted since the last success.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets all failures: something worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_double_up_to_the_cap_and_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(50));
        for bound in [10, 20, 40, 50, 50] {
            assert_eq!(backoff.bound(), Duration::from_millis(bound));
            assert!(backoff.next_wait() <= Duration::from_millis(bound));
        }
        for _ in 0..100 {
            backoff.next_wait();
        }
        assert_eq!(backoff.bound(), Duration::from_millis(50));
        backoff.reset();
        assert_eq!(backoff.bound(), Duration::from_millis(10));
    }
}
