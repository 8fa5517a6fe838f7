//! Reading all blobs of this coordinator again, slowly and for ever, so that damage is found while there are other copies.
//!
//! Each blob is read from the disk, past what the system keeps of it in memory, and held against its checksums and its name. What is not
//! what it was is set aside and fetched again (see `mend`). Policy says how many bytes a second (`scrub_bytes`), and changes it
//! at once. A restart begins a new pass.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Blobs;

/// A pass begins so long after the one before, however fast that was.
const PASS_EVERY: Duration = Duration::from_secs(86_400);

/// The longest time without a look at the policy.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a blob counts for at least.
const SEEK_BYTES: u64 = 4096;

/// See [`Scrub::run`].
pub struct Scrub {
    blobs: Arc<Blobs>,
}

impl Scrub {
    pub(super) fn new(blobs: Arc<Blobs>) -> Self {
        Self { blobs }
    }

    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let forever = async {
            loop {
                let begun = Instant::now();
                self.pass().await;
                tokio::time::sleep_until(begun + PASS_EVERY).await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = forever => {}
        }
    }

    /// Reads every blob once.
    pub(super) async fn pass(&self) {
        let store = self.blobs.store();
        for shelf in store.shelves() {
            for digest in store.on_shelf(shelf) {
                let mut check = store.check(digest);
                loop {
                    match check.step().await {
                        Ok(0) => break,
                        Ok(bytes) => self.pace(bytes).await,
                        // It was set aside, and whoever mends knows of it; or the system is short of something.
                        Err(error) => {
                            tracing::debug!(%digest, %error, "a blob was not read to its end");
                            // A disk that fails everywhere is not gone through at its speed.
                            self.pace(SEEK_BYTES).await;
                            break;
                        }
                    }
                }
                self.blobs.health().scrubbed(check.read());
            }
        }
        self.blobs.health().passed();
    }

    /// Waits as long as reading so much may take.
    async fn pace(&self, bytes: u64) {
        // A small blob costs a seek, whatever its size.
        let mut left = bytes.max(SEEK_BYTES) as f64;
        loop {
            let rate = self.blobs.plane.policy().scrub_bytes as f64;
            let wait = left / rate;
            if wait <= LOOK_EVERY.as_secs_f64() {
                return tokio::time::sleep(Duration::from_secs_f64(wait)).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
            left -= rate * LOOK_EVERY.as_secs_f64();
        }
    }
}
