//! The attempt while it runs: one loop that waits for output, deaths, requests and moments, and never for one alone.
//!
//! Order of a turn: deaths before output, so that "all dead" is followed by one more look at the pipes; output before
//! requests, so that a status tells what was said; the spool last, then the watchers.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use helix_model::{Reason, Room};
use helix_runner::cgroup::{Cgroup, Groups};
use helix_runner::control::{Event, Request, Status};
use helix_runner::disk::{DiskWatch, Usage};
use helix_runner::journal::JournalWriter;
use helix_runner::pids::Notes;
use helix_runner::processes::Process;
use helix_runner::{AttemptDir, End, Order, Outcome, SpoolWriter, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::clock::{Clock, after_ms};
use super::command::{self, StartError};
use super::connections::Connections;
use super::lines::{Found, Output, READ_BYTES};
use super::mask::Mask;
use super::setup;
use super::tree::Tree;

/// Between rounds of killing.
const KILL_ROUND: Duration = Duration::from_millis(5);
/// Between looks at a cgroup that still calls itself populated when the last child is reaped.
const CGROUP_WORD: Duration = Duration::from_millis(1);
/// Between tries to write to a spool whose disk is full.
const SPOOL_RETRY: Duration = Duration::from_millis(200);
/// How long a full disk is waited for, with the command held up by its full pipes, before the command is stopped.
const SPOOL_PATIENCE: Duration = Duration::from_secs(10);
/// The same for a command that said more than [`SPOOL_MUCH_BYTES`]: the loudest gives way first, and makes room for the others.
const SPOOL_PATIENCE_LOUD: Duration = Duration::from_secs(3);
const SPOOL_MUCH_BYTES: u64 = 16 * 1024 * 1024;
/// Between two looks whether the attempt's directory is still there.
const DIRECTORY_LOOK: Duration = Duration::from_secs(2);
/// How long after its end, before the last lines are given up.
const LAST_PATIENCE: Duration = Duration::from_secs(2);
/// Pipe reads after the last descendant's death, at most: what dead processes left in a pipe is at most 1 MiB, but
/// one may have handed its pipe to somebody outside, who goes on writing.
const LAST_READS_MAX: u32 = 64;

/// The first reason to end it, and when patience ends.
#[derive(Clone, Copy, Debug)]
struct Stop {
    reason: Reason,
    kill_at: Instant,
}

/// An attempt in the making, running, or ending.
pub(crate) struct Attempt {
    order: Order,
    clock: Clock,
    spool: SpoolWriter,
    signals: OwnedFd,
    connections: Connections,
    tree: Tree,
    disk: Option<DiskWatch>,
    /// When the directory is looked at next.
    directory_look: Instant,
    outputs: Vec<Output>,
    buffer: Vec<u8>,
    /// The command's pid until it was reaped.
    command: Option<u32>,
    end: Option<End>,
    stop: Option<Stop>,
    /// Whose disk was full, if one was.
    room: Room,
    /// When what the command left behind is killed.
    leftovers_until: Option<Instant>,
    leftovers_killed: u32,
    next_kill: Option<Instant>,
    started: Instant,
    last_output: Instant,
    /// Since when the spool takes no more.
    stuck_since: Option<Instant>,
}

impl Attempt {
    /// Opens all that is needed to run the order.
    pub(crate) fn prepare(
        dir: &AttemptDir,
        order: Order,
        clock: Clock,
        connection: Option<UnixStream>,
    ) -> io::Result<Self> {
        let spool = SpoolWriter::open(dir, order.log_bytes_max)?;
        let signals = setup::signal_descriptor()?;
        let connections = Connections::begin(dir, connection)?;
        // Without a cgroup it works too, and the tree is searched instead.
        let cgroup = order.cgroup.as_deref().and_then(|path| Cgroup::create(path).ok());
        let groups = Groups::create(&order.limits.groups, cgroup.as_ref()).inspect_err(|_| {
            // Nobody is in it yet.
            let _ = cgroup.as_ref().map(Cgroup::remove);
        })?;
        let disk = order.limits.disk.clone().map(DiskWatch::new);
        let now = Instant::now();
        Ok(Self {
            order,
            clock,
            spool,
            signals,
            connections,
            tree: Tree::new(cgroup, groups),
            disk,
            directory_look: now + DIRECTORY_LOOK,
            outputs: Vec::new(),
            buffer: vec![0; READ_BYTES],
            command: None,
            end: None,
            stop: None,
            room: Room::Host,
            leftovers_until: None,
            leftovers_killed: 0,
            next_kill: None,
            started: now,
            last_output: now,
            stuck_since: None,
        })
    }

    /// Starts the command. False when it could not be started; then that is its end.
    pub(crate) fn start(&mut self, journal: &mut JournalWriter) -> bool {
        let note = |pid| {
            let process = Process::read(pid).ok_or(io::ErrorKind::NotFound)?;
            Notes::write_command(journal, process.id)
        };
        // Before the command: what could not be masked must not be said.
        let mask = self.order.secrets.as_deref().map(Mask::load).transpose();
        let mask = mask.map_err(|error| StartError::new("cannot read the secrets", &error));
        let started = mask.and_then(|mask| {
            Ok((command::start(&self.order, self.tree.cgroup(), self.tree.groups(), note)?, mask.map(Rc::new)))
        });
        let (started, mask) = match started {
            Ok(started) => started,
            Err(error) => {
                self.spool.append(self.clock.now_ms(), Stream::System, error.text.as_bytes());
                self.end = Some(End::NotStarted { errno: error.errno, error: error.text });
                return false;
            }
        };
        self.outputs = vec![
            Output::new(started.stdout, Stream::Stdout, mask.as_ref()),
            Output::new(started.stderr, Stream::Stderr, mask.as_ref()),
        ];
        self.command = Some(started.pid);
        (self.started, self.last_output) = (Instant::now(), Instant::now());
        if let Some(status) = started.status {
            self.tree.set_init(started.pid, status);
        }
        true
    }

    /// Goes on until no descendant is left and what they said is read.
    pub(crate) fn work(&mut self) {
        while !self.turn() {
            self.wait();
        }
        let now_ms = self.clock.now_ms();
        for output in &mut self.outputs {
            for _ in 0..LAST_READS_MAX {
                if output.read(&mut self.buffer, now_ms, &mut self.spool) != Found::Bytes {
                    break;
                }
            }
            output.close(now_ms, &mut self.spool);
        }
        if self.leftovers_killed > 0 {
            let text = format!("killed {} processes that the command left behind", self.leftovers_killed);
            self.spool.append(now_ms, Stream::System, text.as_bytes());
        }
        self.judge_disk();
    }

    /// One turn of the loop. True when nobody is left.
    fn turn(&mut self) -> bool {
        if setup::take_signals(&self.signals) {
            self.stop(Reason::Drained, self.order.grace_ms);
        }
        let end = self.tree.reap(self.command);
        self.note_end(end);
        let gone = self.tree.is_gone();
        self.read_outputs();
        self.serve();
        if !gone {
            self.look_at_clock();
            self.look_at_directory();
        }
        self.flush();
        gone
    }

    /// A runner whose directory was removed can be reached and heard by nobody: its build is nobody's.
    fn look_at_directory(&mut self) {
        let now = Instant::now();
        if self.stop.is_some() || now < self.directory_look {
            return;
        }
        self.directory_look = now + DIRECTORY_LOOK;
        if rustix::fs::stat(".").is_ok_and(|stat| stat.st_nlink == 0) {
            self.stop(Reason::Internal, 0);
        }
    }

    fn note_end(&mut self, end: Option<End>) {
        if let Some(end) = end {
            self.command = None;
            self.end = Some(end);
            self.leftovers_until = after_ms(Instant::now(), self.order.leftover_ms);
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        let timeout = self.next_moment().map(|moment| {
            let left = moment.saturating_duration_since(now);
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let mut polled = vec![PollFd::new(&self.signals, PollFlags::IN)];
        polled.extend(self.tree.status().map(|status| PollFd::new(status, PollFlags::IN)));
        if self.stuck_since.is_none() {
            polled.extend(self.outputs.iter().filter_map(Output::pipe).map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        }
        self.connections.poll_into(&mut polled);
        // An interruption or a lack of memory is another turn, no more.
        let _ = poll(&mut polled, timeout.as_ref());
    }

    /// The next moment at which something is due.
    fn next_moment(&self) -> Option<Instant> {
        let mut moments = vec![self.next_kill];
        if self.next_kill.is_none() {
            moments.push(self.stop.map(|stop| stop.kill_at));
            moments.push(self.leftovers_until);
        }
        if self.stop.is_none() && self.command.is_some() {
            moments.push(self.wall_end());
            moments.push(self.silence_end());
            moments.push(self.disk.as_ref().map(DiskWatch::next_step));
        }
        moments.push(self.stop.is_none().then_some(self.directory_look));
        moments.push(self.tree.is_childless().then(|| Instant::now() + CGROUP_WORD));
        moments.push(self.stuck_since.map(|_| Instant::now() + SPOOL_RETRY));
        moments.into_iter().flatten().min()
    }

    fn wall_end(&self) -> Option<Instant> {
        after_ms(self.started, self.order.wall_ms?)
    }

    fn silence_end(&self) -> Option<Instant> {
        // While we do not listen, the command is not silent.
        if self.stuck_since.is_some() { None } else { after_ms(self.last_output, self.order.silence_ms?) }
    }

    fn look_at_clock(&mut self) {
        let now = Instant::now();
        let due = |moment: Option<Instant>| moment.is_some_and(|moment| moment <= now);
        if self.stop.is_none() && self.command.is_some() {
            if due(self.wall_end()) {
                self.stop(Reason::Timeout, self.order.grace_ms);
            } else if due(self.silence_end()) {
                self.stop(Reason::Silence, self.order.grace_ms);
            }
            self.look_at_disk();
        }
        if self.next_kill.is_none() {
            let leftovers = due(self.leftovers_until);
            if leftovers && self.stop.is_none() {
                self.leftovers_killed = self.tree.count();
            }
            if leftovers || due(self.stop.map(|stop| stop.kill_at)) {
                self.next_kill = Some(now);
            }
        }
        if due(self.next_kill) {
            let end = self.tree.kill(self.command);
            self.note_end(end);
            self.next_kill = Some(Instant::now() + KILL_ROUND);
        }
    }

    /// Goes on counting what the build wrote, and stops it when that is too much.
    fn look_at_disk(&mut self) {
        let Some(Usage::Over(room, what)) = self.disk.as_mut().map(DiskWatch::step) else { return };
        self.room = room;
        self.spool.append(self.clock.now_ms(), Stream::System, what.as_bytes());
        // At once: it fills the disk while it is asked nicely.
        self.stop(Reason::DiskFull, 0);
    }

    /// A command that failed because it met the limit itself was stopped by it.
    fn judge_disk(&mut self) {
        let failed = !matches!(self.end, Some(End::Exited(0)) | None);
        if failed
            && self.stop.is_none()
            && let Some(Usage::Over(room, what)) = self.disk.as_mut().map(DiskWatch::last_look)
        {
            self.room = room;
            self.spool.append(self.clock.now_ms(), Stream::System, what.as_bytes());
            self.stop = Some(Stop { reason: Reason::DiskFull, kill_at: Instant::now() });
        }
    }

    /// Begins the end, or hastens it.
    fn stop(&mut self, reason: Reason, grace_ms: u64) {
        let now = Instant::now();
        // A grace beyond the end of time is none of ours to refuse: a year.
        let kill_at = after_ms(now, grace_ms).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        match &mut self.stop {
            Some(stop) => stop.kill_at = stop.kill_at.min(kill_at),
            None => {
                self.stop = Some(Stop { reason, kill_at });
                if grace_ms > 0 {
                    self.tree.terminate();
                }
            }
        }
    }

    fn read_outputs(&mut self) {
        if self.stuck_since.is_some() {
            return;
        }
        let now_ms = self.clock.now_ms();
        for output in &mut self.outputs {
            if output.read(&mut self.buffer, now_ms, &mut self.spool) == Found::Bytes {
                self.last_output = Instant::now();
            }
        }
    }

    fn serve(&mut self) {
        // Taken out meanwhile: answering needs the rest of us.
        let mut asked = Vec::new();
        let status = self.status();
        self.connections.serve(|request| match request {
            Request::Stop { reason, grace_ms } => {
                asked.push((reason, grace_ms));
                let reason = status.stopping.unwrap_or(asked[0].0);
                Some(Event::Stopping { reason })
            }
            Request::Status => Some(Event::Status(status)),
            Request::Watch => None,
        });
        for (reason, grace_ms) in asked {
            self.stop(reason, grace_ms);
        }
    }

    fn status(&self) -> Status {
        Status {
            started_at_ms: self.clock.started_at_ms(),
            command_pid: self.command.unwrap_or(0),
            stopping: self.stop.map(|stop| stop.reason),
            log: self.spool.totals(),
        }
    }

    fn flush(&mut self) {
        match self.spool.flush() {
            Ok(()) => {
                if self.stuck_since.take().is_some() {
                    self.last_output = Instant::now();
                }
                let last_seq = self.spool.last_seq();
                self.connections.tell(last_seq);
            }
            Err(error) => {
                let since = *self.stuck_since.get_or_insert_with(Instant::now);
                let loud = self.spool.totals().bytes > SPOOL_MUCH_BYTES;
                if since.elapsed() >= if loud { SPOOL_PATIENCE_LOUD } else { SPOOL_PATIENCE } {
                    self.stop(spool_reason(&error), 0);
                }
            }
        }
    }

    /// Writes what is left to write and says how it ended. Everybody is dead. The connections are to be closed when the
    /// result is written.
    pub(crate) fn end(mut self) -> (Outcome, Connections) {
        let ended_at_ms = self.clock.now_ms();
        let deadline = Instant::now() + LAST_PATIENCE;
        let mut stopped = self.stop.map(|stop| stop.reason);
        while let Err(error) = self.spool.flush() {
            if Instant::now() >= deadline {
                self.spool.discard_pending();
                stopped = stopped.or(Some(spool_reason(&error)));
                break;
            }
            std::thread::sleep(SPOOL_RETRY);
        }
        let memory_kill = self.tree.remove();
        let error = "the command was not reaped".to_owned();
        let outcome = Outcome {
            started_at_ms: self.clock.started_at_ms(),
            ended_at_ms,
            // A kernel that reports no child before it reported the command: not seen, but said rather than assumed.
            end: self.end.unwrap_or(End::NotStarted { errno: 0, error }),
            room: if stopped == Some(Reason::DiskFull) { self.room } else { Room::Host },
            stopped,
            leftovers_killed: self.leftovers_killed,
            memory_kill,
            log: self.spool.totals(),
        };
        (outcome, self.connections)
    }
}

fn spool_reason(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::DiskFull,
        _ => Reason::Internal,
    }
}
