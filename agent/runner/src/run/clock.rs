//! Times for the log and the result that never go back: the wall clock once, the monotonic clock from there.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Unix time as it was at the start, and what has passed since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    wall: Duration,
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), start: Instant::now() }
    }

    pub(crate) fn started_at_ms(&self) -> u64 {
        u64::try_from(self.wall.as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from((self.wall + self.start.elapsed()).as_millis()).unwrap_or(u64::MAX)
    }
}

/// The moment so many milliseconds after another; `None` when it is beyond what the clock can say.
pub(crate) fn after_ms(moment: Instant, ms: u64) -> Option<Instant> {
    moment.checked_add(Duration::from_millis(ms))
}
