//! Starting runners: a thread of its own, because the forker's answer is waited for without tokio.

use std::io;
use std::path::Path;
use std::thread::JoinHandle;

use helix_runner::{AttemptDir, Forker};
use tokio::sync::{mpsc, oneshot};

/// Runners that wait to be started.
const WAITING_MAX: usize = 256;

struct Start {
    dir: AttemptDir,
    done: oneshot::Sender<io::Result<u32>>,
}

/// Starts runners by way of the forker, which ends with it.
#[derive(Debug)]
pub struct Starter {
    tx: Option<mpsc::Sender<Start>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// Starts the forker.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn new(program: &Path) -> io::Result<Self> {
        let mut forker = Forker::start(program)?;
        let (tx, mut rx) = mpsc::channel::<Start>(WAITING_MAX);
        let serve = move || {
            while let Some(start) = rx.blocking_recv() {
                // Nobody waits for the answer when the attempt was dropped; what started is found by its directory.
                let _ = start.done.send(forker.start_runner(&start.dir));
            }
        };
        let thread = std::thread::Builder::new().name("starter".to_owned()).spawn(serve)?;
        Ok(Self { tx: Some(tx), thread: Some(thread) })
    }

    /// Starts a runner for a directory that has an order.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(&self, dir: AttemptDir) -> io::Result<u32> {
        let gone = || io::Error::other("the agent is ending");
        let (done, answer) = oneshot::channel();
        let tx = self.tx.as_ref().ok_or_else(gone)?;
        tx.send(Start { dir, done }).await.map_err(|_| gone())?;
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
