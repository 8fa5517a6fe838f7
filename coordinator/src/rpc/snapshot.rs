//! `SaveSnapshot`: a consistent copy of the registry, streamed to an operator while the cluster serves.
//!
//! Invariant: the copy has everything that was acknowledged before the call, because it is written after a linearizable
//! barrier; and what an operator receives without its end is not taken for whole.

use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt;
use futures::stream::BoxStream;
use helix_common::status::status;
use helix_common::wall;
use helix_model::{Digest, ErrorCode};
use helix_proto::v1;
use helix_proto::v1::save_snapshot_response::Part;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::answer;
use super::services::Services;
use crate::blobs::STALL;
use crate::codec::ROW_FORMAT;
use crate::raft::SavedSnapshot;
use crate::registry::Consistency;

pub(super) type SaveStream = BoxStream<'static, Result<v1::SaveSnapshotResponse, Status>>;

/// Copies that are streamed at a time: each reads the disk at full speed. More wait.
pub(super) const SAVES_MAX: usize = 2;
/// Bytes in one message.
const CHUNK_BYTES: usize = 256 << 10;
/// Digests in one message.
const DIGESTS_MAX: usize = 256;

type Parts = mpsc::Sender<Result<v1::SaveSnapshotResponse, Status>>;

/// Streams a copy. Ends with it, with whoever asked, or with this node.
pub(super) fn save(services: &Services, saves: &Arc<Semaphore>, list_blobs: bool) -> Response<SaveStream> {
    let (tx, rx) = mpsc::channel(4);
    let (services, saves) = (services.clone(), Arc::clone(saves));
    let stopping = services.stopping.clone();
    services.tasks.clone().spawn(async move {
        let saving = async {
            let _one = saves.acquire().await.map_err(|_| answer::shutting_down())?;
            stream(&services, &tx, list_blobs).await
        };
        let outcome = tokio::select! {
            outcome = saving => outcome,
            () = stopping.cancelled() => Err(answer::shutting_down()),
            // Waiting for a turn, or for the disk, is for somebody.
            () = tx.closed() => return,
        };
        if let Err(refusal) = outcome {
            tracing::info!(%refusal, "a backup ended early");
            // Whoever went away does not want to know.
            let _ = tx.send(Err(refusal)).await;
        }
    });
    Response::new(ReceiverStream::new(rx).boxed())
}

async fn stream(services: &Services, tx: &Parts, list_blobs: bool) -> Result<(), Status> {
    services.freshen(Consistency::Linearizable).await?;
    let saved = services.registry.snapshot().await.map_err(|error| answer::of_store(&error))?;
    let (registry, applied) = (&services.registry, saved.applied());
    tracing::info!(index = applied.index, bytes = saved.bytes(), "a backup is taken");
    let header = v1::BackupHeader {
        cluster: registry.cluster().to_owned(),
        term: applied.term,
        index: applied.index,
        taken_at_ms: wall::message_ms(SystemTime::now()),
        node: registry.node().0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        row_format: ROW_FORMAT,
        bytes: saved.bytes(),
    };
    send(tx, Part::Header(header)).await?;
    let sha256 = send_bytes(&saved, tx).await?;
    send(tx, Part::Trailer(v1::BackupTrailer { sha256: sha256.0.to_vec().into() })).await?;
    if list_blobs {
        send_blobs(saved, tx.clone()).await?;
    }
    send(tx, Part::End(v1::BackupEnd {})).await
}

async fn send_bytes(saved: &SavedSnapshot, tx: &Parts) -> Result<Digest, Status> {
    let (mut hash, mut offset) = (Sha256::new(), 0);
    while offset < saved.bytes() {
        let reading = saved.clone();
        let read = tokio::task::spawn_blocking(move || reading.read_at(offset, CHUNK_BYTES)).await;
        let data = read.map_err(|error| broken(&error))?.map_err(|error| broken(&error))?;
        hash.update(&data);
        let chunk = v1::BackupChunk { offset, crc32: crc32fast::hash(&data), data: data.into() };
        offset += chunk.data.len() as u64;
        send(tx, Part::Chunk(chunk)).await?;
    }
    Ok(Digest(hash.finalize().into()))
}

async fn send_blobs(saved: SavedSnapshot, tx: Parts) -> Result<(), Status> {
    let runtime = tokio::runtime::Handle::current();
    let listed = tokio::task::spawn_blocking(move || {
        let mut page = Vec::with_capacity(DIGESTS_MAX);
        let give = |page: Vec<prost::bytes::Bytes>| {
            let sent = runtime.block_on(send(&tx, Part::Blobs(v1::BackupBlobs { sha256: page })));
            sent.map_err(|status| std::io::Error::other(status.message().to_owned()))
        };
        saved.each_blob(|digest| {
            page.push(prost::bytes::Bytes::copy_from_slice(&digest.0));
            if page.len() < DIGESTS_MAX { Ok(()) } else { give(std::mem::take(&mut page)) }
        })?;
        give(page)
    });
    listed.await.map_err(|error| broken(&error))?.map_err(|error| broken(&error))
}

/// Gives up on somebody who does not read for too long.
async fn send(tx: &Parts, part: Part) -> Result<(), Status> {
    let sent = tx.send_timeout(Ok(v1::SaveSnapshotResponse { part: Some(part) }), STALL).await;
    sent.map_err(|_| Status::cancelled("whoever asked for the backup has gone, or does not read"))
}

fn broken(error: &dyn std::fmt::Display) -> Status {
    tracing::error!(%error, "a snapshot cannot be read");
    status(ErrorCode::Internal, format!("the snapshot cannot be read: {error}"))
}
