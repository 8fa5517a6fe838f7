//! openraft's log on raft-log's write-ahead log: readable at once, acknowledged after the fsync, one flush in flight.
//!
//! Whoever needs a flush while one runs joins the next; so one fsync covers everything that arrived meanwhile. A
//! thread of our own issues that next flush, because raft-log's callback runs on raft-log's thread and must never call
//! back into it. Invariant: nothing is reported flushed unless an fsync that began after its write has succeeded;
//! a failed fsync is reported to everybody waiting and is never tried again.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use helix_common::removal;
use helix_failpoint::{self as failpoint, Point};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use raft_log::api::raft_log_writer::RaftLogWriter;
use raft_log::{Callback, RaftLog};
use tokio::sync::oneshot;

use super::log_check::{check_tail, files_newest_first};
use super::log_codec::{LogTypes, StoredLogId, StoredPayload, StoredVote};
use super::types::{Entry, LogId, TypeConfig, Vote};
use super::wire::payload_bytes;
use crate::registry::Counters;

/// Bytes of entries in one read for replication, at most; one entry is always returned.
const READ_BYTES_MAX: usize = 1 << 20;

/// Limits of the log's files and memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LogLimits {
    /// Bytes in one file; whole files are deleted behind snapshots.
    pub(crate) chunk_bytes: usize,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { chunk_bytes: 64 << 20 }
    }
}

/// The log. Clones share it.
#[derive(Clone)]
pub(crate) struct LogStore {
    inner: Arc<Inner>,
    directory: Arc<Path>,
    // Joined when the last clone goes.
    _flusher: Arc<Flusher>,
}

struct Inner {
    log: RwLock<RaftLog<LogTypes>>,
    flush: Mutex<FlushState>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct FlushState {
    in_flight: bool,
    waiting: Vec<Waiter>,
    failed: Option<String>,
}

/// Who wants to know about a flush.
enum Waiter {
    Entries(IOFlushed<TypeConfig>),
    Call(oneshot::Sender<io::Result<()>>),
}

impl Waiter {
    fn tell(self, result: io::Result<()>) {
        match self {
            Self::Entries(flushed) => flushed.io_completed(result),
            // Whoever went away does not want to know.
            Self::Call(reply) => drop(reply.send(result)),
        }
    }
}

/// Called by raft-log when a flush ended. Dropped unsent, it reports a failure.
pub(super) struct FlushDone {
    waiters: Vec<Waiter>,
    log: Weak<Inner>,
    next: SyncSender<()>,
    started: Instant,
    sent: bool,
}

impl Callback for FlushDone {
    fn send(mut self, result: io::Result<()>) {
        self.sent = true;
        self.finish(&result.and_then(|()| failpoint::hit(Point::LogFlushed)));
    }
}

impl Drop for FlushDone {
    fn drop(&mut self) {
        if !self.sent {
            self.finish(&Err(io::Error::other("the log's thread ended before it could flush")));
        }
    }
}

impl FlushDone {
    fn finish(&mut self, result: &io::Result<()>) {
        let failure = result.as_ref().err().map(|error| (error.kind(), error.to_string()));
        if let Some(inner) = self.log.upgrade() {
            inner.counters.fsync.record(self.started.elapsed());
            let mut flush = inner.flush();
            flush.in_flight = false;
            if let Some((_, why)) = &failure {
                tracing::error!(why, "the log could not be flushed");
                flush.failed = Some(why.clone());
            }
        }
        for waiter in self.waiters.drain(..) {
            waiter.tell(failure.clone().map_or(Ok(()), |(kind, why)| Err(io::Error::new(kind, why))));
        }
        // Full means that the thread has a wake-up before it already; closed, that the log is closing.
        let _ = self.next.try_send(());
    }
}

/// The thread that issues the next flush when one has ended.
struct Flusher {
    thread: Mutex<Option<JoinHandle<()>>>,
    next: Mutex<Option<SyncSender<()>>>,
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Not joined here: the last flush's callback still holds a sender, and it may be this very thread that drops.
        drop(self.thread.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl LogStore {
    /// Opens the log in a directory, or begins one. Blocks; reads the whole log once. A record that a crash cut short
    /// at the very end is dropped: it was never acknowledged.
    ///
    /// # Errors
    /// When a file cannot be read or a record before the end is damaged: then nothing there is changed.
    pub(crate) fn open(directory: &Path, limits: LogLimits, counters: Arc<Counters>) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        check_tail(directory)?;
        let mut config = raft_log::Config::new(directory.display());
        config.wal.chunk_max_size = Some(limits.chunk_bytes);
        config.wal.read_buffer_size = Some(1 << 20);
        // We group flushes ourselves: waiting in there would only add to each.
        config.wal.flush_batch_wait = Some(std::time::Duration::ZERO);
        config.log_cache_max_items = Some(20_000);
        config.log_cache_capacity = Some(32 << 20);
        let log = RaftLog::open(Arc::new(config))?;
        counters.log_bytes.set(log.on_disk_size());
        let inner = Arc::new(Inner { log: RwLock::new(log), flush: Mutex::new(FlushState::default()), counters });
        let (next, wake) = sync_channel(1);
        let thread = {
            let (inner, next) = (Arc::downgrade(&inner), next.clone());
            std::thread::Builder::new().name("log-flush".to_owned()).spawn(move || flush_loop(&inner, &next, &wake))?
        };
        let flusher = Flusher { thread: Mutex::new(Some(thread)), next: Mutex::new(Some(next)) };
        Ok(Self { inner, directory: directory.into(), _flusher: Arc::new(flusher) })
    }

    /// Whether there is a log in a directory.
    pub(crate) fn is_in(directory: &Path) -> bool {
        files_newest_first(directory).is_ok_and(|files| !files.is_empty())
    }

    /// The first and last entry, as ids: what is purged, what is there.
    pub(crate) fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        let log = self.inner.read();
        let state = log.log_state();
        (state.purged().map(|id| id.0), state.last().map(|id| id.0))
    }

    async fn flushed(&self) -> io::Result<()> {
        let (reply, answer) = oneshot::channel();
        self.join_flush(Waiter::Call(reply));
        answer.await.unwrap_or_else(|_| Err(io::Error::other("the log is closing")))
    }

    fn join_flush(&self, waiter: Waiter) {
        let next = self._flusher.next.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(next) = next else {
            waiter.tell(Err(io::Error::other("the log is closing")));
            return;
        };
        self.inner.flush().waiting.push(waiter);
        self.inner.start_flush(&next);
    }
}

fn flush_loop(inner: &Weak<Inner>, next: &SyncSender<()>, wake: &Receiver<()>) {
    while wake.recv().is_ok() {
        let Some(inner) = inner.upgrade() else { return };
        inner.start_flush(next);
    }
}

impl Inner {
    fn read(&self) -> RwLockReadGuard<'_, RaftLog<LogTypes>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, RaftLog<LogTypes>> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) -> MutexGuard<'_, FlushState> {
        self.flush.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a flush for everybody who waits, unless one runs.
    fn start_flush(self: &Arc<Self>, next: &SyncSender<()>) {
        // The order matters: the log first, then the flush state, as everywhere.
        let mut log = self.write();
        let waiters = {
            let mut flush = self.flush();
            if let Some(why) = flush.failed.clone() {
                let waiters = std::mem::take(&mut flush.waiting);
                drop(flush);
                waiters.into_iter().for_each(|waiter| waiter.tell(Err(io::Error::other(why.clone()))));
                return;
            }
            if flush.in_flight || flush.waiting.is_empty() {
                return;
            }
            flush.in_flight = true;
            std::mem::take(&mut flush.waiting)
        };
        failpoint::pass(Point::LogFlush);
        let done =
            FlushDone { waiters, log: Arc::downgrade(self), next: next.clone(), started: Instant::now(), sent: false };
        // On an error the callback was dropped, which told everybody.
        if let Err(error) = log.flush(true, Some(done)) {
            tracing::error!(%error, "the log takes no more flushes");
        }
        self.counters.log_bytes.set(log.on_disk_size());
    }
}

/// The files of a log, to be cut down when their names have gone; some of them, where not all can be opened.
fn open_segments(directory: &Path) -> Vec<(PathBuf, File)> {
    let paths = files_newest_first(directory).into_iter().flatten();
    paths.filter_map(|path| OpenOptions::new().write(true).open(&path).ok().map(|file| (path, file))).collect()
}

fn bounds_of(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(from) => *from,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(to) => *to,
        Bound::Unbounded => u64::MAX,
    };
    (from, to.max(from))
}

impl LogStore {
    /// Entries from `from` on and before `to`, up to about so many bytes, but at least one.
    pub(super) fn read_entries(&self, from: u64, to: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let log = self.inner.read();
        let mut entries = Vec::new();
        let mut bytes = 0usize;
        for read in log.read(from, to) {
            let (StoredLogId(log_id), StoredPayload(payload)) = read?;
            bytes = bytes.saturating_add(payload_bytes(&payload));
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(Entry { log_id, payload });
        }
        Ok(entries)
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (from, to) = bounds_of(&range);
        self.read_entries(from, to, usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.inner.read().log_state().vote().map(|vote| vote.0))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read_entries(start, end, READ_BYTES_MAX)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let (last_purged_log_id, last_log_id) = self.bounds();
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        failpoint::hit(Point::VoteSave)?;
        self.inner.write().save_vote(StoredVote(*vote))?;
        self.flushed().await?;
        failpoint::hit(Point::VoteSaved)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let Some(committed) = committed.map(StoredLogId) else { return Ok(()) };
        let mut log = self.inner.write();
        let state = log.log_state();
        // A commit may run ahead of what is here, and a repeated one says nothing new; raft-log refuses the first.
        if state.last() < Some(&committed) || state.committed() >= Some(&committed) {
            return Ok(());
        }
        // Not flushed: it saves time at the next start, and is not needed.
        log.commit(committed).map(drop)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.inner.read().log_state().committed().map(|id| id.0))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut bytes = 0;
        let entries = entries.into_iter().map(|entry| {
            bytes += payload_bytes(&entry.payload);
            (StoredLogId(entry.log_id), StoredPayload(entry.payload))
        });
        failpoint::hit(Point::LogAppend)?;
        self.inner.write().append(entries)?;
        failpoint::pass(Point::LogAppended);
        self.inner.counters.log_appended_bytes.add(u64::try_from(bytes).unwrap_or(u64::MAX));
        self.join_flush(Waiter::Entries(callback));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let from = last_log_id.map_or(0, |id| id.index() + 1);
        {
            let mut log = self.inner.write();
            // Nothing is there to be cut: openraft means nothing by it, raft-log an error.
            if log.log_state().last().is_none_or(|last| last.0.index() < from) {
                return Ok(());
            }
            failpoint::hit(Point::LogTruncate)?;
            log.truncate(from)?;
        }
        failpoint::pass(Point::LogTruncated);
        self.flushed().await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        failpoint::hit(Point::LogPurge)?;
        // The order matters: they are open before raft-log removes some of them, which then costs its thread nothing.
        let segments = open_segments(&self.directory);
        self.inner.write().purge(StoredLogId(log_id))?;
        failpoint::pass(Point::LogPurged);
        // raft-log removes them behind this flush, and before the next.
        self.flushed().await?;
        self.flushed().await?;
        // Nobody reads what is purged.
        let removed = segments.into_iter().filter(|(path, _)| !path.exists());
        removed.for_each(|(_, file)| removal::release(file));
        Ok(())
    }
}
