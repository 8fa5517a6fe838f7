//! What the agent keeps in an attempt's journal beside what is between it and the runner: the assignment, written before
//! anything is done, and the report, written before it is said. Both outlive the agent, not the machine.

use std::io;

use helix_agent_core::{Assignment, Report};
use helix_proto::agent;
use helix_runner::AttemptDir;
use helix_runner::journal::{self, Journal, Kind};
use prost::Message as _;

use crate::wire;

/// Writes what is to be run.
///
/// # Errors
/// Those of the file system.
pub fn write_assignment(dir: &AttemptDir, assignment: &Assignment) -> io::Result<()> {
    journal::append(dir, Kind::Assignment, &wire::assignment_to_wire(assignment).encode_to_vec())
}

/// Takes out what is to be run; `None` when the agent died before it was written.
///
/// # Errors
/// `InvalidData` when it is of a kind that this agent does not know.
pub fn assignment(journal: &Journal) -> io::Result<Option<Assignment>> {
    let Some(bytes) = journal.last(Kind::Assignment) else { return Ok(None) };
    let decoded = agent::Assign::decode(bytes).map_err(invalid)?;
    wire::assignment_from_wire(decoded).map(Some).map_err(invalid)
}

/// Writes how it ended.
///
/// # Errors
/// Those of the file system.
pub fn write_report(dir: &AttemptDir, key: &helix_model::AttemptKey, report: &Report) -> io::Result<()> {
    journal::append(dir, Kind::Report, &wire::report_to_wire(key, report).encode_to_vec())
}

/// Takes out how it ended; `None` when no report was made.
///
/// # Errors
/// `InvalidData` when it is of a kind that this agent does not know.
pub fn report(journal: &Journal) -> io::Result<Option<Report>> {
    let Some(bytes) = journal.last(Kind::Report) else { return Ok(None) };
    let decoded = agent::Finished::decode(bytes).map_err(invalid)?;
    wire::report_from_wire(decoded).map(Some).map_err(invalid)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
