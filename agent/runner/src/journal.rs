//! What is known of an attempt, in one file that is only ever appended to.
//!
//! | record | written by | says |
//! |---|---|---|
//! | assignment | agent | what the registry wants; opaque here |
//! | order | agent, before a runner starts | what to run ([`crate::Order`]) |
//! | withdrawn | agent, holding the lock | that no runner may take the order any more |
//! | runner | runner, holding the lock | that it took the order, and its process ([`crate::pids`]) |
//! | command | runner | the command's process |
//! | result | runner, its last act | how it ended ([`crate::Outcome`]) |
//! | report | agent | what was made of that; opaque here |
//!
//! One file instead of one for each: making and removing files is what a short attempt costs most. Of several records of a
//! kind the last counts. Nothing is synced, because a power cut ends the attempt anyway; but a record is seen
//! whole or not at all, whoever dies when: its length and a CRC stand before it, and what is behind the last good
//! record is garbage that the next writer removes.
//!
//! There is one writer at a time. The agent writes before a runner has the lock and after it died; in between the runner
//! does, which holds the lock for its life.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use helix_failpoint::{self as failpoint, Point};

use crate::locks;
use crate::paths::AttemptDir;

/// Which record; the number is its byte on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// What the registry wants.
    Assignment = 1,
    /// What to run.
    Order = 2,
    /// No runner may take the order any more.
    Withdrawn = 3,
    /// A runner took the order.
    Runner = 4,
    /// The command was started.
    Command = 5,
    /// How it ended.
    Result = 6,
    /// What was made of that.
    Report = 7,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        const ALL: [Kind; 7] =
            [Kind::Assignment, Kind::Order, Kind::Withdrawn, Kind::Runner, Kind::Command, Kind::Result, Kind::Report];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Before its record is written, and behind it.
    fn points(self) -> (Point, Point) {
        match self {
            Self::Assignment => (Point::AssignmentWrite, Point::AssignmentWritten),
            Self::Order => (Point::OrderWrite, Point::OrderWritten),
            Self::Withdrawn => (Point::WithdrawalWrite, Point::WithdrawalWritten),
            Self::Runner => (Point::RunnerWrite, Point::RunnerWritten),
            Self::Command => (Point::CommandWrite, Point::CommandWritten),
            Self::Result => (Point::ResultWrite, Point::ResultWritten),
            Self::Report => (Point::ReportWrite, Point::ReportWritten),
        }
    }
}

/// Length, CRC of kind and body, kind.
const HEAD_BYTES: usize = 4 + 4 + 1;

/// A body's bytes, at most: an order or assignment holds a spec of 64 KiB, and an environment that may repeat some of it.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A journal's bytes, at most: beyond that it is none of ours.
const JOURNAL_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A journal as it was read: the last record of each kind.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Journal {
    records: Vec<(Kind, Vec<u8>)>,
    /// Behind the last good record.
    end: u64,
    length: u64,
}

impl Journal {
    /// Reads it; one that is not there is empty.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(dir: &AttemptDir) -> io::Result<Self> {
        match File::open(dir.journal()) {
            Ok(file) => Self::of(&file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let mut bytes = vec![0; usize::try_from(length.min(JOURNAL_BYTES_MAX)).unwrap_or(0)];
        let mut have = 0;
        while have < bytes.len() {
            match file.read_at(&mut bytes[have..], have as u64) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(have);
        let mut journal = Self { length, ..Self::default() };
        let mut rest = bytes.as_slice();
        while let Some((kind, body, behind)) = first_record(rest) {
            journal.records.push((kind, body.to_vec()));
            rest = behind;
        }
        journal.end = (bytes.len() - rest.len()) as u64;
        Ok(journal)
    }

    /// The last record of this kind.
    #[must_use]
    pub fn last(&self, kind: Kind) -> Option<&[u8]> {
        self.records.iter().rev().find(|(found, _)| *found == kind).map(|(_, body)| body.as_slice())
    }

    /// Whether there is an order that was not withdrawn.
    #[must_use]
    pub fn is_ordered(&self) -> bool {
        let last = self.records.iter().rev().find(|(kind, _)| matches!(kind, Kind::Order | Kind::Withdrawn));
        last.is_some_and(|(kind, _)| *kind == Kind::Order)
    }

    /// Whether a runner took the order.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.last(Kind::Runner).is_some()
    }
}

/// The first record and what is behind it; `None` where it is not whole.
fn first_record(bytes: &[u8]) -> Option<(Kind, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let crc = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let (body, behind) = rest.split_at_checked(length)?;
    let kind = Kind::of(head[8])?;
    (checksum(kind, body) == crc).then_some((kind, body, behind))
}

fn checksum(kind: Kind, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind as u8]);
    hasher.update(body);
    hasher.finalize()
}

/// Adds records to a journal.
#[derive(Debug)]
pub struct JournalWriter {
    file: File,
    end: u64,
}

impl JournalWriter {
    /// Opens it behind its last good record, or makes one; also gives what is in it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(dir: &AttemptDir) -> io::Result<(Self, Journal)> {
        Self::new(open(dir)?)
    }

    fn new(file: File) -> io::Result<(Self, Journal)> {
        let journal = Journal::of(&file)?;
        if journal.length > journal.end {
            file.set_len(journal.end)?;
        }
        Ok((Self { file, end: journal.end }, journal))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// Those of the file system: then it is as if the record had not been written.
    pub fn append(&mut self, kind: Kind, body: &[u8]) -> io::Result<()> {
        if body.len() > BODY_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a record of an attempt's journal"));
        }
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut record = Vec::with_capacity(HEAD_BYTES + body.len());
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&checksum(kind, body).to_le_bytes());
        record.push(kind as u8);
        record.extend_from_slice(body);
        let (before, behind) = kind.points();
        failpoint::hit(before)?;
        // What a failed write leaves is garbage that the next one overwrites, or the next writer removes.
        self.file.write_all_at(&record, self.end)?;
        failpoint::pass(behind);
        self.end += record.len() as u64;
        Ok(())
    }

    /// Sets room aside for records to come, so that a build that fills the disk cannot hide how it ended.
    ///
    /// # Errors
    /// Those of the file system.
    #[allow(unsafe_code)] // fallocate that keeps the size.
    pub fn reserve(&self, bytes: u32) -> io::Result<()> {
        let end = libc::off_t::try_from(self.end).unwrap_or(libc::off_t::MAX);
        let mode = libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, end, libc::off_t::from(bytes)) } {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                // Some file systems cannot; then it is tried at the end.
                error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
                error => Err(error),
            },
        }
    }
}

fn open(dir: &AttemptDir) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.journal())
}

/// Opens a journal and takes its lock for the life of this process; `None` when another process has it. Who closes any
/// descriptor of the file loses the lock: keep the writer, and read through nothing else.
///
/// # Errors
/// Those of the file system.
pub fn take(dir: &AttemptDir) -> io::Result<Option<(JournalWriter, Journal)>> {
    let file = open(dir)?;
    // Order matters: only who has the lock knows that nobody else writes.
    if locks::take(&file)? { JournalWriter::new(file).map(Some) } else { Ok(None) }
}

/// Adds one record, by whoever is the writer now.
///
/// # Errors
/// Those of the file system.
pub fn append(dir: &AttemptDir, kind: Kind, body: &[u8]) -> io::Result<()> {
    JournalWriter::open(dir)?.0.append(kind, body)
}

/// Takes an order back. False when a runner has it already; true when none will ever take it.
///
/// # Errors
/// Those of the file system.
pub fn withdraw(dir: &AttemptDir) -> io::Result<bool> {
    if !Journal::read(dir)?.is_ordered() {
        return Ok(true);
    }
    let Some((mut writer, journal)) = take(dir)? else { return Ok(false) };
    if journal.is_taken() {
        return Ok(false);
    }
    writer.append(Kind::Withdrawn, &[])?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, AttemptDir) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(temporary.path());
        (temporary, dir)
    }

    #[test]
    fn the_last_of_a_kind_counts() {
        let (_temporary, dir) = dir();
        assert_eq!(Journal::read(&dir).unwrap(), Journal::default());
        for (kind, body) in [(Kind::Assignment, "a"), (Kind::Report, "one"), (Kind::Report, "")] {
            append(&dir, kind, body.as_bytes()).unwrap();
        }
        let journal = Journal::read(&dir).unwrap();
        assert_eq!(journal.last(Kind::Assignment), Some(&b"a"[..]));
        assert_eq!(journal.last(Kind::Report), Some(&b""[..]));
        assert_eq!(journal.last(Kind::Order), None);
        assert!(append(&dir, Kind::Order, &vec![0; BODY_BYTES_MAX + 1]).is_err());
        assert_eq!(Journal::read(&dir).unwrap(), journal);
    }

    #[test]
    fn a_record_is_there_whole_or_not_at_all_and_garbage_goes() {
        let (_temporary, dir) = dir();
        append(&dir, Kind::Assignment, b"first").unwrap();
        let whole = std::fs::read(dir.journal()).unwrap();
        append(&dir, Kind::Order, b"second").unwrap();
        let both = std::fs::read(dir.journal()).unwrap();
        for cut in whole.len()..both.len() {
            std::fs::write(dir.journal(), &both[..cut]).unwrap();
            let journal = Journal::read(&dir).unwrap();
            assert_eq!((journal.last(Kind::Assignment), journal.is_ordered()), (Some(&b"first"[..]), false));
            append(&dir, Kind::Report, b"third").unwrap();
            let journal = Journal::read(&dir).unwrap();
            assert_eq!((journal.last(Kind::Report), journal.is_ordered()), (Some(&b"third"[..]), false));
        }
        for at in whole.len()..both.len() {
            for bit in 0..8 {
                let mut damaged = both.clone();
                damaged[at] ^= 1 << bit;
                std::fs::write(dir.journal(), &damaged).unwrap();
                assert!(!Journal::read(&dir).unwrap().is_ordered(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn an_order_is_withdrawn_unless_it_was_taken() {
        let (_temporary, dir) = dir();
        assert!(withdraw(&dir).unwrap());
        append(&dir, Kind::Order, b"run").unwrap();
        assert!(Journal::read(&dir).unwrap().is_ordered());
        assert!(withdraw(&dir).unwrap() && withdraw(&dir).unwrap());
        assert!(!Journal::read(&dir).unwrap().is_ordered());
        append(&dir, Kind::Order, b"again").unwrap();
        append(&dir, Kind::Runner, b"me").unwrap();
        assert!(!withdraw(&dir).unwrap());
        assert!(Journal::read(&dir).unwrap().is_ordered());
    }
}
