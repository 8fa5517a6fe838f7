//! This coordinator's own blobs: small ones in segments, large ones in files, leases over both.
//!
//! Nothing here knows of peers or of the registry. Hashing and files are off the async threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use helix_common::files::available_bytes;
use helix_common::sha256::Sha256;
use helix_model::Digest;
use helix_model::limits::SMALL_BLOB_BYTES_MAX;

use super::bucket::Bucket;
use super::check::Check;
use super::health::Health;
use super::large::format::LargeBlob;
use super::large::marker::object_name;
use super::large::upload::Upload;
use super::large::{Large, Removed, Sum};
use super::leases::Leases;
use super::segments::Segments;
use super::{BlobError, now_s};

/// What may be stored: the policy's part that concerns blobs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Largest blob.
    pub blob_bytes_max: u64,
    /// Bytes of the disk that stay free.
    pub disk_reserve_bytes: u64,
}

/// One coordinator's blobs.
pub struct BlobStore {
    root: PathBuf,
    pub(super) small: Segments,
    large: Arc<Large>,
    leases: Arc<Leases>,
    health: Arc<Health>,
    bucket: Option<Arc<Bucket>>,
    /// Bytes that uploads under way have announced and not yet written.
    expected: AtomicU64,
}

/// What the store holds, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BlobTotals {
    /// Blobs in segments.
    pub small: u64,
    /// Their bytes.
    pub small_bytes: u64,
    /// Blobs in files.
    pub large: u64,
    /// Their bytes.
    pub large_bytes: u64,
    /// Blobs in the bucket.
    pub bucket: u64,
    /// Their bytes.
    pub bucket_bytes: u64,
    /// Fsyncs of segments since the start.
    pub segment_syncs: u64,
}

impl BlobStore {
    /// Opens the store beneath `root`, which it has for itself. Returns the digests of blobs that it found damaged.
    /// Without the bucket that some went to those are held, and cannot be read. Blocks while it reads what is there.
    ///
    /// # Errors
    /// When the directory cannot be read or written.
    pub fn open(
        root: &Path,
        lease: Duration,
        bucket: Option<Arc<Bucket>>,
    ) -> std::io::Result<(Arc<Self>, Vec<Digest>)> {
        std::fs::create_dir_all(root)?;
        let leases = Arc::new(Leases::new(lease));
        let health = Arc::new(Health::default());
        let (small, damaged) = Segments::open(&root.join("segments"), Arc::clone(&leases), Arc::clone(&health))?;
        let large = Arc::new(Large::open(root, Arc::clone(&health), bucket.clone())?);
        let store = Self { root: root.to_owned(), small, large, leases, health, bucket, expected: AtomicU64::new(0) };
        Ok((Arc::new(store), damaged))
    }

    /// The size of a blob that is here.
    #[must_use]
    pub fn size(&self, digest: &Digest) -> Option<u64> {
        self.small.size(digest).or_else(|| self.large.size(digest))
    }

    /// As [`Self::size`], and leases the blob: it stays at least that long.
    #[must_use]
    pub fn lease(&self, digest: &Digest) -> Option<u64> {
        self.size(digest)?;
        self.leases.give(*digest);
        // Asked again: a removal that did not see the lease has been by now.
        self.size(digest)
    }

    /// Blobs that are here and leased, in order from behind `after` on, at most `max`.
    #[must_use]
    pub fn leased(&self, after: Option<Digest>, max: usize) -> Vec<Digest> {
        let mut found = self.leases.all();
        found.retain(|digest| after.is_none_or(|after| *digest > after));
        found.sort_unstable();
        found.into_iter().filter(|digest| self.size(digest).is_some()).take(max).collect()
    }

    /// What is wrong with what is here.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn is_leased(&self, digest: &Digest) -> bool {
        self.leases.holds(digest)
    }

    /// Parts of what is here, such that each fits into memory.
    pub(super) fn shelves(&self) -> Vec<Shelf> {
        let segments = self.small.numbers().into_iter().map(Shelf::Segment);
        segments.chain((0..=u8::MAX).map(Shelf::Files)).collect()
    }

    /// The blobs of one part.
    pub(super) fn on_shelf(&self, shelf: Shelf) -> Vec<Digest> {
        match shelf {
            Shelf::Segment(number) => self.small.inside(number),
            Shelf::Files(first) => self.large.beginning_with(first),
        }
    }

    /// Reads a blob again from the disk, step by step.
    pub(super) fn check(self: &Arc<Self>, digest: Digest) -> Check {
        Check::new(Arc::clone(self), digest)
    }

    /// How long a lease lasts.
    #[must_use]
    pub fn lease_duration(&self) -> Duration {
        self.leases.duration()
    }

    /// What is here.
    #[must_use]
    pub fn totals(&self) -> BlobTotals {
        let ((small, small_bytes), (large, bucket)) = (self.small.totals(), self.large.totals());
        let (Sum { blobs: large, bytes: large_bytes }, Sum { blobs: bucket, bytes: bucket_bytes }) = (large, bucket);
        let segment_syncs = self.small.syncs();
        BlobTotals { small, small_bytes, large, large_bytes, bucket, bucket_bytes, segment_syncs }
    }

    /// Stores small blobs. Each is checked against its digest; answers when all are durable.
    ///
    /// # Errors
    /// The first that fails; others may have been stored.
    pub async fn put_small(self: &Arc<Self>, blobs: Vec<(Digest, Bytes)>, room: Room) -> Result<(), BlobError> {
        let store = Arc::clone(self);
        let missing = blocking(move || {
            let missing: Vec<_> = blobs.into_iter().filter(|(digest, _)| store.lease(digest).is_none()).collect();
            let bytes = missing.iter().map(|(_, data)| data.len() as u64).sum();
            store.check_room(bytes, room)?;
            for (announced, data) in &missing {
                if data.len() as u64 > SMALL_BLOB_BYTES_MAX.min(room.blob_bytes_max) {
                    let max = SMALL_BLOB_BYTES_MAX.min(room.blob_bytes_max);
                    return Err(BlobError::TooLarge { size: data.len() as u64, max });
                }
                let actual = Sha256::digest(data);
                if actual != *announced {
                    return Err(BlobError::Digest { announced: *announced, actual, resumed: false });
                }
            }
            Ok(missing)
        })
        .await?;
        let puts = missing.into_iter().map(|(digest, data)| {
            self.leases.give(digest);
            self.small.put(digest, data)
        });
        futures::future::try_join_all(puts).await.map(|_| ())
    }

    /// Begins the upload of a blob, or goes on with it at `offset`.
    ///
    /// # Errors
    /// When there is no room for it, before the first byte; or when fewer bytes than `offset` are here.
    pub(super) async fn upload(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
        offset: u64,
        room: Room,
    ) -> Result<Receiving, BlobError> {
        if size > room.blob_bytes_max {
            return Err(BlobError::TooLarge { size, max: room.blob_bytes_max });
        }
        if offset > size {
            return Err(BlobError::Size { announced: size, sent: offset });
        }
        let store = Arc::clone(self);
        blocking(move || {
            let rest = size - offset;
            store.check_room(rest, room)?;
            store.leases.give(digest);
            let upload = store.large.upload(digest, size, offset)?;
            store.expected.fetch_add(rest, Ordering::Relaxed);
            Ok(Receiving { store, upload: Some(upload), expected: rest })
        })
        .await
    }

    /// Bytes of an unfinished upload that are here.
    pub async fn upload_offset(self: &Arc<Self>, digest: Digest) -> Result<u64, BlobError> {
        let store = Arc::clone(self);
        blocking(move || Ok(store.large.part_len(&digest, u64::MAX))).await
    }

    /// Opens a blob that is here; `None` if it is not. A damaged one is an error, and is not served again.
    ///
    /// # Errors
    /// When it is damaged or cannot be read.
    pub async fn read(self: &Arc<Self>, digest: Digest) -> Result<Option<LocalBlob>, BlobError> {
        let store = Arc::clone(self);
        blocking(move || {
            if let Some(data) = store.small.read(&digest)? {
                return Ok(Some(LocalBlob::Small(data)));
            }
            Ok(store
                .large
                .read(&digest)?
                .map(|file| LocalBlob::Large(Arc::new(file), Arc::clone(&store.large), digest)))
        })
        .await
    }

    /// Looks at a blob that was set aside once more, and puts it back if nothing is wrong with it; whether it is here.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) async fn reinstate(self: &Arc<Self>, digest: Digest) -> Result<bool, BlobError> {
        let store = Arc::clone(self);
        let small = blocking(move || Ok(store.small.reinstate(&digest))).await?;
        Ok(small || self.large.reinstate(digest).await?)
    }

    /// Blobs that are at least `age` old and not leased.
    #[must_use]
    pub fn collectable(&self, age: Duration) -> Vec<Digest> {
        let before = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut old = self.small.stored_before(now_s().saturating_sub(age.as_secs()));
        old.extend(self.large.stored_before(before));
        old.retain(|digest| !self.leases.holds(digest));
        old
    }

    /// Removes a blob, unless it was leased meanwhile.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn remove(self: &Arc<Self>, digest: Digest) -> Result<(), BlobError> {
        if self.small.size(&digest).is_some() {
            self.small.remove(digest).await?;
        }
        let store = Arc::clone(self);
        let removed = blocking(move || Ok(store.large.remove(&digest, &store.leases)?)).await?;
        if let (Removed::Marker(object), Some(bucket)) = (removed, &self.bucket)
            && let Err(error) = bucket.delete(&object_name(&digest, object)).await
        {
            // Found by listing, and removed then.
            tracing::debug!(%digest, %error, "the object of a blob that was removed stays for now");
        }
        Ok(())
    }

    /// Large blobs, wherever they lie.
    pub(super) fn large(&self) -> &Arc<Large> {
        &self.large
    }

    /// Where large blobs may go.
    #[must_use]
    pub fn bucket(&self) -> Option<&Arc<Bucket>> {
        self.bucket.as_ref()
    }

    /// Bytes that are free where the blobs lie.
    pub(super) fn free_bytes(&self) -> std::io::Result<u64> {
        available_bytes(&self.root)
    }

    /// Removes uploads that nobody went on with for a day.
    pub async fn remove_stale_uploads(self: &Arc<Self>) -> Result<(), BlobError> {
        let store = Arc::clone(self);
        blocking(move || {
            store.large.remove_stale();
            Ok(())
        })
        .await
    }

    /// Refuses so many bytes where they would not leave the reserve. None always fit.
    pub(super) fn check_room(&self, bytes: u64, room: Room) -> Result<(), BlobError> {
        let free = available_bytes(&self.root)?;
        let expected = self.expected.load(Ordering::Relaxed);
        let needed = bytes.saturating_add(expected).saturating_add(room.disk_reserve_bytes);
        if bytes > 0 && free < needed {
            return Err(BlobError::DiskReserve { free, reserve: room.disk_reserve_bytes });
        }
        Ok(())
    }
}

/// An upload under way, and the room that it was promised.
pub(super) struct Receiving {
    store: Arc<BlobStore>,
    upload: Option<Upload>,
    expected: u64,
}

impl Receiving {
    /// Bytes that are here.
    #[cfg(test)]
    pub(super) fn offset(&self) -> u64 {
        self.upload.as_ref().map_or(0, Upload::offset)
    }

    /// Adds bytes. Blocks.
    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), BlobError> {
        let upload = self.upload.as_mut().ok_or(BlobError::Closed)?;
        upload.write(data)?;
        let arrived = (data.len() as u64).min(self.expected);
        self.expected -= arrived;
        self.store.expected.fetch_sub(arrived, Ordering::Relaxed);
        Ok(())
    }

    /// Checks it and makes it durable. Blocks.
    pub(super) fn finish(mut self) -> Result<(), BlobError> {
        self.upload.take().ok_or(BlobError::Closed)?.finish()
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.store.expected.fetch_sub(self.expected, Ordering::Relaxed);
    }
}

/// A blob of this coordinator, open for reading.
#[derive(Clone)]
pub enum LocalBlob {
    /// In memory.
    Small(Bytes),
    /// In its file, or in the bucket.
    #[allow(private_interfaces)]
    Large(Arc<LargeBlob>, Arc<Large>, Digest),
}

impl LocalBlob {
    /// The blob's size.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Small(data) => data.len() as u64,
            Self::Large(file, ..) => file.size(),
        }
    }

    /// Bytes from `offset` on, at most a chunk, checked; empty at the end.
    ///
    /// # Errors
    /// When they are damaged: the blob is then set aside.
    pub async fn chunk(&self, offset: u64) -> Result<Bytes, BlobError> {
        match self {
            Self::Small(data) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
                Ok(data.slice(from..))
            }
            Self::Large(blob, store, digest) => {
                let chunk = blob.chunk(offset).await;
                if matches!(chunk, Err(BlobError::Damaged(_))) {
                    set_aside(store, *digest, blob).await;
                }
                chunk
            }
        }
    }
}

/// Takes a blob out of service that is damaged where it lies.
pub(super) async fn set_aside(store: &Arc<Large>, digest: Digest, blob: &LargeBlob) {
    let (store, lies) = (Arc::clone(store), blob.lies());
    // It fails when the runtime ends: then it is found again.
    let _ = blocking(move || {
        store.set_aside(&digest, lies);
        Ok(())
    })
    .await;
}

/// Part of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shelf {
    /// A segment.
    Segment(u32),
    /// The files whose digests begin with this byte.
    Files(u8),
}

/// Runs what blocks on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    // It fails only when the work panicked or the runtime ends.
    tokio::task::spawn_blocking(work).await.map_err(|_| BlobError::Closed)?
}
