//! Everything that the command started: reaping it, killing it, and knowing that nothing of it is left.
//!
//! This process is the subreaper, so whoever loses its parent becomes our child, and "no child" (ECHILD) means no
//! descendant. A cgroup must say so too, where there is one.

#![allow(unsafe_code)] // waitpid with __WALL: libc only.

use std::io;
use std::time::Duration;

use helix_runner::cgroup::Cgroup;
use helix_runner::processes::{Process, kill_all, signal};
use helix_runner::{End, MemoryKill};
use rustix::process::Signal;

/// After so many rounds of killing a cgroup the process tree is searched as well: a build with root's rights can
/// leave its cgroup.
const CGROUP_ROUNDS: u32 = 3;

/// How often a round of killing looks at the list of children again.
const HUNT_TRIES: u32 = 500;

/// How often removing the cgroup is tried, a millisecond apart.
const REMOVE_TRIES: u32 = 100;

/// The command's descendants.
#[derive(Debug)]
pub(crate) struct Tree {
    cgroup: Option<Cgroup>,
    childless: bool,
    rounds: u32,
}

impl Tree {
    pub(crate) fn new(cgroup: Option<Cgroup>) -> Self {
        Self { cgroup, childless: false, rounds: 0 }
    }

    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Takes everybody who is dead. Gives the command's end if it was among them.
    pub(crate) fn reap(&mut self, command: Option<u32>) -> Option<End> {
        let mut end = None;
        loop {
            let mut status = 0;
            // __WALL: a process cloned with another exit signal than SIGCHLD would else be left out, even of ECHILD.
            // SAFETY: the status outlives the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
            match pid {
                -1 => {
                    self.childless = io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD);
                    return end;
                }
                0 => {
                    self.childless = false;
                    return end;
                }
                pid if Some(pid.cast_unsigned()) == command => end = Some(end_of(status)),
                _ => {}
            }
        }
    }

    /// Whether no descendant is left, as [`Self::reap`] last saw it.
    pub(crate) fn is_gone(&self) -> bool {
        // A cgroup that cannot be read was removed by a build with root's rights: then the tree alone counts.
        self.childless && !self.cgroup.as_ref().is_some_and(|cgroup| cgroup.populated().unwrap_or(false))
    }

    /// Whether only the cgroup's word is missing. It comes a moment after the last process was reaped, or not at all when
    /// somebody else moved in.
    pub(crate) fn is_childless(&self) -> bool {
        self.childless
    }

    /// Asks everybody to end. The stopped ones are woken, or they could not.
    pub(crate) fn terminate(&self) {
        for process in self.descendants() {
            let _ = signal(process.id, Signal::TERM);
            let _ = signal(process.id, Signal::CONT);
        }
    }

    /// One round of killing; go on until [`Self::is_gone`].
    ///
    /// Gives the command's end like [`Self::reap`].
    pub(crate) fn kill(&mut self, command: Option<u32>) -> Option<End> {
        self.rounds = self.rounds.saturating_add(1);
        let killed = self.cgroup.as_ref().is_some_and(|cgroup| cgroup.kill().is_ok());
        if killed && self.rounds <= CGROUP_ROUNDS {
            return None;
        }
        // Against the many: stop all, then kill. Against the quick, who fork and exit before a walk through all of
        // `/proc` is done: whoever forked them is dead, so they are our own children, and those are found in microseconds.
        let _ = kill_all(|| Process::descendants(std::process::id()));
        let mut end = None;
        for _ in 0..HUNT_TRIES {
            let children = own_children();
            for pid in &children {
                // Nobody but us can reap our child, so the number cannot be another's.
                let _ = rustix::process::kill_process(*pid, Signal::KILL);
            }
            end = end.or(self.reap(command));
            if children.is_empty() {
                break;
            }
        }
        end
    }

    /// How many are alive.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.descendants().len()).unwrap_or(u32::MAX)
    }

    fn descendants(&self) -> Vec<Process> {
        Process::descendants(std::process::id()).unwrap_or_default()
    }

    /// Removes the cgroup, once everybody is gone. Says whether memory ran out in it.
    pub(crate) fn remove(self) -> MemoryKill {
        let Some(cgroup) = self.cgroup else { return MemoryKill::NotSeen };
        let kills = cgroup.memory_kills().unwrap_or(0);
        for _ in 0..REMOVE_TRIES {
            // The kernel may take a moment to let go of the last process. One that stays is empty, and harmless.
            if cgroup.remove().is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if kills > 0 { MemoryKill::Counted } else { MemoryKill::NotSeen }
    }
}

/// Our children, dead ones included. None where the kernel keeps no such list.
fn own_children() -> Vec<rustix::process::Pid> {
    let list = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    let pids = list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter_map(rustix::process::Pid::from_raw).collect()
}

fn end_of(status: libc::c_int) -> End {
    if libc::WIFSIGNALED(status) {
        End::Signaled(libc::WTERMSIG(status))
    } else {
        End::Exited(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
    }
}
