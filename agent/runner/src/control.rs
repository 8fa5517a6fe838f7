//! What agent and runner say over the socket in the attempt's directory.
//!
//! Frames are a little-endian `u32` length and so many bytes, at most [`FRAME_BYTES_MAX`]. A runner takes
//! [`Request`]s, answers with [`Event`]s, and closes the connection at its own end: then the result is there, or
//! the runner died ([`crate::inspect`] tells which). A connection that sends anything else is closed. Requests may be
//! repeated and connections may come and go; what was asked stays asked. Losing a connection means nothing to a build.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use helix_model::Reason;

use crate::codec::{Decoder, Encoder, FormatError};
use crate::outcome::LogTotals;
use crate::paths::AttemptDir;

/// A frame's payload, at most. Nothing that is said needs more; a longer one is garbage.
pub const FRAME_BYTES_MAX: usize = 256;

/// Connections a runner holds at once. An agent needs one; a new one beyond these is closed at once.
pub const CONNECTIONS_MAX: usize = 8;

/// What an agent asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// End the command and all that it started: SIGTERM, and SIGKILL `grace_ms` later (0: at once). A second request
    /// can only shorten the grace; the first reason stays. Answered by [`Event::Stopping`].
    Stop {
        /// Why; comes back in the result.
        reason: Reason,
        /// How long processes may take to end by themselves.
        grace_ms: u64,
    },
    /// Answered by one [`Event::Status`].
    Status,
    /// From now on an [`Event::Grew`] whenever the spool has grown, and one at once. Several growths may become one
    /// event, so that a slow reader costs nothing.
    Watch,
}

/// What a runner says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The stop was understood and has begun.
    Stopping {
        /// The reason that counts: the first.
        reason: Reason,
    },
    /// How things stand.
    Status(Status),
    /// The spool has records up to this number.
    Grew {
        /// The newest line's number.
        last_seq: u64,
    },
}

/// How an attempt stands while its runner lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// When the command was started, in Unix milliseconds.
    pub started_at_ms: u64,
    /// The command's pid, 0 once it has ended.
    pub command_pid: u32,
    /// Why it is being stopped, if it is.
    pub stopping: Option<Reason>,
    /// The log until now.
    pub log: LogTotals,
}

impl Request {
    /// The frame, with its length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        match self {
            Self::Stop { reason, grace_ms } => out.u8(1).bytes(reason.as_str().as_bytes()).u64(*grace_ms),
            Self::Status => out.u8(2),
            Self::Watch => out.u8(3),
        };
        frame(&out.finish())
    }

    /// Reads a frame's payload.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(payload: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Decoder::new(payload);
        let request = match fields.u8()? {
            1 => Self::Stop { reason: reason(&mut fields)?, grace_ms: fields.u64()? },
            2 => Self::Status,
            3 => Self::Watch,
            _ => return Err(FormatError::Foreign),
        };
        fields.end()?;
        Ok(request)
    }
}

impl Event {
    /// The frame, with its length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        match self {
            Self::Stopping { reason } => out.u8(1).bytes(reason.as_str().as_bytes()),
            Self::Status(status) => {
                out.u8(2).u64(status.started_at_ms).u32(status.command_pid);
                out.bytes(status.stopping.map_or("", Reason::as_str).as_bytes());
                let log = status.log;
                out.u64(log.last_seq).u64(log.bytes).u64(log.dropped_lines).u64(log.dropped_bytes)
            }
            Self::Grew { last_seq } => out.u8(3).u64(*last_seq),
        };
        frame(&out.finish())
    }

    /// Reads a frame's payload.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(payload: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Decoder::new(payload);
        let event = match fields.u8()? {
            1 => Self::Stopping { reason: reason(&mut fields)? },
            2 => {
                let (started_at_ms, command_pid) = (fields.u64()?, fields.u32()?);
                let stopping = match fields.text("stopping")? {
                    "" => None,
                    word => Some(word.parse().map_err(|_| FormatError::Value("stopping"))?),
                };
                let log = LogTotals {
                    last_seq: fields.u64()?,
                    bytes: fields.u64()?,
                    dropped_lines: fields.u64()?,
                    dropped_bytes: fields.u64()?,
                };
                Self::Status(Status { started_at_ms, command_pid, stopping, log })
            }
            3 => Self::Grew { last_seq: fields.u64()? },
            _ => return Err(FormatError::Foreign),
        };
        fields.end()?;
        Ok(event)
    }
}

fn reason(fields: &mut Decoder<'_>) -> Result<Reason, FormatError> {
    fields.text("reason")?.parse().map_err(|_| FormatError::Value("reason"))
}

/// Puts the length before a payload.
pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    Encoder::default().bytes(payload).finish()
}

/// Finds frames in what a socket gives, in whatever pieces it gives it. Holds one incomplete frame at most.
#[derive(Debug)]
pub struct Frames {
    pending: Vec<u8>,
    bytes_max: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self::with_bytes_max(FRAME_BYTES_MAX)
    }
}

impl Frames {
    /// For frames up to another size.
    #[must_use]
    pub fn with_bytes_max(bytes_max: usize) -> Self {
        Self { pending: Vec::new(), bytes_max }
    }

    /// Adds what was read; call [`Self::next_frame`] until it has no more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame's payload.
    ///
    /// # Errors
    /// A length beyond the bound: the connection is of no use any more.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, FormatError> {
        let Some(head) = self.pending.first_chunk::<4>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*head)).map_err(|_| FormatError::Value("length"))?;
        if length > self.bytes_max {
            return Err(FormatError::Value("length"));
        }
        let Some(payload) = self.pending.get(4..4 + length) else { return Ok(None) };
        let payload = payload.to_vec();
        self.pending.drain(..4 + length);
        Ok(Some(payload))
    }
}

/// Connects to an attempt's runner, however long the directory's path is.
///
/// # Errors
/// `NotFound` when no runner ever listened there; `ConnectionRefused` when it is gone.
pub fn connect(dir: &AttemptDir) -> io::Result<UnixStream> {
    // A socket's address holds 107 bytes of path: go through a descriptor of the directory instead.
    let root = rustix::fs::open(
        dir.root(),
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    UnixStream::connect(format!("/proc/self/fd/{}/control", root.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_in_any_pieces() {
        let requests = [Request::Stop { reason: Reason::Cancelled, grace_ms: 5 }, Request::Status, Request::Watch];
        let stream: Vec<u8> = requests.iter().flat_map(Request::encode).collect();
        for piece in 1..stream.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                frames.push(bytes);
                while let Some(payload) = frames.next_frame().unwrap() {
                    seen.push(Request::decode(&payload).unwrap());
                }
            }
            assert_eq!(seen, requests);
        }
    }

    #[test]
    fn events_read_back_and_fit() {
        let log = LogTotals { last_seq: 9, bytes: 8, dropped_lines: 7, dropped_bytes: 6 };
        for event in [
            Event::Stopping { reason: Reason::WorkerLost },
            Event::Status(Status { started_at_ms: 1, command_pid: 2, stopping: Some(Reason::Drained), log }),
            Event::Grew { last_seq: u64::MAX },
        ] {
            let bytes = event.encode();
            assert!(bytes.len() - 4 <= FRAME_BYTES_MAX);
            assert_eq!(Event::decode(&bytes[4..]), Ok(event));
        }
    }

    #[test]
    fn garbage_is_refused() {
        let mut frames = Frames::default();
        frames.push(b"GET / HTTP/1.1\r\n");
        assert!(frames.next_frame().is_err());
        for payload in [&b""[..], b"\x09", b"\x02extra", b"\x01\x03\0\0\0wat\0\0\0\0\0\0\0\0"] {
            assert!(Request::decode(payload).is_err(), "{payload:?}");
        }
    }
}
