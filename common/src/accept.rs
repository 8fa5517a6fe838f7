//! The accept loop: from a listening socket to connections whose peer is known.
//!
//! tonic's own TLS cannot reload, check revocation or show an identity, so this feeds its
//! `serve_with_incoming_shutdown`. Handshakes run beside each other, each with a time-out; when too many are under
//! way the oldest gives way, so that a crowd of half-open connections cannot keep a legitimate one out.
//! Invariant: the stream never ends and never yields an error.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

pub use crate::tls::PeerInfo;
use crate::tls::{Guarded, Side, TlsStore};

/// How long [`bind`] goes on trying a port that is in use.
const BIND_RETRY: Duration = Duration::from_secs(1);

/// The pause after `accept` failed, as it does when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Calls that one peer may have open at once on a connection; a follower of logs has one each.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 1024;

/// Bounds of an accept loop.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A handshake that takes longer is dropped.
    pub handshake_timeout: Duration,
    /// Handshakes under way at once; beyond it the oldest is dropped.
    pub handshakes_max: usize,
    /// Connections at once; beyond it new ones are dropped, so that descriptors remain for files.
    pub connections_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(5), handshakes_max: 2048, connections_max: 16_384 }
    }
}

/// Listens on an address. A port in use is tried again for a second: after a crash the kernel may hold it for a moment.
///
/// # Errors
/// When the address cannot be had; a port in use is named, with what to do.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let end = Instant::now() + BIND_RETRY;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                sleep(Duration::from_millis(50)).await;
            }
            Err(error) => {
                let advice = match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        format!(
                            "; stop the process that has it (`ss -ltnp 'sport = :{}'` names it) or configure another port",
                            address.port()
                        )
                    }
                    io::ErrorKind::AddrNotAvailable => "; this machine has no such address".to_owned(),
                    _ => String::new(),
                };
                return Err(io::Error::new(error.kind(), format!("cannot listen on {address}: {error}{advice}")));
            }
            listener => return listener,
        }
    }
}

/// A tonic server with the bounds that every server of ours wants: dead peers are noticed in 15 s, and no peer may open
/// streams, reset them or send headers without limit. Layers, services and message limits are the caller's.
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION_MAX))
        .http2_max_pending_accept_reset_streams(Some(32))
        .http2_max_header_list_size(16 * 1024)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
}

/// Accepts connections for ever. Give the stream to tonic; dropping it ends the listening and all handshakes.
#[must_use]
pub fn serve(listener: TcpListener, tls: Arc<TlsStore>, limits: Limits) -> Incoming {
    Incoming {
        listener,
        tls,
        places: Arc::new(Semaphore::new(limits.connections_max.min(Semaphore::MAX_PERMITS))),
        limits,
        handshakes: JoinSet::new(),
        oldest_first: VecDeque::new(),
        pause: None,
        refusals: Refusals::default(),
    }
}

/// The stream of connections that [`serve`] makes.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    tls: Arc<TlsStore>,
    limits: Limits,
    places: Arc<Semaphore>,
    handshakes: JoinSet<Result<TlsConnection, Refusal>>,
    oldest_first: VecDeque<AbortHandle>,
    pause: Option<Pin<Box<Sleep>>>,
    refusals: Refusals,
}

#[derive(Debug)]
struct Refusal {
    address: SocketAddr,
    why: io::Error,
}

impl Incoming {
    /// The address listened on.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    fn admit(&mut self, stream: TcpStream, address: SocketAddr) {
        // Finished ones do not count, and hold memory.
        if self.oldest_first.len() >= self.limits.handshakes_max
            || self.oldest_first.len() > 2 * self.handshakes.len() + 16
        {
            self.oldest_first.retain(|handshake| !handshake.is_finished());
        }
        if self.oldest_first.len() >= self.limits.handshakes_max && self.drop_oldest() {
            self.refusals.note("accept", &"too many handshakes; the oldest is dropped");
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            self.refusals.note(&address, &"too many connections");
            return;
        };
        let tls = Arc::clone(&self.tls);
        let timeout = self.limits.handshake_timeout;
        self.oldest_first.push_back(self.handshakes.spawn(async move {
            shake_hands(stream, address, &tls, timeout, place).await.map_err(|why| Refusal { address, why })
        }));
    }

    /// Drops the handshake that has been under way for longest. Says whether there was one.
    fn drop_oldest(&mut self) -> bool {
        while let Some(oldest) = self.oldest_first.pop_front() {
            if !oldest.is_finished() {
                oldest.abort();
                return true;
            }
        }
        false
    }
}

async fn shake_hands(
    stream: TcpStream,
    address: SocketAddr,
    tls: &TlsStore,
    timeout: Duration,
    place: OwnedSemaphorePermit,
) -> io::Result<TlsConnection> {
    stream.set_nodelay(true)?;
    let acceptor = TlsAcceptor::from(tls.server_config());
    let stream = tokio::time::timeout(timeout, acceptor.accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("no handshake within {timeout:?}")))??;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(io::Error::other("the client offered no HTTP/2 (ALPN h2)"));
    }
    let chain: Vec<_> = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
    let (inner, peer) = tls.guard(stream, &chain, address, Side::Client).map_err(io::Error::other)?;
    Ok(TlsConnection { inner, peer, _place: place })
}

impl Stream for Incoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            while let Poll::Ready(Some(ended)) = this.handshakes.poll_join_next(ctx) {
                match ended {
                    Ok(Ok(connection)) => return Poll::Ready(Some(Ok(connection))),
                    // A probe, or a client that changed its mind.
                    Ok(Err(refusal)) if left(&refusal.why) => {
                        tracing::debug!(address = %refusal.address, "left before the handshake was done");
                    }
                    Ok(Err(refusal)) => this.refusals.note(&refusal.address, &refusal.why),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => tracing::error!(%error, "a handshake panicked"),
                }
            }
            if let Some(pause) = &mut this.pause {
                std::task::ready!(pause.as_mut().poll(ctx));
                this.pause = None;
            }
            match std::task::ready!(this.listener.poll_accept(ctx)) {
                Ok((stream, address)) => this.admit(stream, address),
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) => {
                    // Most likely out of descriptors: whoever has waited longest for a handshake gives its up.
                    let dropped = this.drop_oldest();
                    this.refusals.note(&"accept", &format_args!("{error}; handshake dropped: {dropped}; trying again"));
                    this.pause = Some(Box::pin(sleep_until(Instant::now() + ACCEPT_PAUSE)));
                }
            }
        }
    }
}

fn left(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Says why connections were refused, once a second at most: whoever knocks must not fill the log.
#[derive(Default, Debug)]
struct Refusals {
    last: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    fn note(&mut self, who: &(impl std::fmt::Display + ?Sized), why: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.unsaid += 1;
            return;
        }
        tracing::warn!(target: "audit", address = %who, %why, unsaid = self.unsaid, "connection refused");
        self.last = Some(now);
        self.unsaid = 0;
    }
}

/// A connection whose handshake is done and whose peer is known. Reads and writes fail once the peer is revoked.
#[derive(Debug)]
pub struct TlsConnection {
    inner: Guarded<TlsStream<TcpStream>>,
    peer: PeerInfo,
    _place: OwnedSemaphorePermit,
}

impl TlsConnection {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, ctx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(ctx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, ctx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(ctx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(ctx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(ctx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(ctx)
    }
}
