//! What a runner notes about its processes, so that after its death somebody can look for what it left.
//!
//! The file is text and only ever appended to: `runner PID TICKS BOOT`, then `command PID TICKS`. TICKS is the process's
//! start time since boot, which with the boot id tells a process from a later one under the same number.

use std::fs;
use std::io;

use crate::paths::AttemptDir;

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
pub struct PidFile {
    /// The kernel's boot id at the time.
    pub boot_id: String,
    /// The runner.
    pub runner: ProcessId,
    /// The command, once it was started. It leads a session and a process group of its own.
    pub command: Option<ProcessId>,
}

impl PidFile {
    /// Reads the notes; `None` when there are none or not a whole line of them.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(dir: &AttemptDir) -> io::Result<Option<Self>> {
        match fs::read_to_string(dir.pid()) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        // Only lines with their end count: a number that was cut off is another number.
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let (runner, boot_id) = process(lines.next()?.strip_prefix("runner ")?)?;
        let command = lines.next().and_then(|line| process(line.strip_prefix("command ")?));
        Some(Self { boot_id: boot_id.to_owned(), runner, command: command.map(|(id, _)| id) })
    }

    /// The line about the runner.
    #[must_use]
    pub fn runner_line(runner: ProcessId, boot_id: &str) -> String {
        format!("runner {} {} {boot_id}\n", runner.pid, runner.start_ticks)
    }

    /// The line about the command.
    #[must_use]
    pub fn command_line(command: ProcessId) -> String {
        format!("command {} {}\n", command.pid, command.start_ticks)
    }
}

fn process(text: &str) -> Option<(ProcessId, &str)> {
    let (pid, rest) = text.split_once(' ')?;
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

    #[test]
    fn whole_lines_read_back_and_cut_ones_do_not_count() {
        let runner = ProcessId { pid: 10, start_ticks: 77 };
        let command = ProcessId { pid: 11, start_ticks: 78 };
        let text = PidFile::runner_line(runner, "boot") + &PidFile::command_line(command);
        let whole = PidFile { boot_id: "boot".to_owned(), runner, command: Some(command) };
        assert_eq!(PidFile::parse(&text), Some(whole.clone()));
        assert_eq!(PidFile::parse(&text[..text.len() - 1]), Some(PidFile { command: None, ..whole }));
        assert_eq!(PidFile::parse("runner 10 7"), None);
    }
}
