//! Following a runner to its end: its output as it grows, and a stop when one is wished.
//!
//! Losing the connection means nothing to the build; the attempt's directory is what counts.

use std::io;
use std::time::Duration;

use helix_agent_core::{Death, StopCause};
use helix_model::Reason;
use helix_runner::control::{self, Event, Frames, Request};
use helix_runner::{AttemptDir, AttemptState};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::prepare::GRACE_MS;
use super::{Attempt, Ending, RETRY};
use crate::blocking::blocking;

/// How long a runner may take to listen before it is started once more.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);

/// Times that a runner is started for one order.
const STARTS_MAX: u32 = 3;

impl Attempt {
    /// Waits for the end of all the attempt's processes.
    pub(super) async fn follow(&mut self) -> io::Result<Ending> {
        let mut wait = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        let mut starts = 1;
        loop {
            if let Ok(stream) = connect(&self.dir) {
                wait = Duration::from_millis(1);
                if let Err(error) = self.watch_runner(stream).await {
                    tracing::debug!(attempt = %self.key, %error, "a connection to a runner broke");
                }
            }
            let dir = self.dir.clone();
            match blocking(move || helix_runner::inspect(&dir)).await? {
                AttemptState::Ended(outcome) => return Ok(Ending::Ran(outcome)),
                AttemptState::RunnerDied => return self.after_runner_died().await,
                AttemptState::Running { .. } => {}
                AttemptState::NotStarted if waited < LISTEN_LIMIT => {}
                AttemptState::NotStarted if starts < STARTS_MAX => {
                    (starts, waited) = (starts + 1, Duration::ZERO);
                    self.services.starter.start(self.dir.clone()).await?;
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
                    stream.write_all(&stop_request(cause).encode()).await?;
                }
            }
        }
    }

    /// A runner that died leaves processes that must be found, and no word on how the command ended.
    async fn after_runner_died(&self) -> io::Result<Ending> {
        loop {
            let death = match self.sweep().await {
                Ok(death) => death,
                Err(error) => {
                    tracing::error!(attempt = %self.key, %error, "processes of a dead runner are left; trying again");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let stop_wished = matches!(self.wished.borrow().stop, Some(StopCause::Registry(_)));
            if death == Death::Proven || !stop_wished {
                return Ok(Ending::RunnerLost(death));
            }
            // The registry waits for a proof, and there is none: it will say so itself.
            tracing::error!(attempt = %self.key, "its runner died, and that all its processes are dead is not proven");
            tokio::time::sleep(RETRY * 5).await;
        }
    }
}

fn stop_request(cause: StopCause) -> Request {
    match cause {
        StopCause::Registry(reason) => Request::Stop { reason, grace_ms: GRACE_MS },
        StopCause::Drained => Request::Stop { reason: Reason::Drained, grace_ms: GRACE_MS / 2 },
    }
}

fn connect(dir: &AttemptDir) -> io::Result<UnixStream> {
    let stream = control::connect(dir)?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Stops a runner and waits until it closes the connection; [`helix_runner::inspect`] then tells.
pub(super) async fn stop_and_wait(dir: &AttemptDir, reason: Reason, grace_ms: u64) -> io::Result<()> {
    let mut stream = match connect(dir) {
        Ok(stream) => stream,
        // It ended just now, or listens in a moment.
        Err(_) => {
            tokio::time::sleep(Duration::from_millis(10)).await;
            return Ok(());
        }
    };
    stream.write_all(&Request::Stop { reason, grace_ms }.encode()).await?;
    let mut buffer = [0; 1024];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}
