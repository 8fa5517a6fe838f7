//! Looking at processes and signalling them without hitting a stranger that got a dead one's number.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use rustix::process::{Pid, PidfdFlags, Signal};

use crate::pids::ProcessId;

/// A process as `/proc` showed it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process {
    /// Which.
    pub id: ProcessId,
    /// Its parent's pid.
    pub parent: u32,
    /// Its session's leader's pid.
    pub session: u32,
    /// Whether it is dead and only waits for its parent to look.
    pub zombie: bool,
    /// Whether it stands still, because of a signal or of a tracer.
    pub stopped: bool,
}

impl Process {
    /// Reads one process; `None` when there is none under this number.
    #[must_use]
    pub fn read(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in parentheses and may hold anything, parentheses and spaces included.
        let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
        let text = std::str::from_utf8(stat.get(after_name..)?).ok()?;
        let mut fields = text.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start_ticks = fields.nth(15)?.parse().ok()?;
        let id = ProcessId { pid, start_ticks };
        Some(Self { id, parent, session, zombie: matches!(state, "Z" | "X"), stopped: matches!(state, "T" | "t") })
    }

    /// All processes that can be seen, in no order. Not one moment's picture: processes come and go meanwhile.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn all() -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok());
            found.extend(pid.and_then(Self::read));
        }
        Ok(found)
    }

    /// The live descendants of a process.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn descendants(of: u32) -> io::Result<Vec<Self>> {
        let all = Self::all()?;
        let Some(top) = all.iter().find(|process| process.id.pid == of) else { return Ok(Vec::new()) };
        let mut found = with_descendants(&all, vec![*top]);
        found.retain(|process| process.id.pid != of && !process.zombie);
        Ok(found)
    }
}

/// Processes and all that descend from them. A child counts only if its parent is still who it was in the picture: where numbers
/// are used up quickly, a dead parent's may be a stranger's by the time its supposed child was looked at. A child that is left
/// out for that has another parent by now, and is found by the next look.
#[must_use]
pub fn with_descendants(all: &[Process], mut inside: Vec<Process>) -> Vec<Process> {
    let mut numbers: BTreeSet<u32> = inside.iter().map(|process| process.id.pid).collect();
    let mut at = 0;
    while at < inside.len() {
        let parent = inside[at].id;
        at += 1;
        let mut children = all.iter().filter(|process| process.parent == parent.pid).peekable();
        if children.peek().is_none() || Process::read(parent.pid).is_none_or(|now| now.id != parent) {
            continue;
        }
        inside.extend(children.filter(|child| numbers.insert(child.id.pid)));
    }
    inside
}

/// Whether a process descends from another. One that is gone counts as a descendant: nothing good is known of it.
#[must_use]
pub fn descends(pid: u32, from: u32) -> bool {
    let mut at = pid;
    // Bounded: parents may change while we walk.
    for _ in 0..4096 {
        match Process::read(at) {
            None => return true,
            Some(_) if at == from => return true,
            Some(process) if process.parent == 0 || at == 1 => return false,
            Some(process) => at = process.parent,
        }
    }
    true
}

/// Sends a signal to exactly this process; one that is gone is fine.
///
/// # Errors
/// When the system does not allow it.
pub fn signal(id: ProcessId, signal: Signal) -> io::Result<()> {
    let Some(pid) = i32::try_from(id.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let gone = |error: rustix::io::Errno| if error == rustix::io::Errno::SRCH { Ok(()) } else { Err(error.into()) };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => return gone(error),
    };
    // The descriptor holds whoever has the number now; the start time tells whether that is who was meant.
    if Process::read(id.pid).is_none_or(|now| now.id != id) {
        return Ok(());
    }
    rustix::process::pidfd_send_signal(&pidfd, signal).or_else(gone)
}

/// Kills whatever `find` finds, as one: everybody is stopped first, until nobody new turns up, so that nobody can fork
/// away while others die. Returns how many were found. Who cannot be signalled is left out.
///
/// # Errors
/// Those of `find`.
pub fn kill_all(mut find: impl FnMut() -> io::Result<Vec<Process>>) -> io::Result<u32> {
    let mut stopped: BTreeSet<(u32, u64)> = BTreeSet::new();
    // Bounded: a fork storm that wins a round loses the next call's.
    for _ in 0..100 {
        let before = stopped.len();
        for process in find()?.iter().filter(|process| !process.zombie) {
            if stopped.insert((process.id.pid, process.id.start_ticks)) {
                let _ = signal(process.id, Signal::STOP);
            }
        }
        if stopped.len() == before {
            break;
        }
    }
    for &(pid, start_ticks) in &stopped {
        let _ = signal(ProcessId { pid, start_ticks }, Signal::KILL);
    }
    Ok(u32::try_from(stopped.len()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_this_process_under_its_parent() {
        let own = Process::read(std::process::id()).unwrap();
        let parent = u32::try_from(rustix::process::getppid().unwrap().as_raw_nonzero().get()).unwrap();
        assert_eq!(own.parent, parent);
        assert!(!own.zombie);
        assert!(descends(own.id.pid, parent));
        assert!(!descends(parent, own.id.pid));
        assert!(Process::descendants(parent).unwrap().iter().any(|process| process.id == own.id));
    }

    #[test]
    fn a_reused_number_is_not_signalled() {
        let own = Process::read(std::process::id()).unwrap().id;
        let earlier = ProcessId { start_ticks: own.start_ticks.wrapping_sub(1), ..own };
        signal(earlier, Signal::KILL).unwrap();
    }
}
