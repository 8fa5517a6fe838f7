//! Where a large blob's bytes lie: in its file here, or in an object of a bucket (`bucket`).
//!
//! A place is not trusted. Whoever reads holds what it gives against the checksums, which never come from there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

/// Bytes of one blob, to be read in any order.
pub(in crate::blobs) trait Place: Send + Sync {
    /// Reads exactly these bytes.
    fn read(&self, at: u64, len: usize) -> BoxFuture<'_, Result<Bytes, Unread>>;

    /// Has what lies there come from where it lies when it is read next, and not from what is kept of it on the way.
    fn forget(&self, at: u64, len: usize) -> BoxFuture<'_, ()>;
}

/// Why bytes were not read.
#[derive(Debug)]
pub(in crate::blobs) enum Unread {
    /// They are not there, or are not what they were.
    Damaged(String),
    /// The place does not answer: nothing is known of the bytes.
    Away(String),
    /// The store is closing.
    Closed,
}

/// A file.
pub(super) struct InFile(pub(super) Arc<File>);

impl Place for InFile {
    fn read(&self, at: u64, len: usize) -> BoxFuture<'_, Result<Bytes, Unread>> {
        let file = Arc::clone(&self.0);
        Box::pin(async move {
            let read = move || {
                let mut data = vec![0; len];
                file.read_exact_at(&mut data, at).map(|()| data)
            };
            match tokio::task::spawn_blocking(read).await {
                Ok(Ok(data)) => Ok(data.into()),
                Ok(Err(error)) => Err(Unread::Damaged(error.to_string())),
                Err(_) => Err(Unread::Closed),
            }
        })
    }

    fn forget(&self, at: u64, len: usize) -> BoxFuture<'_, ()> {
        let len = std::num::NonZeroU64::new(len as u64);
        // Advice: without it older bytes are checked.
        let _ = rustix::fs::fadvise(&*self.0, at, len, rustix::fs::Advice::DontNeed);
        Box::pin(std::future::ready(()))
    }
}
