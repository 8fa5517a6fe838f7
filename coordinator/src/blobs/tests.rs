//! Blobs under crashes, damage, haste and bad peers. Real files, real servers on loopback.

#[cfg(feature = "s3")]
mod bucket;
#[cfg(feature = "s3")]
mod bucket_faults;
mod cluster;
mod endpoint;
mod local;
mod scrub;

use std::path::Path;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use sha2::{Digest as _, Sha256};

use self::endpoint::{BUCKET, Endpoint};
use super::bucket::Patience;
use super::offload::Mover;
use super::*;
use crate::config::S3;

/// Makes a test of each function that takes a [`Place`]: one with large blobs in files, one with large blobs in a bucket.
macro_rules! in_both_places {
    ($($name:ident,)*) => {
        mod in_files {
            $(#[tokio::test] async fn $name() { super::$name(super::Place::files()).await })*
        }
        #[cfg(feature = "s3")]
        mod in_a_bucket {
            $(#[tokio::test] async fn $name() { super::$name(super::Place::patient_bucket().await).await })*
        }
    };
}
use in_both_places;

/// Where large blobs lie in a test.
struct Place {
    endpoint: Option<Endpoint>,
    patience: Patience,
}

impl Place {
    fn files() -> Self {
        Self { endpoint: None, patience: Patience::default() }
    }

    /// A bucket that may be made not to answer.
    async fn bucket() -> Self {
        Self { endpoint: Some(Endpoint::start().await), patience: HASTE }
    }

    /// A bucket that always answers, however busy the machine is.
    async fn patient_bucket() -> Self {
        Self { endpoint: Some(Endpoint::start().await), patience: Patience::default() }
    }

    /// The part of the bucket that belongs to the blobs beneath `root`.
    fn open(&self, root: &Path) -> Option<Bucket> {
        let endpoint = self.endpoint.as_ref()?;
        Some(Bucket::open_with(&settings(endpoint), root, "test.1", self.patience).unwrap())
    }

    /// Moves all large blobs of a store to where they lie in this test.
    async fn settle(&self, store: &Arc<BlobStore>) {
        if self.endpoint.is_some() {
            let mover = Mover::new(Arc::clone(store), Arc::clone(store.bucket().unwrap()));
            mover.check().await.unwrap();
            for (_, digest) in store.large().in_files() {
                assert!(mover.go(digest).await.unwrap(), "{digest} does not move");
            }
            assert_eq!(store.totals().large, 0);
        }
    }

    /// The file that a large blob's bytes lie in; where several nodes have it in the bucket, the first's.
    fn file_of(&self, root: &Path, digest: &Digest) -> std::path::PathBuf {
        let file = file_of(root, digest);
        let Some(endpoint) = self.endpoint.as_ref().filter(|_| !file.exists()) else { return file };
        let own = std::fs::read_to_string(root.join("bucket")).unwrap();
        let is_of = |path: &std::path::PathBuf| {
            let path = path.to_str().unwrap();
            path.contains(&own) && path.contains(&digest.to_string())
        };
        endpoint.objects().into_iter().find(is_of).unwrap_or(file)
    }

    fn is_bucket(&self) -> bool {
        self.endpoint.is_some()
    }
}

/// Tests that wait for a time-out should not wait long.
const HASTE: Patience = Patience {
    connect: Duration::from_secs(3),
    request: Duration::from_secs(10),
    read: Duration::from_secs(3),
    retries: 1,
};

fn settings(endpoint: &Endpoint) -> S3 {
    let (id, secret) = endpoint.keys();
    let keys = format!("access_key_id_file = {id:?}\nsecret_access_key_file = {secret:?}\n");
    toml::from_str(&format!("bucket = {BUCKET:?}\nendpoint = {:?}\nallow_http = true\n{keys}", endpoint.url())).unwrap()
}

fn digest_of(data: &[u8]) -> Digest {
    Digest(Sha256::digest(data).into())
}

/// Bytes that differ with the seed and do not repeat at the length of a chunk.
fn bytes_of(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut data: Vec<u8> = (0..len.div_ceil(8)).flat_map(next).collect();
    data.truncate(len);
    data.into()
}

fn chunks(data: &Bytes) -> impl Stream<Item = Result<Bytes, Status>> + Send + Unpin + use<> {
    let data = data.clone();
    let starts = (0..data.len()).step_by(100_000);
    let parts: Vec<_> = starts.map(|at| Ok(data.slice(at..data.len().min(at + 100_000)))).collect();
    futures::stream::iter(parts)
}

fn room() -> Room {
    Room { blob_bytes_max: 1 << 30, disk_reserve_bytes: 0 }
}

fn announce(data: &Bytes, copies: u32) -> Announce {
    Announce { digest: digest_of(data), size: data.len() as u64, offset: 0, copies }
}

fn file_of(root: &Path, digest: &Digest) -> std::path::PathBuf {
    let name = digest.to_string();
    root.join("blobs").join(&name[..2]).join(name)
}

fn marker_of(root: &Path, digest: &Digest) -> std::path::PathBuf {
    let name = digest.to_string();
    root.join("offloaded").join(&name[..2]).join(name)
}

async fn read_all(blobs: &Arc<Blobs>, digest: Digest) -> Result<Vec<u8>, BlobError> {
    let mut reading = blobs.read(digest, 0, 0, Reach::Cluster).await?;
    let mut out = Vec::new();
    while let Some(chunk) = reading.next().await? {
        out.extend_from_slice(&chunk);
    }
    Ok(out)
}

async fn all(mut stream: impl Stream<Item = Result<Bytes, Status>> + Unpin) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(chunk) = stream.next().await {
        out.extend_from_slice(&chunk.unwrap());
    }
    out
}
