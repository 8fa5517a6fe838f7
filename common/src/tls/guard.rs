//! A stream that can be cut from outside, when the other end is no longer trusted.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::TlsStore;
use std::sync::Arc;

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

/// A TLS stream whose peer is trusted: reads and writes fail with `ConnectionAborted` once it no longer is.
#[derive(Debug)]
pub struct Guarded<S> {
    inner: S,
    cut: Arc<Cut>,
    _registration: Registration,
}

impl<S> Guarded<S> {
    pub(crate) fn new(inner: S, cut: Arc<Cut>, registration: Registration) -> Self {
        Self { inner, cut, _registration: registration }
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

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, ctx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Registered before the check: a cut in between wakes us. HTTP/2 always has a read pending.
        self.cut.reader.register(ctx.waker());
        self.check()?;
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
