//! How an attempt ended, as the runner's last act writes it.
//!
//! That it exists is the proof of death: it is written only after the kernel said that no descendant is left.

use std::io;

use helix_model::{Reason, Room};

use crate::codec::{self, Decoder, Encoder, FormatError, Kind};
use crate::journal::{self, Journal, JournalWriter};
use crate::paths::AttemptDir;

const KIND: Kind = Kind { magic: b"HLXDONE\0", version: 1 };

/// A result's bytes, at most; so much is preallocated, so that a full disk does not hide how a build ended.
pub const OUTCOME_BYTES_MAX: usize = 4096;

/// An error's text in a result, at most.
const ERROR_BYTES_MAX: usize = 1024;

/// How the command itself ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// By itself, with this code.
    Exited(u8),
    /// By this signal. Whose signal that was says [`Outcome::stopped`].
    Signaled(i32),
    /// It never ran: no such program, not executable, no such workdir.
    NotStarted {
        /// The system's error number, 0 when there is none.
        errno: i32,
        /// What could not be done, for people.
        error: String,
    },
}

/// What became of the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogTotals {
    /// The newest line's number, 0 when there is no line.
    pub last_seq: u64,
    /// Bytes of all lines ever written, dropped ones included, line ends excluded.
    pub bytes: u64,
    /// Lines that were dropped because of the limit.
    pub dropped_lines: u64,
    /// Bytes of those.
    pub dropped_bytes: u64,
}

/// Whether the kernel killed something for want of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryKill {
    /// No sign of it. Without a memory controller there can be none.
    NotSeen,
    /// The attempt's cgroup counted at least one.
    Counted,
}

/// How the attempt ended. No process of it is left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// When the command was started, in Unix milliseconds.
    pub started_at_ms: u64,
    /// When the last descendant was seen dead, in Unix milliseconds, by a clock that does not go back.
    pub ended_at_ms: u64,
    /// How the command ended.
    pub end: End,
    /// Why the runner stopped it, if it did: the first reason given.
    pub stopped: Option<Reason>,
    /// Whose disk was full, where that was the reason.
    pub room: Room,
    /// How many processes that the command had left behind were killed.
    pub leftovers_killed: u32,
    /// Whether memory ran out.
    pub memory_kill: MemoryKill,
    /// The log when the runner ended.
    pub log: LogTotals,
}

impl Outcome {
    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, journal: &mut JournalWriter) -> io::Result<()> {
        journal.append(journal::Kind::Result, &self.encode())
    }

    /// Reads it; `None` when there is no result yet.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` with a [`FormatError`] inside.
    pub fn read(dir: &AttemptDir) -> io::Result<Option<Self>> {
        Ok(Self::of(&Journal::read(dir)?)?)
    }

    /// Takes it out of a journal; `None` when there is no result yet.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(journal: &Journal) -> Result<Option<Self>, FormatError> {
        journal.last(journal::Kind::Result).map(Self::decode).transpose()
    }

    /// The file's bytes; an error's text is cut to 1,024 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        out.u64(self.started_at_ms).u64(self.ended_at_ms);
        match &self.end {
            End::Exited(code) => out.u8(0).u8(*code),
            End::Signaled(signal) => out.u8(1).u32(signal.cast_unsigned()),
            End::NotStarted { errno, error } => {
                let cut = error.floor_char_boundary(ERROR_BYTES_MAX);
                out.u8(2).u32(errno.cast_unsigned()).bytes(&error.as_bytes()[..cut])
            }
        };
        out.bytes(self.stopped.map_or("", Reason::as_str).as_bytes());
        out.u32(self.leftovers_killed).u8(match self.memory_kill {
            MemoryKill::NotSeen => 0,
            MemoryKill::Counted => 1,
        });
        let log = self.log;
        out.u64(log.last_seq).u64(log.bytes).u64(log.dropped_lines).u64(log.dropped_bytes);
        // Left out where it is as it always was, so that an agent of before reads all other results.
        if self.room == Room::Own {
            out.u8(1);
        }
        codec::seal(&KIND, &out.finish())
    }

    /// Reads what [`Self::encode`] made.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Decoder::new(codec::unseal(&KIND, file)?);
        let (started_at_ms, ended_at_ms) = (fields.u64()?, fields.u64()?);
        let end = match fields.u8()? {
            0 => End::Exited(fields.u8()?),
            1 => End::Signaled(fields.u32()?.cast_signed()),
            2 => End::NotStarted { errno: fields.u32()?.cast_signed(), error: fields.text("error")?.to_owned() },
            _ => return Err(FormatError::Value("end")),
        };
        let stopped = match fields.text("stopped")? {
            "" => None,
            word => Some(word.parse().map_err(|_| FormatError::Value("stopped"))?),
        };
        let leftovers_killed = fields.u32()?;
        let memory_kill = match fields.u8()? {
            0 => MemoryKill::NotSeen,
            1 => MemoryKill::Counted,
            _ => return Err(FormatError::Value("memory_kill")),
        };
        let log = LogTotals {
            last_seq: fields.u64()?,
            bytes: fields.u64()?,
            dropped_lines: fields.u64()?,
            dropped_bytes: fields.u64()?,
        };
        let room = match fields.is_empty() {
            true => Room::Host,
            false if fields.u8()? == 1 => Room::Own,
            false => return Err(FormatError::Value("room")),
        };
        fields.end()?;
        Ok(Self { started_at_ms, ended_at_ms, end, stopped, room, leftovers_killed, memory_kill, log })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes_within_its_room() {
        let log = LogTotals { last_seq: 1, bytes: 2, dropped_lines: 3, dropped_bytes: 4 };
        for end in [
            End::Exited(255),
            End::Signaled(9),
            End::NotStarted { errno: 2, error: "no such program".to_owned() },
            End::NotStarted { errno: -1, error: "é".repeat(512) },
        ] {
            for (stopped, room) in [(None, Room::Host), (Some(Reason::DiskFull), Room::Own)] {
                let outcome = Outcome {
                    started_at_ms: 1,
                    ended_at_ms: u64::MAX,
                    end: end.clone(),
                    stopped,
                    room,
                    leftovers_killed: 7,
                    memory_kill: MemoryKill::Counted,
                    log,
                };
                let bytes = outcome.encode();
                assert!(bytes.len() <= OUTCOME_BYTES_MAX);
                assert_eq!(Outcome::decode(&bytes), Ok(outcome));
            }
        }
    }
}
