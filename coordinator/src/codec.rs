//! The durable form of commands, rows and replies: ours, versioned, golden-tested. Nothing else is ever written to disk
//! or to a peer.
//!
//! Reading is strict: what is malformed is an error with its place, never a default, and what a newer program wrote
//! is an error that names the version it needs. Values were validated before they were written, so an error here
//! means damage or a newer writer.

use helix_core::Command;
use helix_model::{InvalidField, LogTime};
use helix_proto::store;
use prost::Message;

mod command;
mod parts;
mod policy;
mod reply;
mod row;

pub use command::{command_from_wire, command_to_wire};
pub(crate) use command::{format_of, lower};
pub(crate) use policy::policy_needs;
pub use reply::{reply_from_wire, reply_to_wire};
pub use row::{ROW_FORMAT, decode_row, encode_row};

use crate::registry::COMMAND_FORMAT;

/// Why bytes cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CodecError {
    /// Written by a newer program.
    #[error("{what} has format {needed}, and this program knows {known}: start a newer helix-coordinator")]
    Newer {
        /// What was read.
        what: &'static str,
        /// The format it has.
        needed: u32,
        /// The highest format known here.
        known: u32,
    },
    /// Not what we write.
    #[error("{what} is malformed: {why}")]
    Malformed {
        /// What was read.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl CodecError {
    fn missing(what: &'static str) -> Self {
        Self::Malformed { what, why: "it is missing".to_owned() }
    }

    fn bytes(what: &'static str, error: &prost::DecodeError) -> Self {
        Self::Malformed { what, why: error.to_string() }
    }
}

impl From<InvalidField> for CodecError {
    fn from(error: InvalidField) -> Self {
        Self::Malformed { what: error.field, why: error.why }
    }
}

impl From<CodecError> for std::io::Error {
    fn from(error: CodecError) -> Self {
        // Never `UnexpectedEof`: the log takes that for a write that a crash cut short.
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// The bytes of a log entry's commands.
#[must_use]
pub fn encode_batch(at: LogTime, commands: Vec<store::Command>) -> Vec<u8> {
    // The lowest that will do, so that what older nodes can read they do read.
    let format = commands.iter().map(command::format_of).max().unwrap_or(1);
    store::Batch { format, at_ms: at.0, commands }.encode_to_vec()
}

/// Reads a log entry's commands.
///
/// # Errors
/// [`CodecError`]; `Newer` also for a command of a kind that is unknown here.
pub fn decode_batch(bytes: &[u8]) -> Result<(LogTime, Vec<Command>), CodecError> {
    let batch = store::Batch::decode(bytes).map_err(|error| CodecError::bytes("commands", &error))?;
    check_format("commands", batch.format, COMMAND_FORMAT)?;
    let commands = batch.commands.into_iter().map(command_from_wire).collect::<Result<_, _>>()?;
    Ok((LogTime(batch.at_ms), commands))
}

/// The format that a log entry's commands need.
///
/// # Errors
/// [`CodecError`].
pub(crate) fn format_of_batch(bytes: &[u8]) -> Result<u32, CodecError> {
    let batch = store::Batch::decode(bytes).map_err(|error| CodecError::bytes("commands", &error))?;
    Ok(batch.format)
}

fn check_format(what: &'static str, needed: u32, known: u32) -> Result<(), CodecError> {
    if needed > known { Err(CodecError::Newer { what, needed, known }) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests;
