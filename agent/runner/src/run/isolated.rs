//! A command in namespaces of its own, made by the runner itself.
//!
//! Two processes: the *init*, first of a new PID namespace, which makes what the command sees and then does nothing but
//! reap; and the command, which gets a user namespace besides, in which it is nobody but itself. What follows from that:
//!
//! - Nothing can leave a PID namespace, and the kernel ends its init only after everybody else in it. So the init's death,
//!   seen by the runner or by a sweep, is the proof that no process of the attempt is left.
//! - The init dies with its runner. It begins only when the runner has noted who it is, so that a runner that dies earlier
//!   has started nothing.
//! - The command has no power over what the init made: mounts and host name belong to another user namespace than its own.

#![allow(unsafe_code)] // clone, waitpid, prctl, ioctl and credentials: libc only.

mod bubblewrap;
mod powers;
mod seccomp;
mod view;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use helix_runner::isolation::{HOST_NAME_INSIDE, Isolation, Network, Tool, USER_INSIDE};
use helix_runner::{Order, User};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{getegid, geteuid};

use super::command::{Image, report, reset_signals, set_descriptors, set_limits};
use super::fork::{Forked, fork};

pub(super) use bubblewrap::{Bubblewrap, prepare as prepare_bubblewrap};
use view::Failed;

/// What the kernel is asked to make with the init; 0 where the runner makes no namespaces.
pub(super) fn clone_flags(order: &Order) -> libc::c_int {
    let Some(Isolation { tool: Tool::Namespaces, network, .. }) = &order.isolation else { return 0 };
    let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if *network == Network::None {
        flags |= libc::CLONE_NEWNET;
    }
    // Who is root needs no user namespace to make the others in, and they are then beyond the reach of anybody less.
    if order.user.is_none() {
        flags |= libc::CLONE_NEWUSER;
    }
    flags
}

/// The pipes between runner and init: one holds the init back, the other tells how the command ended.
pub(super) struct Hold {
    /// Who the runner is, which nobody can ask in a new user namespace.
    runner: User,
    go: (OwnedFd, OwnedFd),
    status: (OwnedFd, OwnedFd),
}

impl Hold {
    pub(super) fn new() -> io::Result<Self> {
        let runner = User { uid: geteuid().as_raw(), gid: getegid().as_raw() };
        Ok(Self { runner, go: pipe_with(PipeFlags::CLOEXEC)?, status: pipe_with(PipeFlags::CLOEXEC)? })
    }

    /// The runner's part: lets the init begin. Gives where the command's end will be told.
    pub(super) fn release(self) -> io::Result<OwnedFd> {
        drop(self.status.1);
        // An init that died already is noticed by whoever waits for its report.
        let _ = rustix::io::write(&self.go.1, b"!");
        rustix::io::ioctl_fionbio(&self.status.0, true)?;
        Ok(self.status.0)
    }

    /// The init's part: waits for the runner. Gives where to tell the command's end; `None` when the runner is gone.
    fn wait(self) -> Option<OwnedFd> {
        drop((self.go.1, self.status.0));
        let begun = rustix::io::retry_on_intr(|| rustix::io::read(&self.go.0, &mut [0; 1]));
        (begun == Ok(1)).then_some(self.status.1)
    }
}

/// What both processes need.
pub(super) struct Plan<'a> {
    pub(super) order: &'a Order,
    pub(super) image: &'a Image,
    /// The files by which it enters its cgroups.
    pub(super) cgroups: &'a [PathBuf],
    /// The command's descriptors 0, 1 and 2.
    pub(super) outputs: [BorrowedFd<'a>; 3],
    /// Where a process that fails says so.
    pub(super) failure: BorrowedFd<'a>,
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn step(what: &str, result: io::Result<()>) -> Result<(), Failed> {
    result.map_err(|error| (what.to_owned(), error))
}

/// The init's life. Ends the process, or returns what it could not do before there was a command.
pub(super) fn be_init(plan: Plan<'_>, hold: Hold) -> (String, io::Error) {
    let Err(failed) = init(plan, hold);
    failed
}

fn init(plan: Plan<'_>, hold: Hold) -> Result<std::convert::Infallible, Failed> {
    let Some(isolation) = &plan.order.isolation else {
        return Err(("cannot isolate".to_owned(), io::ErrorKind::InvalidInput.into()));
    };
    // SAFETY: plain calls with integers. Dumpable while our own files in /proc have to be ours to write.
    unsafe {
        step("cannot be bound to the runner", done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)))?;
        step("cannot be seen", done(libc::prctl(libc::PR_SET_DUMPABLE, 1)))?;
    }
    let runner = hold.runner;
    let Some(status) = hold.wait() else {
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(0) }
    };
    step("cannot leave the runner's session", rustix::process::setsid().map(drop).map_err(io::Error::from))?;
    step("cannot enter the cgroup", plan.cgroups.iter().try_for_each(|procs| fs::write(procs, "0")))?;
    rustix::process::umask(rustix::fs::Mode::from_bits_retain(0o022));
    match plan.order.user {
        // SAFETY: an empty list.
        Some(_) => step("cannot leave groups", done(unsafe { libc::setgroups(0, std::ptr::null()) }))?,
        None => step("cannot map users", map_own_user(runner))?,
    }
    step("cannot set the host's name", rustix::system::sethostname(HOST_NAME_INSIDE.as_bytes()).map_err(Into::into))?;
    if isolation.network == Network::None {
        step("cannot raise the loopback interface", raise_loopback())?;
    }
    view::build(isolation, plan.order.variable("HOME").unwrap_or_default())?;
    let command = start_command(plan, isolation)?;
    // SAFETY: a plain call with integers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    // Best effort: nobody in here can make it do anything.
    let _ = powers::drop_capabilities();
    reap(command, &status)
}

/// In a user namespace where nobody is mapped yet: this process becomes the one user that a build believes to be.
fn map_own_user(outside: User) -> io::Result<()> {
    // Without it the kernel lets nobody map a group.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{} {} 1", USER_INSIDE.uid, outside.uid))?;
    fs::write("/proc/self/gid_map", format!("{} {} 1", USER_INSIDE.gid, outside.gid))
}

fn raise_loopback() -> io::Result<()> {
    // SAFETY: the descriptor is closed below; the request is all zeros but for name and flags, and outlives the calls.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        done(socket)?;
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        let raised = done(libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request));
        libc::close(socket);
        raised
    }
}

/// Forks the command into a user namespace with one user in it. While the kernel lets go of the host's root it comes to be,
/// and waits.
fn start_command(plan: Plan<'_>, isolation: &Isolation) -> Result<libc::pid_t, Failed> {
    let program = seccomp::program().map_err(|error| ("cannot refuse system calls".to_owned(), error))?;
    let (mapped, mapped_ours) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| ("cannot make pipes".to_owned(), error.into()))?;
    // SAFETY: this process has one thread.
    let forked = unsafe { fork(libc::CLONE_NEWUSER, None) };
    let pid = match forked.map_err(|error| ("cannot make a user namespace".to_owned(), error))? {
        Forked::Child { .. } => {
            drop(mapped_ours);
            let (what, error) = become_command(&plan, isolation, &mapped, &program);
            report(plan.failure, &what, &error);
            // SAFETY: ends this child at once.
            unsafe { libc::_exit(127) }
        }
        Forked::Parent { child } => child,
    };
    view::let_go()?;
    let outside = plan.order.user.unwrap_or(USER_INSIDE);
    step("cannot map the build's user", map_user(pid, outside))?;
    step("cannot start the command", rustix::io::write(&mapped_ours, b"!").map(drop).map_err(Into::into))?;
    Ok(pid)
}

fn map_user(pid: libc::pid_t, outside: User) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/uid_map"), format!("{} {} 1", USER_INSIDE.uid, outside.uid))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("{} {} 1", USER_INSIDE.gid, outside.gid))
}

/// Runs in the child. Returns what could not be done.
fn become_command(
    plan: &Plan<'_>,
    isolation: &Isolation,
    mapped: &OwnedFd,
    program: &[seccomp::Instruction],
) -> (String, io::Error) {
    let order = plan.order;
    let argument = order.argv.first().map(|program| program.display().to_string()).unwrap_or_default();
    let wait = || match rustix::io::retry_on_intr(|| rustix::io::read(mapped, &mut [0; 1])) {
        Ok(1) => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    };
    // Order matters: the user before descriptors and directory, which are entered with its own rights; system calls last,
    // because all of this needs them.
    let steps: [(&str, &dyn Fn() -> io::Result<()>); 9] = [
        ("cannot leave the init's session", &|| Ok(rustix::process::setsid().map(drop)?)),
        ("cannot wait for the init", &wait),
        ("cannot set limits", &|| set_limits(order)),
        ("cannot take the build's user", &take_user),
        ("cannot set up descriptors", &|| set_descriptors(plan.outputs)),
        ("cannot enter the working directory", &|| std::env::set_current_dir(&order.workdir)),
        ("cannot gain no more", &|| Ok(rustix::thread::set_no_new_privs(true)?)),
        ("cannot drop capabilities", &powers::drop_capabilities),
        ("cannot leave the host's sockets", &|| match isolation.network {
            Network::Host => powers::leave_abstract_sockets(),
            Network::None => Ok(()),
        }),
    ];
    for (what, step) in steps {
        if let Err(error) = step() {
            return (what.to_owned(), error);
        }
    }
    reset_signals();
    if let Err(error) = powers::refuse_calls(program) {
        return ("cannot refuse system calls".to_owned(), error);
    }
    (format!("cannot start {argument}"), plan.image.exec())
}

fn take_user() -> io::Result<()> {
    let (uid, gid) = (USER_INSIDE.uid, USER_INSIDE.gid);
    // SAFETY: plain calls with integers.
    unsafe {
        done(libc::setresgid(gid, gid, gid))?;
        done(libc::setresuid(uid, uid, uid))
    }
}

/// Reaps whoever dies, tells of the command's end, and ends when nobody is left. The kernel lets nobody in here kill us.
fn reap(command: libc::pid_t, status: &OwnedFd) -> ! {
    // Nothing of the runner's but the one pipe.
    // SAFETY: integers only; what else these descriptors belonged to is never used again in this process.
    unsafe {
        libc::dup2(status.as_raw_fd(), 0);
        libc::close_range(1, libc::c_uint::MAX, 0);
    }
    loop {
        let mut end = 0;
        // SAFETY: the status outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut end, libc::__WALL) };
        if pid == command {
            let bytes = end.to_ne_bytes();
            // SAFETY: writes four bytes that exist, at once, since a pipe takes as many. A runner that is gone takes us along.
            unsafe { libc::write(0, bytes.as_ptr().cast(), bytes.len()) };
        } else if pid == -1 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
    }
}
