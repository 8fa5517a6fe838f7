//! What goes in comes out; what was damaged is noticed, byte by byte.

use std::io::{Cursor, Read, Seek, SeekFrom};

use super::*;

fn record(seq: u64, data: &[u8]) -> LogRecord {
    let stream = [LogStream::Stdout, LogStream::Stderr, LogStream::System][usize::try_from(seq % 3).unwrap()];
    let step = i64::try_from(seq % 1_000_000).unwrap();
    let time_ms = 1_700_000_000_000 + step * if seq.is_multiple_of(7) { -3 } else { 5 };
    LogRecord { seq, time_ms, stream, data: Bytes::copy_from_slice(data) }
}

/// Lines that compress badly, so that a few thousand of them make several blocks.
fn noise(seq: u64, len: usize) -> Vec<u8> {
    let mut state = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..len).map(next).collect()
}

fn sealed(records: &[LogRecord]) -> Vec<u8> {
    let mut writer = SealedLogWriter::new(Vec::new()).unwrap();
    for record in records {
        writer.push(record).unwrap();
    }
    let (bytes, totals) = writer.finish().unwrap();
    let raw_bytes = records.iter().map(|record| record.data.len() as u64).sum();
    assert_eq!(totals, SealedLogTotals { lines: records.len() as u64, raw_bytes });
    bytes
}

fn read(
    bytes: &[u8],
    place: impl FnOnce(&mut SealedLogReader<Cursor<&[u8]>>),
) -> Result<Vec<LogRecord>, SealedLogError> {
    let mut reader = SealedLogReader::open(Cursor::new(bytes))?;
    place(&mut reader);
    reader.collect()
}

fn several_blocks() -> Vec<LogRecord> {
    (1..=3000).map(|seq| record(seq, &noise(seq, 300))).collect()
}

#[test]
fn an_empty_log_has_no_lines() {
    let bytes = sealed(&[]);
    assert_eq!(read(&bytes, |_| ()).unwrap(), []);
    assert_eq!(read(&bytes, |reader| reader.seek_tail(5)).unwrap(), []);
    assert_eq!(read(&bytes, |reader| reader.seek_seq(5)).unwrap(), []);
}

#[test]
fn lines_come_back_whole_and_in_order() {
    let mut records = several_blocks();
    records.push(record(3001, b""));
    records.push(record(3002, &noise(1, LOG_LINE_BYTES_MAX)));
    records.push(LogRecord { time_ms: i64::MIN, ..record(3003, b"\xff\0") });
    records.push(LogRecord { time_ms: i64::MAX, ..record(u64::MAX, b"after a hole") });
    let bytes = sealed(&records);
    assert_eq!(read(&bytes, |_| ()).unwrap(), records);
}

#[test]
fn reading_begins_at_any_number() {
    let mut records = several_blocks();
    records.drain(100..120);
    let bytes = sealed(&records);
    for from in [0, 1, 2, 99, 100, 101, 110, 121, 850, 874, 875, 876, 2999, 3000, 3001, u64::MAX] {
        let expected: Vec<_> = records.iter().filter(|record| record.seq >= from).cloned().collect();
        assert_eq!(read(&bytes, |reader| reader.seek_seq(from)).unwrap(), expected, "from {from}");
    }
}

#[test]
fn the_tail_is_the_last_lines() {
    let records = several_blocks();
    let bytes = sealed(&records);
    for lines in [0, 1, 2, 500, 870, 900, 2999, 3000, 3001, u64::MAX] {
        let skip = records.len().saturating_sub(usize::try_from(lines).unwrap());
        assert_eq!(read(&bytes, |reader| reader.seek_tail(lines)).unwrap(), records[skip..], "{lines}");
    }
}

/// Counts what is read.
struct Counted<'a> {
    inner: Cursor<&'a [u8]>,
    bytes: &'a std::cell::Cell<usize>,
}

impl Read for Counted<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(out)?;
        self.bytes.set(self.bytes.get() + read);
        Ok(read)
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}

#[test]
fn the_last_line_costs_one_block() {
    let records: Vec<_> = (1..=20_000).map(|seq| record(seq, &noise(seq, 300))).collect();
    let bytes = sealed(&records);
    let count = std::cell::Cell::new(0);
    let mut reader = SealedLogReader::open(Counted { inner: Cursor::new(&bytes), bytes: &count }).unwrap();
    reader.seek_tail(1);
    assert_eq!(reader.next().unwrap().unwrap(), records[19_999]);
    assert!(reader.next().is_none());
    assert!(count.get() < 2 * BLOCK_RAW_BYTES && bytes.len() > 20 * BLOCK_RAW_BYTES, "{} bytes read", count.get());
}

#[test]
fn misuse_is_refused_and_leaves_the_log_as_it_was() {
    let mut writer = SealedLogWriter::new(Vec::new()).unwrap();
    writer.push(&record(1, b"one")).unwrap();
    assert!(matches!(writer.push(&record(1, b"again")), Err(SealedLogError::OutOfOrder { seq: 1, previous: 1 })));
    let long = record(2, &vec![b'x'; LOG_LINE_BYTES_MAX + 1]);
    assert!(matches!(writer.push(&long), Err(SealedLogError::LineTooLong { seq: 2, .. })));
    writer.push(&record(2, b"two")).unwrap();
    let (bytes, _) = writer.finish().unwrap();
    assert_eq!(read(&bytes, |_| ()).unwrap(), [record(1, b"one"), record(2, b"two")]);
}

#[test]
fn every_truncation_is_noticed() {
    let records: Vec<_> = (1..=50).map(|seq| record(seq, &noise(seq, 20))).collect();
    let bytes = sealed(&records);
    for len in 0..bytes.len() {
        let outcome = read(&bytes[..len], |_| ());
        assert!(matches!(outcome, Err(SealedLogError::Damaged { .. })), "cut to {len}: {outcome:?}");
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let records: Vec<_> = (1..=20).map(|seq| record(seq, &noise(seq, 20))).collect();
    let mut bytes = sealed(&records);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes, |_| ()).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
    assert_eq!(read(&bytes, |_| ()).unwrap(), records);
}

#[test]
fn damage_in_one_block_leaves_the_others_readable_and_names_the_place() {
    let records = several_blocks();
    let mut bytes = sealed(&records);
    bytes[HEADER_BYTES + BLOCK_HEADER_BYTES + 1000] ^= 1;
    let error = read(&bytes, |_| ()).unwrap_err();
    assert!(matches!(error, SealedLogError::Damaged { offset: 12, .. }), "{error}");
    assert_eq!(read(&bytes, |reader| reader.seek_tail(10)).unwrap(), records[2990..]);
}

#[test]
fn lies_with_valid_checksums_cost_no_memory() {
    let bytes = sealed(&[record(1, b"x")]);
    let trailer_at = bytes.len() - TRAILER_BYTES;
    // A trailer that promises four thousand million blocks.
    let mut lie = bytes.clone();
    lie[trailer_at + 8..trailer_at + 12].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32fast::hash(&lie[trailer_at..trailer_at + 28]);
    lie[trailer_at + 28..trailer_at + 32].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(read(&lie, |_| ()), Err(SealedLogError::Damaged { .. })));
    // A block that promises four gigabytes.
    let mut lie = bytes.clone();
    lie[HEADER_BYTES + 20..HEADER_BYTES + 24].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32fast::hash(&lie[HEADER_BYTES..HEADER_BYTES + 32]);
    lie[HEADER_BYTES + 32..HEADER_BYTES + 36].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(read(&lie, |_| ()), Err(SealedLogError::Damaged { offset: 12, .. })));
    // A version from the future.
    let mut later = bytes;
    later[8] = 2;
    assert!(matches!(read(&later, |_| ()), Err(SealedLogError::Version { found: 2 })));
}
