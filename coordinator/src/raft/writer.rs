//! The one thread that writes the store: merges what was applied, writes it in batches, walks snapshots between them.
//!
//! Rows wait here until they are written, and readers look here first. A snapshot is the rows as of the moment it began: a
//! row that changes ahead of the walk is written to the file from its image before. Invariant: a row is dropped from
//! here only after the store has it.

mod ending;
mod renewal;
mod thread;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use helix_core::record::BuildRecord;
use helix_core::{Row, RowChange, RowKey};
use helix_model::{BuildId, Digest};
use tokio::sync::{Notify, oneshot, watch};

pub use self::renewal::RenewWhen;
pub(in crate::raft) use self::renewal::Renewal;
use self::thread::Run;
use self::waiting::Rows;
use super::snapshot;
use super::store::{Store, merge};
use super::types::SnapshotMeta;
use crate::registry::{Counters, StoreError};

/// Rows are written this long after the first of them was applied,
const WRITE_AFTER: Duration = Duration::from_millis(100);
/// or when this many wait.
const WRITE_KEYS: usize = 2_048;
/// `apply` waits when this many rows wait.
const WAITING_KEYS_MAX: usize = 8_192;

/// The queue in front of the thread. Clones share it.
#[derive(Clone)]
pub(crate) struct Writer {
    inner: Arc<Inner>,
}

struct Inner {
    pending: Mutex<Pending>,
    wake: Condvar,
    room: Notify,
    store: Arc<Store>,
    snapshots: PathBuf,
    current: watch::Sender<Vec<(SnapshotMeta, PathBuf)>>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Pending {
    rows: Rows,
    meta: Option<SnapshotMeta>,
    since: Option<Instant>,
    writing: Option<Arc<Rows>>,
    requests: Vec<Request>,
    failed: Option<String>,
    stopped: bool,
}

enum Request {
    Snapshot(oneshot::Sender<io::Result<(SnapshotMeta, PathBuf)>>),
    /// A snapshot's file and the store are durable, or not.
    Ended(io::Result<PathBuf>),
    Install(PathBuf, oneshot::Sender<io::Result<SnapshotMeta>>),
    Stop(oneshot::Sender<()>),
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(
        store: Arc<Store>,
        snapshots: PathBuf,
        known: Vec<(SnapshotMeta, PathBuf)>,
        counters: Arc<Counters>,
        renewal: RenewWhen,
    ) -> io::Result<Self> {
        let inner = Arc::new(Inner {
            pending: Mutex::new(Pending::default()),
            wake: Condvar::new(),
            room: Notify::new(),
            store,
            snapshots,
            current: watch::Sender::new(known),
            counters,
            thread: Mutex::new(None),
        });
        let thread = {
            let inner = Arc::clone(&inner);
            std::thread::Builder::new().name("store-write".to_owned()).spawn(move || Run::new(inner, renewal).run())?
        };
        *inner.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(Self { inner })
    }

    /// Waits while too much waits.
    pub(crate) async fn room(&self) -> io::Result<()> {
        loop {
            let room = self.inner.room.notified();
            {
                let pending = self.inner.pending();
                if let Some(why) = &pending.failed {
                    return Err(io::Error::other(why.clone()));
                }
                if pending.rows.len() < WAITING_KEYS_MAX {
                    return Ok(());
                }
            }
            // A timeout, because a wake-up between the look and the wait would be missed.
            let _ = tokio::time::timeout(WRITE_AFTER, room).await;
        }
    }

    /// Waits until it cannot write any more, and says why; for ever, if it can until it is stopped.
    pub(crate) async fn failed(&self) -> String {
        loop {
            let news = self.inner.room.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if let Some(why) = &self.inner.pending().failed {
                return why.clone();
            }
            news.await;
        }
    }

    /// Takes what an entry changed, in the order of the log.
    pub(crate) fn push(&self, rows: Vec<RowChange>, meta: SnapshotMeta) {
        let mut pending = self.inner.pending();
        rows.into_iter().for_each(|change| pending.rows.take_in(change));
        pending.meta = Some(meta);
        let first = pending.since.is_none();
        pending.since.get_or_insert_with(Instant::now);
        self.inner.counters.store_pending.set(pending.rows.len() as u64);
        if first || pending.rows.len() >= WRITE_KEYS {
            self.inner.wake.notify_one();
        }
    }

    /// Writes a snapshot of everything pushed so far.
    pub(crate) async fn snapshot(&self) -> io::Result<(SnapshotMeta, PathBuf)> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Snapshot(reply))?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Replaces everything by a verified snapshot file, which becomes the newest.
    pub(crate) async fn install(&self, file: PathBuf) -> io::Result<SnapshotMeta> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Install(file, reply))?;
        answer.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Writes out what waits, syncs, and ends the thread.
    pub(crate) async fn stop(&self) {
        let (reply, answer) = oneshot::channel();
        if self.request(Request::Stop(reply)).is_ok() {
            // An error means that it has ended already.
            let _ = answer.await;
        }
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the store's thread panicked");
            }
        }
    }

    /// The snapshots kept, newest first.
    pub(crate) fn snapshots(&self) -> Vec<(SnapshotMeta, PathBuf)> {
        self.inner.current.borrow().clone()
    }

    pub(crate) fn snapshots_directory(&self) -> &std::path::Path {
        &self.inner.snapshots
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// A finished build's record with everything known of it. Blocks.
    pub(crate) fn record(&self, build: &BuildId) -> Result<Option<Arc<BuildRecord>>, StoreError> {
        // The order matters: a row leaves here only after the store has it, so here first.
        let (writing, changes) = {
            let pending = self.inner.pending();
            (pending.writing.clone(), pending.rows.overlay_of(build))
        };
        let broken = |error: io::Error| StoreError(error.to_string());
        let (mut record, rows) = self.inner.store.build(build).map_err(broken)?;
        let mut addenda: BTreeMap<RowKey, Row> = rows.into_iter().map(|row| (row.key(), row)).collect();
        for layer in writing.as_deref().into_iter().chain([&changes]) {
            layer.overlay(build, &mut record, &mut addenda);
        }
        let Some(Row::Build(record)) = record else { return Ok(None) };
        if addenda.is_empty() {
            return Ok(Some(record));
        }
        let mut record = BuildRecord::clone(&record);
        merge(&mut record, addenda.into_values().collect());
        Ok(Some(Arc::new(record)))
    }

    /// Whether a stored build, or one that waits to be stored, names the blob. Blocks.
    pub(crate) fn names_blob(&self, digest: &Digest) -> bool {
        {
            let pending = self.inner.pending();
            let writing = pending.writing.as_ref().is_some_and(|rows| rows.blobs.contains(digest));
            if writing || pending.rows.blobs.contains(digest) {
                return true;
            }
        }
        self.inner.store.names_blob(digest).unwrap_or_else(|error| {
            tracing::error!(%error, "the store cannot say who names a blob; it is kept");
            true
        })
    }

    /// Blobs that stored builds and those that wait to be stored name, in order from behind `after` on, at most `max`. Blocks.
    pub(crate) fn named_blobs(&self, after: Option<Digest>, max: usize) -> Result<Vec<Digest>, StoreError> {
        let behind = |digest: &&Digest| after.is_none_or(|after| **digest > after);
        // The order matters: what leaves here is in the store by then.
        let mut found: BTreeSet<Digest> = {
            let pending = self.inner.pending();
            let writing = pending.writing.iter().flat_map(|rows| &rows.blobs);
            writing.chain(&pending.rows.blobs).filter(behind).copied().collect()
        };
        let stored = self.inner.store.named_blobs(after, max).map_err(|error| StoreError(error.to_string()))?;
        found.extend(stored);
        Ok(found.into_iter().take(max).collect())
    }

    fn request(&self, request: Request) -> io::Result<()> {
        let mut pending = self.inner.pending();
        if pending.stopped {
            return Err(closed());
        }
        pending.requests.push(request);
        self.inner.wake.notify_one();
        Ok(())
    }
}

fn closed() -> io::Error {
    io::Error::other("the store is closed")
}

impl Inner {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a snapshot among those that are kept.
    fn keep(&self, meta: SnapshotMeta, path: PathBuf) -> io::Result<()> {
        snapshot::retain(&self.snapshots)?;
        self.current.send_modify(|kept| {
            kept.retain(|(_, other)| *other != path);
            kept.insert(0, (meta, path));
            kept.sort_by(|a, b| b.1.cmp(&a.1));
            kept.truncate(snapshot::KEPT);
        });
        Ok(())
    }
}
