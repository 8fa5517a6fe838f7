//! An attempt's log on disk: numbered lines, each with its time and stream, in records that show damage.
//!
//! One log through the attempt's life: the agent writes its own `system` lines before the runner starts, the runner
//! writes what the command says, the agent adds the last words. Never two of them at a time.
//!
//! # Form
//!
//! A part starts with 32 bytes: magic `HLXSPOOL`, version, number of its first line, bytes of all lines before it, CRC.
//! Then records: payload length `u32`, CRC `u32` of the rest, number `u64`, Unix milliseconds `u64`, stream `u8`, payload.
//! A part that ends within a record was cut off while writing; everything before is good.
//!
//! # The bound
//!
//! `log.spool` takes records until only the room for the tail is left (half of the limit, at most 4 MiB). Then a `system`
//! line says so, and further lines go to `log.tail`, which becomes `log.tail.old` when half of that room is full, and
//! so on: an older `log.tail.old` is dropped. Readers see the head while it grows, and head and tail when the attempt has
//! ended, with a `system` line at the gap, which has the number of the last line that was dropped. So what a reader gets
//! does not depend on how fast it reads, and never exceeds the limit.

mod reader;
mod writer;

use std::fmt;

use crate::codec::FormatError;

pub use reader::{Growth, Position, SpoolError, SpoolReader};
pub use writer::{LOG_BYTES_MIN, SpoolWriter};

/// Where a line comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stream {
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
    /// Agent or runner.
    System,
}

impl Stream {
    fn code(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::System => 3,
        }
    }

    fn from_code(code: u8) -> Result<Self, FormatError> {
        match code {
            1 => Ok(Self::Stdout),
            2 => Ok(Self::Stderr),
            3 => Ok(Self::System),
            _ => Err(FormatError::Value("stream")),
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::System => "system",
        })
    }
}

/// A line of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// From 1, ascending; a number is missing only where a `system` line tells of dropped ones.
    pub seq: u64,
    /// When it was read from the command, in Unix milliseconds.
    pub time_ms: u64,
    /// Where it comes from.
    pub stream: Stream,
    /// What it says, as it was, without its line end; at most [`helix_model::limits::LOG_LINE_BYTES_MAX`] bytes. A
    /// longer line is several records.
    pub bytes: Vec<u8>,
}

const MAGIC: &[u8; 8] = b"HLXSPOOL";
const VERSION: u32 = 1;
const PART_HEAD_BYTES: usize = 32;
const RECORD_HEAD_BYTES: usize = 25;

/// The tail's room, at most: people look at the last lines, not at the last hundred thousand.
const TAIL_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What a part starts with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PartHead {
    first_seq: u64,
    bytes_before: u64,
}

impl PartHead {
    fn encode(self) -> [u8; PART_HEAD_BYTES] {
        let mut head = [0; PART_HEAD_BYTES];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[12..20].copy_from_slice(&self.first_seq.to_le_bytes());
        head[20..28].copy_from_slice(&self.bytes_before.to_le_bytes());
        let crc = crc32fast::hash(&head[..28]);
        head[28..].copy_from_slice(&crc.to_le_bytes());
        head
    }

    fn decode(head: &[u8; PART_HEAD_BYTES]) -> Result<Self, FormatError> {
        if &head[..8] != MAGIC {
            return Err(FormatError::Foreign);
        }
        if crc32fast::hash(&head[..28]) != u32_at(head, 28) {
            return Err(FormatError::Checksum);
        }
        match u32_at(head, 8) {
            VERSION => Ok(Self { first_seq: u64_at(head, 12), bytes_before: u64_at(head, 20) }),
            other => Err(FormatError::Version(other)),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Appends a record's bytes.
fn encode_record(out: &mut Vec<u8>, seq: u64, time_ms: u64, stream: Stream, payload: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&u32::try_from(payload.len()).expect("lines are split before").to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&seq.to_le_bytes());
    out.extend_from_slice(&time_ms.to_le_bytes());
    out.push(stream.code());
    out.extend_from_slice(payload);
    let crc = record_crc(&out[start..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

fn record_crc(record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..4]);
    hasher.update(&record[8..]);
    hasher.finalize()
}

/// Reads the record at the start of `bytes`; `None` when it is not complete. Also tells how long it is.
fn decode_record(bytes: &[u8]) -> Result<Option<(RecordView<'_>, usize)>, FormatError> {
    if bytes.len() < RECORD_HEAD_BYTES {
        return Ok(None);
    }
    let length = u32_at(bytes, 0) as usize;
    if length > helix_model::limits::LOG_LINE_BYTES_MAX {
        return Err(FormatError::Value("length"));
    }
    let Some(record) = bytes.get(..RECORD_HEAD_BYTES + length) else { return Ok(None) };
    if record_crc(record) != u32_at(record, 4) {
        return Err(FormatError::Checksum);
    }
    let view = RecordView {
        seq: u64_at(record, 8),
        time_ms: u64_at(record, 16),
        stream: Stream::from_code(record[24])?,
        bytes: &record[RECORD_HEAD_BYTES..],
    };
    Ok(Some((view, record.len())))
}

/// A record where it lies.
struct RecordView<'a> {
    seq: u64,
    time_ms: u64,
    stream: Stream,
    bytes: &'a [u8],
}
