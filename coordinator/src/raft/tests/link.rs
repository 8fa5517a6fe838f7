//! A link to a node that is slow, or whose connections break.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// What it carries at once.
const STEP_BYTES: usize = 16 << 10;

/// It ends with this.
pub(super) struct Link {
    pub(super) state: Arc<State>,
    task: JoinHandle<()>,
}

/// What it did, and does.
pub(super) struct State {
    /// Bytes towards the node.
    pub(super) carried: AtomicU64,
    /// Connections that broke.
    pub(super) broken: AtomicU64,
    /// A connection breaks when it has carried so many bytes towards the node.
    pub(super) breaks_after: AtomicU64,
    /// After each step of a connection that has carried many.
    pub(super) rest: Duration,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Carries what arrives at one address to another.
    pub(super) async fn between(from: SocketAddr, to: SocketAddr, breaks_after: u64, rest: Duration) -> Self {
        let listener = TcpListener::bind(from).await.unwrap();
        let (carried, broken) = (AtomicU64::new(0), AtomicU64::new(0));
        let state = Arc::new(State { carried, broken, breaks_after: AtomicU64::new(breaks_after), rest });
        let task = tokio::spawn(serve(listener, to, Arc::clone(&state)));
        Self { state, task }
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((dialler, _)) = listener.accept().await else { continue };
        let state = Arc::clone(&state);
        connections.spawn(async move {
            // Nobody listens while the node is down.
            let Ok(node) = TcpStream::connect(to).await else { return };
            let (mut from_dialler, mut to_dialler) = dialler.into_split();
            let (mut from_node, mut to_node) = node.into_split();
            tokio::select! {
                // Either side may close; both are closed then.
                _ = tokio::io::copy(&mut from_node, &mut to_dialler) => {}
                () = carry(&mut from_dialler, &mut to_node, &state) => {}
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin), state: &State) {
    let (mut buffer, mut carried) = (vec![0; STEP_BYTES], 0);
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        carried += read as u64;
        state.carried.fetch_add(read as u64, Ordering::Relaxed);
        if carried > state.breaks_after.load(Ordering::Relaxed) {
            state.broken.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // What is small, as heartbeats are, is not held up.
        if carried > STEP_BYTES as u64 * 4 {
            tokio::time::sleep(state.rest).await;
        }
    }
}
