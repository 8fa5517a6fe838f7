//! The end of a snapshot's walk: its file and the store are made durable on a thread of their own, since that may take long where much was
//! written, and what is applied meanwhile would wait for the writer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use super::super::snapshot::SnapshotWriter;
use super::super::store::guarded;
use super::super::types::SnapshotMeta;
use super::{Inner, Request};

/// Who waits for a snapshot.
pub(super) type Replies = Vec<oneshot::Sender<io::Result<(SnapshotMeta, PathBuf)>>>;

/// A snapshot whose rows are all in its file.
pub(super) struct Ending {
    meta: SnapshotMeta,
    replies: Replies,
    thread: JoinHandle<()>,
}

impl Ending {
    /// Starts the thread. Its last act is a [`Request::Ended`].
    pub(super) fn start(
        inner: &Arc<Inner>,
        meta: SnapshotMeta,
        file: SnapshotWriter,
        replies: Replies,
    ) -> Option<Self> {
        let (inner, copy) = (Arc::clone(inner), meta.clone());
        let work = move || {
            let ended = guarded(|| end(&inner, copy, file));
            inner.pending().requests.push(Request::Ended(ended));
            inner.wake.notify_one();
        };
        match std::thread::Builder::new().name("snapshot-end".to_owned()).spawn(work) {
            Ok(thread) => Some(Self { meta, replies, thread }),
            Err(error) => {
                tell(replies, &Err(error));
                None
            }
        }
    }

    /// Tells how it came out.
    pub(super) fn tell(self, ended: io::Result<PathBuf>) {
        let Self { meta, replies, thread } = self;
        // It catches its panics.
        let _ = thread.join();
        tell(replies, &ended.map(|path| (meta, path)));
    }

    /// The store is not written any more. The thread is not waited for: the disk that failed may keep it for long.
    pub(super) fn give_up(self) {
        tell(self.replies, &Err(io::Error::other("the store is not written any more")));
    }
}

fn end(inner: &Inner, meta: SnapshotMeta, file: SnapshotWriter) -> io::Result<PathBuf> {
    let path = file.finish()?;
    // From here on the log may be purged up to the older snapshot: the store must be as far on disk.
    inner.store.sync()?;
    inner.counters.snapshots.add(1);
    inner.keep(meta, path.clone())?;
    Ok(path)
}

/// Tells all who wait.
pub(super) fn tell(replies: Replies, result: &io::Result<(SnapshotMeta, PathBuf)>) {
    for reply in replies {
        let copy = match result {
            Ok(found) => Ok(found.clone()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // Whoever went away does not want to know.
        drop(reply.send(copy));
    }
}
