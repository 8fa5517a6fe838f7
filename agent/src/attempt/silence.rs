//! How long a command has printed nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use helix_agent_core::Phase;

/// When an attempt's command began or last printed something, whichever was later, by a clock that nobody sets. Clones share it.
#[derive(Clone, Debug)]
pub struct LastOutput {
    began: Instant,
    after_ms: Arc<AtomicU64>,
}

impl LastOutput {
    pub(super) fn now() -> Self {
        Self { began: Instant::now(), after_ms: Arc::default() }
    }

    /// It is now.
    pub(super) fn note(&self) {
        self.after_ms.store(self.elapsed_ms(), Ordering::Relaxed);
    }

    /// How long ago it was, in milliseconds. Only a command that runs can be silent: what an attempt fetches, stores or waits for does not
    /// count.
    #[must_use]
    pub fn silent_ms(&self, phase: &Phase) -> u64 {
        match phase {
            Phase::Building => self.elapsed_ms().saturating_sub(self.after_ms.load(Ordering::Relaxed)),
            Phase::Preparing
            | Phase::AwaitingCommit { .. }
            | Phase::Uploading
            | Phase::AwaitingImages { .. }
            | Phase::Ended { .. }
            | Phase::Removing { .. } => 0,
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_a_command_that_runs_is_silent_and_what_it_prints_ends_that() {
        let began = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        let last = LastOutput { began, after_ms: Arc::default() };
        for phase in [Phase::Preparing, Phase::Uploading, Phase::AwaitingCommit { commit: String::new() }] {
            assert_eq!(last.silent_ms(&phase), 0, "{phase:?}");
        }
        assert!(last.silent_ms(&Phase::Building) >= 60_000);
        last.clone().note();
        assert!(last.silent_ms(&Phase::Building) < 60_000);
    }
}
