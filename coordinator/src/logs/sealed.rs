//! Reading a sealed log out of a blob, wherever the blob is, a bounded piece at a time.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use bytes::Bytes;
use helix_common::sealed_log::{LogStream, SealedLogError, SealedLogReader};
use helix_core::record::BlobRef;
use helix_model::limits::CHUNK_BYTES;
use helix_proto::v1;
use tokio::runtime::Handle;

use crate::blobs::Blobs;

/// Records in a piece, at most, however short they are.
const RECORDS_MAX: usize = 4096;

/// Where to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Start {
    /// At this line.
    Seq(u64),
    /// So many lines before the end.
    Tail(u64),
}

/// A sealed log open for reading. Its methods block: they are called off the async threads.
pub(super) struct SealedReader(SealedLogReader<BlobFile>);

impl SealedReader {
    /// Opens the log.
    pub(super) fn open(blobs: Arc<Blobs>, blob: &BlobRef, start: Start) -> Result<Self, SealedLogError> {
        let file = BlobFile {
            blobs,
            blob: blob.clone(),
            handle: Handle::current(),
            at: 0,
            buffer: Bytes::new(),
            buffer_at: 0,
        };
        let mut reader = SealedLogReader::open(file)?;
        match start {
            Start::Seq(seq) => reader.seek_seq(seq),
            Start::Tail(lines) => reader.seek_tail(lines),
        }
        Ok(Self(reader))
    }

    /// The next lines; none at the end.
    pub(super) fn read(&mut self) -> Result<Vec<v1::LogRecord>, SealedLogError> {
        let mut records = Vec::new();
        let mut bytes = 0;
        while bytes < CHUNK_BYTES && records.len() < RECORDS_MAX {
            let Some(record) = self.0.next() else { break };
            let record = record?;
            bytes += record.data.len();
            records.push(v1::LogRecord {
                seq: record.seq,
                time_ms: record.time_ms,
                stream: to_wire(record.stream).into(),
                data: record.data,
            });
        }
        Ok(records)
    }
}

fn to_wire(stream: LogStream) -> v1::LogStream {
    match stream {
        LogStream::Stdout => v1::LogStream::Stdout,
        LogStream::Stderr => v1::LogStream::Stderr,
        LogStream::System => v1::LogStream::System,
    }
}

/// A blob as a file: a chunk of it in memory.
struct BlobFile {
    blobs: Arc<Blobs>,
    blob: BlobRef,
    handle: Handle,
    at: u64,
    buffer: Bytes,
    buffer_at: u64,
}

impl Read for BlobFile {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.blob.size || out.is_empty() {
            return Ok(0);
        }
        let inside = self.at.checked_sub(self.buffer_at).and_then(|at| usize::try_from(at).ok());
        let mut have = inside.and_then(|at| self.buffer.get(at..)).unwrap_or_default();
        if have.is_empty() {
            let fetched = self.handle.block_on(self.blobs.read_range(self.blob.digest, self.at, CHUNK_BYTES as u64));
            self.buffer = fetched.map_err(io::Error::other)?;
            self.buffer_at = self.at;
            have = &self.buffer;
            if have.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let len = have.len().min(out.len());
        out[..len].copy_from_slice(&have[..len]);
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for BlobFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.blob.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
