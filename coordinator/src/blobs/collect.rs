//! What runs beside the blobs: collection of those that no build names, and repair of damaged ones.
//!
//! A blob goes when, in two passes in a row, the registry does not name it (asked behind a read barrier), nobody leased it, and it is
//! old enough. Each node does this for its own blobs alone. Whenever anything is in doubt, the blob stays.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use helix_model::Digest;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::Blobs;
use super::store::blocking;

/// Blobs that are looked up in the registry at a time, off the async threads.
const LOOKUPS: usize = 256;

/// Between tries to replace damaged blobs whose other holders do not answer.
const MEND_EVERY: Duration = Duration::from_secs(60);

/// When blobs are collected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Between passes.
    pub interval: Duration,
    /// Younger blobs are never collected: whoever put them may yet commit what names them.
    pub age_min: Duration,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { interval: Duration::from_secs(900), age_min: Duration::from_secs(86_400) }
    }
}

/// Collection and repair; see [`Collection::run`].
pub struct Collection {
    blobs: Arc<Blobs>,
    /// What the pass before would have removed.
    doomed: HashSet<Digest>,
}

impl Collection {
    pub(super) fn new(blobs: Arc<Blobs>) -> Self {
        Self { blobs, doomed: HashSet::new() }
    }

    /// Runs until `shutdown`.
    pub async fn run(mut self, schedule: Schedule, shutdown: CancellationToken) {
        // Leases that were given before a restart are forgotten: nothing goes until they would be over.
        let first = Instant::now() + schedule.interval.max(self.blobs.store.lease_duration());
        let mut ticks = tokio::time::interval_at(first, schedule.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut mends = tokio::time::interval(MEND_EVERY);
        mends.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {
                    let removed = tokio::select! {
                        () = shutdown.cancelled() => return,
                        removed = self.pass(schedule.age_min) => removed,
                    };
                    if removed > 0 {
                        tracing::info!(removed, "blobs that no build names were removed");
                    }
                }
                _ = mends.tick() => tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = self.blobs.mend_all() => {}
                },
                () = self.blobs.health().wake.notified() => mends.reset_immediately(),
            }
        }
    }

    /// One pass; how many blobs went.
    pub async fn pass(&mut self, age_min: Duration) -> usize {
        if let Err(error) = self.blobs.store.remove_stale_uploads().await {
            tracing::warn!(%error, "stale uploads cannot be removed");
        }
        let candidates = self.blobs.store.collectable(age_min);
        let barrier = tokio::time::timeout(Duration::from_secs(30), self.blobs.plane.barrier()).await;
        if !matches!(barrier, Ok(Ok(()))) {
            tracing::debug!("no blobs are collected while the registry cannot be asked");
            self.doomed.clear();
            return 0;
        }
        let mut removed = 0;
        let mut doomed = HashSet::new();
        for some in candidates.chunks(LOOKUPS) {
            for digest in self.unnamed(some.to_vec()).await {
                if !self.doomed.contains(&digest) {
                    doomed.insert(digest);
                    continue;
                }
                match self.blobs.store.remove(digest).await {
                    Ok(()) => removed += 1,
                    Err(error) => tracing::warn!(%digest, %error, "a blob cannot be removed"),
                }
            }
        }
        self.doomed = doomed;
        removed
    }

    async fn unnamed(&self, digests: Vec<Digest>) -> Vec<Digest> {
        let plane = Arc::clone(&self.blobs.plane);
        let asked = blocking(move || Ok(digests.into_iter().filter(|digest| !plane.names_blob(digest)).collect()));
        // In doubt all of them are named.
        asked.await.unwrap_or_default()
    }
}
