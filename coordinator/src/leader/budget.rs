//! How many messages an agent may send: a bucket that fills at a steady pace.

use tokio::time::Instant;

/// Messages an agent may send at once: several for each attempt of a full spool, after a reconnect.
const BURST: f64 = 8_192.0;
/// Messages a second it may send for ever: far more than any host finishes builds.
const PER_SECOND: f64 = 2_048.0;

/// One session's bucket.
#[derive(Debug)]
pub(crate) struct Budget {
    left: f64,
    filled_at: Instant,
}

impl Budget {
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: BURST, filled_at: now }
    }

    /// Takes one message out; `false` when there is none.
    pub(crate) fn spend(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.left = (self.left + passed * PER_SECOND).min(BURST) - 1.0;
        self.filled_at = now;
        self.left >= 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_runs_dry_and_a_pause_fills_up() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let taken = (0..20_000).take_while(|_| budget.spend(start)).count();
        assert_eq!(taken, 8_192);
        assert!(budget.spend(start + Duration::from_secs(1)));
    }
}
