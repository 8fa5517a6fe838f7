//! A stream that can be cut from outside, when the other end is no longer trusted, and ends when its certificate does.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::TlsStore;
use std::sync::Arc;

/// Between looks at the wall clock, which may have been set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

/// The switch of one connection.
#[derive(Default, Debug)]
pub(crate) struct Cut {
    done: AtomicBool,
    reader: AtomicWaker,
}

impl Cut {
    pub(crate) fn cut(&self) {
        self.done.store(true, Ordering::Release);
        self.reader.wake();
    }

    fn is_cut(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

/// A connection's place in its store; given back when the connection ends.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) store: Weak<TlsStore>,
    pub(crate) id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.forget(self.id);
        }
    }
}

/// A TLS stream whose peer is trusted: reads and writes fail with `ConnectionAborted` once it no longer is, and reads once
/// its certificate has run out. Whoever has a newer one connects anew with that.
#[derive(Debug)]
pub struct Guarded<S> {
    inner: S,
    cut: Arc<Cut>,
    not_after: SystemTime,
    look: Pin<Box<Sleep>>,
    _registration: Registration,
}

impl<S> Guarded<S> {
    pub(crate) fn new(inner: S, cut: Arc<Cut>, not_after: SystemTime, registration: Registration) -> Self {
        let look = Box::pin(sleep(until(not_after).unwrap_or_default()));
        Self { inner, cut, not_after, look, _registration: registration }
    }

    /// Fails once the peer's certificate has run out; wakes the reader then.
    fn check_end(&mut self, ctx: &mut Context<'_>) -> io::Result<()> {
        while self.look.as_mut().poll(ctx).is_ready() {
            let Some(wait) = until(self.not_after) else {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the peer's certificate has expired"));
            };
            self.look.as_mut().reset(Instant::now() + wait);
        }
        Ok(())
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.is_cut() {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the peer's certificate is no longer trusted",
            ));
        }
        Ok(())
    }
}

/// How long to wait before looking whether a certificate has run out; `None` once it has.
fn until(not_after: SystemTime) -> Option<Duration> {
    // The last second of its validity belongs to it.
    let left = (not_after + Duration::from_secs(1)).duration_since(SystemTime::now()).ok()?;
    // A timer counts milliseconds: never so early that it is asked again at once.
    Some((left + Duration::from_millis(1)).min(LOOK_AGAIN))
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, ctx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Registered before the check: a cut in between wakes us. HTTP/2 always has a read pending.
        self.cut.reader.register(ctx.waker());
        self.check()?;
        self.check_end(ctx)?;
        Pin::new(&mut self.inner).poll_read(ctx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, ctx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write(ctx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        ctx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write_vectored(ctx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_flush(ctx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_shutdown(ctx)
    }
}
