//! Following a runner to its end: its output as it grows, and a stop when one is wished.
//!
//! Losing the connection means nothing to the build; the attempt's directory is what counts.

use std::io;
use std::time::Duration;

use helix_agent_core::{Death, StopCause};
use helix_model::Reason;
use helix_runner::control::{self, Event, Frames, Request};
use helix_runner::journal::Journal;
use helix_runner::pids::{Notes, boot_id};
use helix_runner::processes::Process;
use helix_runner::{AttemptDir, AttemptState};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::prepare::GRACE_MS;
use super::{Attempt, Ending, RETRY};
use crate::blocking::blocking;

/// How long a runner that was started in the place of another may take to note that it has the order, before a third one is.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);

/// How long after a stop a runner may need beyond the grace of its processes before it is looked at.
const STOP_MARGIN: Duration = Duration::from_secs(3);

/// Looks at a runner that is found frozen: woken each time, and killed at the last.
const FROZEN_MAX: u32 = 5;

/// Times that a runner is started for one order.
const STARTS_MAX: u32 = 3;

impl Attempt {
    /// Waits for the end of all the attempt's processes.
    pub(super) async fn follow(&mut self) -> io::Result<Ending> {
        let mut wait = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        let mut starts = 1;
        loop {
            let connected = match self.runner.take() {
                Some(stream) => for_tokio(stream),
                None => control::connect(&self.dir).and_then(for_tokio),
            };
            if let Ok(stream) = connected {
                wait = Duration::from_millis(1);
                if let Err(error) = self.watch_runner(stream).await {
                    tracing::debug!(attempt = %self.key, %error, "a connection to a runner broke");
                }
            }
            let dir = self.dir.clone();
            match blocking(move || helix_runner::inspect(&dir)).await? {
                AttemptState::Ended(outcome) => return Ok(Ending::Ran(outcome)),
                AttemptState::RunnerDied => return Ok(self.after_runner_died().await),
                AttemptState::Running { .. } => {}
                // Nobody is connected: the first runner has died, or an agent that died had started none. A second one does no
                // harm beside it, and is started at once; the third waits for what keeps them.
                AttemptState::NotStarted if starts > 1 && waited < LISTEN_LIMIT => {}
                AttemptState::NotStarted if starts < STARTS_MAX => {
                    (starts, waited) = (starts + 1, Duration::ZERO);
                    self.runner = Some(self.services.starter.start(self.dir.clone()).await?);
                }
                AttemptState::NotStarted => {
                    self.kill().await?;
                    return Err(io::Error::other("no runner takes the order"));
                }
            }
            tokio::time::sleep(wait).await;
            waited += wait;
            wait = (wait * 2).min(Duration::from_millis(100));
        }
    }

    /// Reads what the runner says until it closes the connection.
    async fn watch_runner(&mut self, mut stream: UnixStream) -> io::Result<()> {
        stream.write_all(&Request::Watch.encode()).await?;
        let mut frames = Frames::default();
        let mut buffer = [0; 1024];
        let mut stopping = false;
        let (mut frozen, mut look_at) = (0, None);
        loop {
            tokio::select! {
                read = stream.read(&mut buffer) => {
                    let count = read?;
                    if count == 0 {
                        return Ok(());
                    }
                    frames.push(&buffer[..count]);
                    while let Some(payload) = frames.next_frame()? {
                        if let Event::Grew { .. } = Event::decode(&payload)? {
                            self.note_output();
                        }
                    }
                }
                cause = self.stop_wished(), if !stopping => {
                    stopping = true;
                    look_at = Some(Instant::now() + Duration::from_millis(GRACE_MS) + STOP_MARGIN);
                    stream.write_all(&stop_request(cause).encode()).await?;
                }
                () = self.over_store.notified() => {
                    stream.write_all(&Request::Stop { reason: Reason::DiskFull, grace_ms: 0 }.encode()).await?;
                }
                () = until(look_at) => {
                    look_at = Some(Instant::now() + RETRY);
                    frozen = thaw(&self.dir, frozen).await?;
                }
            }
        }
    }

    /// A runner that died leaves processes that must be found, and no word on how the command ended.
    async fn after_runner_died(&self) -> Ending {
        let death = self.kill_until_dead().await;
        if death == Death::Unproven {
            tracing::error!(attempt = %self.key, "its runner died, and that all its processes are dead is not proven");
        }
        Ending::RunnerLost(death)
    }
}

fn stop_request(cause: StopCause) -> Request {
    match cause {
        StopCause::Registry(reason) => Request::Stop { reason, grace_ms: GRACE_MS },
        StopCause::Drained => Request::Stop { reason: Reason::Drained, grace_ms: GRACE_MS / 2 },
        StopCause::CutOff { .. } => Request::Stop { reason: Reason::Drained, grace_ms: GRACE_MS },
    }
}

fn for_tokio(stream: std::os::unix::net::UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Looks whether a runner that was told to stop is itself stopped, which a build under the same user can do to it, and then
/// neither limits nor stops would ever be heeded. It is woken; where that does not last it is killed, and what it
/// leaves is swept. Gives how often it was found so.
async fn thaw(dir: &AttemptDir, frozen: u32) -> io::Result<u32> {
    let dir = dir.clone();
    blocking(move || {
        let notes = Notes::of(&Journal::read(&dir)?);
        let Some(runner) = notes.filter(|notes| boot_id().is_ok_and(|boot| boot == notes.boot_id)) else {
            return Ok(frozen);
        };
        let runner = runner.runner;
        if Process::read(runner.pid).is_none_or(|process| process.id != runner || !process.stopped) {
            return Ok(frozen);
        }
        let signal = if frozen < FROZEN_MAX { Signal::CONT } else { Signal::KILL };
        tracing::warn!(attempt = %dir, pid = runner.pid, ?signal, "a runner that has to stop its build is itself stopped");
        helix_runner::processes::signal(runner, signal)?;
        Ok(frozen + 1)
    })
    .await
}

/// A moment that may never come.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Stops a runner and waits until it closes the connection; [`helix_runner::inspect`] then tells.
pub(super) async fn stop_and_wait(dir: &AttemptDir, reason: Reason, grace_ms: u64) -> io::Result<()> {
    let mut stream = match control::connect(dir).and_then(for_tokio) {
        Ok(stream) => stream,
        // It ended just now, or listens in a moment.
        Err(_) => {
            tokio::time::sleep(Duration::from_millis(10)).await;
            return Ok(());
        }
    };
    stream.write_all(&Request::Stop { reason, grace_ms }.encode()).await?;
    let mut buffer = [0; 1024];
    let (mut frozen, mut look_at) = (0, Instant::now() + Duration::from_millis(grace_ms) + STOP_MARGIN);
    loop {
        tokio::select! {
            read = stream.read(&mut buffer) => if read? == 0 { return Ok(()) },
            () = until(Some(look_at)) => {
                look_at = Instant::now() + RETRY;
                frozen = thaw(dir, frozen).await?;
            }
        }
    }
}
