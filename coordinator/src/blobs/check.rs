//! Reading one blob again from where it lies, step by step, and holding it against its checksums and its name.

use std::sync::Arc;

use helix_common::sha256::Sha256;
use helix_model::Digest;

use super::BlobError;
use super::large::format::{LargeBlob, hashed};
use super::store::{BlobStore, blocking, set_aside};

/// A blob that is read again; see [`BlobStore::check`].
pub(super) struct Check {
    store: Arc<BlobStore>,
    digest: Digest,
    read: u64,
    file: Option<Arc<LargeBlob>>,
    sha256: Sha256,
}

impl Check {
    pub(super) fn new(store: Arc<BlobStore>, digest: Digest) -> Self {
        Self { store, digest, read: 0, file: None, sha256: Sha256::new() }
    }

    /// Bytes that were read.
    pub(super) fn read(&self) -> u64 {
        self.read
    }

    /// Reads and checks some more; how many bytes, 0 at the end, or when the blob is not here any more.
    ///
    /// # Errors
    /// When it is damaged: then it is set aside. Or when the system cannot open files.
    pub(super) async fn step(&mut self) -> Result<u64, BlobError> {
        let blob = match &self.file {
            Some(blob) => Arc::clone(blob),
            None if self.read > 0 => return Ok(0),
            None => match self.open().await? {
                Opened::Small(bytes) => {
                    self.read = bytes;
                    return Ok(bytes);
                }
                Opened::Large(blob) => blob,
            },
        };
        self.file = Some(Arc::clone(&blob));
        let checked = self.check_some(&blob).await;
        if matches!(checked, Err(BlobError::Damaged(_))) {
            set_aside(self.store.large(), self.digest, &blob).await;
        }
        checked
    }

    async fn open(&self) -> Result<Opened, BlobError> {
        let (store, digest) = (Arc::clone(&self.store), self.digest);
        blocking(move || match store.small.check(&digest)? {
            Some(bytes) => Ok(Opened::Small(bytes)),
            None => Ok(store.large().read(&digest)?.map_or(Opened::Small(0), |blob| Opened::Large(Arc::new(blob)))),
        })
        .await
    }

    async fn check_some(&mut self, blob: &LargeBlob) -> Result<u64, BlobError> {
        blob.forget(self.read).await;
        let data = blob.chunk(self.read).await?;
        let bytes = data.len() as u64;
        self.sha256 = hashed(std::mem::take(&mut self.sha256), data).await?;
        self.read += bytes;
        if self.read >= blob.size() && self.sha256.clone().finalize() != self.digest {
            tracing::error!(digest = %self.digest, "a blob holds other bytes than its name says, and is set aside");
            return Err(BlobError::Damaged(self.digest));
        }
        Ok(bytes)
    }
}

/// A blob that is to be read again.
enum Opened {
    /// So many bytes were read at once; 0 where there is none.
    Small(u64),
    Large(Arc<LargeBlob>),
}
