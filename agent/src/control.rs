//! `helix-agent detach`: a socket in the data directory, a line each way.
//!
//! Only who may enter the directory may speak. Invariant: "detached" is said only when the agent is about to exit.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::data_dir::DataDir;

/// What is answered when the leader waits for the next agent.
pub const DETACHED: &str = "detached";

/// What is answered when no leader confirmed that.
pub const DETACHED_UNHEARD: &str = "detached, but no coordinator confirmed it: start the next agent at once. What runs here runs elsewhere, \
     too, when a lease is over, which began when this agent was last heard, or begins when somebody leads again";

/// How long a caller may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// How long the command waits for the agent to go.
const DETACH_LIMIT: Duration = Duration::from_secs(30);

/// A request, and where its answer goes.
#[derive(Debug)]
pub struct DetachRequest {
    stream: UnixStream,
}

impl DetachRequest {
    /// Tells the caller, at the very end.
    pub async fn answer(mut self, text: &str) {
        // A caller that has gone needs no answer.
        let _ = self.stream.write_all(format!("{text}\n").as_bytes()).await;
        let _ = self.stream.shutdown().await;
    }
}

/// A path that fits into a socket's address however long the directory's is; valid as long as the descriptor lives.
fn short_path(root: &Path) -> std::io::Result<(std::fs::File, std::path::PathBuf)> {
    let dir = std::fs::File::open(root)?;
    let path = format!("/proc/self/fd/{}", dir.as_raw_fd()).into();
    Ok((dir, path))
}

/// Listens in the data directory, which this process holds.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(root: &Path) -> std::io::Result<UnixListener> {
    let path = DataDir::control_socket(root);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_dir, short) = short_path(root)?;
    let listener = UnixListener::bind(DataDir::control_socket(&short))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes requests for ever, one at a time.
pub async fn serve(listener: UnixListener, requests: mpsc::Sender<DetachRequest>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket does not answer for a moment");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        match tokio::time::timeout(REQUEST_LIMIT, read_request(stream)).await {
            Ok(Some(request)) => {
                if requests.send(request).await.is_err() {
                    return;
                }
            }
            Ok(None) | Err(_) => tracing::warn!("a request on the control socket was not understood"),
        }
    }
}

async fn read_request(stream: UnixStream) -> Option<DetachRequest> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    (&mut reader).take(64).read_line(&mut line).await.ok()?;
    (line == "detach\n").then(|| DetachRequest { stream: reader.into_inner() })
}

/// The command's side: asks the agent of a data directory to go and waits until it does.
///
/// # Errors
/// When no agent runs there, or it does not go.
pub fn detach(root: &Path) -> anyhow::Result<()> {
    let (_dir, short) = short_path(root).with_context(|| format!("cannot open {}", root.display()))?;
    let mut stream = std::os::unix::net::UnixStream::connect(DataDir::control_socket(&short))
        .with_context(|| format!("no agent runs on {}", root.display()))?;
    stream.set_read_timeout(Some(DETACH_LIMIT))?;
    stream.write_all(b"detach\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the agent does not answer")?;
    match answer.trim() {
        DETACHED => Ok(()),
        DETACHED_UNHEARD => {
            eprintln!("helix-agent: {DETACHED_UNHEARD}");
            Ok(())
        }
        other => bail!("the agent did not detach: {other}"),
    }
}
