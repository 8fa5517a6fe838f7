//! Reading a sealed log from a number, or its last lines, holding one block and the index in memory.

use std::io::{Read, Seek, SeekFrom};

use bytes::Bytes;
use helix_model::limits::LOG_LINE_BYTES_MAX;
use zstd::bulk::Decompressor;

use super::{
    BLOCK_HEADER_BYTES, BLOCK_RAW_BYTES_MAX, HEADER_BYTES, INDEX_ENTRY_BYTES, LogRecord, LogStream, MAGIC,
    SealedLogError, SealedLogTotals, TRAILER_BYTES, TRAILER_MAGIC, VERSION, take_varint, unzigzag,
};

/// Reads a sealed log: an iterator over its lines from where [`SealedLogReader::seek_seq`] or
/// [`SealedLogReader::seek_tail`] put it, at first the beginning. After an error it yields nothing more.
pub struct SealedLogReader<R: Read + Seek> {
    input: R,
    decompressor: Decompressor<'static>,
    index: Vec<IndexEntry>,
    index_offset: u64,
    totals: SealedLogTotals,
    /// The block to read when the present one is used up.
    next_block: usize,
    block: Bytes,
    cursor: Cursor,
    /// Lines numbered below this are passed over.
    from_seq: u64,
    /// So many lines are passed over.
    skip: u64,
    failed: bool,
}

#[derive(Clone, Copy)]
struct IndexEntry {
    offset: u64,
    first_seq: u64,
    lines: u32,
}

/// Where the reader stands in its block.
#[derive(Default)]
struct Cursor {
    at: usize,
    seq: u64,
    time_ms: i64,
    lines_left: u32,
    last_seq: u64,
    /// The block's place in the file, for complaints.
    offset: u64,
}

impl<R: Read + Seek> SealedLogReader<R> {
    /// Opens a log: reads its header, trailer and index.
    ///
    /// # Errors
    /// When it cannot be read, is not a sealed log, or is damaged there.
    pub fn open(mut input: R) -> Result<Self, SealedLogError> {
        let file_len = input.seek(SeekFrom::End(0))?;
        if file_len < (HEADER_BYTES + 4 + TRAILER_BYTES) as u64 {
            return Err(damaged(file_len, "too short to be a sealed log"));
        }
        let mut header = [0; HEADER_BYTES];
        input.seek(SeekFrom::Start(0))?;
        input.read_exact(&mut header)?;
        if &header[..8] != MAGIC {
            return Err(damaged(0, "the magic is not a sealed log's"));
        }
        let found = u32_at(&header, 8);
        if found != VERSION {
            return Err(SealedLogError::Version { found });
        }
        let trailer = read_trailer(&mut input, file_len)?;
        let index = read_index(&mut input, file_len, &trailer)?;
        Ok(Self {
            input,
            decompressor: Decompressor::new()?,
            index,
            index_offset: trailer.index_offset,
            totals: trailer.totals,
            next_block: 0,
            block: Bytes::new(),
            cursor: Cursor::default(),
            from_seq: 0,
            skip: 0,
            failed: false,
        })
    }

    /// What the log holds.
    pub fn totals(&self) -> SealedLogTotals {
        self.totals
    }

    /// Goes to the first line numbered `seq` or higher.
    pub fn seek_seq(&mut self, seq: u64) {
        let after = self.index.partition_point(|entry| entry.first_seq <= seq);
        self.place(after.saturating_sub(1));
        self.from_seq = seq;
    }

    /// Goes to where the last `lines` lines begin; to the beginning when there are not so many.
    pub fn seek_tail(&mut self, lines: u64) {
        let mut missing = lines;
        let mut block = self.index.len();
        while missing > 0 && block > 0 {
            block -= 1;
            let held = u64::from(self.index[block].lines);
            if held >= missing {
                self.place(block);
                self.skip = held - missing;
                return;
            }
            missing -= held;
        }
        self.place(block);
    }

    fn place(&mut self, block: usize) {
        self.next_block = block;
        self.cursor = Cursor::default();
        self.block = Bytes::new();
        self.from_seq = 0;
        self.skip = 0;
    }

    fn advance(&mut self) -> Result<Option<LogRecord>, SealedLogError> {
        loop {
            while self.cursor.lines_left > 0 {
                let record = self.take_record()?;
                if self.skip > 0 {
                    self.skip -= 1;
                } else if record.seq >= self.from_seq {
                    return Ok(Some(record));
                }
            }
            if self.next_block == self.index.len() {
                return Ok(None);
            }
            self.load_block()?;
        }
    }

    /// Reads and checks the next block. Its length is known from the index, and must agree with its header.
    fn load_block(&mut self) -> Result<(), SealedLogError> {
        let entry = self.index[self.next_block];
        let end = self.index.get(self.next_block + 1).map_or(self.index_offset, |next| next.offset);
        self.input.seek(SeekFrom::Start(entry.offset))?;
        let mut header = [0; BLOCK_HEADER_BYTES];
        self.input.read_exact(&mut header)?;
        if crc32fast::hash(&header[..32]) != u32_at(&header, 32) {
            return Err(damaged(entry.offset, "a block's header does not match its checksum"));
        }
        let (last_seq, raw_len, compressed_len) = (u64_at(&header, 8), u32_at(&header, 20), u32_at(&header, 24));
        let agrees = u64_at(&header, 0) == entry.first_seq
            && u32_at(&header, 16) == entry.lines
            && u64::from(compressed_len) + BLOCK_HEADER_BYTES as u64 == end - entry.offset;
        if !agrees {
            return Err(damaged(entry.offset, "a block is not the one the index names"));
        }
        let (raw_len, compressed_len) = (raw_len as usize, compressed_len as usize);
        if raw_len > BLOCK_RAW_BYTES_MAX || compressed_len > zstd::zstd_safe::compress_bound(BLOCK_RAW_BYTES_MAX) {
            return Err(damaged(entry.offset, "a block is larger than any block may be"));
        }
        let mut compressed = vec![0; compressed_len];
        self.input.read_exact(&mut compressed)?;
        if crc32fast::hash(&compressed) != u32_at(&header, 28) {
            return Err(damaged(entry.offset, "a block does not match its checksum"));
        }
        let raw = self.decompressor.decompress(&compressed, raw_len);
        let raw = raw.map_err(|_| damaged(entry.offset, "a block does not decompress"))?;
        if raw.len() != raw_len {
            return Err(damaged(entry.offset, "a block decompresses to another length"));
        }
        self.block = Bytes::from(raw);
        self.cursor = Cursor { lines_left: entry.lines, last_seq, offset: entry.offset, ..Cursor::default() };
        self.next_block += 1;
        Ok(())
    }

    fn take_record(&mut self) -> Result<LogRecord, SealedLogError> {
        let cursor = &mut self.cursor;
        let broken = || damaged(cursor.offset, "a block's records do not add up");
        let mut rest = &self.block[cursor.at..];
        let step = take_varint(&mut rest).filter(|step| *step > 0).ok_or_else(broken)?;
        let seq = cursor.seq.checked_add(step).filter(|seq| *seq <= cursor.last_seq).ok_or_else(broken)?;
        let time_ms = cursor.time_ms.wrapping_add(unzigzag(take_varint(&mut rest).ok_or_else(broken)?));
        let (&stream, mut rest) = rest.split_first().ok_or_else(broken)?;
        let stream = LogStream::from_number(stream).ok_or_else(broken)?;
        let len = take_varint(&mut rest).and_then(|len| usize::try_from(len).ok()).ok_or_else(broken)?;
        if len > LOG_LINE_BYTES_MAX || len > rest.len() {
            return Err(broken());
        }
        let start = self.block.len() - rest.len();
        let data = self.block.slice(start..start + len);
        let complete = start + len == self.block.len() && seq == cursor.last_seq;
        if (cursor.lines_left == 1) != complete {
            return Err(broken());
        }
        cursor.at = start + len;
        cursor.seq = seq;
        cursor.time_ms = time_ms;
        cursor.lines_left -= 1;
        Ok(LogRecord { seq, time_ms, stream, data })
    }
}

impl<R: Read + Seek> Iterator for SealedLogReader<R> {
    type Item = Result<LogRecord, SealedLogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.advance();
        self.failed = item.is_err();
        item.transpose()
    }
}

struct Trailer {
    index_offset: u64,
    blocks: u32,
    totals: SealedLogTotals,
}

fn read_trailer<R: Read + Seek>(input: &mut R, file_len: u64) -> Result<Trailer, SealedLogError> {
    let at = file_len - TRAILER_BYTES as u64;
    let mut bytes = [0; TRAILER_BYTES];
    input.seek(SeekFrom::Start(at))?;
    input.read_exact(&mut bytes)?;
    if &bytes[32..] != TRAILER_MAGIC {
        return Err(damaged(at, "the end is missing: the file is truncated or was never finished"));
    }
    if crc32fast::hash(&bytes[..28]) != u32_at(&bytes, 28) {
        return Err(damaged(at, "the trailer does not match its checksum"));
    }
    let totals = SealedLogTotals { lines: u64_at(&bytes, 12), raw_bytes: u64_at(&bytes, 20) };
    Ok(Trailer { index_offset: u64_at(&bytes, 0), blocks: u32_at(&bytes, 8), totals })
}

/// Reads the index. Its length must fill the file exactly, so that no trailer can ask for more memory than there are bytes.
fn read_index<R: Read + Seek>(
    input: &mut R,
    file_len: u64,
    trailer: &Trailer,
) -> Result<Vec<IndexEntry>, SealedLogError> {
    let at = trailer.index_offset;
    let bytes_len = u64::from(trailer.blocks) * INDEX_ENTRY_BYTES as u64 + 4;
    if at.checked_add(bytes_len + TRAILER_BYTES as u64) != Some(file_len) {
        return Err(damaged(file_len - TRAILER_BYTES as u64, "the index does not lie where the trailer says"));
    }
    let too_large = |_| damaged(at, "the index does not fit into memory");
    let mut bytes = vec![0; usize::try_from(bytes_len).map_err(too_large)?];
    input.seek(SeekFrom::Start(at))?;
    input.read_exact(&mut bytes)?;
    let (entries, crc) = bytes.split_at(bytes.len() - 4);
    if crc32fast::hash(entries) != u32_at(crc, 0) {
        return Err(damaged(at, "the index does not match its checksum"));
    }
    let entries = entries.chunks_exact(INDEX_ENTRY_BYTES).map(|entry| IndexEntry {
        offset: u64_at(entry, 0),
        first_seq: u64_at(entry, 8),
        lines: u32_at(entry, 16),
    });
    let index: Vec<_> = entries.collect();
    check_index(&index, trailer)?;
    Ok(index)
}

fn check_index(index: &[IndexEntry], trailer: &Trailer) -> Result<(), SealedLogError> {
    let first = index.first().map_or(trailer.index_offset, |entry| entry.offset);
    let ends = index.iter().skip(1).map(|entry| entry.offset).chain([trailer.index_offset]);
    let filled = index.iter().zip(ends).all(|(entry, end)| {
        entry.lines > 0 && entry.offset.checked_add(BLOCK_HEADER_BYTES as u64).is_some_and(|least| least < end)
    });
    let ordered = index.windows(2).all(|pair| pair[0].first_seq < pair[1].first_seq);
    let lines = index.iter().map(|entry| u64::from(entry.lines)).sum::<u64>();
    if first == HEADER_BYTES as u64 && filled && ordered && lines == trailer.totals.lines {
        Ok(())
    } else {
        Err(damaged(trailer.index_offset, "the index contradicts itself"))
    }
}

fn damaged(offset: u64, what: &'static str) -> SealedLogError {
    SealedLogError::Damaged { offset, what }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}
