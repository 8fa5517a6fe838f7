//! A stream's bytes as lines.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use helix_model::limits::LOG_LINE_BYTES_MAX;
use helix_runner::{SpoolWriter, Stream};

use super::mask::{Mask, Masking};

/// Bytes taken from a pipe at once: a pipe's default size. Empty lines become 25 bytes of record each, so this also
/// bounds what waits in memory, to under two megabytes a stream.
pub(crate) const READ_BYTES: usize = 64 * 1024;

/// What a read found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    Bytes,
    Nothing,
    End,
}

/// One of the command's output pipes and the line that it is in the middle of.
#[derive(Debug)]
pub(crate) struct Output {
    pipe: Option<OwnedFd>,
    stream: Stream,
    partial: Vec<u8>,
    /// Keeps secrets out, if there are any.
    masking: Option<Masking>,
}

impl Output {
    pub(crate) fn new(pipe: OwnedFd, stream: Stream, mask: Option<&Rc<Mask>>) -> Self {
        let masking = mask.map(|mask| Masking::new(Rc::clone(mask)));
        Self { pipe: Some(pipe), stream, partial: Vec::new(), masking }
    }

    /// The pipe while it is open.
    pub(crate) fn pipe(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref()
    }

    /// Reads once and appends the whole lines.
    pub(crate) fn read(&mut self, buffer: &mut [u8], time_ms: u64, spool: &mut SpoolWriter) -> Found {
        let Some(pipe) = &self.pipe else { return Found::End };
        match rustix::io::read(pipe, &mut *buffer) {
            Ok(0) => {
                self.close(time_ms, spool);
                Found::End
            }
            Ok(count) => {
                self.hear(&buffer[..count], time_ms, spool);
                Found::Bytes
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Found::Nothing,
            Err(error) => {
                let text = format!("reading {} failed: {}", self.stream, io::Error::from(error));
                self.close(time_ms, spool);
                spool.append(time_ms, Stream::System, text.as_bytes());
                Found::End
            }
        }
    }

    fn hear(&mut self, bytes: &[u8], time_ms: u64, spool: &mut SpoolWriter) {
        match &mut self.masking {
            None => self.take(bytes, time_ms, spool),
            Some(masking) => {
                let mut shown = Vec::with_capacity(bytes.len());
                masking.push(bytes, &mut shown);
                self.take(&shown, time_ms, spool);
            }
        }
    }

    fn take(&mut self, mut bytes: &[u8], time_ms: u64, spool: &mut SpoolWriter) {
        while !bytes.is_empty() {
            let room = LOG_LINE_BYTES_MAX - self.partial.len();
            // The line end of a line that is exactly full still belongs to it.
            let window = &bytes[..bytes.len().min(room + 1)];
            let end = window.iter().position(|byte| *byte == b'\n');
            let (line, used) = match end {
                Some(end) => (&bytes[..end], end + 1),
                None if window.len() > room => (&bytes[..room], room),
                None => {
                    self.partial.extend_from_slice(bytes);
                    return;
                }
            };
            if self.partial.is_empty() {
                spool.append(time_ms, self.stream, line);
            } else {
                self.partial.extend_from_slice(line);
                spool.append(time_ms, self.stream, &self.partial);
                self.partial.clear();
            }
            bytes = &bytes[used..];
        }
    }

    /// No more is read; a last line without a line end counts.
    pub(crate) fn close(&mut self, time_ms: u64, spool: &mut SpoolWriter) {
        self.pipe = None;
        if let Some(mut masking) = self.masking.take() {
            let mut shown = Vec::new();
            masking.finish(&mut shown);
            self.take(&shown, time_ms, spool);
        }
        if !self.partial.is_empty() {
            spool.append(time_ms, self.stream, &self.partial);
            self.partial = Vec::new();
        }
    }
}
