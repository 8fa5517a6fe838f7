//! Who was told "have it": such a blob is not collected for an hour, whether or not anything names it yet.
//!
//! Leases live in memory alone. A restarted node collects nothing until every lease it may have given is over.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use helix_model::Digest;

/// How long a blob that was put or asked for is kept.
pub const LEASE: Duration = Duration::from_secs(3600);

/// Leases given between sweeps for those that are over, at least: sweeping is then cheap on average.
const SWEEP_EVERY: usize = 4096;

pub(super) struct Leases {
    lease: Duration,
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    until: HashMap<Digest, Instant>,
    since_sweep: usize,
}

impl Leases {
    pub(super) fn new(lease: Duration) -> Self {
        Self { lease, given: Mutex::default() }
    }

    /// How long a lease lasts.
    pub(super) fn duration(&self) -> Duration {
        self.lease
    }

    /// Leases a blob from now.
    pub(super) fn give(&self, digest: Digest) {
        let now = Instant::now();
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.until.insert(digest, now + self.lease);
        given.since_sweep += 1;
        if given.since_sweep >= SWEEP_EVERY.max(given.until.len() / 2) {
            given.until.retain(|_, until| *until > now);
            given.since_sweep = 0;
        }
    }

    /// What is leased.
    pub(super) fn all(&self) -> Vec<Digest> {
        let now = Instant::now();
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.until.iter().filter(|(_, until)| **until > now).map(|(digest, _)| *digest).collect()
    }

    /// Whether a blob is leased.
    pub(super) fn holds(&self, digest: &Digest) -> bool {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.until.get(digest).is_some_and(|until| *until > Instant::now())
    }
}
