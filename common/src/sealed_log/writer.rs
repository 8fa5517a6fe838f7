//! Writing a sealed log, front to back, without seeking: the destination may be a hasher or a socket.

use std::io::Write;

use helix_model::limits::LOG_LINE_BYTES_MAX;
use zstd::bulk::Compressor;

use super::{
    BLOCK_HEADER_BYTES, BLOCK_RAW_BYTES, HEADER_BYTES, INDEX_ENTRY_BYTES, LogRecord, LogStream, MAGIC, SealedLogError,
    SealedLogTotals, TRAILER_BYTES, TRAILER_MAGIC, VERSION, put_varint, zigzag,
};

/// The speed of a disk at about a quarter of the size: higher levels cost more than the bytes they save.
const COMPRESSION_LEVEL: i32 = 1;

/// Writes a sealed log. Dropped before [`SealedLogWriter::finish`], it leaves a file that no reader accepts.
pub struct SealedLogWriter<W: Write> {
    out: W,
    compressor: Compressor<'static>,
    /// The open block's records.
    raw: Vec<u8>,
    compressed: Vec<u8>,
    index: Vec<u8>,
    offset: u64,
    block: OpenBlock,
    blocks: u32,
    totals: SealedLogTotals,
    last_seq: u64,
}

#[derive(Default)]
struct OpenBlock {
    first_seq: u64,
    last_time_ms: i64,
    lines: u32,
}

impl<W: Write> SealedLogWriter<W> {
    /// Begins a log on `out`. Writes are a block at a time: no further buffering is needed.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn new(mut out: W) -> Result<Self, SealedLogError> {
        let compressor = Compressor::new(COMPRESSION_LEVEL)?;
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..].copy_from_slice(&VERSION.to_le_bytes());
        out.write_all(&header)?;
        Ok(Self {
            out,
            compressor,
            raw: Vec::with_capacity(BLOCK_RAW_BYTES),
            compressed: Vec::new(),
            index: Vec::new(),
            offset: HEADER_BYTES as u64,
            block: OpenBlock::default(),
            blocks: 0,
            totals: SealedLogTotals::default(),
            last_seq: 0,
        })
    }

    /// Adds a line. Numbers must grow; holes are allowed, though a complete log has none.
    ///
    /// # Errors
    /// When the line is too long or its number does not grow (nothing is written then, and the writer goes on), or
    /// when the destination cannot be written (the file is lost).
    pub fn push(&mut self, record: &LogRecord) -> Result<(), SealedLogError> {
        self.push_parts(record.seq, record.time_ms, record.stream, &record.data)
    }

    /// As [`Self::push`], for callers who keep their lines in another shape.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_parts(&mut self, seq: u64, time_ms: i64, stream: LogStream, data: &[u8]) -> Result<(), SealedLogError> {
        if data.len() > LOG_LINE_BYTES_MAX {
            return Err(SealedLogError::LineTooLong { seq, bytes: data.len() });
        }
        if seq <= self.last_seq {
            return Err(SealedLogError::OutOfOrder { seq, previous: self.last_seq });
        }
        if self.block.lines == 0 {
            self.block.first_seq = seq;
            // Within a block both deltas start from zero, so that each block reads by itself.
            put_varint(&mut self.raw, seq);
        } else {
            put_varint(&mut self.raw, seq - self.last_seq);
        }
        put_varint(&mut self.raw, zigzag(time_ms.wrapping_sub(self.block.last_time_ms)));
        self.raw.push(stream.number());
        put_varint(&mut self.raw, data.len() as u64);
        self.raw.extend_from_slice(data);
        self.block.last_time_ms = time_ms;
        self.block.lines += 1;
        self.last_seq = seq;
        self.totals.lines += 1;
        self.totals.raw_bytes += data.len() as u64;
        if self.raw.len() >= BLOCK_RAW_BYTES {
            self.close_block()?;
        }
        Ok(())
    }

    /// Writes what is left, the index and the trailer, and gives the destination back, flushed (not fsynced).
    ///
    /// # Errors
    /// When the destination cannot be written.
    pub fn finish(mut self) -> Result<(W, SealedLogTotals), SealedLogError> {
        if self.block.lines > 0 {
            self.close_block()?;
        }
        let index_offset = self.offset;
        let crc = crc32fast::hash(&self.index);
        self.index.extend_from_slice(&crc.to_le_bytes());
        self.out.write_all(&self.index)?;

        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.extend_from_slice(&index_offset.to_le_bytes());
        trailer.extend_from_slice(&self.blocks.to_le_bytes());
        trailer.extend_from_slice(&self.totals.lines.to_le_bytes());
        trailer.extend_from_slice(&self.totals.raw_bytes.to_le_bytes());
        trailer.extend_from_slice(&crc32fast::hash(&trailer).to_le_bytes());
        trailer.extend_from_slice(TRAILER_MAGIC);
        self.out.write_all(&trailer)?;
        self.out.flush()?;
        Ok((self.out, self.totals))
    }

    fn close_block(&mut self) -> Result<(), SealedLogError> {
        self.compressed.clear();
        self.compressed.reserve(zstd::zstd_safe::compress_bound(self.raw.len()));
        self.compressor.compress_to_buffer(&self.raw, &mut self.compressed)?;
        let mut header = Vec::with_capacity(BLOCK_HEADER_BYTES);
        header.extend_from_slice(&self.block.first_seq.to_le_bytes());
        header.extend_from_slice(&self.last_seq.to_le_bytes());
        header.extend_from_slice(&self.block.lines.to_le_bytes());
        header.extend_from_slice(&length(&self.raw).to_le_bytes());
        header.extend_from_slice(&length(&self.compressed).to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&self.compressed).to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        self.out.write_all(&header)?;
        self.out.write_all(&self.compressed)?;

        self.index.reserve(INDEX_ENTRY_BYTES);
        self.index.extend_from_slice(&self.offset.to_le_bytes());
        self.index.extend_from_slice(&self.block.first_seq.to_le_bytes());
        self.index.extend_from_slice(&self.block.lines.to_le_bytes());
        self.offset += (header.len() + self.compressed.len()) as u64;
        self.blocks += 1;
        self.block = OpenBlock::default();
        self.raw.clear();
        Ok(())
    }
}

/// A block's length, which its limits keep far below 32 bits.
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
