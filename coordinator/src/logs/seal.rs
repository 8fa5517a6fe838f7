//! Sealing the logs of attempts whose agents will not: of workers that were lost, before an attempt's end or before they brought its log.
//!
//! Who has the most of such a log seals it, some time after the attempt's end. Until then its agent may come back: it goes on pushing lines, and
//! seals the whole itself, which counts. Afterwards what it brings is acknowledged and dropped, and it is told to forget the attempt. The sealed
//! log ends with a `system` line that says from where on lines may be missing, so that a gap stands where it is.
//! When several seal at once the first report counts, as always.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use helix_common::removal::{remove_gradually, share};
use helix_common::sealed_log::{LogStream, SealedLogError, SealedLogWriter};
use helix_common::sha256::Sha256;
use helix_core::command::SealLog;
use helix_core::record::{BlobRef, SealedLog};
use helix_failpoint::{self as failpoint, Point};
use helix_model::limits::CHUNK_BYTES;
use helix_model::{AttemptKey, Digest, NodeId, WorkerName};
use helix_proto::v1;
use tonic::Status;

use super::LogHub;
use super::live::{LiveLog, LiveReader};
use super::read::{Source, Survey};
use crate::blobs::Announce;
use crate::plane::{AttemptFacts, EndFacts};

/// How much longer a coordinator that does not answer is waited for, as it may have more of the log.
const SILENT_PATIENCE_MS: u64 = 600_000;

/// Between two tries to seal a log, at first and at most: each reads all of it.
const PAUSE: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// A log that nobody may seal but us.
#[derive(Debug)]
pub(super) struct Left {
    /// Since when that is known here.
    seen: Instant,
    /// Not to be tried before.
    not_before: Instant,
    pause: Duration,
}

/// What a log is called while it is sealed.
pub(super) const SEALING: &str = "sealing";

/// What can be sealed here now, and what to say at its end.
struct Due {
    key: AttemptKey,
    worker: WorkerName,
    end: EndFacts,
    log: Arc<LiveLog>,
    silent: Vec<NodeId>,
    /// The last line that any other coordinator has.
    elsewhere: u64,
}

impl LogHub {
    /// Looks for logs that are to be sealed here, and seals them. How many were.
    pub(super) async fn seal_left(&self) -> usize {
        let mut sealed = 0;
        let keys = self.inner.live.keys();
        self.left().retain(|key, _| self.inner.live.get(key).is_some());
        for key in keys {
            let Some(due) = self.due(key).await else { continue };
            let (key, last) = (due.key.clone(), due.log.head().borrow().last_seq);
            match self.seal(due).await {
                Ok(()) => {
                    sealed += 1;
                    tracing::info!(attempt = %key, lines = last, "a log whose agent did not seal it was sealed");
                }
                Err(error) => {
                    tracing::warn!(attempt = %key, %error, "a log that was left here cannot be sealed yet");
                    self.left().entry(key).and_modify(|left| {
                        left.not_before = Instant::now() + left.pause;
                        left.pause = (left.pause * 2).min(PAUSE_MAX);
                    });
                }
            }
        }
        sealed
    }

    /// Whether this coordinator is to seal the log now. In doubt, later.
    async fn due(&self, key: AttemptKey) -> Option<Due> {
        let inner = &self.inner;
        let log = inner.live.get(&key)?;
        let head = *log.head().borrow();
        if head.pushers > 0 || head.closed {
            return None;
        }
        let Ok(AttemptFacts::Open { worker, end: Some(end) }) = inner.plane.attempt(&key).await else { return None };
        // An agent that is there seals it whole, and does not give up.
        if end.agent_lives && !end.worker_gone() {
            return None;
        }
        // Log time stands still here while nothing is committed, and what this node saw begins anew when it starts.
        let now = Instant::now();
        let seen = {
            let mut all = self.left();
            let left = all.entry(key.clone()).or_insert(Left { seen: now, not_before: now, pause: PAUSE });
            if now < left.not_before {
                return None;
            }
            left.seen
        };
        let seen_ms = u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX);
        let waited = inner.plane.now().since_ms(end.at).max(seen_ms);
        let late = waited.checked_sub(inner.plane.policy().seal_lost_after_ms)?;
        let Survey { found, silent } = inner.survey(&key).await;
        let better = found.iter().any(|found| match found.source {
            Source::Here(_) => false,
            // Who has as much and comes first in order does it.
            Source::Peer(node) => found.pushing || (found.last_seq, inner.plane.node()) > (head.last_seq, node),
        });
        let wait = better || (!silent.is_empty() && late < SILENT_PATIENCE_MS);
        let peers = found.iter().filter(|found| matches!(found.source, Source::Peer(_)));
        let elsewhere = peers.map(|found| found.last_seq).max().unwrap_or(0);
        (!wait).then_some(Due { key, worker, end, log, silent, elsewhere })
    }

    fn left(&self) -> MutexGuard<'_, HashMap<AttemptKey, Left>> {
        self.inner.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As if enough time had passed since the last try.
    #[cfg(test)]
    pub(super) fn forget_pauses(&self) {
        self.left().values_mut().for_each(|left| left.not_before = Instant::now());
    }

    async fn seal(&self, due: Due) -> Result<(), String> {
        self.check_room().map_err(|status| status.message().to_owned())?;
        let path = self.inner.directory.join(format!("{}.{SEALING}", due.key));
        let (key, worker) = (due.key.clone(), due.worker.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let sealing = Sealing::write(&due, path)?;
            failpoint::hit(Point::LiveSealed).map(|()| sealing)
        });
        let sealing = writing.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let Sealing { digest, size, lines, .. } = sealing;
        let announce = Announce { digest, size, offset: 0, copies: 0 };
        let stored = self.inner.blobs.put(announce, sealing.chunks().boxed()).await;
        let holders = stored.map_err(|error| error.to_string())?;
        failpoint::pass(Point::LiveStored);
        let log = SealedLog { blob: BlobRef { digest, size, holders }, lines };
        self.inner.plane.seal_log(SealLog { key, worker, log }).await.map_err(|error| error.to_string())
    }
}

/// A sealed log in a file of its own, which goes with it.
struct Sealing {
    file: Arc<File>,
    path: PathBuf,
    digest: Digest,
    size: u64,
    lines: u64,
}

impl Drop for Sealing {
    fn drop(&mut self) {
        // What stays is removed at the next start.
        let _ = remove_gradually(&self.path);
    }
}

impl Sealing {
    /// Writes what is here of the log, and its last line. Blocks.
    fn write(due: &Due, path: PathBuf) -> io::Result<Self> {
        let options = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        share(&options)?;
        let file = Arc::new(options);
        let out = Hashing { file: Arc::clone(&file), sha256: Sha256::new(), size: 0 };
        let mut sealing = Self { file, path, digest: Digest([0; 32]), size: 0, lines: 0 };
        let mut writer = SealedLogWriter::new(out).map_err(to_io)?;
        let head = *due.log.head().borrow();
        let mut reader = LiveReader::new(Arc::clone(&due.log), 1);
        let (mut last, mut last_ms) = (0, 0);
        let broken = loop {
            match reader.read() {
                Ok(records) if records.is_empty() => break None,
                Ok(records) => {
                    for record in records {
                        let stream = stream_of(&record);
                        writer.push_parts(record.seq, record.time_ms, stream, &record.data).map_err(to_io)?;
                        (last, last_ms) = (record.seq, record.time_ms);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && head.last_seq == 0 => break None,
                Err(error) if !is_loss(&error) => return Err(error),
                Err(error) if due.elsewhere > last => {
                    due.log.cut_back(last, reader.place())?;
                    return Err(error);
                }
                Err(error) => break Some(error),
            }
        };
        if let Some(text) = due.last_words(last, head.complete, broken.as_ref()) {
            let at = i64::try_from(due.end.at.0).unwrap_or(i64::MAX).max(last_ms);
            writer.push_parts(last + 1, at, LogStream::System, text.as_bytes()).map_err(to_io)?;
        }
        let (out, totals) = writer.finish().map_err(to_io)?;
        (sealing.digest, sealing.size, sealing.lines) = (out.sha256.finalize(), out.size, totals.lines);
        Ok(sealing)
    }

    /// The file's bytes, a piece in memory at a time.
    fn chunks(&self) -> impl Stream<Item = Result<Bytes, Status>> + Send + use<> {
        let (file, size) = (Arc::clone(&self.file), self.size);
        futures::stream::try_unfold(0, move |at| {
            let file = Arc::clone(&file);
            async move {
                let len = usize::try_from(size - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
                if len == 0 {
                    return Ok(None);
                }
                let read = tokio::task::spawn_blocking(move || {
                    let mut data = vec![0; len];
                    file.read_exact_at(&mut data, at).map(|()| Bytes::from(data))
                });
                let data = read.await.map_err(|error| Status::internal(error.to_string()))?;
                let data = data.map_err(|error| Status::internal(error.to_string()))?;
                Ok(Some((data, at + len as u64)))
            }
        })
    }
}

impl Due {
    /// What the log's last line says; `None` where nothing can be missing.
    fn last_words(&self, last: u64, complete: bool, broken: Option<&io::Error>) -> Option<String> {
        let what = if last == 0 { "the log of this attempt".to_owned() } else { format!("what followed line {last}") };
        let mut text = match broken {
            Some(error) => format!("{what} was damaged on the only coordinator that had it: {error}"),
            None if complete => return None,
            None if self.end.worker_gone() => format!("{what}, if anything did, was lost with worker {}", self.worker),
            None => format!("{what}, if anything did, was never brought by worker {}", self.worker),
        };
        if last == 0 && broken.is_none() {
            text = text.replace(", if anything did,", "");
        }
        if !self.silent.is_empty() {
            let names: Vec<_> = self.silent.iter().map(NodeId::to_string).collect();
            text = format!("{text}; coordinators that did not answer and may have had more: {}", names.join(", "));
        }
        Some(text)
    }
}

/// A file that is hashed as it is written, front to back.
struct Hashing {
    file: Arc<File>,
    sha256: Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.size)?;
        self.sha256.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether lines are gone for good: a system that is merely short of something is asked again.
fn is_loss(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound)
}

fn stream_of(record: &v1::LogRecord) -> LogStream {
    match record.stream() {
        v1::LogStream::Stderr => LogStream::Stderr,
        v1::LogStream::System => LogStream::System,
        v1::LogStream::Stdout | v1::LogStream::Unspecified => LogStream::Stdout,
    }
}

fn to_io(error: SealedLogError) -> io::Error {
    match error {
        SealedLogError::Io(error) => error,
        other => io::Error::other(other),
    }
}
