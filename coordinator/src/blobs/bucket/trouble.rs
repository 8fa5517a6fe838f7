//! How it goes with the bucket: for metrics, and for a log that has a line a minute and not one for every try.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::BucketError;

/// Between two lines about a bucket that goes on failing.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// Numbers for metrics, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BucketTotals {
    /// Requests that failed, each after its retries.
    pub errors: u64,
    /// Whether the last one did.
    pub failing: bool,
}

#[derive(Default)]
pub(super) struct Trouble {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    totals: BucketTotals,
    said: Option<Instant>,
    unsaid: u64,
    /// The last line was that it fails.
    is_known: bool,
}

impl Trouble {
    pub(super) fn failed(&self, error: &BucketError) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.totals.errors += 1;
        state.totals.failing = true;
        state.unsaid += 1;
        if state.said.is_none_or(|said| said.elapsed() >= SAID_EVERY) {
            let (code, times) = (error.code(), state.unsaid);
            tracing::warn!(%code, %error, times, "the bucket for large blobs fails; they stay here, or are read from other holders");
            (state.said, state.unsaid, state.is_known) = (Some(Instant::now()), 0, true);
        }
    }

    pub(super) fn answered(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.totals.failing = false;
        if std::mem::take(&mut state.is_known) {
            tracing::info!("the bucket for large blobs answers again");
        }
    }

    pub(super) fn totals(&self) -> BucketTotals {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).totals
    }
}
