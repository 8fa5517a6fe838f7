//! Live logs on this coordinator's disk: one append-only file per attempt, always from line 1 without a hole.
//!
//! Nothing is fsynced: the agent keeps its spool until the log is sealed, so that a live log is a copy that may be lost.
//! Invariant: the head announces a line only when it can be read from the file.
//!
//! ```text
//! frame   magic u32, first number u64, records u32, length u32, crc32 of the payload u32, crc32 of this header u32,
//!         payload: a `helix.v1.LogChunk` with the records alone
//! ```

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use helix_common::removal::{open_shared, remove_gradually};
use helix_failpoint::{self as failpoint, Point};
use helix_model::AttemptKey;
use helix_model::limits::{CHUNK_BYTES, LOG_LINE_BYTES_MAX};
use helix_proto::v1;
use prost::Message;
use tokio::sync::watch;

use super::seal::SEALING;

const FRAME_MAGIC: u32 = 0x10c5_f4a3;
const FRAME_HEADER_BYTES: usize = 28;

/// What a record costs beside its data, at most: tags, number, time, stream, lengths.
const RECORD_OVERHEAD_MAX: usize = 40;

/// A frame is closed when its payload reaches this; one more line may come on top.
const FRAME_BYTES: usize = CHUNK_BYTES;

/// A payload, at most.
const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES + LOG_LINE_BYTES_MAX + RECORD_OVERHEAD_MAX;

/// Bytes between entries of the index in memory.
const INDEX_EVERY: u64 = 256 * 1024;

/// How far a live log is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Head {
    /// The last line that can be read.
    pub(super) last_seq: u64,
    /// Agents' streams that push it now.
    pub(super) pushers: u32,
    /// Its last line is here.
    pub(super) complete: bool,
    /// The file is gone: the log is sealed, or its build purged.
    pub(super) closed: bool,
    /// Bytes of whole frames.
    end: u64,
}

/// Why lines were not taken.
#[derive(thiserror::Error, Debug)]
pub(super) enum AppendError {
    /// Lines between what is here and what came are missing.
    #[error("line {got} came after line {have}")]
    Gap {
        /// The last line here.
        have: u64,
        /// What came.
        got: u64,
    },
    /// A line is too long or of no stream.
    #[error("line {seq} is malformed: {why}")]
    Malformed {
        /// Its number.
        seq: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// The log has grown beyond its limit.
    #[error("the log has more than {0} bytes")]
    TooLarge(u64),
    /// The disk failed.
    #[error("disk: {0}")]
    Io(#[from] io::Error),
}

/// One attempt's live log.
pub(super) struct LiveLog {
    path: PathBuf,
    writer: Mutex<Writer>,
    head: watch::Sender<Head>,
}

#[derive(Default)]
struct Writer {
    /// Open while lines come.
    file: Option<File>,
    /// A frame's first number and place, every so many bytes.
    index: Vec<(u64, u64)>,
}

/// Counts as a pusher of a log while it lives.
pub(super) struct Pushing(Arc<LiveLog>);

impl Drop for Pushing {
    fn drop(&mut self) {
        self.0.head.send_modify(|head| head.pushers -= 1);
    }
}

impl LiveLog {
    fn new(path: PathBuf) -> Self {
        Self { path, writer: Mutex::default(), head: watch::Sender::new(Head::default()) }
    }

    /// How far it is, now and from now on.
    pub(super) fn head(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    /// Notes a pusher.
    pub(super) fn pushing(self: &Arc<Self>) -> Pushing {
        self.head.send_modify(|head| head.pushers += 1);
        Pushing(Arc::clone(self))
    }

    /// Takes lines; those that are here already are passed over. Returns the last line's number. Once the log is closed,
    /// lines are dropped: nobody needs them here. Blocks.
    pub(super) fn append(&self, records: &[v1::LogRecord], bytes_max: u64) -> Result<u64, AppendError> {
        let mut writer = self.lock();
        let head = *self.head.borrow();
        let fresh = &records[records.partition_point(|record| record.seq <= head.last_seq)..];
        if head.closed || fresh.is_empty() {
            return Ok(head.last_seq);
        }
        check(fresh, head.last_seq)?;
        if head.end > bytes_max {
            return Err(AppendError::TooLarge(bytes_max));
        }
        let mut frames = Vec::new();
        let mut index = Vec::new();
        let mut rest = fresh;
        while let Some(first) = rest.first() {
            let place = head.end + frames.len() as u64;
            let indexed = index.last().or(writer.index.last()).map_or(0, |(_, at)| *at);
            if place == 0 || place - indexed >= INDEX_EVERY {
                index.push((first.seq, place));
            }
            rest = encode_frame(rest, &mut frames);
        }
        let written = failpoint::hit(Point::LiveWrite)
            .and_then(|()| writer.open(&self.path))
            .and_then(|file| file.write_all_at(&frames, head.end));
        if let Err(error) = written {
            // What was written in part lies behind the end and is overwritten, or cut off at the next start.
            writer.file = None;
            return Err(error.into());
        }
        failpoint::pass(Point::LiveWritten);
        writer.index.append(&mut index);
        let last_seq = fresh.last().map_or(head.last_seq, |record| record.seq);
        self.head.send_modify(|head| {
            head.last_seq = last_seq;
            head.end += frames.len() as u64;
        });
        Ok(last_seq)
    }

    /// Gives up what cannot be read behind a line, and what lies behind that: others may have it. Blocks.
    pub(super) fn cut_back(&self, last_seq: u64, at: u64) -> io::Result<()> {
        let mut writer = self.lock();
        writer.open(&self.path)?.set_len(at)?;
        writer.file = None;
        writer.index.retain(|(_, place)| *place < at);
        self.head.send_modify(|head| (head.last_seq, head.end, head.complete) = (last_seq, at, false));
        Ok(())
    }

    /// No more lines will come.
    pub(super) fn complete(&self) {
        self.lock().file = None;
        self.head.send_modify(|head| head.complete = true);
    }

    /// Removes the file. Readers that hold it open may read on; their head says that it is closed. Blocks.
    fn close(&self) {
        let mut writer = self.lock();
        *writer = Writer::default();
        failpoint::pass(Point::LiveRemove);
        match remove_gradually(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "a live log cannot be removed");
            }
            _ => {}
        }
        self.head.send_modify(|head| head.closed = true);
    }

    /// Reads the file from its start, and cuts off what a crash left unfinished. Blocks.
    fn recover(path: PathBuf) -> io::Result<Self> {
        let log = Self::new(path);
        let file = OpenOptions::new().read(true).write(true).open(&log.path)?;
        let len = file.metadata()?.len();
        let mut head = Head::default();
        let mut index: Vec<(u64, u64)> = Vec::new();
        loop {
            let buffer = read_some(&file, head.end, len)?;
            let mut at = 0;
            while let Some(frame) = parse_frame(&buffer, at) {
                let place = head.end + at as u64;
                if frame.first_seq != head.last_seq + 1 {
                    break;
                }
                if index.last().is_none_or(|(_, indexed)| place - indexed >= INDEX_EVERY) {
                    index.push((frame.first_seq, place));
                }
                head.last_seq += u64::from(frame.records);
                at = frame.end;
            }
            if at == 0 {
                break;
            }
            head.end += at as u64;
        }
        if head.end < len {
            tracing::warn!(path = %log.path.display(), at = head.end, len, "a live log is cut off where it is damaged");
            file.set_len(head.end)?;
        }
        log.lock().index = index;
        log.head.send_replace(head);
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn open(&mut self, path: &Path) -> io::Result<&File> {
        if self.file.is_none() {
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
            self.file = Some(open?);
        }
        self.file.as_ref().ok_or_else(|| io::Error::other("no file"))
    }
}

fn check(fresh: &[v1::LogRecord], last_seq: u64) -> Result<(), AppendError> {
    for (record, expected) in fresh.iter().zip(last_seq + 1..) {
        if record.seq != expected {
            return Err(AppendError::Gap { have: expected - 1, got: record.seq });
        }
        let malformed = |why| AppendError::Malformed { seq: record.seq, why };
        if record.data.len() > LOG_LINE_BYTES_MAX {
            return Err(malformed("too long"));
        }
        if record.stream() == v1::LogStream::Unspecified {
            return Err(malformed("of no stream"));
        }
    }
    Ok(())
}

/// Appends a frame of the first records; returns those left.
fn encode_frame<'a>(records: &'a [v1::LogRecord], out: &mut Vec<u8>) -> &'a [v1::LogRecord] {
    let header_at = out.len();
    out.resize(header_at + FRAME_HEADER_BYTES, 0);
    let mut count = 0;
    for record in records {
        // The encoding of a repeated field is that of its elements one after another: tag 3, length, message.
        out.push(3 << 3 | 2);
        prost::encoding::encode_varint(record.encoded_len() as u64, out);
        record.encode_raw(out);
        count += 1;
        if out.len() - header_at - FRAME_HEADER_BYTES >= FRAME_BYTES {
            break;
        }
    }
    let (header, payload) = out[header_at..].split_at_mut(FRAME_HEADER_BYTES);
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    header[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    header[4..12].copy_from_slice(&records.first().map_or(0, |record| record.seq).to_le_bytes());
    header[12..16].copy_from_slice(&number(count));
    header[16..20].copy_from_slice(&number(payload.len()));
    header[20..24].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let crc = crc32fast::hash(&header[..24]);
    header[24..].copy_from_slice(&crc.to_le_bytes());
    &records[count..]
}

struct Frame {
    first_seq: u64,
    records: u32,
    payload: Bytes,
    /// Where the next one begins.
    end: usize,
}

/// The frame at `at`; `None` when it is not whole or not sound.
fn parse_frame(buffer: &Bytes, at: usize) -> Option<Frame> {
    let header = buffer.get(at..at + FRAME_HEADER_BYTES)?;
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if number(0) != FRAME_MAGIC || crc32fast::hash(&header[..24]) != number(24) {
        return None;
    }
    let start = at + FRAME_HEADER_BYTES;
    let end = start.checked_add(number(16) as usize).filter(|end| *end <= buffer.len())?;
    let payload = buffer.slice(start..end);
    let first_seq = u64::from(number(4)) | u64::from(number(8)) << 32;
    (crc32fast::hash(&payload) == number(20)).then_some(Frame { first_seq, records: number(12), payload, end })
}

/// Bytes from `at` on: one whole frame at least, if there is one before `end`.
fn read_some(file: &File, at: u64, end: u64) -> io::Result<Bytes> {
    let len = end.saturating_sub(at).min((PAYLOAD_BYTES_MAX + FRAME_HEADER_BYTES) as u64);
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer.into())
}

/// A place in a live log.
pub(super) struct LiveReader {
    log: Arc<LiveLog>,
    file: Option<Arc<File>>,
    at: u64,
    next: u64,
}

impl LiveReader {
    /// Before line `next`.
    pub(super) fn new(log: Arc<LiveLog>, next: u64) -> Self {
        let next = next.max(1);
        let at = {
            let writer = log.lock();
            let after = writer.index.partition_point(|(seq, _)| *seq <= next);
            writer.index.get(after.saturating_sub(1)).map_or(0, |(_, at)| *at)
        };
        Self { log, file: None, at, next }
    }

    /// Where the frame begins that is read next.
    pub(super) fn place(&self) -> u64 {
        self.at
    }

    /// Some of the lines that are there; none at the end. Blocks.
    pub(super) fn read(&mut self) -> io::Result<Vec<v1::LogRecord>> {
        let end = self.log.head.borrow().end;
        let file = match &self.file {
            Some(file) => Arc::clone(file),
            None if end == 0 => return Ok(Vec::new()),
            None => Arc::clone(self.file.insert(Arc::new(open_shared(&self.log.path)?))),
        };
        let mut records = Vec::new();
        while records.is_empty() && self.at < end {
            let buffer = read_some(&file, self.at, end)?;
            let mut at = 0;
            while let Some(frame) = parse_frame(&buffer, at) {
                at = frame.end;
                if frame.first_seq + u64::from(frame.records) <= self.next {
                    continue;
                }
                let chunk = v1::LogChunk::decode(frame.payload).map_err(io::Error::other)?;
                records.extend(chunk.records.into_iter().filter(|record| record.seq >= self.next));
            }
            if at == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("damaged at byte {}", self.at)));
            }
            self.at += at as u64;
        }
        if let Some(last) = records.last() {
            self.next = last.seq + 1;
        }
        Ok(records)
    }
}

/// All live logs of this coordinator.
pub(super) struct LiveLogs {
    directory: PathBuf,
    logs: Mutex<HashMap<AttemptKey, Arc<LiveLog>>>,
}

impl LiveLogs {
    /// Opens the directory and reads what is in it. Blocks.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let mut logs = HashMap::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let stem = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".log"));
            if path.extension().is_some_and(|extension| extension == SEALING) {
                // Cut short: it is begun again.
                remove_gradually(&path)?;
            }
            let Some(key) = stem.and_then(|stem| stem.parse::<AttemptKey>().ok()) else { continue };
            match LiveLog::recover(path.clone()) {
                Ok(log) => {
                    logs.insert(key, Arc::new(log));
                }
                Err(error) => tracing::error!(path = %path.display(), %error, "a live log cannot be read"),
            }
        }
        Ok(Self { directory: directory.to_owned(), logs: Mutex::new(logs) })
    }

    /// An attempt's log, if it is here.
    pub(super) fn get(&self, key: &AttemptKey) -> Option<Arc<LiveLog>> {
        self.lock().get(key).cloned()
    }

    /// An attempt's log, begun if it is not here.
    pub(super) fn get_or_begin(&self, key: &AttemptKey) -> Arc<LiveLog> {
        let begin = || Arc::new(LiveLog::new(self.directory.join(format!("{key}.log"))));
        Arc::clone(self.lock().entry(key.clone()).or_insert_with(begin))
    }

    /// The attempts that have a log here.
    pub(super) fn keys(&self) -> Vec<AttemptKey> {
        self.lock().keys().cloned().collect()
    }

    /// How many logs there are, and their bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        let logs = self.lock();
        (logs.len() as u64, logs.values().map(|log| log.head.borrow().end).sum())
    }

    /// Removes an attempt's log. Blocks.
    pub(super) fn remove(&self, key: &AttemptKey) {
        let removed = self.lock().remove(key);
        if let Some(log) = removed {
            log.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AttemptKey, Arc<LiveLog>>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
