//! The lock that says "this runner lives": a POSIX record lock, because the kernel drops it with the process, children
//! do not inherit it, and anyone may ask who holds it without taking it.
//!
//! Invariant for the runner: the file is opened once and never closed. Closing any descriptor of it unlocks.

#![allow(unsafe_code)] // fcntl's lock calls take a struct by pointer; rustix has no F_GETLK.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Takes the lock for the life of this process. False when another process has it.
///
/// # Errors
/// Those of the system.
pub fn take(file: &File) -> io::Result<bool> {
    let lock = whole_file();
    // SAFETY: the descriptor is open and the struct is complete and outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// The process that holds the lock.
///
/// # Errors
/// Those of the system.
pub(crate) fn holder(file: &File) -> io::Result<Option<u32>> {
    let mut lock = whole_file();
    // SAFETY: the descriptor is open and the struct is complete, writable and outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if i32::from(lock.l_type) == libc::F_UNLCK { Ok(None) } else { Ok(u32::try_from(lock.l_pid).ok()) }
}

fn whole_file() -> libc::flock {
    // SAFETY: all zeros is a valid value: offset 0, length 0, which means to the end, from SEEK_SET.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}
