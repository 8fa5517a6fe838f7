//! What a runner notes about its processes, so that after its death somebody can look for what it left.
//!
//! Two records of the attempt's journal hold it as text: `PID TICKS BOOT` of the runner, and `PID TICKS` of the command.
//! TICKS is the process's start time since boot, which with the boot id tells a process from a later one under the
//! same number.

use std::fs;
use std::io;

use crate::journal::{Journal, JournalWriter, Kind};

/// A process, told from any other of this boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProcessId {
    /// The number, as this PID namespace has it.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_ticks: u64,
}

/// The notes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notes {
    /// The kernel's boot id at the time.
    pub boot_id: String,
    /// The runner.
    pub runner: ProcessId,
    /// The command, once it was started. It leads a session and a process group of its own.
    pub command: Option<ProcessId>,
}

impl Notes {
    /// Takes the notes out of a journal; `None` when no runner took the order.
    #[must_use]
    pub fn of(journal: &Journal) -> Option<Self> {
        let (runner, boot_id) = process(journal.last(Kind::Runner)?)?;
        let command = journal.last(Kind::Command).and_then(process).map(|(id, _)| id);
        Some(Self { boot_id: boot_id.to_owned(), runner, command })
    }

    /// Notes that this runner took the order.
    ///
    /// # Errors
    /// Those of the file system, or of `/proc`.
    pub fn write_runner(journal: &mut JournalWriter, runner: ProcessId) -> io::Result<()> {
        journal.append(Kind::Runner, format!("{} {} {}", runner.pid, runner.start_ticks, boot_id()?).as_bytes())
    }

    /// Notes the command.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_command(journal: &mut JournalWriter, command: ProcessId) -> io::Result<()> {
        journal.append(Kind::Command, format!("{} {}", command.pid, command.start_ticks).as_bytes())
    }
}

fn process(text: &[u8]) -> Option<(ProcessId, &str)> {
    let (pid, rest) = std::str::from_utf8(text).ok()?.split_once(' ')?;
    let (ticks, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    Some((ProcessId { pid: pid.parse().ok()?, start_ticks: ticks.parse().ok()? }, rest))
}

/// The kernel's id of this boot.
///
/// # Errors
/// Without `/proc`.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::AttemptDir;

    #[test]
    fn read_back() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = AttemptDir::new(temporary.path());
        let notes = || Notes::of(&Journal::read(&dir).unwrap());
        assert_eq!(notes(), None);
        let runner = ProcessId { pid: 10, start_ticks: 77 };
        let command = ProcessId { pid: 11, start_ticks: 78 };
        let (mut journal, _) = JournalWriter::open(&dir).unwrap();
        Notes::write_runner(&mut journal, runner).unwrap();
        let expected = Notes { boot_id: boot_id().unwrap(), runner, command: None };
        assert_eq!(notes(), Some(expected.clone()));
        Notes::write_command(&mut journal, command).unwrap();
        assert_eq!(notes(), Some(Notes { command: Some(command), ..expected }));
    }
}
