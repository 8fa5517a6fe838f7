//! A blob in its object: read in ranges that grow while a reader goes on, so that a far bucket does not cost a round trip a chunk.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use helix_model::limits::CHUNK_BYTES;
use tokio::sync::Mutex;

use super::Bucket;
use crate::blobs::large::format::Tail;
use crate::blobs::large::place::{Place, Unread};

/// Bytes that are asked for at once, at most: what a reader holds in memory.
const AHEAD_BYTES_MAX: usize = 16 * CHUNK_BYTES;

/// A blob's bytes in the bucket.
pub(in crate::blobs) struct InBucket {
    bucket: Option<Arc<Bucket>>,
    name: String,
    size: u64,
    whole: u64,
    /// What was read last. Readers of one blob that share it take turns.
    window: Mutex<Window>,
}

#[derive(Default)]
struct Window {
    at: u64,
    bytes: Bytes,
}

impl Window {
    fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    fn cut(&self, at: u64, len: usize) -> Option<Bytes> {
        let from = usize::try_from(at.checked_sub(self.at)?).ok()?;
        let to = from.checked_add(len).filter(|to| *to <= self.bytes.len())?;
        Some(self.bytes.slice(from..to))
    }
}

impl InBucket {
    pub(in crate::blobs) fn new(bucket: Option<Arc<Bucket>>, name: String, tail: &Tail) -> Self {
        Self { bucket, name, size: tail.size, whole: tail.whole(), window: Mutex::default() }
    }
}

impl Place for InBucket {
    fn read(&self, at: u64, len: usize) -> BoxFuture<'_, Result<Bytes, Unread>> {
        Box::pin(async move {
            let Some(bucket) = &self.bucket else {
                return Err(Unread::Away("it lies in a bucket, and [blobs.s3] is not configured".to_owned()));
            };
            let mut window = self.window.lock().await;
            if let Some(bytes) = window.cut(at, len) {
                return Ok(bytes);
            }
            // Twice as much as before for who reads on, no more than asked for to others.
            let goes_on = at == window.end() && at > 0;
            let ahead = if goes_on { (window.bytes.len() * 2).clamp(len, AHEAD_BYTES_MAX) } else { len };
            let end = (at + ahead as u64).min(self.size).max(at + len as u64);
            *window = Window::default();
            let bytes = bucket.get(&self.name, at..end, self.whole).await?;
            *window = Window { at, bytes: bytes.clone() };
            Ok(bytes.slice(..len))
        })
    }

    fn forget(&self, at: u64, len: usize) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let mut window = self.window.lock().await;
            if window.cut(at, len.min(1)).is_some() {
                *window = Window::default();
            }
        })
    }
}
