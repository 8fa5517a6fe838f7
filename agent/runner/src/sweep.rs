//! Killing what a dead runner left.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use crate::cgroup::{Cgroup, Groups};
use crate::inspect::{AttemptState, inspect};
use crate::isolation::{Isolation, Tool};
use crate::journal::Journal;
use crate::order::Order;
use crate::paths::AttemptDir;
use crate::pids::{Notes, ProcessId, boot_id};
use crate::processes::{Process, kill_all, signal, with_descendants};
use rustix::process::Signal;

/// The variables that, together, name an attempt in its processes' environments.
const MARKS: [&str; 2] = ["HELIX_BUILD_ID", "HELIX_ATTEMPT"];

/// What a sweep can say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sweep {
    /// No process of the attempt is left: its cgroups are empty, or the init of its PID namespace is dead, or the host was
    /// started anew since.
    Proven {
        /// How many were found and killed one by one; the cgroup's kill does not count.
        killed: u32,
    },
    /// All that could be recognised is gone, but one that hid would not have been.
    Unproven {
        /// How many were found and killed.
        killed: u32,
    },
}

/// Kills what the runner of this attempt left behind, however it can be recognised: by its cgroups, the command's session,
/// the attempt's variables in the environment, a current directory in the workdir, or descent from one of these.
/// Waits until none is seen, `patience` at most.
///
/// # Errors
/// `WouldBlock` when a runner lives; `TimedOut` when something does not die; else those of the system.
pub fn sweep(dir: &AttemptDir, patience: Duration) -> io::Result<Sweep> {
    if let AttemptState::Running { pid } = inspect(dir)? {
        return Err(io::Error::new(io::ErrorKind::WouldBlock, format!("runner {pid} lives")));
    }
    let journal = Journal::read(dir)?;
    let notes = Notes::of(&journal);
    if let Some(notes) = &notes
        && notes.boot_id != boot_id()?
    {
        // Before the order is looked at: what ended the boot may have damaged it.
        return Ok(Sweep::Proven { killed: 0 });
    }
    let order = Order::of(&journal)?;
    let namespace = Namespace::of(&order, notes.as_ref());
    let cgroup = order.cgroup.as_deref().and_then(Cgroup::existing);
    let groups = Groups::existing(&order.limits.groups);
    let deadline = Instant::now() + patience;
    let mut killed = 0;
    loop {
        if let Some(cgroup) = &cgroup {
            cgroup.kill()?;
        }
        namespace.kill()?;
        let found = kill_all(|| {
            let mut found = recognised(&order, notes.as_ref())?;
            found.extend(groups.members()?);
            Ok(found)
        })?;
        killed += found;
        let populated = cgroup.as_ref().map_or(Ok(false), Cgroup::populated)?;
        if found == 0 && !populated && namespace.is_gone() {
            break;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "a process of the attempt does not die"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let proven = cgroup.is_some() || !groups.is_empty() || namespace != Namespace::None;
    groups.remove()?;
    if let Some(cgroup) = cgroup {
        cgroup.remove()?;
    }
    Ok(if proven { Sweep::Proven { killed } } else { Sweep::Unproven { killed } })
}

/// The PID namespace of an isolated command: the kernel lets its init be gone only after everybody else in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Namespace {
    /// The command had none of its own, or its init is not ours to know.
    None,
    /// The init was never noted, and before it is it begins nothing.
    NotBegun,
    /// Its init.
    Begun(ProcessId),
}

impl Namespace {
    fn of(order: &Order, notes: Option<&Notes>) -> Self {
        match (&order.isolation, notes.and_then(|notes| notes.command)) {
            (Some(Isolation { tool: Tool::Namespaces, .. }), Some(init)) => Self::Begun(init),
            (Some(Isolation { tool: Tool::Namespaces, .. }), None) => Self::NotBegun,
            (None | Some(_), _) => Self::None,
        }
    }

    fn kill(self) -> io::Result<()> {
        match self {
            Self::Begun(init) => signal(init, Signal::KILL),
            Self::None | Self::NotBegun => Ok(()),
        }
    }

    fn is_gone(self) -> bool {
        match self {
            // A zombie has seen the others go.
            Self::Begun(init) => Process::read(init.pid).is_none_or(|now| now.id != init || now.zombie),
            Self::None | Self::NotBegun => true,
        }
    }
}

/// The live processes that show a sign of the attempt, and their descendants.
fn recognised(order: &Order, notes: Option<&Notes>) -> io::Result<Vec<Process>> {
    let all = Process::all()?;
    let own = std::process::id();
    let marked = all.iter().filter(|process| is_marked(process, order, notes)).copied().collect();
    let mut inside = with_descendants(&all, marked);
    inside.retain(|process| !process.zombie && process.id.pid != own);
    Ok(inside)
}

fn is_marked(process: &Process, order: &Order, notes: Option<&Notes>) -> bool {
    if process.id.pid == std::process::id() || process.id.pid == 1 {
        return false;
    }
    let in_session = notes.and_then(|notes| notes.command).is_some_and(|command| {
        // The number stays taken as long as the session has members; only a live leader can show that it is another's.
        let by_number = process.session == command.pid;
        by_number && Process::read(command.pid).is_none_or(|leader| leader.id == command)
    });
    let of = |name: &str| format!("/proc/{}/{name}", process.id.pid);
    let in_workdir = || fs::read_link(of("cwd")).is_ok_and(|cwd| order.owns_path(&cwd));
    let has_marks = || {
        let environment = fs::read(of("environ")).unwrap_or_default();
        MARKS.iter().all(|name| {
            let Some(value) = order.variable(name) else { return false };
            let wanted = [name.as_bytes(), b"=", value.as_bytes()].concat();
            environment.split(|byte| *byte == 0).any(|entry| OsStr::from_bytes(entry) == OsStr::from_bytes(&wanted))
        })
    };
    in_session || in_workdir() || has_marks()
}
