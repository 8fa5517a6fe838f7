//! How a large blob lies in its file, or in its object: the bytes, a CRC32 of each chunk, a footer.
//!
//! Wherever the bytes lie, table and footer are read from this node's disk.
//!
//! ```text
//! file    data, crc32 of each chunk u32, footer
//! footer  size u64, crc32 of the table and of the size u32, magic "HELIXBLB"
//! ```

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use helix_common::removal::open_shared;
use helix_common::sha256::Sha256;
use helix_model::Digest;
use helix_model::limits::CHUNK_BYTES;

use super::Lies;
use super::place::{InFile, Place, Unread};
use crate::blobs::BlobError;
use crate::blobs::store::blocking;

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
        (self.digest.finalize(), self.table)
    }
}

/// What lies behind a blob's bytes: the checksums to hold them against.
pub(in crate::blobs) struct Tail {
    /// Bytes of the blob.
    pub(in crate::blobs) size: u64,
    /// The table and the footer, as they lie in the file.
    bytes: Bytes,
}

impl Tail {
    /// Takes the end of a file of that many bytes, from `read`, which reads exactly what it is asked for.
    fn read(len: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<Self> {
        let footer_at = len.checked_sub(FOOTER_BYTES).ok_or_else(wrong)?;
        let mut footer = [0; FOOTER_BYTES as usize];
        read(&mut footer, footer_at)?;
        let size = size_in(&footer);
        let table_bytes = size.div_ceil(CHUNK_BYTES as u64).checked_mul(4).ok_or_else(wrong)?;
        if size.checked_add(table_bytes) != Some(footer_at) {
            return Err(wrong());
        }
        let mut bytes = vec![0; usize::try_from(table_bytes + FOOTER_BYTES).map_err(|_| wrong())?];
        read(&mut bytes, size)?;
        Self::parse(bytes.into())
    }

    /// Takes a table with its footer, if they are whole.
    pub(in crate::blobs) fn parse(bytes: Bytes) -> io::Result<Self> {
        let table_bytes = bytes.len().checked_sub(FOOTER_BYTES as usize).ok_or_else(wrong)?;
        let (table, footer) = bytes.split_at(table_bytes);
        let size = size_in(footer);
        let mut crc = crc32fast::Hasher::new();
        crc.update(table);
        crc.update(&footer[..8]);
        let sound = footer[12..] == *FOOTER_MAGIC
            && crc.finalize().to_le_bytes() == footer[8..12]
            && size.div_ceil(CHUNK_BYTES as u64).checked_mul(4) == Some(table_bytes as u64);
        if sound { Ok(Self { size, bytes }) } else { Err(wrong()) }
    }

    /// As it lies in the file.
    pub(in crate::blobs) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Bytes of the whole file.
    pub(in crate::blobs) fn whole(&self) -> u64 {
        self.size + self.bytes.len() as u64
    }

    /// Whether these are the bytes of the chunk that begins at `start`.
    fn matches(&self, start: u64, data: &[u8]) -> bool {
        let entry = usize::try_from(start / CHUNK_BYTES as u64).unwrap_or(usize::MAX).saturating_mul(4);
        let expected = self.bytes.get(entry..entry.saturating_add(4));
        expected == Some(&crc32fast::hash(data).to_le_bytes()[..])
    }
}

fn wrong() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the footer is damaged")
}

fn size_in(footer: &[u8]) -> u64 {
    footer.first_chunk().map_or(0, |size| u64::from_le_bytes(*size))
}

/// A large blob open for reading. Removing the blob does not disturb who reads its file.
pub(in crate::blobs) struct LargeBlob {
    digest: Digest,
    lies: Lies,
    tail: Tail,
    place: Box<dyn Place>,
}

impl LargeBlob {
    /// Opens a file. Blocks.
    pub(super) fn open(path: &Path, digest: Digest) -> io::Result<Self> {
        let file = open_shared(path)?;
        let tail = Tail::read(file.metadata()?.len(), |buffer, at| file.read_exact_at(buffer, at))?;
        Ok(Self { digest, lies: Lies::Here, tail, place: Box::new(InFile(Arc::new(file))) })
    }

    /// Opens what lies elsewhere, and is checked against what is kept here.
    pub(super) fn elsewhere(digest: Digest, object: u64, tail: Tail, place: Box<dyn Place>) -> Self {
        Self { digest, lies: Lies::Bucket(object), tail, place }
    }

    /// The blob's size.
    pub(in crate::blobs) fn size(&self) -> u64 {
        self.tail.size
    }

    /// Where its bytes lie.
    pub(in crate::blobs) fn lies(&self) -> Lies {
        self.lies
    }

    /// Its checksums.
    pub(in crate::blobs) fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Has the chunk at `offset` come from where it lies when it is read next.
    pub(in crate::blobs) async fn forget(&self, offset: u64) {
        self.place.forget(offset, CHUNK_BYTES).await;
    }

    /// The rest of the chunk that `offset` lies in, checked; empty at the end.
    pub(in crate::blobs) async fn chunk(&self, offset: u64) -> Result<Bytes, BlobError> {
        if offset >= self.tail.size {
            return Ok(Bytes::new());
        }
        let start = offset - offset % CHUNK_BYTES as u64;
        let len = usize::try_from(self.tail.size - start).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let mut data = self.read(start, len).await?;
        if !self.tail.matches(start, &data) {
            // Once more from where it lies: what was kept on the way may be what is wrong.
            self.place.forget(start, len).await;
            data = self.read(start, len).await?;
        }
        if !self.tail.matches(start, &data) {
            return Err(self.damaged(start, "a chunk does not match its checksum"));
        }
        Ok(data.slice(usize::try_from(offset - start).unwrap_or(0).min(data.len())..))
    }

    async fn read(&self, start: u64, len: usize) -> Result<Bytes, BlobError> {
        self.place.read(start, len).await.map_err(|unread| match unread {
            Unread::Damaged(why) => self.damaged(start, &why),
            Unread::Away(why) => BlobError::Bucket(why),
            Unread::Closed => BlobError::Closed,
        })
    }

    fn damaged(&self, start: u64, why: &str) -> BlobError {
        tracing::error!(digest = %self.digest, start, why, lies = ?self.lies, "a blob is damaged where it lies");
        BlobError::Damaged(self.digest)
    }

    /// Reads all of it and holds it against its name.
    pub(in crate::blobs) async fn is_what_its_name_says(&self) -> Result<bool, BlobError> {
        let (mut sha256, mut at) = (Sha256::new(), 0);
        while at < self.size() {
            let chunk = match self.chunk(at).await {
                Ok(chunk) => chunk,
                Err(BlobError::Damaged(_)) => return Ok(false),
                Err(error) => return Err(error),
            };
            at += chunk.len() as u64;
            sha256 = hashed(sha256, chunk).await?;
        }
        Ok(sha256.finalize() == self.digest)
    }
}

/// Hashes off the async threads.
pub(in crate::blobs) async fn hashed(mut sha256: Sha256, data: Bytes) -> Result<Sha256, BlobError> {
    blocking(move || {
        sha256.update(&data);
        Ok(sha256)
    })
    .await
}
