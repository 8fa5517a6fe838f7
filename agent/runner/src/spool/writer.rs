//! Writing a spool within its bound.
//!
//! Lines are numbered when appended and written when flushed. A flush that fails leaves the file as it was and the
//! lines in memory, so that it can be tried again: nothing is lost by a disk that is full for a while.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use helix_failpoint::{self as failpoint, Point};
use helix_model::limits::LOG_LINE_BYTES_MAX;

use super::reader::{Growth, Part, SpoolReader};
use super::{PART_HEAD_BYTES, PartHead, RECORD_HEAD_BYTES, Stream, TAIL_BYTES_MAX, encode_record, u32_at, u64_at};
use crate::outcome::LogTotals;
use crate::paths::AttemptDir;

/// The smallest bound that is kept: below, the longest lines would not fit into a part.
pub const LOG_BYTES_MIN: u64 = 1024 * 1024;

/// Room at the head's end for the line that says what follows.
const NOTICE_BYTES: u64 = 512;

/// A part that is being written.
#[derive(Debug)]
struct OpenPart {
    file: File,
    length: u64,
    head: PartHead,
}

/// Appends lines to an attempt's log.
#[derive(Debug)]
pub struct SpoolWriter {
    dir: AttemptDir,
    head_bytes_max: u64,
    tail_part_bytes_max: u64,
    /// Made with its first line: many commands say nothing.
    head: Option<OpenPart>,
    /// The head's length once all pending lines are written.
    head_planned: u64,
    /// Lines and bytes of the head, from the moment when it took its last line.
    head_closed: Option<LogTotals>,
    /// Where the oldest tail part on disk that is not the open one begins.
    tail_old: Option<PartHead>,
    tail: Option<OpenPart>,
    /// Records for the head, whole, in order.
    pending_head: Vec<u8>,
    /// Records for the tail.
    pending_tail: Vec<u8>,
    /// Bytes of all lines that are on disk or were dropped; lags behind `totals` by what is pending.
    bytes_written: u64,
    totals: LogTotals,
}

impl SpoolWriter {
    /// Opens an attempt's log behind its last good line; one that is not there is made with its first. At most `log_bytes_max` bytes, but not less than
    /// [`LOG_BYTES_MIN`], are kept on disk. A record that was cut off at the end is removed.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` when what is there is damaged.
    pub fn open(dir: &AttemptDir, log_bytes_max: u64) -> io::Result<Self> {
        let log_bytes_max = log_bytes_max.max(LOG_BYTES_MIN);
        let tail_bytes_max = (log_bytes_max / 2).min(TAIL_BYTES_MAX);
        let mut scan = SpoolReader::new(dir);
        let mut head_end = 0;
        let mut head_totals = LogTotals::default();
        while scan.next_record(Growth::Ended)?.is_some() {
            if let (Part::Head, end) = scan.end() {
                (head_end, head_totals) = (end, scan.totals());
            }
        }
        let totals = scan.totals();
        let head = if Part::Head.path(dir).try_exists()? { Some(OpenPart::head(dir, head_end)?) } else { None };
        let mut writer = Self {
            dir: dir.clone(),
            head_bytes_max: log_bytes_max - tail_bytes_max - NOTICE_BYTES,
            tail_part_bytes_max: tail_bytes_max / 2,
            head_planned: planned(head.as_ref()),
            head,
            head_closed: None,
            tail_old: None,
            tail: None,
            pending_head: Vec::new(),
            pending_tail: Vec::new(),
            bytes_written: totals.bytes,
            totals,
        };
        writer.adopt_tail(head_totals, scan.end())?;
        Ok(writer)
    }

    /// Takes over the tail that an earlier writer left.
    fn adopt_tail(&mut self, head_totals: LogTotals, (_, tail_end): (Part, u64)) -> io::Result<()> {
        self.tail_old = read_part_head(&self.dir, Part::TailOld)?;
        if let Some(head) = read_part_head(&self.dir, Part::Tail)? {
            self.tail = Some(OpenPart::open(&self.dir, Part::Tail, head, tail_end)?);
        }
        if self.tail.is_some() || self.tail_old.is_some() {
            self.head_closed = Some(head_totals);
        }
        Ok(())
    }

    /// Numbers a line and keeps it in memory until [`Self::flush`]. A line over the limit becomes several.
    /// Returns the last number given.
    pub fn append(&mut self, time_ms: u64, stream: Stream, line: &[u8]) -> u64 {
        if line.len() <= LOG_LINE_BYTES_MAX {
            self.append_part(time_ms, stream, line);
        } else {
            for part in line.chunks(LOG_LINE_BYTES_MAX) {
                self.append_part(time_ms, stream, part);
            }
        }
        self.totals.last_seq
    }

    fn append_part(&mut self, time_ms: u64, stream: Stream, line: &[u8]) {
        let length = (RECORD_HEAD_BYTES + line.len()) as u64;
        if self.head_closed.is_none() && self.head_planned + length > self.head_bytes_max {
            let notice = format!(
                "the log is near its limit of {} bytes: what follows can be read when the attempt has ended, and of \
                 that the last {} bytes at least",
                self.head_bytes_max + NOTICE_BYTES + 2 * self.tail_part_bytes_max,
                self.tail_part_bytes_max,
            );
            self.put(time_ms, Stream::System, notice.as_bytes());
            self.head_closed = Some(self.totals);
        }
        self.put(time_ms, stream, line);
    }

    fn put(&mut self, time_ms: u64, stream: Stream, line: &[u8]) {
        self.totals.last_seq += 1;
        self.totals.bytes += line.len() as u64;
        let seq = self.totals.last_seq;
        if self.head_closed.is_none() {
            self.head_planned += (RECORD_HEAD_BYTES + line.len()) as u64;
            encode_record(&mut self.pending_head, seq, time_ms, stream, line);
        } else {
            encode_record(&mut self.pending_tail, seq, time_ms, stream, line);
        }
    }

    /// Bytes that wait for [`Self::flush`].
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.pending_head.len() + self.pending_tail.len()
    }

    /// Writes all pending lines.
    ///
    /// # Errors
    /// Those of the file system. Nothing is lost: call it again when there is hope.
    pub fn flush(&mut self) -> io::Result<()> {
        if !self.pending_head.is_empty() {
            let head = match &mut self.head {
                Some(head) => head,
                None => self.head.insert(OpenPart::head(&self.dir, 0)?),
            };
            head.append(&self.pending_head)?;
            self.bytes_written += payload_bytes(&self.pending_head);
            self.pending_head.clear();
        }
        while !self.pending_tail.is_empty() {
            let room = self.tail.as_ref().map_or(0, |tail| self.tail_part_bytes_max.saturating_sub(tail.length));
            let fits = whole_records(&self.pending_tail, room);
            if fits == 0 {
                self.rotate()?;
                continue;
            }
            let tail = self.tail.as_mut().expect("room is 0 without a tail");
            tail.append(&self.pending_tail[..fits])?;
            self.bytes_written += payload_bytes(&self.pending_tail[..fits]);
            self.pending_tail.drain(..fits);
        }
        Ok(())
    }

    /// Makes the open tail the old one, in the place of an older one, and opens an empty one.
    fn rotate(&mut self) -> io::Result<()> {
        if let Some(tail) = self.tail.as_ref().map(|tail| tail.head) {
            failpoint::hit(Point::SpoolRotate)?;
            fs::rename(self.dir.log_tail(), self.dir.log_tail_old())?;
            failpoint::pass(Point::SpoolRotated);
            // Not before it has moved: a tail that nobody holds would be written over at the next try.
            self.tail = None;
            self.tail_old = Some(tail);
            if let Some(head) = self.head_closed {
                let lines = (tail.first_seq - 1).saturating_sub(head.last_seq);
                let bytes = tail.bytes_before.saturating_sub(head.bytes);
                // Discarded lines may lie outside of this gap, or inside; never count fewer than are gone.
                self.totals.dropped_lines = self.totals.dropped_lines.max(lines);
                self.totals.dropped_bytes = self.totals.dropped_bytes.max(bytes);
            }
        }
        let head = PartHead { first_seq: u64_at(&self.pending_tail, 8), bytes_before: self.bytes_written };
        self.tail = Some(OpenPart::open(&self.dir, Part::Tail, head, 0)?);
        Ok(())
    }

    /// Gives up what could not be written, for good. The numbers stay used: the loss shows as a gap.
    ///
    /// Lines are lost here and only here, so use it only when the disk stays full.
    pub fn discard_pending(&mut self) {
        for pending in [&mut self.pending_head, &mut self.pending_tail] {
            let bytes = payload_bytes(pending);
            self.bytes_written += bytes;
            self.totals.dropped_bytes += bytes;
            self.totals.dropped_lines += records(pending).count() as u64;
            pending.clear();
        }
        self.head_planned = planned(self.head.as_ref());
    }

    /// The newest line's number.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        self.totals.last_seq
    }

    /// The log until now, pending lines included.
    #[must_use]
    pub fn totals(&self) -> LogTotals {
        self.totals
    }
}

/// The head's length when nothing is pending.
fn planned(head: Option<&OpenPart>) -> u64 {
    head.map_or(PART_HEAD_BYTES as u64, |head| head.length)
}

impl OpenPart {
    /// Opens the log's beginning.
    fn head(dir: &AttemptDir, good_bytes: u64) -> io::Result<Self> {
        Self::open(dir, Part::Head, PartHead { first_seq: 1, bytes_before: 0 }, good_bytes)
    }

    /// Opens a part, cut to its good bytes; 0 of them: writes it anew.
    fn open(dir: &AttemptDir, part: Part, head: PartHead, good_bytes: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(part.path(dir))?;
        // Only where there is garbage: ext4 writes a file that was truncated to nothing out at its close.
        if file.metadata()?.len() > good_bytes {
            file.set_len(good_bytes)?;
        }
        let mut part = Self { file, length: good_bytes, head };
        if good_bytes < PART_HEAD_BYTES as u64 {
            part.append(&head.encode())?;
        }
        Ok(part)
    }

    /// All of it or, at the next reading, nothing.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = failpoint::hit(Point::SpoolWrite).and_then(|()| self.file.write_all_at(bytes, self.length));
        if let Err(error) = written {
            // A cut-off record in the middle would be damage; should this fail too, the next try writes over it.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        failpoint::pass(Point::SpoolWritten);
        self.length += bytes.len() as u64;
        Ok(())
    }
}

fn read_part_head(dir: &AttemptDir, part: Part) -> io::Result<Option<PartHead>> {
    let file = match File::open(part.path(dir)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut head = [0; PART_HEAD_BYTES];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) => Ok(Some(PartHead::decode(&head)?)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// The lengths of the records in bytes that we encoded.
fn records(encoded: &[u8]) -> impl Iterator<Item = usize> {
    let mut rest = encoded;
    std::iter::from_fn(move || {
        let length = RECORD_HEAD_BYTES + u32_at(rest.get(..4)?, 0) as usize;
        rest = &rest[length..];
        Some(length)
    })
}

fn payload_bytes(encoded: &[u8]) -> u64 {
    records(encoded).map(|length| (length - RECORD_HEAD_BYTES) as u64).sum()
}

/// How many bytes of whole records fit into `room`.
fn whole_records(encoded: &[u8], room: u64) -> usize {
    let mut fitting = 0;
    for length in records(encoded) {
        if (fitting + length) as u64 > room {
            break;
        }
        fitting += length;
    }
    fitting
}
