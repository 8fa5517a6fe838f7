//! The forker: answers every attempt's path on its standard input with a fork of itself that runs that attempt.
//!
//! It ends when the agent closes the socket. Children are reaped by the kernel, because it never asks how one ended:
//! that is what results are for.

#![allow(unsafe_code)] // fork, and ignoring SIGCHLD: libc only.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use helix_runner::control::Frames;
use helix_runner::forker::{PATH_BYTES_MAX, encode_answer};

use crate::run;

/// Serves until the agent is gone.
pub(crate) fn serve() -> ExitCode {
    // Ctrl-C in the agent's terminal is the agent's business.
    let _ = rustix::process::setsid();
    // SAFETY: sets a disposition, no handler; the process has one thread.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // SAFETY: nothing else in this program owns descriptor 0; a closed one shows as an error at the first read.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    // Asks the processor what it can do, once: in a virtual machine that takes a while, and runners inherit the answer.
    let _ = crc32fast::hash(b"");
    let mut frames = Frames::with_bytes_max(PATH_BYTES_MAX);
    let mut buffer = [0; 1024];
    loop {
        let path = match frames.next_frame() {
            Ok(Some(path)) => path,
            Ok(None) => match socket.read(&mut buffer) {
                Ok(0) | Err(_) => return ExitCode::SUCCESS,
                Ok(count) => {
                    frames.push(&buffer[..count]);
                    continue;
                }
            },
            Err(_) => return ExitCode::FAILURE,
        };
        // SAFETY: one thread, so the child is a whole copy that may do anything.
        let answer = match unsafe { libc::fork() } {
            0 => {
                // Standard input must not be the agent's socket for one moment longer than needed.
                if let Ok(null) = std::fs::File::open("/dev/null") {
                    // SAFETY: both descriptors are open; the socket's value is forgotten below.
                    unsafe { libc::dup2(null.as_raw_fd(), 0) };
                }
                // SAFETY: as above; the runner reaps its children itself.
                unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
                std::mem::forget(socket);
                return run::run(OsStr::from_bytes(&path).as_ref());
            }
            -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)),
            pid => Ok(pid.cast_unsigned()),
        };
        if socket.write_all(&encode_answer(answer)).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}
