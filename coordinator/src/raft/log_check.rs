//! Tells a tail that a crash cut short from one that is damaged, before raft-log opens the log and cuts it off.
//!
//! raft-log takes a record that claims to end behind the file for one that was being written, and cuts the file there.
//! A single flipped bit in a length looks the same, and what stands behind it was acknowledged. But behind a record
//! that really was cut short there is nothing whole. Invariant: where a whole record stands behind an unreadable
//! one, the log is not opened and no file of it is changed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use raft_log::codeq::{Decode, Encode};
use raft_log::{RaftLogRecord, Types};

use super::log_codec::{StoredLogId, StoredVote, read_record};
use super::log_store::FlushDone;

/// As [`super::log_codec::LogTypes`], without looking into entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Shallow;

impl Types for Shallow {
    type LogId = StoredLogId;
    type LogPayload = Unread;
    type Vote = StoredVote;
    type Callback = FlushDone;
    type UserData = ();

    fn log_index(id: &StoredLogId) -> u64 {
        id.0.index()
    }

    fn payload_size(payload: &Unread) -> u64 {
        payload.0.len() as u64
    }
}

/// An entry's bytes.
#[derive(Clone, PartialEq, Debug)]
struct Unread(Bytes);

impl Encode for Unread {
    fn encode<W: Write>(&self, _: W) -> io::Result<usize> {
        Err(io::Error::other("entries are only read here"))
    }
}

impl Decode for Unread {
    fn decode<R: Read>(from: R) -> io::Result<Self> {
        read_record("a log entry", from).map(Self)
    }
}

/// Checks the newest file of the log, and the one before where the newest was only just begun; then makes sure that
/// what was read is on the disk and not only in the system's memory, because from now on it counts as flushed. Blocks.
///
/// # Errors
/// When a file cannot be read, or a whole record stands behind one that cannot be read.
pub(super) fn check_tail(directory: &Path) -> io::Result<()> {
    for path in files_newest_first(directory)? {
        let mut file = File::open(&path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        file.sync_data()?;
        let whole = whole_records(&bytes);
        if let Some(next) = whole_record_behind(&bytes, whole) {
            let message = format!(
                "{} is damaged at byte {whole}, and whole again at byte {next}: this node may have acknowledged what is \
                 lost; remove it and add the host under a new id",
                path.display()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if whole > 0 {
            break;
        }
    }
    Ok(())
}

/// The log's files.
pub(super) fn files_newest_first(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "wal") {
            found.push(path);
        }
    }
    // Names are offsets, padded with zeros.
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// How many bytes the records at the beginning take that can be read.
fn whole_records(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while !rest.is_empty() {
        let before = rest;
        if RaftLogRecord::<Shallow>::decode(&mut rest).is_err() {
            return bytes.len() - before.len();
        }
    }
    bytes.len()
}

/// Where the next whole record stands, if any does behind the unreadable one at `broken`.
fn whole_record_behind(bytes: &[u8], broken: usize) -> Option<usize> {
    let begins = |at: &usize| matches!(bytes.get(*at..*at + 4), Some([0, 0, 0, 0..=5]));
    let mut places = (broken + 1..bytes.len()).filter(begins);
    places.find(|at| RaftLogRecord::<Shallow>::decode(&mut &bytes[*at..]).is_ok())
}
