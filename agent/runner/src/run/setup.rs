//! Turning a process that was just started or forked into a runner.

#![allow(unsafe_code)] // prctl, close_range, sigprocmask and signalfd exist in libc only.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

/// Its own session, adopter of all orphans below it, opaque to processes of the same user, and no descriptor from
/// whoever started it but 0, 1 and 2.
pub(crate) fn own_process() -> io::Result<()> {
    // Fails only for a group leader, which then leads no shell's job that could take us along.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_bits_retain(0o077));
    // SAFETY: plain calls with integers; closing descriptors is sound, since this program has opened none yet that a
    // value still owns (the forker's socket is forgotten, and is descriptor 0 besides).
    unsafe {
        check(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
        // A build under the same user could else read our memory and descriptors, or trace us.
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0))?;
        check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) as libc::c_int)?;
    }
    Ok(())
}

/// The connection that is standard input, which is nothing from now on.
pub(crate) fn connection_from_input() -> io::Result<UnixStream> {
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: descriptor 0 is open and owned by no value; the copy is new.
    let copy = unsafe { OwnedFd::from_raw_fd(check(libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3))?) };
    // SAFETY: as above.
    check(unsafe { libc::dup2(null.as_raw_fd(), 0) })?;
    Ok(UnixStream::from(copy))
}

/// Signals as a descriptor: SIGCHLD, and SIGTERM, which a host sends to all when it goes down.
pub(crate) fn signal_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; the new descriptor is owned by nobody else.
    unsafe {
        for ignored in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGPIPE] {
            libc::signal(ignored, libc::SIG_IGN);
        }
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()))?;
        let descriptor = check(libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

/// Takes waiting signals; true when SIGTERM was among them.
pub(crate) fn take_signals(descriptor: &OwnedFd) -> bool {
    const RECORD_BYTES: usize = size_of::<libc::signalfd_siginfo>();
    let mut buffer = [0_u8; RECORD_BYTES * 8];
    let mut terminated = false;
    while let Ok(count) = rustix::io::read(descriptor, &mut buffer) {
        // The signal's number is the record's first field.
        for record in buffer[..count].chunks_exact(RECORD_BYTES) {
            terminated |= record[..4] == libc::SIGTERM.to_ne_bytes();
        }
        if count < buffer.len() {
            break;
        }
    }
    terminated
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
