//! The one thread that writes the store: merges what was applied, writes it in batches, walks snapshots between them.
//!
//! Rows wait here until they are written, and readers look here first. A snapshot is the rows as of the moment it began: a
//! row that changes ahead of the walk is written to the file from its image before. Invariant: a row is dropped from
//! here only after the store has it.

mod ending;
mod renewal;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use helix_core::record::BuildRecord;
use helix_core::retention::Kept;
use helix_core::{Row, RowChange, RowKey};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{BuildId, Digest, LogTime};
use tokio::sync::{Notify, oneshot, watch};

use self::ending::{Ending, Replies};
pub use self::renewal::RenewWhen;
pub(in crate::raft) use self::renewal::Renewal;
use super::rows::{base_key, blobs_of, sum_of};
use super::snapshot::{self, SnapshotWriter};
use super::store::{Changes, Head, STEP_BYTES, STEP_ROWS, Store, guarded, merge};
use super::types::SnapshotMeta;
use crate::codec::{decode_row, encode_row};
use crate::registry::{Counters, StoreError};

/// Rows are written this long after the first of them was applied,
const WRITE_AFTER: Duration = Duration::from_millis(100);
/// or when this many wait.
const WRITE_KEYS: usize = 2_048;
/// `apply` waits when this many rows wait.
const WAITING_KEYS_MAX: usize = 8_192;
const SIZE_EVERY: Duration = Duration::from_secs(5);

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

#[derive(Clone, Default)]
struct Rows {
    changes: BTreeMap<RowKey, Option<Row>>,
    /// Builds whose addenda in the store go; those in `changes` are newer.
    addenda_gone: BTreeSet<BuildId>,
    /// What stored rows of builds, and of their addenda, are to forget; those in `changes` have.
    expired: BTreeMap<(BuildId, Kept), LogTime>,
    /// Blobs named by what waits.
    blobs: BTreeSet<Digest>,
}

enum Request {
    Snapshot(oneshot::Sender<io::Result<(SnapshotMeta, PathBuf)>>),
    /// A snapshot's file and the store are durable, or not.
    Ended(io::Result<PathBuf>),
    Install(PathBuf, oneshot::Sender<io::Result<SnapshotMeta>>),
    Stop(oneshot::Sender<()>),
}

struct Walk {
    meta: SnapshotMeta,
    file: SnapshotWriter,
    /// What the rows added up to when the walk began, less what is in the file: nothing at the end.
    missing: u128,
    cursor: Vec<u8>,
    /// Rows ahead of the cursor that are in the file already, or were not there when the walk began.
    done_ahead: BTreeSet<Vec<u8>>,
    replies: Replies,
}

impl Walk {
    fn put(&mut self, base: &[u8], row: &[u8]) -> io::Result<()> {
        self.missing = self.missing.wrapping_sub(sum_of(base, row));
        self.file.row(row)
    }
}

impl Rows {
    fn take_in(&mut self, change: RowChange) {
        match change {
            RowChange::Put(row) => {
                if let Some((_, blobs)) = blobs_of(&row) {
                    self.blobs.extend(blobs);
                }
                self.changes.insert(row.key(), Some(row));
            }
            RowChange::Delete(key) => {
                self.changes.insert(key, None);
            }
            RowChange::DeleteAddenda(build) => {
                self.changes.retain(|key, _| !matches!(key, RowKey::Addendum(attempt, _) if attempt.build == build));
                self.expired.retain(|(id, _), _| *id != build);
                self.addenda_gone.insert(build);
            }
            RowChange::Expire(build, kept, at) => self.expire(build, kept, at),
        }
    }

    /// What waits is changed here, what is stored when it is written.
    fn expire(&mut self, build: BuildId, kept: Kept, at: LogTime) {
        if let Some(Some(Row::Build(record))) = self.changes.get_mut(&RowKey::Build(build.clone())) {
            Arc::make_mut(record).expire(kept, at);
        }
        let about = |key: &RowKey| {
            matches!(key, RowKey::Addendum(attempt, _) if attempt.build == build) && Kept::of_key(key) == Some(kept)
        };
        self.changes.retain(|key, _| !about(key));
        self.expired.insert((build, kept), at);
    }

    fn len(&self) -> usize {
        self.changes.len() + self.addenda_gone.len() + self.expired.len()
    }

    /// Puts what waits here about a build over what is known of it so far.
    fn overlay(&self, build: &BuildId, record: &mut Option<Row>, addenda: &mut BTreeMap<RowKey, Row>) {
        if let Some(change) = self.changes.get(&RowKey::Build(build.clone())) {
            record.clone_from(change);
        }
        if self.addenda_gone.contains(build) {
            addenda.clear();
        }
        for ((_, kept), at) in self.expired.iter().filter(|((id, _), _)| id == build) {
            if let Some(Row::Build(record)) = record {
                Arc::make_mut(record).expire(*kept, *at);
            }
            addenda.retain(|key, _| Kept::of_key(key) != Some(*kept));
        }
        for (key, change) in &self.changes {
            let RowKey::Addendum(attempt, _) = key else { continue };
            if attempt.build == *build {
                match change {
                    Some(row) => drop(addenda.insert(key.clone(), row.clone())),
                    None => drop(addenda.remove(key)),
                }
            }
        }
    }
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

impl Rows {
    /// What waits here about one build.
    fn overlay_of(&self, build: &BuildId) -> Self {
        let about = |key: &RowKey| match key {
            RowKey::Build(id) => id == build,
            RowKey::Addendum(attempt, _) => attempt.build == *build,
            RowKey::Counters | RowKey::Policy | RowKey::Node(_) | RowKey::Worker(_) | RowKey::Tombstone(_) => false,
        };
        let changes = self.changes.iter().filter(|(key, _)| about(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let addenda_gone = self.addenda_gone.get(build).cloned().into_iter().collect();
        let expired = self.expired.iter().filter(|((id, _), _)| id == build).map(|(k, v)| (k.clone(), *v)).collect();
        Self { changes, addenda_gone, expired, blobs: BTreeSet::new() }
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

/// The thread's own state.
struct Run {
    inner: Arc<Inner>,
    meta: SnapshotMeta,
    walk: Option<Walk>,
    /// The snapshot whose walk is over.
    ending: Option<Ending>,
    /// Requests that wait for it.
    deferred: Vec<Request>,
    renewal: Renewal,
    measured: Option<Instant>,
}

struct Work {
    rows: Option<(Arc<Rows>, SnapshotMeta)>,
    requests: Vec<Request>,
}

impl Run {
    fn new(inner: Arc<Inner>, renewal: RenewWhen) -> Self {
        let renewal = Renewal::new(Arc::clone(&inner.store), renewal);
        let meta = SnapshotMeta::default();
        Self { inner, meta, walk: None, ending: None, deferred: Vec::new(), renewal, measured: None }
    }

    fn run(mut self) {
        // Nobody may wait for ever for a thread that is gone.
        let ended = guarded(|| {
            self.meta = self.inner.store.head()?.meta;
            self.work()
        });
        self.walk = None;
        let mut pending = self.inner.pending();
        pending.stopped = true;
        pending.requests.clear();
        if let Err(error) = ended {
            tracing::error!(%error, "the store cannot be written");
            pending.failed = Some(format!("the store cannot be written: {error}"));
        }
        drop(pending);
        self.inner.room.notify_waiters();
        self.deferred.clear();
        self.renewal.give_up();
        if let Some(ending) = self.ending.take() {
            ending.give_up();
        }
    }

    fn work(&mut self) -> io::Result<()> {
        loop {
            let Work { rows, requests } = self.next();
            let written = rows.is_some();
            if let Some((rows, meta)) = rows {
                self.write(&rows, meta)?;
            }
            let mut stop = Vec::new();
            for request in requests {
                self.heed(request, &mut stop)?;
            }
            if !stop.is_empty() {
                self.walk = None;
                self.inner.store.sync()?;
                for reply in stop {
                    let _ = reply.send(());
                }
                return Ok(());
            }
            if self.walk.is_some() {
                self.step()?;
            }
            self.renewal.step()?;
            self.measure(written);
        }
    }

    fn heed(&mut self, request: Request, stop: &mut Vec<oneshot::Sender<()>>) -> io::Result<()> {
        match request {
            Request::Ended(ended) => {
                if let Some(ending) = self.ending.take() {
                    ending.tell(ended);
                }
                for request in std::mem::take(&mut self.deferred) {
                    self.heed(request, stop)?;
                }
            }
            // One snapshot at a time, and none is put in the place of the store while that is made durable.
            request if self.ending.is_some() => self.deferred.push(request),
            Request::Snapshot(reply) => self.begin_walk(reply),
            Request::Install(file, reply) => self.install(&file, reply)?,
            Request::Stop(reply) => stop.push(reply),
        }
        Ok(())
    }

    /// Waits until there is something to do, and takes it.
    fn next(&self) -> Work {
        let mut pending = self.inner.pending();
        loop {
            let age = pending.since.map(|since| since.elapsed());
            let due = age.is_some_and(|age| age >= WRITE_AFTER) || pending.rows.len() >= WRITE_KEYS;
            let copy_in = self.renewal.due_in();
            if due || !pending.requests.is_empty() || self.walk.is_some() || copy_in == Some(Duration::ZERO) {
                break;
            }
            let wait = age.map_or(SIZE_EVERY, |age| WRITE_AFTER.saturating_sub(age));
            let wait = copy_in.map_or(wait, |copy_in| copy_in.min(wait));
            pending = self.inner.wake.wait_timeout(pending, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let requests = std::mem::take(&mut pending.requests);
        let due = pending.since.is_some_and(|since| since.elapsed() >= WRITE_AFTER);
        let take = due || pending.rows.len() >= WRITE_KEYS || !requests.is_empty();
        let rows = match pending.meta.take_if(|_| take) {
            Some(meta) => {
                let rows = Arc::new(std::mem::take(&mut pending.rows));
                pending.since = None;
                pending.writing = Some(Arc::clone(&rows));
                Some((rows, meta))
            }
            None => None,
        };
        Work { rows, requests }
    }

    fn write(&mut self, rows: &Rows, meta: SnapshotMeta) -> io::Result<()> {
        let began = Instant::now();
        let mut changes = Changes::new();
        for build in &rows.addenda_gone {
            changes.extend(self.inner.store.addenda_keys(build)?.into_iter().map(|key| (key, None)));
        }
        for ((build, kept), at) in &rows.expired {
            self.forget(build, *kept, *at, &mut changes)?;
        }
        for (key, change) in &rows.changes {
            changes.insert(base_key(key), change.as_ref().map(|row| (encode_row(row), row.clone())));
        }
        self.save_images(&changes)?;
        self.inner.store.write(&changes, &meta)?;
        self.renewal.write(changes);
        self.inner.counters.store_write.record(began.elapsed());
        self.inner.counters.stored_index.set(meta.last_log_id.as_ref().map_or(0, |id| id.index()));
        self.meta = meta;
        let mut pending = self.inner.pending();
        pending.writing = None;
        self.inner.counters.store_pending.set(pending.rows.len() as u64);
        drop(pending);
        self.inner.room.notify_waiters();
        Ok(())
    }

    /// Stored rows of a build that let go of its logs or artifacts.
    fn forget(&self, build: &BuildId, kept: Kept, at: LogTime, changes: &mut Changes) -> io::Result<()> {
        let base = base_key(&RowKey::Build(build.clone()));
        // What is to be forgotten of one build twice is forgotten of the same row.
        let before = match changes.remove(&base) {
            Some(change) => change.map(|(_, row)| row),
            None => self.inner.store.row(&base)?.map(|bytes| decode_row(&bytes)).transpose()?,
        };
        if let Some(Row::Build(mut record)) = before {
            Arc::make_mut(&mut record).expire(kept, at);
            let row = Row::Build(record);
            changes.insert(base, Some((encode_row(&row), row)));
        }
        for base in self.inner.store.addenda_keys(build)? {
            let row = self.inner.store.row(&base)?.map(|bytes| decode_row(&bytes)).transpose()?;
            if row.is_some_and(|row| Kept::of_key(&row.key()) == Some(kept)) {
                changes.insert(base, None);
            }
        }
        Ok(())
    }

    /// Before rows ahead of the walk change: writes them to the snapshot as they were.
    fn save_images(&mut self, changes: &Changes) -> io::Result<()> {
        let Some(walk) = &mut self.walk else { return Ok(()) };
        for base in changes.keys() {
            if *base > walk.cursor && !walk.done_ahead.contains(base) {
                if let Some(before) = self.inner.store.row(base)? {
                    walk.put(base, &before)?;
                }
                walk.done_ahead.insert(base.clone());
            }
        }
        Ok(())
    }

    fn begin_walk(&mut self, reply: oneshot::Sender<io::Result<(SnapshotMeta, PathBuf)>>) {
        if let Some(walk) = &mut self.walk {
            walk.replies.push(reply);
            return;
        }
        let begun = self
            .inner
            .store
            .head()
            .and_then(|Head { sum, .. }| Ok((SnapshotWriter::create(&self.inner.snapshots, &self.meta)?, sum)));
        match begun {
            Ok((file, missing)) => {
                let meta = self.meta.clone();
                let done_ahead = BTreeSet::new();
                self.walk = Some(Walk { meta, file, missing, cursor: Vec::new(), done_ahead, replies: vec![reply] });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// # Errors
    /// When rows are missing in the store: then it is no use to go on writing to it.
    fn step(&mut self) -> io::Result<()> {
        let Some(mut walk) = self.walk.take() else { return Ok(()) };
        match advance(&self.inner.store, &mut walk) {
            Ok(false) => self.walk = Some(walk),
            Ok(true) if walk.missing != 0 => {
                let error =
                    io::Error::new(io::ErrorKind::InvalidData, "rows are missing; it is rebuilt at the next start");
                tell(walk.replies, &Err(io::Error::new(error.kind(), error.to_string())));
                return Err(error);
            }
            Ok(true) => {
                let Walk { meta, file, replies, .. } = walk;
                self.ending = Ending::start(&self.inner, meta, file, replies);
            }
            Err(error) => tell(walk.replies, &Err(error)),
        }
        Ok(())
    }

    fn install(&mut self, file: &std::path::Path, reply: oneshot::Sender<io::Result<SnapshotMeta>>) -> io::Result<()> {
        // What waits is older than the snapshot, and was written before this request was looked at. So is what a walk
        // under way would write: whoever waits for it is given the newer one, since an error would stop consensus.
        let waiting = self.walk.take().map(|walk| walk.replies).unwrap_or_default();
        self.renewal.give_up();
        let name = snapshot::verify(file).and_then(|meta| {
            let path = self.inner.snapshots.join(snapshot::name_of(&meta));
            self.take_file(file, &path)?;
            Ok(path)
        });
        match name.and_then(|path| Ok((self.inner.store.replace(&path)?, path))) {
            Ok((meta, path)) => {
                self.meta = meta.clone();
                self.inner.counters.snapshots_installed.add(1);
                self.inner.keep(meta.clone(), path.clone())?;
                tell(waiting, &Ok((meta.clone(), path)));
                drop(reply.send(Ok(meta)));
                Ok(())
            }
            Err(error) => {
                let again = io::Error::new(error.kind(), error.to_string());
                tell(waiting, &Err(io::Error::new(error.kind(), error.to_string())));
                drop(reply.send(Err(error)));
                Err(again)
            }
        }
    }

    /// Gives a snapshot file its place and name; one that lies elsewhere is somebody else's and is copied.
    fn take_file(&self, from: &std::path::Path, to: &std::path::Path) -> io::Result<()> {
        if from.parent() != Some(&self.inner.snapshots) {
            let copy = to.with_extension("writing");
            std::fs::create_dir_all(&self.inner.snapshots)?;
            std::fs::copy(from, &copy)?;
            std::fs::File::open(&copy)?.sync_all()?;
            failpoint::hit(Point::SnapshotTake)?;
            std::fs::rename(copy, to)?;
        } else if from != to {
            failpoint::hit(Point::SnapshotTake)?;
            std::fs::rename(from, to)?;
        }
        failpoint::hit(Point::SnapshotTaken)?;
        helix_common::files::sync_directory(&self.inner.snapshots)
    }

    fn measure(&mut self, written: bool) {
        if written || self.measured.is_none_or(|at| at.elapsed() >= SIZE_EVERY) {
            self.measured = Some(Instant::now());
            self.inner.counters.store_bytes.set(self.renewal.look());
        }
    }
}

/// One step of the walk; true at its end.
fn advance(store: &Store, walk: &mut Walk) -> io::Result<bool> {
    let rows = store.walk(&walk.cursor, STEP_BYTES, STEP_ROWS)?;
    let Some((last, _)) = rows.last() else { return Ok(true) };
    walk.cursor.clone_from(last);
    for (base, row) in rows {
        if !walk.done_ahead.remove(&base) {
            walk.put(&base, &row)?;
        }
    }
    Ok(false)
}

fn tell(replies: Replies, result: &io::Result<(SnapshotMeta, PathBuf)>) {
    for reply in replies {
        let copy = match result {
            Ok(found) => Ok(found.clone()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // Whoever went away does not want to know.
        drop(reply.send(copy));
    }
}
