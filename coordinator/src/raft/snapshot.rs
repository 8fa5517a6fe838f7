//! Snapshot files: all rows as of one log entry, checksummed, whole or absent.
//!
//! Form: magic, version, header with the log id and the membership, then rows as length and bytes, an end mark, their
//! count, and the CRC-32 of all that. A file is written under another name, fsynced, renamed, and its directory fsynced.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use helix_common::files::sync_directory;
use helix_common::removal::{open_shared, remove_gradually};
use helix_failpoint::{self as failpoint, Point};
use helix_proto::raft;
use prost::Message;

use super::types::{SnapshotMeta, StoredMembership};
use super::wire::{log_id, log_id_to_wire, malformed, stored_membership, stored_membership_to_wire};
use crate::codec::CodecError;

const MAGIC: &[u8; 8] = b"HELIXSNP";
const VERSION: u32 = 1;
const END: u32 = u32::MAX;
const SUFFIX: &str = ".snapshot";

/// Bytes that are written before they are synced: all at once in the end they would hold up the log, which is on the same disk.
const SYNC_BYTES: u64 = 4 << 20;

/// Snapshot files kept; the log reaches back to the oldest of them.
pub(super) const KEPT: usize = 2;

/// A whole snapshot file, open, so that it stays readable when its name goes.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    /// Its name.
    pub(super) path: PathBuf,
    file: Arc<File>,
    bytes: u64,
}

impl SnapshotFile {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open_shared(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file: Arc::new(file), bytes })
    }

    /// Its length.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads up to `length` bytes from `offset`.
    pub(super) fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut out = vec![0; length.min(left)];
        self.file.read_exact_at(&mut out, offset)?;
        Ok(out)
    }

    /// The checksum at its end, which is of all before it: tells it from others.
    pub(super) fn checksum(&self) -> io::Result<u32> {
        let mut crc = [0; 4];
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "it is too short for a checksum");
        self.file.read_exact_at(&mut crc, self.bytes.checked_sub(4).ok_or_else(missing)?)?;
        Ok(u32::from_be_bytes(crc))
    }

    /// All its bytes, from the first.
    pub(super) fn reader(&self) -> impl Read + use<> {
        BufReader::with_capacity(1 << 18, FileReader { file: Arc::clone(&self.file), at: 0 })
    }
}

/// Reads a file that others read at the same time.
struct FileReader {
    file: Arc<File>,
    at: u64,
}

impl Read for FileReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(out, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// A snapshot being written.
pub(super) struct SnapshotWriter {
    to: CrcWriter,
    temporary: PathBuf,
    finished: PathBuf,
    rows: u64,
    /// Bytes since the last sync.
    unsynced: u64,
    done: bool,
}

struct CrcWriter {
    file: BufWriter<File>,
    crc: crc32fast::Hasher,
}

impl CrcWriter {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.file.write_all(bytes)
    }
}

impl SnapshotWriter {
    pub(super) fn create(directory: &Path, meta: &SnapshotMeta) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let finished = directory.join(name_of(meta));
        let temporary = finished.with_extension("writing");
        let file = BufWriter::with_capacity(1 << 18, File::create(&temporary)?);
        let mut to = CrcWriter { file, crc: crc32fast::Hasher::new() };
        let header = meta_to_wire(meta).encode_to_vec();
        to.put(MAGIC)?;
        to.put(&VERSION.to_be_bytes())?;
        to.put(&u32::try_from(header.len()).map_err(io::Error::other)?.to_be_bytes())?;
        to.put(&header)?;
        Ok(Self { to, temporary, finished, rows: 0, unsynced: 0, done: false })
    }

    pub(super) fn row(&mut self, row: &[u8]) -> io::Result<()> {
        self.to.put(&u32::try_from(row.len()).map_err(io::Error::other)?.to_be_bytes())?;
        self.to.put(row)?;
        self.rows += 1;
        self.unsynced += row.len() as u64;
        if self.unsynced >= SYNC_BYTES {
            self.unsynced = 0;
            self.to.file.flush()?;
            self.to.file.get_ref().sync_data()?;
        }
        Ok(())
    }

    /// Makes the file durable and gives it its name.
    pub(super) fn finish(mut self) -> io::Result<PathBuf> {
        failpoint::hit(Point::SnapshotFinish)?;
        self.to.put(&END.to_be_bytes())?;
        self.to.put(&self.rows.to_be_bytes())?;
        let crc = self.to.crc.clone().finalize();
        self.to.file.write_all(&crc.to_be_bytes())?;
        self.to.file.flush()?;
        failpoint::hit(Point::SnapshotWritten)?;
        self.to.file.get_ref().sync_all()?;
        failpoint::hit(Point::SnapshotSynced)?;
        std::fs::rename(&self.temporary, &self.finished)?;
        failpoint::hit(Point::SnapshotRenamed)?;
        sync_directory(self.finished.parent().unwrap_or(Path::new(".")))?;
        self.done = true;
        Ok(self.finished.clone())
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.done {
            // Best effort: a leftover is removed at the next start.
            let _ = remove_gradually(&self.temporary);
        }
    }
}

/// The name of a snapshot's file: in the order of what it covers.
pub(super) fn name_of(meta: &SnapshotMeta) -> String {
    let (index, term, node) = meta
        .last_log_id
        .as_ref()
        .map_or((0, 0, 0), |id| (id.index(), id.committed_leader_id().term, id.committed_leader_id().node_id));
    format!("{index:020}-{term}-{node}{SUFFIX}")
}

/// Whole-looking snapshot files, newest first.
pub(super) fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    match std::fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == &SUFFIX[1..]) {
                    found.push(path);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Removes all but the newest [`KEPT`] snapshots, and what a crash left half-written.
pub(super) fn retain(directory: &Path) -> io::Result<()> {
    for old in list(directory)?.into_iter().skip(KEPT) {
        failpoint::hit(Point::SnapshotRetain)?;
        remove_gradually(&old)?;
    }
    Ok(())
}

/// Removes what a crash left half-written or half-received.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "writing" || extension == "incoming") {
            remove_gradually(&path)?;
        }
    }
    Ok(())
}

/// Reads a file once to its end and checks it; then it can be trusted.
pub(super) fn verify(path: &Path) -> io::Result<SnapshotMeta> {
    read(path, |_| Ok(()))
}

/// Reads all rows. The checksum stands at the end, so `each` sees rows before they are known to be whole: verify first.
pub(super) fn read(path: &Path, each: impl FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<SnapshotMeta> {
    read_from(BufReader::with_capacity(1 << 18, File::open(path)?), path, each)
}

/// As [`read`], from bytes that are somewhere else than in a file of their own; `name` is what errors call them.
pub(super) fn read_from(
    file: impl Read,
    name: &Path,
    mut each: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<SnapshotMeta> {
    let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", name.display()));
    let mut from = CrcReader { file, crc: crc32fast::Hasher::new() };
    if &from.take::<8>()? != MAGIC {
        return Err(damaged("not a snapshot"));
    }
    let version = u32::from_be_bytes(from.take()?);
    if version > VERSION {
        return Err(CodecError::Newer { what: "a snapshot", needed: version, known: VERSION }.into());
    }
    let header = from.length()?;
    let header = raft::SnapshotHeader::decode(&from.bytes(header)?[..]);
    let meta = meta_from_wire(header.map_err(|error| damaged(&error.to_string()))?)?;
    let mut rows = 0u64;
    loop {
        let length = from.length()?;
        if length == END {
            break;
        }
        each(from.bytes(length)?)?;
        rows += 1;
    }
    if u64::from_be_bytes(from.take()?) != rows {
        return Err(damaged("the count of rows is wrong"));
    }
    let expected = from.crc.clone().finalize();
    if u32::from_be_bytes(from.take()?) != expected {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(meta)
}

struct CrcReader<R> {
    file: R,
    crc: crc32fast::Hasher,
}

impl<R: Read> CrcReader<R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.file.read_exact(&mut out)?;
        self.crc.update(&out);
        Ok(out)
    }

    fn length(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.take()?))
    }

    fn bytes(&mut self, length: u32) -> io::Result<Vec<u8>> {
        // Grows as it is read: a damaged length must not make us reserve gigabytes.
        let mut out = Vec::new();
        let read = (&mut self.file).take(u64::from(length)).read_to_end(&mut out)?;
        if read != usize::try_from(length).unwrap_or(usize::MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file ends within a row"));
        }
        self.crc.update(&out);
        Ok(out)
    }
}

pub(super) fn meta_to_wire(meta: &SnapshotMeta) -> raft::SnapshotHeader {
    raft::SnapshotHeader {
        last_log_id: meta.last_log_id.as_ref().map(log_id_to_wire),
        membership: Some(stored_membership_to_wire(&meta.last_membership)),
        ..raft::SnapshotHeader::default()
    }
}

pub(super) fn meta_from_wire(wire: raft::SnapshotHeader) -> Result<SnapshotMeta, CodecError> {
    let last_membership: StoredMembership = stored_membership(wire.membership)?;
    let last_log_id = wire.last_log_id.map(log_id);
    if last_log_id.is_none() && last_membership.log_id().is_some() {
        return Err(malformed("a snapshot", "membership from beyond its end"));
    }
    Ok(SnapshotMeta { last_log_id, last_membership })
}
