//! What the agent keeps of an attempt beside the runner's files: the assignment, written before anything is done,
//! and the report, written before it is said. Both outlive the agent, not the machine.

use std::fs;
use std::io;
use std::path::PathBuf;

use helix_agent_core::{Assignment, Report};
use helix_common::files::{Durability, write_atomic};
use helix_proto::agent;
use helix_runner::AttemptDir;
use prost::Message as _;

use crate::wire;

fn assignment_path(dir: &AttemptDir) -> PathBuf {
    dir.root().join("assignment")
}

fn report_path(dir: &AttemptDir) -> PathBuf {
    dir.root().join("report")
}

/// Writes what is to be run.
///
/// # Errors
/// Those of the file system.
pub fn write_assignment(dir: &AttemptDir, assignment: &Assignment) -> io::Result<()> {
    let bytes = wire::assignment_to_wire(assignment).encode_to_vec();
    write_atomic(&assignment_path(dir), &bytes, 0o600, Durability::Unsynced)
}

/// Reads what is to be run; `None` when the agent died before it was written.
///
/// # Errors
/// Those of the file system; `InvalidData` when it is damaged.
pub fn read_assignment(dir: &AttemptDir) -> io::Result<Option<Assignment>> {
    let Some(bytes) = read(&assignment_path(dir))? else { return Ok(None) };
    let decoded = agent::Assign::decode(bytes.as_slice()).map_err(invalid)?;
    wire::assignment_from_wire(decoded).map(Some).map_err(invalid)
}

/// Writes how it ended.
///
/// # Errors
/// Those of the file system.
pub fn write_report(dir: &AttemptDir, key: &helix_model::AttemptKey, report: &Report) -> io::Result<()> {
    let bytes = wire::report_to_wire(key, report).encode_to_vec();
    write_atomic(&report_path(dir), &bytes, 0o600, Durability::Unsynced)
}

/// Reads how it ended; `None` when no report was made.
///
/// # Errors
/// Those of the file system; `InvalidData` when it is damaged.
pub fn read_report(dir: &AttemptDir) -> io::Result<Option<Report>> {
    let Some(bytes) = read(&report_path(dir))? else { return Ok(None) };
    let decoded = agent::Finished::decode(bytes.as_slice()).map_err(invalid)?;
    wire::report_from_wire(decoded).map(Some).map_err(invalid)
}

fn read(path: &std::path::Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
