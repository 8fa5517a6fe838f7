//! Logs of attempts: live ones as agents push them, sealed ones from blobs, and readers that pass from one to the other.
//!
//! A reader may be at any coordinator. Whether an attempt runs, has ended, or has a sealed log is the registry's to say.
//! Invariant: a reader gets every line once and in order, and where lines are lost a `system` line says so.

mod bells;
mod live;
mod peer;
mod push;
mod read;
mod seal;
mod sealed;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use helix_common::files::available_bytes;
use helix_common::status::status;
use helix_common::tls::PeerInfo;
use helix_core::Effect;
use helix_model::{AttemptKey, BuildId, ErrorCode};
use helix_proto::agent::PushLog;
use helix_proto::agent::PushLogAck;
use tokio::sync::{Semaphore, broadcast};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use self::bells::Bells;
use self::live::LiveLogs;
use crate::blobs::Blobs;
use crate::plane::{AttemptFacts, Plane};

/// Followers of live logs elsewhere that keep a stream open each; more of them ask again and again instead, so that
/// the connection to a peer is never full of followers.
const REMOTE_FOLLOWERS_MAX: usize = 256;

/// Readers that have peers answer when a log begins there; more of them ask now and then.
const REMOTE_WAITERS_MAX: usize = 256;

/// How long one look at the free disk is believed.
const ROOM_BELIEVED: Duration = Duration::from_secs(1);

/// Between looks for live logs that nobody needs any more.
const SWEEP_EVERY: Duration = Duration::from_secs(300);

/// After one that could not be made, as at a start, when nobody leads yet.
const SWEEP_AGAIN: Duration = Duration::from_secs(5);

/// Between looks for logs that no agent seals any more.
const SEAL_LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a reader wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogQuery {
    /// The attempt.
    pub key: AttemptKey,
    /// Only lines numbered from here on; 0 or 1 for all.
    pub from_seq: u64,
    /// Only the last so many lines of what is there; 0 for all.
    pub tail: u64,
    /// Go on until the attempt has ended.
    pub follow: bool,
}

/// Whether there was a look for live logs that nobody needs any more, where one was due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Swept {
    /// There was, or none was due.
    Done,
    /// The registry could not be asked.
    NotNow,
}

/// The logs, as this coordinator serves them. Cheap to clone.
#[derive(Clone)]
pub struct LogHub {
    inner: Arc<Inner>,
}

struct Inner {
    directory: PathBuf,
    plane: Arc<dyn Plane>,
    blobs: Arc<Blobs>,
    live: LiveLogs,
    bells: Bells,
    /// Attempts that have ended and whose logs are here and not sealed, and since when this node knows.
    left: Mutex<HashMap<AttemptKey, seal::Left>>,
    remote_followers: Semaphore,
    remote_waiters: Semaphore,
    /// Free bytes of the disk, and when that was looked up.
    room: Mutex<Option<(Instant, u64)>>,
    readers: AtomicU64,
    stopping: CancellationToken,
}

impl LogHub {
    /// Opens the live logs in `directory`. Blocks while it reads them. [`Self::keep`] must be run beside it.
    /// When `stopping` is cancelled, streams end.
    ///
    /// # Errors
    /// When the directory cannot be read or written.
    pub fn open(
        directory: &Path,
        plane: Arc<dyn Plane>,
        blobs: Arc<Blobs>,
        stopping: CancellationToken,
    ) -> io::Result<Self> {
        let inner = Inner {
            directory: directory.to_owned(),
            plane,
            blobs,
            live: LiveLogs::open(directory)?,
            bells: Bells::default(),
            left: Mutex::default(),
            remote_followers: Semaphore::new(REMOTE_FOLLOWERS_MAX),
            remote_waiters: Semaphore::new(REMOTE_WAITERS_MAX),
            room: Mutex::default(),
            readers: AtomicU64::new(0),
            stopping,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Serves an agent's stream of live lines, as [`Self::serve_push`], to whoever the certificate names.
    #[must_use]
    pub fn push(&self, stream: Streaming<PushLog>, peer: &PeerInfo) -> ReceiverStream<Result<PushLogAck, Status>> {
        if let Some(worker) = peer.identity.worker() {
            return self.serve_push(stream, worker);
        }
        let (tx, rx) = tokio::sync::mpsc::channel(1);
        // There is room for one.
        let _ = tx.try_send(Err(status(ErrorCode::RoleNotAllowed, format!("{} is no agent", peer.identity))));
        ReceiverStream::new(rx)
    }

    /// Readers under way, for metrics.
    #[must_use]
    pub fn readers(&self) -> u64 {
        self.inner.readers.load(Ordering::Relaxed)
    }

    /// Live logs on this coordinator and their bytes, for metrics.
    #[must_use]
    pub fn live_totals(&self) -> (u64, u64) {
        self.inner.live.totals()
    }

    /// Seals logs that no agent seals any more. Runs until stopped.
    pub async fn seal_what_is_left(self) {
        let stopping = self.inner.stopping.clone();
        let forever = async {
            loop {
                tokio::time::sleep(SEAL_LOOK_EVERY).await;
                self.seal_left().await;
            }
        };
        tokio::select! {
            () = stopping.cancelled() => {}
            () = forever => {}
        }
    }

    /// Wakes readers when the registry changes, and removes live logs that are sealed or purged. Runs until stopped.
    pub async fn keep(self) {
        let stopping = self.inner.stopping.clone();
        let mut effects = self.inner.plane.effects();
        let mut sweeps = tokio::time::interval(SWEEP_EVERY);
        sweeps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let work: BoxFuture<'_, Swept> = tokio::select! {
                () = stopping.cancelled() => return,
                _ = sweeps.tick() => Box::pin(self.sweep()),
                heard = effects.recv() => match heard {
                    Ok(effects) => Box::pin(self.heed(effects)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.inner.bells.ring_all();
                        Box::pin(self.sweep())
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            };
            tokio::select! {
                () = stopping.cancelled() => return,
                swept = work => if swept == Swept::NotNow {
                    sweeps.reset_after(SWEEP_AGAIN);
                }
            }
        }
    }

    async fn heed(&self, effects: Arc<[Effect]>) -> Swept {
        for effect in effects.iter() {
            match effect {
                Effect::LogSealed(key) => {
                    self.remove(vec![key.clone()]).await;
                    self.inner.bells.ring(&key.build);
                }
                Effect::BuildPurged(build) | Effect::LogsExpired(build) => {
                    self.remove(self.keys_of(build)).await;
                    self.inner.bells.ring(build);
                }
                Effect::BuildChanged(build) => self.inner.bells.ring(build),
                _ => {}
            }
        }
        Swept::Done
    }

    fn keys_of(&self, build: &BuildId) -> Vec<AttemptKey> {
        self.inner.live.keys().into_iter().filter(|key| key.build == *build).collect()
    }

    /// Removes the live logs whose attempts are sealed or gone. In doubt they stay.
    async fn sweep(&self) -> Swept {
        let keys = self.inner.live.keys();
        if keys.is_empty() {
            return Swept::Done;
        }
        let barrier = tokio::time::timeout(Duration::from_secs(30), self.inner.plane.barrier()).await;
        if !matches!(barrier, Ok(Ok(()))) {
            return Swept::NotNow;
        }
        let mut gone = Vec::new();
        for key in keys {
            let facts = self.inner.plane.attempt(&key).await;
            if let Ok(AttemptFacts::Unknown | AttemptFacts::Expired | AttemptFacts::Sealed { .. }) = facts {
                gone.push(key);
            }
        }
        self.remove(gone).await;
        Swept::Done
    }

    async fn remove(&self, keys: Vec<AttemptKey>) {
        if keys.iter().all(|key| self.inner.live.get(key).is_none()) {
            return;
        }
        let hub = self.clone();
        let job = tokio::task::spawn_blocking(move || keys.iter().for_each(|key| hub.inner.live.remove(key)));
        if job.await.is_err() {
            tracing::warn!("live logs were not removed: the runtime ends");
        }
    }

    /// Whether the disk has room for more lines.
    // A status is what the caller answers with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    fn check_room(&self) -> Result<(), Status> {
        let mut room = self.inner.room.lock().unwrap_or_else(PoisonError::into_inner);
        let free = match *room {
            Some((at, free)) if at.elapsed() < ROOM_BELIEVED => free,
            _ => {
                let free = available_bytes(&self.inner.directory);
                let free = free.map_err(|error| status(ErrorCode::Internal, error.to_string()))?;
                *room = Some((Instant::now(), free));
                free
            }
        };
        let reserve = self.inner.plane.policy().disk_reserve_bytes;
        if free < reserve {
            let text = format!("the disk has {free} bytes free, and {reserve} stay in reserve");
            return Err(status(ErrorCode::DiskReserve, text));
        }
        Ok(())
    }

    /// A live log's bytes, at most: agents keep to the policy themselves, this is for one that does not.
    fn bytes_max(&self) -> u64 {
        let max = self.inner.plane.policy().log_bytes_max;
        max.saturating_add(max / 4).saturating_add(64 << 20)
    }
}
