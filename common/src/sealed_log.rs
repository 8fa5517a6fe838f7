//! The sealed form of an attempt's log: what is stored as a blob once the attempt has ended.
//!
//! A file is a header, compressed blocks of about [`BLOCK_RAW_BYTES`], an index of the blocks, and a trailer that
//! finds the index; all integers are little-endian. Reading from a number, or the last so many lines, touches the
//! trailer, the index and the blocks concerned, never the whole file, and holds one block in memory.
//!
//! Where the bytes lie and how they travel is decided elsewhere. Invariant: every byte of a file is covered by a checksum
//! or by a comparison, so that a damaged or truncated file is an error that names the place, never a wrong line.
//!
//! ```text
//! header   magic "HELIXLOG", version u32
//! block    first_seq u64, last_seq u64, lines u32, raw_len u32, compressed_len u32, crc32 of the payload u32,
//!          crc32 of this header u32, payload (zstd)
//! index    per block: offset u64, first_seq u64, lines u32; then crc32 of all that u32
//! trailer  index offset u64, blocks u32, lines u64, raw bytes u64, crc32 of this trailer u32, magic "GOLXILEH"
//! record   in a block: seq - previous seq (varint), time - previous time (zigzag varint), stream u8,
//!          length (varint), bytes
//! ```

mod reader;
#[cfg(test)]
mod tests;
mod writer;

use bytes::Bytes;
use helix_model::limits::LOG_LINE_BYTES_MAX;

pub use reader::SealedLogReader;
pub use writer::SealedLogWriter;

/// Raw bytes after which a block is closed: large enough to compress well, small enough to read one for its last line.
pub const BLOCK_RAW_BYTES: usize = 256 * 1024;

/// A record's bytes beside its data, at most: two varints of 64 bits, a stream, a varint of 32 bits.
const RECORD_OVERHEAD_MAX: usize = 10 + 10 + 1 + 5;

/// A block's raw bytes, at most: a full line may come when the block is one byte short.
const BLOCK_RAW_BYTES_MAX: usize = BLOCK_RAW_BYTES + LOG_LINE_BYTES_MAX + RECORD_OVERHEAD_MAX;

const MAGIC: &[u8; 8] = b"HELIXLOG";
const TRAILER_MAGIC: &[u8; 8] = b"GOLXILEH";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 12;
const BLOCK_HEADER_BYTES: usize = 36;
const INDEX_ENTRY_BYTES: usize = 20;
const TRAILER_BYTES: usize = 40;

/// Where a line came from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LogStream {
    /// The build's standard output.
    Stdout,
    /// The build's standard error.
    Stderr,
    /// Helix itself.
    System,
}

impl LogStream {
    /// The stream's number in files and on the wire.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::System => 3,
        }
    }

    /// The stream of that number, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            3 => Some(Self::System),
            _ => None,
        }
    }
}

/// A line of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogRecord {
    /// Its number in its attempt, from 1.
    pub seq: u64,
    /// Unix milliseconds on the build host.
    pub time_ms: i64,
    /// Where it came from.
    pub stream: LogStream,
    /// The line without its newline, at most [`LOG_LINE_BYTES_MAX`] bytes.
    pub data: Bytes,
}

/// What a sealed log holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SealedLogTotals {
    /// Lines.
    pub lines: u64,
    /// Bytes of all lines, without newlines.
    pub raw_bytes: u64,
}

/// Why a sealed log could not be written or read.
#[derive(thiserror::Error, Debug)]
pub enum SealedLogError {
    /// The file beneath failed.
    #[error("sealed log: {0}")]
    Io(#[from] std::io::Error),
    /// The bytes are not those that were written.
    #[error("sealed log is damaged at byte {offset}: {what}")]
    Damaged {
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// Written by a later version of Helix.
    #[error("sealed log has format {found}, this program reads up to {VERSION}")]
    Version {
        /// The file's format.
        found: u32,
    },
    /// A line longer than the limit was pushed.
    #[error("line {seq} has {bytes} bytes, more than {LOG_LINE_BYTES_MAX}")]
    LineTooLong {
        /// The line's number.
        seq: u64,
        /// Its length.
        bytes: usize,
    },
    /// A line was pushed whose number is not larger than the one before it.
    #[error("line {seq} pushed after line {previous}")]
    OutOfOrder {
        /// The line's number.
        seq: u64,
        /// The number before it.
        previous: u64,
    },
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Reads a varint at the front of `bytes`; `None` when it does not end, or has more than 64 bits.
fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Small numbers of either sign become small numbers without one.
fn zigzag(value: i64) -> u64 {
    (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}
