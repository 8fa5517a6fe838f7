//! How a large blob lies in its file: the bytes, a CRC32 of each chunk, a footer.
//!
//! ```text
//! file    data, crc32 of each chunk u32, footer
//! footer  size u64, crc32 of the table and of the size u32, magic "HELIXBLB"
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use helix_model::Digest;
use helix_model::limits::CHUNK_BYTES;
use sha2::{Digest as _, Sha256};

use crate::blobs::BlobError;

const FOOTER_BYTES: u64 = 20;
const FOOTER_MAGIC: &[u8; 8] = b"HELIXBLB";

/// What is computed of bytes as they pass.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) bytes: u64,
    digest: Sha256,
    chunk: crc32fast::Hasher,
    chunk_len: usize,
    table: Vec<u8>,
}

impl Sums {
    pub(super) fn update(&mut self, mut data: &[u8]) {
        self.bytes += data.len() as u64;
        self.digest.update(data);
        while !data.is_empty() {
            let (now, later) = data.split_at(data.len().min(CHUNK_BYTES - self.chunk_len));
            self.chunk.update(now);
            self.chunk_len += now.len();
            data = later;
            if self.chunk_len == CHUNK_BYTES {
                self.close_chunk();
            }
        }
    }

    fn close_chunk(&mut self) {
        let crc = std::mem::take(&mut self.chunk).finalize();
        self.table.extend_from_slice(&crc.to_le_bytes());
        self.chunk_len = 0;
    }

    /// The digest, and the table with the footer.
    pub(super) fn finish(mut self) -> (Digest, Vec<u8>) {
        if self.chunk_len > 0 {
            self.close_chunk();
        }
        self.table.extend_from_slice(&self.bytes.to_le_bytes());
        let crc = crc32fast::hash(&self.table);
        self.table.extend_from_slice(&crc.to_le_bytes());
        self.table.extend_from_slice(FOOTER_MAGIC);
        (Digest(self.digest.finalize().into()), self.table)
    }
}

/// A large blob open for reading. Removing the blob does not disturb it.
pub(in crate::blobs) struct LargeFile {
    file: File,
    digest: Digest,
    pub(super) size: u64,
    table: Vec<u8>,
}

impl LargeFile {
    pub(super) fn open(path: &Path, digest: Digest) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the footer is damaged");
        let footer_at = len.checked_sub(FOOTER_BYTES).ok_or_else(wrong)?;
        let mut footer = [0; 20];
        file.read_exact_at(&mut footer, footer_at)?;
        let size = u64::from_le_bytes(footer[..8].try_into().map_err(|_| wrong())?);
        let table_bytes = size.div_ceil(CHUNK_BYTES as u64).checked_mul(4).ok_or_else(wrong)?;
        if footer[12..] != *FOOTER_MAGIC || size.checked_add(table_bytes) != Some(footer_at) {
            return Err(wrong());
        }
        let mut table = vec![0; usize::try_from(table_bytes).map_err(|_| wrong())?];
        file.read_exact_at(&mut table, size)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&table);
        crc.update(&footer[..8]);
        if crc.finalize().to_le_bytes() != footer[8..12] {
            return Err(wrong());
        }
        Ok(Self { file, digest, size, table })
    }

    /// The blob's size.
    pub(in crate::blobs) fn size(&self) -> u64 {
        self.size
    }

    /// Has the chunk at `offset` come from the disk when it is read next, and not from what the system keeps of it.
    pub(in crate::blobs) fn forget_pages(&self, offset: u64) {
        let len = std::num::NonZeroU64::new(CHUNK_BYTES as u64);
        // Advice: without it older bytes are checked.
        let _ = rustix::fs::fadvise(&self.file, offset, len, rustix::fs::Advice::DontNeed);
    }

    /// The rest of the chunk that `offset` lies in, checked; empty at the end.
    pub(in crate::blobs) fn chunk(&self, offset: u64) -> Result<Vec<u8>, BlobError> {
        if offset >= self.size {
            return Ok(Vec::new());
        }
        let chunk_bytes = CHUNK_BYTES as u64;
        let start = offset - offset % chunk_bytes;
        let len = usize::try_from(chunk_bytes.min(self.size - start)).unwrap_or(CHUNK_BYTES);
        let mut data = vec![0; len];
        let damaged = |why: &dyn std::fmt::Display| {
            tracing::error!(digest = %self.digest, start, why = %why, "a blob's file is damaged");
            BlobError::Damaged(self.digest)
        };
        self.file.read_exact_at(&mut data, start).map_err(|error| damaged(&error))?;
        let entry = usize::try_from(start / chunk_bytes).unwrap_or(usize::MAX).saturating_mul(4);
        let expected = self.table.get(entry..entry.saturating_add(4));
        if expected != Some(&crc32fast::hash(&data).to_le_bytes()[..]) {
            return Err(damaged(&"a chunk does not match its checksum"));
        }
        data.drain(..usize::try_from(offset - start).unwrap_or(0));
        Ok(data)
    }
}
