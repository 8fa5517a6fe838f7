//! The socket in the attempt's directory and who is connected to it.
//!
//! The socket is made when it is needed: not while the agent that started us holds the connection that it brought along. An
//! agent that comes after it finds the socket a moment after the first one's end.
//!
//! Nobody on the other side can hold the runner up or make it grow: nothing blocks, a reader that does not read gets
//! one event for many, a writer that writes nonsense is cut off, and the build itself is not let in.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};

use helix_runner::AttemptDir;
use helix_runner::control::{CONNECTIONS_MAX, Event, Frames, Request};
use helix_runner::processes::descends;
use rustix::event::{PollFd, PollFlags};

/// Answers that wait for a reader, at most; with more, its requests are not read.
const ANSWERS_BYTES_MAX: usize = 4096;

/// The listening socket, once there is one, and the open connections.
#[derive(Debug)]
pub(crate) struct Connections {
    dir: AttemptDir,
    listener: Option<UnixListener>,
    open: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    frames: Frames,
    answers: Vec<u8>,
    watch: Watch,
}

/// Whether a connection wants to hear of growth, and up to which line it did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Watch {
    Off,
    ToldUpTo(Option<u64>),
}

impl Connections {
    /// Begins with a connection that whoever started us brought along, or listens. Paths are relative to the attempt's
    /// directory, so they are short.
    pub(crate) fn begin(dir: &AttemptDir, first: Option<UnixStream>) -> io::Result<Self> {
        let mut connections = Self { dir: dir.clone(), listener: None, open: Vec::new() };
        if let Some(stream) = first {
            connections.add(stream);
        }
        if connections.open.is_empty() {
            connections.listen()?;
        }
        Ok(connections)
    }

    fn listen(&mut self) -> io::Result<()> {
        let path = self.dir.control();
        // An earlier try may have come so far and no further.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// What to wait for.
    pub(crate) fn poll_into<'a>(&'a self, polled: &mut Vec<PollFd<'a>>) {
        polled.extend(self.listener.as_ref().map(|listener| PollFd::new(listener, PollFlags::IN)));
        for connection in &self.open {
            let mut wanted = PollFlags::empty();
            if connection.answers.len() < ANSWERS_BYTES_MAX {
                wanted |= PollFlags::IN;
            }
            if !connection.answers.is_empty() {
                wanted |= PollFlags::OUT;
            }
            polled.push(PollFd::new(&connection.stream, wanted));
        }
    }

    /// Takes new connections and everything that they say; `answer` does what is asked.
    pub(crate) fn serve(&mut self, mut answer: impl FnMut(Request) -> Option<Event>) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            let welcome = self.open.len() < CONNECTIONS_MAX && is_outsider(&stream);
            if welcome {
                self.add(stream);
            }
        }
        self.open.retain_mut(|connection| connection.serve(&mut answer).is_ok());
        if self.open.is_empty() && self.listener.is_none() {
            // A disk that takes no socket now is asked again at the next turn, which comes within seconds.
            let _ = self.listen();
        }
    }

    fn add(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_ok() {
            self.open.push(Connection { stream, frames: Frames::default(), answers: Vec::new(), watch: Watch::Off });
        }
    }

    /// Tells the watchers that the spool has lines up to this one.
    pub(crate) fn tell(&mut self, last_seq: u64) {
        self.open.retain_mut(|connection| connection.tell(last_seq).is_ok());
    }
}

/// A process of the build has no business here: it could end itself as `cancelled`.
fn is_outsider(stream: &UnixStream) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(stream.as_fd()) else { return false };
    !descends(peer.pid.as_raw_nonzero().get().cast_unsigned(), std::process::id())
}

impl Connection {
    fn serve(&mut self, answer: &mut impl FnMut(Request) -> Option<Event>) -> io::Result<()> {
        let mut buffer = [0; 512];
        while self.answers.len() < ANSWERS_BYTES_MAX {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.frames.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            while let Some(payload) = self.frames.next_frame()? {
                let request = Request::decode(&payload)?;
                if request == Request::Watch && self.watch == Watch::Off {
                    self.watch = Watch::ToldUpTo(None);
                }
                if let Some(event) = answer(request) {
                    self.answers.extend_from_slice(&event.encode());
                }
            }
        }
        self.write()
    }

    fn tell(&mut self, last_seq: u64) -> io::Result<()> {
        // What waits is said first; the growth meanwhile becomes one event.
        if self.answers.is_empty() && matches!(self.watch, Watch::ToldUpTo(told) if told != Some(last_seq)) {
            self.watch = Watch::ToldUpTo(Some(last_seq));
            self.answers.extend_from_slice(&Event::Grew { last_seq }.encode());
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.answers.is_empty() {
            match self.stream.write(&self.answers) {
                Ok(count) => drop(self.answers.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
