//! Signals: the first SIGTERM or SIGINT asks to end in good order, the second to end now, SIGHUP to reload.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What signals ask of a process. Clones share one state.
#[derive(Clone, Debug)]
pub struct Shutdown {
    graceful: CancellationToken,
    forced: CancellationToken,
    reloads: Arc<watch::Sender<u64>>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::manual()
    }
}

impl Shutdown {
    /// Without signals: for tests and for parts that are embedded.
    #[must_use]
    pub fn manual() -> Self {
        let graceful = CancellationToken::new();
        Self { forced: CancellationToken::new(), graceful, reloads: Arc::new(watch::Sender::new(0)) }
    }

    /// Listens to this process's signals until the returned [`Listener`] is dropped. Needs a tokio runtime.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn install() -> io::Result<(Self, Listener)> {
        let shutdown = Self::manual();
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        let hang_up = signal(SignalKind::hangup())?;
        let task = tokio::spawn(listen(shutdown.clone(), terminate, interrupt, hang_up));
        Ok((shutdown, Listener(task)))
    }

    /// Cancelled at the first request to end.
    #[must_use]
    pub fn graceful(&self) -> &CancellationToken {
        &self.graceful
    }

    /// Cancelled at the second.
    #[must_use]
    pub fn forced(&self) -> &CancellationToken {
        &self.forced
    }

    /// Changes with every request to reload; requests that come together may be seen as one.
    #[must_use]
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.reloads.subscribe()
    }

    /// Counts a request to end, as a signal would.
    pub fn request_end(&self) {
        if self.graceful.is_cancelled() {
            self.forced.cancel();
        } else {
            self.graceful.cancel();
        }
    }

    /// Ends now.
    pub fn force(&self) {
        self.graceful.cancel();
        self.forced.cancel();
    }

    /// Asks for a reload, as SIGHUP would.
    pub fn request_reload(&self) {
        self.reloads.send_modify(|count| *count += 1);
    }
}

/// Owns the task that listens to signals, and ends it when dropped.
#[derive(Debug)]
pub struct Listener(JoinHandle<()>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn listen(shutdown: Shutdown, mut terminate: Signal, mut interrupt: Signal, mut hang_up: Signal) {
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hang_up.recv() => {
                tracing::info!("SIGHUP: reloading");
                shutdown.request_reload();
                continue;
            }
        };
        tracing::info!(again = shutdown.graceful.is_cancelled(), "{name}: ending");
        shutdown.request_end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_request_forces() {
        let shutdown = Shutdown::manual();
        shutdown.request_end();
        assert!(shutdown.graceful().is_cancelled() && !shutdown.forced().is_cancelled());
        shutdown.request_end();
        assert!(shutdown.forced().is_cancelled());
    }

    #[tokio::test]
    async fn signals_arrive() {
        let (shutdown, _listener) = Shutdown::install().unwrap();
        let mut reloads = shutdown.reloads();
        let own = rustix::process::getpid();
        rustix::process::kill_process(own, rustix::process::Signal::HUP).unwrap();
        reloads.changed().await.unwrap();
        rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
        shutdown.graceful().cancelled().await;
        rustix::process::kill_process(own, rustix::process::Signal::INT).unwrap();
        shutdown.forced().cancelled().await;
    }
}
