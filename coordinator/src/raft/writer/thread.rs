//! The thread itself: what it does next, and each of its steps. A snapshot's walk goes on where nothing is to be written.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use helix_core::retention::Kept;
use helix_core::{Row, RowKey};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{BuildId, LogTime};
use tokio::sync::oneshot;

use super::super::rows::{base_key, sum_of};
use super::super::snapshot::{self, SnapshotWriter};
use super::super::store::{Changes, Head, STEP_BYTES, STEP_ROWS, Store, guarded};
use super::super::types::SnapshotMeta;
use super::ending::{Ending, Replies, tell};
use super::waiting::Rows;
use super::{Inner, RenewWhen, Renewal, Request, WRITE_AFTER, WRITE_KEYS};
use crate::codec::{decode_row, encode_row};

/// Between two looks at the store's size.
const SIZE_EVERY: Duration = Duration::from_secs(5);

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

/// The thread's own state.
pub(super) struct Run {
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
    pub(super) fn new(inner: Arc<Inner>, renewal: RenewWhen) -> Self {
        let renewal = Renewal::new(Arc::clone(&inner.store), renewal);
        let meta = SnapshotMeta::default();
        Self { inner, meta, walk: None, ending: None, deferred: Vec::new(), renewal, measured: None }
    }

    pub(super) fn run(mut self) {
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
