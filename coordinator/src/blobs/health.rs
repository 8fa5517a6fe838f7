//! What is wrong with this coordinator's blobs, and what has been done about it: for whoever repairs, and for operators.
//!
//! A blob stands here from the moment it was found damaged, and set aside, until there is a good copy here again, or nothing names it
//! any more. In memory alone: what a restarted node lacks, the leader's pass over all copies finds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use helix_model::Digest;
use tokio::sync::Notify;

/// Damaged blobs that are remembered: what a dying disk adds beyond them, the leader's pass finds as missing copies.
const LISTED_MAX: usize = 4096;

/// How a damaged blob stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// A good copy is looked for.
    Waiting,
    /// Every other coordinator was asked, and none has a good copy.
    Lost,
}

/// See the module.
#[derive(Default)]
pub struct Health {
    damaged: Mutex<BTreeMap<Digest, Damage>>,
    /// Rung when there is something to repair.
    pub(super) wake: Notify,
    found: AtomicU64,
    repaired: AtomicU64,
    scrubbed: AtomicU64,
    scrubbed_bytes: AtomicU64,
    passes: AtomicU64,
}

/// Numbers for metrics, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HealthTotals {
    /// Damaged now, a copy is looked for.
    pub waiting: u64,
    /// Damaged now, and there is no good copy.
    pub lost: u64,
    /// Found damaged.
    pub found: u64,
    /// Replaced by a good copy.
    pub repaired: u64,
    /// Blobs that scrubbing read.
    pub scrubbed: u64,
    /// Their bytes.
    pub scrubbed_bytes: u64,
    /// Passes over all blobs that scrubbing ended.
    pub passes: u64,
}

impl Health {
    /// A blob is damaged and not served from here any more.
    pub(super) fn damaged(&self, digest: Digest) {
        self.found.fetch_add(1, Ordering::Relaxed);
        self.suspect(digest);
    }

    /// A blob should be looked after: it may be damaged, or the disk may just not have answered.
    pub(super) fn suspect(&self, digest: Digest) {
        let mut damaged = self.lock();
        if damaged.len() < LISTED_MAX {
            damaged.entry(digest).or_insert(Damage::Waiting);
        }
        drop(damaged);
        self.wake.notify_one();
    }

    /// What is damaged, in order.
    #[must_use]
    pub fn list(&self) -> Vec<(Digest, Damage)> {
        self.lock().iter().map(|(digest, damage)| (*digest, *damage)).collect()
    }

    /// Notes that no other coordinator has a good copy; whether that is news.
    pub(super) fn lost(&self, digest: Digest) -> bool {
        self.lock().insert(digest, Damage::Lost) != Some(Damage::Lost)
    }

    /// It is here again, or nobody wants it.
    pub(super) fn settled(&self, digest: &Digest) {
        self.lock().remove(digest);
    }

    pub(super) fn repaired(&self, digest: &Digest) {
        self.repaired.fetch_add(1, Ordering::Relaxed);
        self.settled(digest);
    }

    pub(super) fn scrubbed(&self, bytes: u64) {
        self.scrubbed.fetch_add(1, Ordering::Relaxed);
        self.scrubbed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn passed(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
    }

    /// Numbers as of now.
    #[must_use]
    pub fn totals(&self) -> HealthTotals {
        let listed = self.list();
        let lost = listed.iter().filter(|(_, damage)| *damage == Damage::Lost).count() as u64;
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HealthTotals {
            waiting: listed.len() as u64 - lost,
            lost,
            found: number(&self.found),
            repaired: number(&self.repaired),
            scrubbed: number(&self.scrubbed),
            scrubbed_bytes: number(&self.scrubbed_bytes),
            passes: number(&self.passes),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Digest, Damage>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
