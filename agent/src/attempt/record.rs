//! What the agent keeps in an attempt's journal beside what is between it and the runner: the assignment, written before
//! anything is done, and the report, written before it is said. Both outlive the agent, not the machine.

use std::io;

use helix_agent_core::{Assignment, Report};
use helix_model::Instance;
use helix_proto::agent;
use helix_runner::journal::{self, Journal, Kind};
use helix_runner::{AttemptDir, Order};
use prost::Message as _;

use crate::settings::LOG_BYTES_MAX_DEFAULT;
use crate::wire;

/// Writes what is to be run, and which life of the worker was given it.
///
/// # Errors
/// Those of the file system.
pub fn write_assignment(dir: &AttemptDir, assignment: &Assignment, instance: &Instance) -> io::Result<()> {
    let kept = agent::Assign { instance: instance.as_str().to_owned(), ..wire::assignment_to_wire(assignment) };
    journal::append(dir, Kind::Assignment, &kept.encode_to_vec())
}

/// Whether the assignment was given to another life of the worker than `instance`. The registry has ended it with that life,
/// so it must not begin any more.
///
/// # Errors
/// `InvalidData` when it cannot be read.
pub fn is_outlived(journal: &Journal, instance: &Instance) -> io::Result<bool> {
    let Some(bytes) = journal.last(Kind::Assignment) else { return Ok(false) };
    let kept = agent::Assign::decode(bytes).map_err(invalid)?;
    Ok(!kept.instance.is_empty() && kept.instance != instance.as_str())
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

/// How long the log may be where no coordinator has said so yet: as its order says, which an earlier agent wrote that knew. Of an
/// attempt without one the log is short.
pub fn log_bytes_max(dir: &AttemptDir) -> u64 {
    let order = Journal::read(dir).and_then(|journal| Order::of(&journal));
    order.map_or(LOG_BYTES_MAX_DEFAULT, |order| order.log_bytes_max)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use helix_model::BuildSpec;
    use helix_runner::{Privileges, limits::Limits};

    use super::*;

    #[test]
    fn how_long_a_log_may_be_is_told_by_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(dir.path());
        assert_eq!(log_bytes_max(&dir), LOG_BYTES_MAX_DEFAULT, "nobody said");
        let order = Order {
            argv: vec!["true".into()],
            environment: Vec::new(),
            workdir: "/w".into(),
            user: None,
            privileges: Privileges::NeverMore,
            cgroup: None,
            wall_ms: None,
            silence_ms: None,
            grace_ms: 0,
            leftover_ms: 0,
            log_bytes_max: 5 << 20,
            isolation: None,
            limits: Limits::default(),
            secrets: None,
        };
        order.write(&dir).unwrap();
        assert_eq!(log_bytes_max(&dir), 5 << 20);
        journal::append(&dir, Kind::Order, b"as nobody wrote it").unwrap();
        assert_eq!(log_bytes_max(&dir), LOG_BYTES_MAX_DEFAULT, "it cannot be read");
    }

    #[test]
    fn an_assignment_knows_which_life_it_was_given_to() {
        let dir = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(dir.path());
        let key = "b.0.1".parse().unwrap();
        let spec = BuildSpec { repo_url: "https://h/p".to_owned(), ..BuildSpec::default() };
        let given = Assignment { key, spec, commit: None, platform: None, previous: String::new() };
        let (before, now) = (Instance::new("d.boot1").unwrap(), Instance::new("d.boot2").unwrap());
        let outlived = |instance: &Instance| is_outlived(&Journal::read(&dir).unwrap(), instance).unwrap();
        assert!(!outlived(&now), "nothing was given");
        write_assignment(&dir, &given, &before).unwrap();
        assert!(!outlived(&before) && outlived(&now));
        assert_eq!(assignment(&Journal::read(&dir).unwrap()).unwrap(), Some(given.clone()));
        // As an older agent wrote it.
        journal::append(&dir, Kind::Assignment, &wire::assignment_to_wire(&given).encode_to_vec()).unwrap();
        assert!(!outlived(&now));
    }
}
