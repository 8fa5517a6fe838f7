//! The forker: answers every attempt's path on its standard input, and the descriptor that comes with it, with a fork of
//! itself that runs that attempt and has that descriptor as its first connection.
//!
//! It ends when the agent closes the socket. Children are reaped by the kernel, because it never asks how one ended:
//! that is what results are for.

#![allow(unsafe_code)] // fork, and ignoring SIGCHLD: libc only.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use helix_runner::control::Frames;
use helix_runner::forker::{PATH_BYTES_MAX, encode_answer};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

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
    let mut connection = None;
    loop {
        let path = match frames.next_frame() {
            Ok(Some(path)) => path,
            Ok(None) => match receive(&socket, &mut buffer, &mut connection) {
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
                let first = connection.take();
                if let Some(first) = &first {
                    // SAFETY: both descriptors are open; the socket's value is forgotten below.
                    unsafe { libc::dup2(first.as_raw_fd(), 0) };
                }
                // SAFETY: as above; the runner reaps its children itself.
                unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
                std::mem::forget(socket);
                let input = if first.is_some() { run::Input::Connection } else { run::Input::Nothing };
                // It closes what is not 0, 1 or 2.
                std::mem::forget(first);
                return run::run(OsStr::from_bytes(&path).as_ref(), input);
            }
            -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)),
            pid => Ok(pid.cast_unsigned()),
        };
        // The runner's copy must be the only one, or its end would not be noticed.
        connection = None;
        if socket.write_all(&encode_answer(answer)).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

/// Reads bytes, and keeps a descriptor that comes with them.
fn receive(socket: &UnixStream, buffer: &mut [u8], connection: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut rights, flags))?;
    for message in rights.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            *connection = descriptors.last().or(connection.take());
        }
    }
    Ok(received.bytes)
}
