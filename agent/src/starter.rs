//! Starting runners: a thread of its own, because the forker's answer is waited for without tokio.
//!
//! Where processes are limited by cgroup v1, runners come from several forkers, each in a cgroup of its own: a *slot*. Moving a
//! process to a cgroup holds up every fork of the host for some milliseconds; a runner that is forked there is there for
//! nothing, with its whole build. A slot is free when nobody but its forker is in it, and the kernel counts that: no
//! book is kept, and an agent that starts again finds the slots whose builds still run taken.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use helix_runner::{AttemptDir, Forker, Order};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::limits::Slots;

/// Runners that wait to be started.
const WAITING_MAX: usize = 256;

/// How often a slot is made when others remove it meanwhile.
const TRIES: usize = 4;

/// Slots, at most: more than any agent's capacity, so that builds that are still dying do not use them up.
const SLOTS_MAX: usize = 2 * helix_model::limits::WORKER_CAPACITY_MAX as usize;

struct Start {
    dir: AttemptDir,
    /// What is written first; none, if that was done before.
    order: Option<Box<Order>>,
    /// Held until it is known whether there is a runner: an attempt that is removed meanwhile waits for that.
    _token: Option<TaskTrackerToken>,
    done: oneshot::Sender<Result<UnixStream, NotStarted>>,
}

/// Why there is no runner.
#[derive(Debug)]
pub enum NotStarted {
    /// The order could not be written: nobody can have taken it.
    Unordered(io::Error),
    /// The order is there.
    Ordered(io::Error),
}

/// Starts runners by way of the forkers, which end with it.
#[derive(Debug)]
pub struct Starter {
    tx: Option<mpsc::Sender<Start>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// Starts the first forker.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn new(program: &Path, slots: Option<Slots>) -> io::Result<Self> {
        let mut forkers = match slots {
            None => Forkers::One(Box::new(Forker::start(program)?)),
            Some(slots) => {
                let mut slots = Pool { program: program.to_owned(), slots, forkers: Vec::new() };
                slots.slots.remove_unused();
                slots.free()?;
                Forkers::InSlots(slots)
            }
        };
        let (tx, mut rx) = mpsc::channel::<Start>(WAITING_MAX);
        let serve = move || {
            while let Some(Start { dir, order, done, _token }) = rx.blocking_recv() {
                let ordered = order.map_or(Ok(()), |order| order.write(&dir)).map_err(NotStarted::Unordered);
                let mut start = || forkers.start_runner(&dir).map_err(NotStarted::Ordered);
                // Nobody waits for the answer when the attempt was dropped; what started is found by its directory.
                let _ = done.send(ordered.and_then(|()| Ok(start()?.1)));
            }
        };
        let thread = std::thread::Builder::new().name("starter".to_owned()).spawn(serve)?;
        Ok(Self { tx: Some(tx), thread: Some(thread) })
    }

    /// Starts a runner for a directory that has an order, and gives a connection to it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(&self, dir: AttemptDir) -> io::Result<UnixStream> {
        self.ask(dir, None, None).await.map_err(|(NotStarted::Unordered(error) | NotStarted::Ordered(error))| error)
    }

    /// Writes an order, starts a runner for it, and gives a connection to it. The token is held until that is done, also when
    /// nobody waits for it any more.
    ///
    /// # Errors
    /// How far it came.
    pub async fn start_ordered(
        &self,
        dir: AttemptDir,
        order: Order,
        token: TaskTrackerToken,
    ) -> Result<UnixStream, NotStarted> {
        self.ask(dir, Some(Box::new(order)), Some(token)).await
    }

    async fn ask(
        &self,
        dir: AttemptDir,
        order: Option<Box<Order>>,
        token: Option<TaskTrackerToken>,
    ) -> Result<UnixStream, NotStarted> {
        let gone = || NotStarted::Ordered(io::Error::other("the agent is ending"));
        let (done, answer) = oneshot::channel();
        let tx = self.tx.as_ref().ok_or_else(gone)?;
        tx.send(Start { dir, order, _token: token, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.tx = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
enum Forkers {
    One(Box<Forker>),
    InSlots(Pool),
}

impl Forkers {
    fn start_runner(&mut self, dir: &AttemptDir) -> io::Result<(u32, UnixStream)> {
        match self {
            Self::One(forker) => forker.start_runner(dir),
            // The runner is counted before this returns, so the next one finds the slot taken.
            Self::InSlots(pool) => pool.free()?.start_runner(dir),
        }
    }
}

/// Forkers by slot; `None` where builds of an earlier agent still run.
#[derive(Debug)]
struct Pool {
    program: PathBuf,
    slots: Slots,
    forkers: Vec<Option<Forker>>,
}

impl Pool {
    /// The forker of the first slot that is free.
    fn free(&mut self) -> io::Result<&mut Forker> {
        for index in 0..SLOTS_MAX {
            if index == self.forkers.len() {
                self.forkers.push(None);
            }
            let path = self.slots.path(index);
            let mut taken = self.take(index, &path);
            for _ in 1..TRIES {
                if !taken.as_ref().is_err_and(is_gone) {
                    break;
                }
                // Another agent that started just now took it for one of a dead agent.
                self.forkers[index] = None;
                taken = self.take(index, &path);
            }
            if taken? {
                return self.forkers[index].as_mut().ok_or_else(|| io::ErrorKind::NotFound.into());
            }
        }
        Err(io::Error::other("builds that ended are still dying everywhere"))
    }
}

impl Pool {
    /// Puts a forker in a slot, if there is none. False when builds are in it.
    fn take(&mut self, index: usize, path: &Path) -> io::Result<bool> {
        let own = self.forkers[index].as_ref().and_then(Forker::pid);
        if self.forkers[index].is_none() {
            self.slots.make(path)?;
        }
        if is_taken(path, own)? {
            return Ok(false);
        }
        if self.forkers[index].is_none() {
            self.forkers[index] = Some(Forker::start_in(&self.program, Some(path.to_owned()))?);
        }
        Ok(true)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (index, forker) in self.forkers.drain(..).enumerate() {
            // It has ended when this returns.
            drop(forker);
            // One where a build runs on stays, for the next agent.
            let _ = fs::remove_dir(self.slots.path(index));
        }
    }
}

/// Whether a slot was removed: before its file was opened, or after, which the kernel tells by another word.
fn is_gone(error: &io::Error) -> bool {
    let removed = rustix::io::Errno::NODEV.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(removed)
}

/// Whether anybody but the forker is in a slot.
fn is_taken(slot: &Path, forker: Option<u32>) -> io::Result<bool> {
    let text = fs::read_to_string(slot.join("cgroup.procs"))?;
    Ok(text.lines().any(|line| forker.is_none_or(|forker| line != forker.to_string())))
}
