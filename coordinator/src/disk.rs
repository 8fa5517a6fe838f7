//! How much room is left for the data directory, asked of the file system once a second.
//!
//! Submits and bytes are refused below the policy's reserve; asking the kernel for each of them would put a
//! system call that may hang on every path.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use helix_common::files::available_bytes;
use helix_common::status::status;
use helix_model::ErrorCode;
use tokio_util::sync::CancellationToken;
use tonic::Status;

const INTERVAL: Duration = Duration::from_secs(1);

/// The room left, as last seen. Clones share it.
#[derive(Clone, Debug)]
pub struct DiskRoom {
    path: Arc<PathBuf>,
    free_bytes: Arc<AtomicU64>,
}

impl DiskRoom {
    /// Asks for the first time.
    ///
    /// # Errors
    /// When the file system does not answer.
    pub fn of(directory: &Path) -> std::io::Result<Self> {
        let free_bytes = available_bytes(directory)?;
        Ok(Self { path: Arc::new(directory.to_owned()), free_bytes: Arc::new(AtomicU64::new(free_bytes)) })
    }

    /// Bytes left.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Refuses what would take room while less than `reserve_bytes` is left.
    ///
    /// # Errors
    /// `disk_reserve`, which asks the client to retry.
    // A status is what the caller answers with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    pub fn expect_above(&self, reserve_bytes: u64) -> Result<(), Status> {
        let free = self.free_bytes();
        if free >= reserve_bytes {
            return Ok(());
        }
        let text = format!(
            "this coordinator has {free} bytes left on its disk and keeps {reserve_bytes} in reserve: free some, or retry on another"
        );
        Err(status(ErrorCode::DiskReserve, text))
    }

    /// Goes on asking until `stopping` is cancelled.
    pub async fn watch(self, stopping: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stopping.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let path = Arc::clone(&self.path);
            match tokio::task::spawn_blocking(move || available_bytes(&path)).await {
                Ok(Ok(free)) => self.free_bytes.store(free, Ordering::Relaxed),
                Ok(Err(error)) => tracing::warn!(%error, "the data directory's file system does not answer"),
                Err(error) => tracing::error!(%error, "asking for free disk space panicked"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_common::status::{error_code, retry_after};

    #[test]
    fn below_the_reserve_is_refused_with_a_time_to_retry() {
        let room = DiskRoom::of(Path::new("/")).unwrap();
        assert!(room.expect_above(0).is_ok());
        let refusal = room.expect_above(u64::MAX).unwrap_err();
        assert_eq!(error_code(&refusal), Some(ErrorCode::DiskReserve));
        assert!(retry_after(&refusal).is_some());
    }
}
