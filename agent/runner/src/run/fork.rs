//! Forking, with what only the kernel's own call can do: being born in a cgroup, and in new namespaces.

#![allow(unsafe_code)] // clone3 and clone: libc only.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// `clone3`'s flag of that name (Linux 5.7); libc's constant overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What a fork returns, twice.
pub(super) enum Forked {
    /// In the new process; whether it was born in the cgroup.
    Child { placed: bool },
    /// In the old one.
    Parent { child: libc::pid_t },
}

/// Forks into new namespaces, as `clone`'s flags name them, and into a cgroup. A process that moves to a cgroup by itself
/// waits for every processor of the host to pass a point of rest, about ten milliseconds during which nobody can fork; one
/// that is born there waits for nothing.
///
/// # Safety
/// For a process of one thread: only such a one is copied whole, and its copy may do anything.
pub(super) unsafe fn fork(namespaces: libc::c_int, cgroup: Option<&File>) -> io::Result<Forked> {
    if let Some(cgroup) = cgroup {
        // SAFETY: all zeros is a valid value: no flags and no pointers.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.flags = CLONE_INTO_CGROUP | u64::from(namespaces.cast_unsigned());
        arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
        // SAFETY: as below; neither memory nor descriptors are shared with the child.
        match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) } {
            // An older kernel, or one that wants to be asked differently: the child moves.
            -1 => {}
            0 => return Ok(Forked::Child { placed: true }),
            child => return Ok(Forked::Parent { child: child as libc::pid_t }),
        }
    }
    let none = 0_usize;
    let flags = (namespaces | libc::SIGCHLD) as usize;
    // SAFETY: without a stack of its own the child goes on with a copy of ours. The order of the other arguments differs
    // between architectures, and all are none.
    match unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child { placed: false }),
        child => Ok(Forked::Parent { child: child as libc::pid_t }),
    }
}
