//! Sealing: an ended attempt's spool as one compressed file, in memory where it is small.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use helix_common::sealed_log::{LogStream, SealedLogError, SealedLogWriter};
use helix_common::wall;
use helix_failpoint::{self as failpoint, Point};
use helix_model::limits::SMALL_BLOB_BYTES_MAX;
use helix_runner::{AttemptDir, Growth, SpoolError, SpoolReader, Stream};

use crate::stores::body::{Body, Source};

/// Seals an attempt's log. Gives the file's bytes and its lines. Blocks.
///
/// What cannot be read of a damaged spool is replaced by a `system` line that says so.
///
/// # Errors
/// Those of the file system.
pub(super) fn seal(dir: &AttemptDir) -> io::Result<(Body, u64)> {
    let path = dir.root().join("sealed");
    let spill = Spill { memory: Vec::new(), file: None, path };
    let mut writer = SealedLogWriter::new(spill).map_err(io_error)?;
    let mut reader = SpoolReader::new(dir);
    let mut last_seq = 0;
    loop {
        match reader.next_record(Growth::Ended) {
            Ok(Some(record)) => {
                let stream = match record.stream {
                    Stream::Stdout => LogStream::Stdout,
                    Stream::Stderr => LogStream::Stderr,
                    Stream::System => LogStream::System,
                };
                last_seq = record.seq;
                writer.push_parts(record.seq, to_i64(record.time_ms), stream, &record.bytes).map_err(io_error)?;
            }
            Ok(None) => break,
            Err(SpoolError::Io(error)) => return Err(error),
            Err(damaged @ SpoolError::Damaged { .. }) => {
                let text = format!("lines after this are lost: {damaged}");
                writer
                    .push_parts(last_seq + 1, to_i64(wall::now_ms()), LogStream::System, text.as_bytes())
                    .map_err(io_error)?;
                break;
            }
        }
    }
    let (spill, totals) = writer.finish().map_err(io_error)?;
    Ok((spill.into_body()?, totals.lines))
}

fn to_i64(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

fn io_error(error: SealedLogError) -> io::Error {
    match error {
        SealedLogError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// Memory first, a file when it becomes too much.
struct Spill {
    memory: Vec<u8>,
    file: Option<File>,
    path: PathBuf,
}

impl Spill {
    fn into_body(self) -> io::Result<Body> {
        match self.file {
            None => Ok(Body::of_bytes(self.memory)),
            Some(file) => Body::measure(Source::File(Arc::new(file)), u64::MAX),
        }
    }
}

impl Write for Spill {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.is_none() && (self.memory.len() + bytes.len()) as u64 > SMALL_BLOB_BYTES_MAX {
            let mut options = OpenOptions::new();
            let mut file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&self.path)?;
            file.write_all(&self.memory)?;
            self.memory = Vec::new();
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => failpoint::hit(Point::SealWrite).and_then(|()| file.write_all(bytes))?,
            None => self.memory.extend_from_slice(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
