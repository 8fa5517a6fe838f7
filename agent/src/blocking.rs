//! Files off the async threads: a disk that hangs must not hold up heartbeats.

use std::io;

/// Runs a piece of blocking work on a thread for it.
///
/// # Errors
/// The work's, or that it panicked.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
