//! Reading a spool, while it grows and afterwards.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use super::{PART_HEAD_BYTES, PartHead, Record, Stream, decode_record};
use crate::codec::FormatError;
use crate::outcome::LogTotals;
use crate::paths::AttemptDir;

/// Bytes asked of the file at once, at most; several of the longest lines fit.
const READ_BYTES: usize = 256 * 1024;

/// The same at first: most logs are short, and what is asked for is zeroed before it is read.
const READ_BYTES_FIRST: usize = 4 * 1024;

/// Whether somebody may still write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Growth {
    /// Yes: an incomplete end is waited for, and only the head is read.
    Open,
    /// No: the tail is read as well, and an incomplete end is where the writer died.
    Ended,
}

/// A place in a spool to which a reader can return.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Position {
    part: Part,
    offset: u64,
    totals: LogTotals,
    /// Of the last record.
    time_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Head,
    TailOld,
    Tail,
}

impl Part {
    fn next(self) -> Option<Self> {
        match self {
            Self::Head => Some(Self::TailOld),
            Self::TailOld => Some(Self::Tail),
            Self::Tail => None,
        }
    }

    pub(super) fn path(self, dir: &AttemptDir) -> PathBuf {
        match self {
            Self::Head => dir.log_head(),
            Self::TailOld => dir.log_tail_old(),
            Self::Tail => dir.log_tail(),
        }
    }
}

/// Why a spool could not be read on.
#[derive(Debug)]
pub enum SpoolError {
    /// The file system failed.
    Io(io::Error),
    /// The bytes are not what was written. What was read before is good; what follows is lost.
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damaged record starts.
        offset: u64,
        /// What is wrong with it.
        error: FormatError,
    },
}

impl fmt::Display for SpoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Damaged { path, offset, error } => {
                write!(f, "{} is damaged at byte {offset}: {error}", path.display())
            }
        }
    }
}

impl std::error::Error for SpoolError {}

impl From<io::Error> for SpoolError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<SpoolError> for io::Error {
    fn from(error: SpoolError) -> Self {
        match error {
            SpoolError::Io(error) => error,
            damaged @ SpoolError::Damaged { .. } => Self::new(io::ErrorKind::InvalidData, damaged),
        }
    }
}

/// Reads records in order. Needs no writer and disturbs none; any number may read at once.
#[derive(Debug)]
pub struct SpoolReader {
    dir: AttemptDir,
    position: Position,
    file: Option<File>,
    /// Bytes from `position.offset` on, the first `taken` of which belong to records before it.
    buffer: Vec<u8>,
    taken: usize,
    /// Bytes to ask for next.
    wanted: usize,
}

impl SpoolReader {
    /// Reads from the first line. The spool need not exist yet.
    #[must_use]
    pub fn new(dir: &AttemptDir) -> Self {
        Self::resume(dir, Position { part: Part::Head, offset: 0, totals: LogTotals::default(), time_ms: 0 })
    }

    /// Reads on from where another reader was.
    #[must_use]
    pub fn resume(dir: &AttemptDir, position: Position) -> Self {
        Self { dir: dir.clone(), position, file: None, buffer: Vec::new(), taken: 0, wanted: READ_BYTES_FIRST }
    }

    /// The place behind the last record that was given.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// What was read until now; after the end, all there is.
    #[must_use]
    pub fn totals(&self) -> LogTotals {
        self.position.totals
    }

    /// The next record. `None`: there is none now ([`Growth::Open`]: ask again later), or never
    /// ([`Growth::Ended`]).
    ///
    /// # Errors
    /// [`SpoolError`]; after `Damaged` every further call says the same.
    pub fn next_record(&mut self, growth: Growth) -> Result<Option<Record>, SpoolError> {
        loop {
            if self.position.offset == 0 {
                if let Some(gap) = self.enter_part()? {
                    return Ok(Some(gap));
                }
            } else if let Some(record) = self.take_record()? {
                return Ok(Some(record));
            }
            if self.position.offset > 0 && self.fill()? {
                continue;
            }
            // What is left in the buffer is incomplete. It is read again later: its writer may have taken it back.
            self.buffer.clear();
            self.taken = 0;
            match (growth, self.position.part.next()) {
                (Growth::Ended, Some(part)) => {
                    self.position = Position { part, offset: 0, ..self.position };
                    self.file = None;
                }
                (Growth::Open, _) | (Growth::Ended, None) => return Ok(None),
            }
        }
    }

    /// Opens the part and reads its head. Gives the line that stands for what was dropped before it. Offset 0 stays
    /// when the part does not exist or has no whole head.
    fn enter_part(&mut self) -> Result<Option<Record>, SpoolError> {
        let path = self.position.part.path(&self.dir);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut head = [0; PART_HEAD_BYTES];
        match file.read_exact_at(&mut head, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let head = PartHead::decode(&head).map_err(|error| self.damaged(error))?;
        self.file = Some(file);
        self.position.offset = PART_HEAD_BYTES as u64;
        let totals = &mut self.position.totals;
        let lines = head.first_seq.saturating_sub(totals.last_seq + 1);
        if lines == 0 {
            return Ok(None);
        }
        let bytes = head.bytes_before.saturating_sub(totals.bytes);
        totals.dropped_lines += lines;
        totals.dropped_bytes += bytes;
        totals.last_seq = head.first_seq - 1;
        totals.bytes = head.bytes_before;
        let text = format!("{lines} lines ({bytes} bytes) were dropped here: the log passed its limit");
        let (seq, time_ms) = (totals.last_seq, self.position.time_ms);
        Ok(Some(Record { seq, time_ms, stream: Stream::System, bytes: text.into_bytes() }))
    }

    fn take_record(&mut self) -> Result<Option<Record>, SpoolError> {
        let Some((view, length)) = decode_record(&self.buffer[self.taken..]).map_err(|error| self.damaged(error))?
        else {
            return Ok(None);
        };
        let totals = &mut self.position.totals;
        match view.seq.checked_sub(totals.last_seq + 1) {
            None => return Err(self.damaged(FormatError::Value("seq"))),
            Some(0) => {}
            Some(lines) => {
                // Given up by the writer; see `SpoolWriter::discard_pending`.
                totals.dropped_lines += lines;
                totals.last_seq = view.seq - 1;
                let text = format!("{lines} lines were lost here: the disk stayed full");
                return Ok(Some(Record {
                    seq: totals.last_seq,
                    time_ms: view.time_ms,
                    stream: Stream::System,
                    bytes: text.into_bytes(),
                }));
            }
        }
        let record = Record { seq: view.seq, time_ms: view.time_ms, stream: view.stream, bytes: view.bytes.to_vec() };
        self.taken += length;
        self.position.offset += length as u64;
        self.position.time_ms = record.time_ms;
        self.position.totals.last_seq = record.seq;
        self.position.totals.bytes += record.bytes.len() as u64;
        Ok(Some(record))
    }

    /// Reads more of the part. False at its end.
    fn fill(&mut self) -> Result<bool, SpoolError> {
        let file = match &self.file {
            Some(file) => file,
            // After `resume`.
            None => self.file.insert(File::open(self.position.part.path(&self.dir))?),
        };
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let have = self.buffer.len();
        let wanted = self.wanted;
        self.buffer.resize(have + wanted, 0);
        let read = file.read_at(&mut self.buffer[have..], self.position.offset + have as u64);
        self.buffer.truncate(have + read.as_ref().map_or(0, |count| *count));
        let count = read?;
        if count == wanted {
            self.wanted = (wanted * 4).min(READ_BYTES);
        }
        Ok(count > 0)
    }

    fn damaged(&self, error: FormatError) -> SpoolError {
        SpoolError::Damaged { path: self.position.part.path(&self.dir), offset: self.position.offset, error }
    }

    /// The part that was read to its end, and how many good bytes it has: 0 when it does not exist.
    pub(super) fn end(&self) -> (Part, u64) {
        (self.position.part, self.position.offset)
    }
}
