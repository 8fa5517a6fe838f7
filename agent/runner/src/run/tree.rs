//! Everything that the command started: reaping it, killing it, and knowing that nothing of it is left.
//!
//! This process is the subreaper, so whoever loses its parent becomes our child, and "no child" (ECHILD) means no
//! descendant. A cgroup must say so too, where there is one.

#![allow(unsafe_code)] // waitpid with __WALL: libc only.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use helix_runner::cgroup::{Cgroup, Groups};
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
    /// Those that limit it.
    groups: Groups,
    childless: bool,
    rounds: u32,
    init: Option<Init>,
}

/// The first process of the command's PID namespace: it outlives all others in there, and none outlives it.
#[derive(Debug)]
struct Init {
    pid: u32,
    /// Where it tells how the command ended, until it has.
    status: Option<OwnedFd>,
}

impl Init {
    /// How the command ended, once.
    fn told(&mut self) -> Option<End> {
        let mut status = [0; size_of::<libc::c_int>()];
        // Few bytes are written as one.
        let read = rustix::io::read(self.status.as_ref()?, &mut status).ok()?;
        // Nothing more comes; and the end of a pipe would wake us without a pause for as long as the init takes to die.
        self.status = None;
        (read == status.len()).then(|| end_of(libc::c_int::from_ne_bytes(status)))
    }
}

impl Tree {
    pub(crate) fn new(cgroup: Option<Cgroup>, groups: Groups) -> Self {
        Self { cgroup, groups, childless: false, rounds: 0, init: None }
    }

    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    pub(crate) fn groups(&self) -> &Groups {
        &self.groups
    }

    /// What was started is the init of namespaces, and tells there how the command ended.
    pub(crate) fn set_init(&mut self, pid: u32, status: OwnedFd) {
        self.init = Some(Init { pid, status: Some(status) });
    }

    /// What can be waited for besides deaths.
    pub(crate) fn status(&self) -> Option<&OwnedFd> {
        self.init.as_ref().and_then(|init| init.status.as_ref())
    }

    /// Takes everybody who is dead. Gives the command's end if it was among them, or if the init told it.
    pub(crate) fn reap(&mut self, command: Option<u32>) -> Option<End> {
        let mut end = None;
        let mut init_died = false;
        loop {
            let mut status = 0;
            // __WALL: a process cloned with another exit signal than SIGCHLD would else be left out, even of ECHILD.
            // SAFETY: the status outlives the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
            if pid <= 0 {
                self.childless = pid == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD);
                break;
            }
            let pid = Some(pid.cast_unsigned());
            if pid == command {
                end = Some(end_of(status));
            }
            init_died |= pid == self.init.as_ref().map(|init| init.pid);
        }
        // Asked after the reaping: an init that is dead has said what it ever will, and its word goes before its own end.
        let told = self.init.as_mut().and_then(Init::told);
        if init_died {
            self.init = None;
        }
        told.or(end)
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
        if let Some(init) = &self.init
            && let Some(pid) = rustix::process::Pid::from_raw(init.pid.cast_signed())
        {
            // Everybody in there dies with it, at once, forks in flight included. The number is its own until it is reaped.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            if self.rounds <= CGROUP_ROUNDS {
                return None;
            }
        }
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
        let inits = usize::from(self.init.is_some());
        u32::try_from(self.descendants().len().saturating_sub(inits)).unwrap_or(u32::MAX)
    }

    fn descendants(&self) -> Vec<Process> {
        Process::descendants(std::process::id()).unwrap_or_default()
    }

    /// Removes the cgroups, once everybody is gone. Says whether memory ran out in them.
    pub(crate) fn remove(self) -> MemoryKill {
        let kills = self.groups.memory_kills() + self.cgroup.as_ref().map_or(0, Cgroup::memory_kills);
        for _ in 0..REMOVE_TRIES {
            // The kernel may take a moment to let go of the last process. One that stays is empty, and the agent puts it away.
            if self.groups.remove().is_ok() && self.cgroup.as_ref().is_none_or(|cgroup| cgroup.remove().is_ok()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn told(said: Option<&[u8]>) -> (Option<End>, bool) {
        let (status, theirs) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut init = Init { pid: 1, status: Some(status) };
        assert_eq!(init.told(), None);
        assert!(init.status.is_some(), "it goes on being waited for");
        if let Some(said) = said {
            rustix::io::write(&theirs, said).unwrap();
        }
        drop(theirs);
        (init.told(), init.status.is_some())
    }

    #[test]
    fn an_init_that_has_told_all_it_will_is_not_waited_for_at_its_pipe() {
        assert_eq!(told(Some(&(7_i32 << 8).to_ne_bytes())), (Some(End::Exited(7)), false));
        assert_eq!(told(None), (None, false));
    }
}
