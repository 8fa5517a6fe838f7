//! Blobs under crashes, damage, haste and bad peers. Real files, real servers on loopback.

mod cluster;
mod local;
mod scrub;

use std::path::Path;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use sha2::{Digest as _, Sha256};

use super::*;

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
