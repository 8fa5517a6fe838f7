//! A snapshot on its way to a peer: in pieces, each acknowledged, from where the peer has it.
//!
//! openraft sets no limit of its own, and begins again with the newest snapshot for as long as this fails. Invariant: it is told that a
//! snapshot is installed only when the peer's openraft said so, of this very snapshot.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use futures::stream::{once, unfold};
use futures::{Stream, StreamExt};
use helix_common::status::{error_code, retry_after};
use helix_model::ErrorCode;
use helix_proto::raft::{self, SnapshotStep};
use openraft::errors::{ReplicationClosed, StreamingError};
use openraft::network::{NetSnapshot, RPCOption};
use openraft::raft::SnapshotResponse;
use tonic::Status;

use super::{Client, Link, Rpc, TypeConfig, unreachable};
use crate::peers::Purpose;
use crate::raft::snapshot::{SnapshotFile, meta_to_wire};
use crate::raft::transfer::{CHUNK_BYTES, PIECE_BYTES_MIN, Transfer, next_piece};
use crate::raft::types::{Snapshot, Vote};
use crate::raft::wire::{vote, vote_to_wire};

/// Checking and installing have no progress to be seen: of a million builds, on a slow disk. A peer that is gone is noticed by its
/// connection.
const INSTALL_WAIT: Duration = Duration::from_secs(600);

/// A peer that asks for a longer rest does not get it.
const REST_MAX: Duration = Duration::from_secs(60);

impl NetSnapshot<TypeConfig> for Client {
    type SnapshotData = SnapshotFile;

    async fn full_snapshot(
        &mut self,
        leader: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let sending = Sending { link: self.link.clone(), transfer: self.transfer, leader, snapshot };
        let told = &mut self.told;
        let work = async move {
            let error = match sending.run().await {
                Ok(vote) => return Ok(SnapshotResponse::new(vote)),
                Err(error) => error,
            };
            let node = sending.link.target.0;
            let why = error.to_string();
            // Once: it is tried again for as long as it takes.
            if std::mem::replace(told, true) {
                tracing::debug!(node, why, "a snapshot is not sent yet");
            } else {
                tracing::warn!(node, why, "a snapshot could not be sent; it is tried again, and goes on where it was");
            }
            if let Failed::Refused(status) = &error {
                tokio::time::sleep(retry_after(status).unwrap_or_default().min(REST_MAX)).await;
            }
            Err(error)
        };
        let result = tokio::select! {
            result = work => result,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        result.map_err(|error| unreachable(error).into())
    }
}

/// Why a snapshot did not arrive.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{}: {}", word(.0), .0.message())]
    Refused(Status),
    #[error("the peer acknowledged nothing for {0:?}")]
    Stalled(Duration),
    #[error("the peer has {0} bytes, as before")]
    Stuck(u64),
    #[error("it cannot be read: {0}")]
    Unreadable(io::Error),
    #[error("{0}")]
    Other(Box<openraft::errors::RPCError<TypeConfig>>),
}

fn word(status: &Status) -> String {
    error_code(status).map_or_else(|| format!("{:?}", status.code()), |code| code.to_string())
}

fn other(error: openraft::errors::RPCError<TypeConfig>) -> Failed {
    Failed::Other(Box::new(error))
}

/// What a call answered.
struct Answer {
    vote: Vote,
    offset: u64,
}

struct Sending {
    link: Link,
    transfer: Transfer,
    leader: Vote,
    snapshot: Snapshot,
}

impl Sending {
    /// Sends what the peer lacks and has it installed. Answers the peer's vote: a higher one ends it early.
    async fn run(&self) -> Result<Vote, Failed> {
        let file = &self.snapshot.snapshot;
        let reading = file.clone();
        let crc32 = tokio::task::spawn_blocking(move || reading.checksum()).await;
        let crc32 = crc32.map_err(io::Error::other).and_then(|crc32| crc32).map_err(Failed::Unreadable)?;
        // It may have much to read again before it answers this.
        let mut answer = match self.call(SnapshotStep::Part, crc32, 0..0, INSTALL_WAIT).await {
            // One that knows no parts, and misses the bytes.
            Err(Failed::Refused(status)) if error_code(&status) == Some(ErrorCode::DigestMismatch) => {
                return Ok(self.call(SnapshotStep::Whole, crc32, 0..file.bytes(), INSTALL_WAIT).await?.vote);
            }
            answer => answer?,
        };
        let mut piece = PIECE_BYTES_MIN;
        while answer.offset < file.bytes() {
            if answer.vote > self.leader {
                return Ok(answer.vote);
            }
            let (began, from) = (Instant::now(), answer.offset);
            let range = from..from.saturating_add(piece).min(file.bytes());
            answer = self.call(SnapshotStep::Part, crc32, range, self.transfer.stalled_after).await?;
            if answer.offset <= from && answer.vote <= self.leader {
                return Err(Failed::Stuck(from));
            }
            piece = next_piece(piece, began.elapsed());
        }
        Ok(self.call(SnapshotStep::Install, crc32, 0..0, INSTALL_WAIT).await?.vote)
    }

    async fn call(
        &self,
        step: SnapshotStep,
        file_crc32: u32,
        range: Range<u64>,
        limit: Duration,
    ) -> Result<Answer, Failed> {
        let link = &self.link;
        let header = raft::SnapshotHeader {
            envelope: link.envelope(),
            vote: Some(vote_to_wire(&self.leader)),
            bytes: self.snapshot.snapshot.bytes(),
            step: step.into(),
            file_crc32,
            ..meta_to_wire(&self.snapshot.meta)
        };
        let mut service = link.service(Purpose::Snapshot).map_err(other)?;
        let call = service.install_snapshot(parts(header, self.snapshot.snapshot.clone(), range));
        let answer = tokio::time::timeout(limit, call).await.map_err(|_| Failed::Stalled(limit))?;
        let answer = answer.map_err(|status| {
            link.peers.heed(link.target, &status);
            Failed::Refused(status)
        })?;
        let answer = answer.into_inner();
        self.read(answer).await.map_err(other)
    }

    async fn read(&self, answer: raft::SnapshotResponse) -> Rpc<Answer> {
        self.link.check(answer.envelope.as_ref()).await?;
        let vote = vote(answer.vote).map_err(|error| self.link.garbled(&error))?;
        Ok(Answer { vote, offset: answer.offset })
    }
}

/// A header, and a range of the file in chunks.
fn parts(
    header: raft::SnapshotHeader,
    file: SnapshotFile,
    range: Range<u64>,
) -> impl Stream<Item = raft::SnapshotRequest> + Send + use<> {
    let header = raft::SnapshotRequest { part: Some(raft::snapshot_request::Part::Header(header)) };
    let chunks = unfold(Some((file, range)), |state| async move {
        let (file, Range { start: offset, end }) = state?;
        let length = usize::try_from(end.checked_sub(offset)?.min(CHUNK_BYTES)).ok().filter(|length| *length > 0)?;
        let reading = file.clone();
        let read = tokio::task::spawn_blocking(move || reading.read_at(offset, length)).await;
        match read.map_err(io::Error::other).and_then(|read| read) {
            Ok(data) => {
                let next = offset + data.len() as u64;
                let chunk = raft::SnapshotChunk { offset, crc32: crc32fast::hash(&data), data: data.into() };
                let part = raft::SnapshotRequest { part: Some(raft::snapshot_request::Part::Chunk(chunk)) };
                Some((part, Some((file, next..end))))
            }
            Err(error) => {
                // The receiver sees that bytes are missing.
                tracing::error!(%error, path = %file.path.display(), "a snapshot cannot be read");
                None
            }
        }
    });
    once(async move { header }).chain(chunks)
}
