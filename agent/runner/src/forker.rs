//! The agent's side of starting runners.
//!
//! A fork of the agent is slow, and an exec per runner not free. So one tiny helper, `helix-runner --forker`, stays
//! beside the agent and forks runners off itself: no exec, no threads, two megabytes. It ends when the agent does;
//! its runners go on. One that died is replaced at the next start.
//!
//! With each path goes one end of a connection, which is the runner's first: the agent need not wait until it listens.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::codec::{Decoder, Encoder};
use crate::control::{self, Frames};
use crate::paths::AttemptDir;

/// A request's path, at most; the system's own limit.
pub const PATH_BYTES_MAX: usize = 4096;

/// How long the forker may take for an answer; it needs a fraction of a millisecond.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the forker answers: the runner's pid, or the system's error number.
pub type Answer = Result<u32, i32>;

/// Starts runners. Blocking, but for well under a millisecond; owned by one thread.
#[derive(Debug)]
pub struct Forker {
    program: PathBuf,
    /// A cgroup that the helper is put in, and so are its runners and all that they start.
    group: Option<PathBuf>,
    helper: Option<Helper>,
}

#[derive(Debug)]
struct Helper {
    socket: Option<UnixStream>,
    child: Child,
}

impl Forker {
    /// Starts the helper from the program `helix-runner` at this path.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(program: impl Into<PathBuf>) -> io::Result<Self> {
        Self::start_in(program, None)
    }

    /// As [`Self::start`]; runners are born in a cgroup, which costs nothing, where moving there would.
    ///
    /// # Errors
    /// When the program cannot be started, or not be put there.
    pub fn start_in(program: impl Into<PathBuf>, group: Option<PathBuf>) -> io::Result<Self> {
        let program = program.into();
        let helper = Some(Helper::start(&program, group.as_deref())?);
        Ok(Self { program, group, helper })
    }

    /// The helper's pid, for logs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.helper.as_ref().map(|helper| helper.child.id())
    }

    /// Starts a runner for an attempt whose order is written. Returns its pid as soon as it is forked, and a connection
    /// as [`control::connect`] would make it later; whether it took the order shows [`crate::inspect`]. Safe to
    /// repeat: only the first runner in a directory runs the command.
    ///
    /// # Errors
    /// When neither the helper nor a new one in its place could fork.
    pub fn start_runner(&mut self, dir: &AttemptDir) -> io::Result<(u32, UnixStream)> {
        let path = std::path::absolute(dir.root())?;
        let (ours, theirs) = UnixStream::pair()?;
        let answer = match &mut self.helper {
            Some(helper) => helper.ask(&path, theirs.as_fd()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(_) => {
                self.helper = None;
                self.helper.insert(Helper::start(&self.program, self.group.as_deref())?).ask(&path, theirs.as_fd())?
            }
        };
        answer.map(|pid| (pid, ours)).map_err(io::Error::from_raw_os_error)
    }
}

impl Helper {
    fn start(program: &Path, group: Option<&Path>) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        ours.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        // Nothing here forces a fork of the agent: no hook, no working directory; the helper sees to the rest itself.
        let child = Command::new(program)
            .arg("--forker")
            .env_clear()
            .envs(helix_failpoint::variable())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let helper = Self { socket: Some(ours), child };
        if let Some(group) = group {
            // It forks nothing before it is asked to; should this fail, it ends here.
            std::fs::write(group.join("cgroup.procs"), helper.child.id().to_string())?;
        }
        Ok(helper)
    }

    fn ask(&mut self, path: &Path, connection: BorrowedFd<'_>) -> io::Result<Answer> {
        let Some(socket) = &mut self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
        let frame = control::frame(path.as_os_str().as_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let connection = [connection];
        if !rights.push(SendAncillaryMessage::ScmRights(&connection)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        // The descriptor goes with the first byte.
        let sent = sendmsg(&*socket, &[IoSlice::new(&frame)], &mut rights, SendFlags::NOSIGNAL)?;
        socket.write_all(&frame[sent..])?;
        let mut answer = [0; 12];
        socket.read_exact(&mut answer)?;
        let mut frames = Frames::default();
        frames.push(&answer);
        let payload = frames.next_frame()?.ok_or(io::ErrorKind::InvalidData)?;
        let mut fields = Decoder::new(&payload);
        let (pid, errno) = (fields.u32()?, fields.u32()?);
        Ok(if errno == 0 { Ok(pid) } else { Err(errno.cast_signed()) })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Closing the socket ends it; should it hang, it is killed.
        self.socket = None;
        for _ in 0..100 {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The forker's answer as a frame.
#[must_use]
pub fn encode_answer(answer: Answer) -> Vec<u8> {
    let (pid, errno) = match answer {
        Ok(pid) => (pid, 0),
        Err(errno) => (0, errno.cast_unsigned()),
    };
    control::frame(&Encoder::default().u32(pid).u32(errno).finish())
}
