//! Bytes between this host and the coordinators: blobs up and down, live log lines up.
//!
//! Nothing here gives up by itself where a retry could help: callers bound it with a deadline or drop the future.

pub mod body;
pub mod live;
mod nodes;
mod recent;
mod small;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use helix_agent_core::Blob;
use helix_common::backoff::Backoff;
use helix_common::status::{error_code, is_worth_beginning_anew};
use helix_failpoint::{self as failpoint, Point};
use helix_model::limits::SMALL_BLOB_BYTES_MAX;
use helix_model::{Digest, ErrorCode, NodeId};
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::{
    GetBlobRequest, GetBlobResponse, HeadBlobsRequest, PutBlobHeader, PutBlobRequest, UploadOffsetRequest,
    put_blob_request::Part,
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use self::body::{Body, Source};
pub use self::nodes::Nodes;
use self::recent::Recent;
use self::small::SmallPuts;

/// Chunks of an upload that wait to be sent.
const CHUNKS_WAITING_MAX: usize = 4;

/// Rounds after which those who say that a blob is nowhere are believed, although others do not answer.
const ABSENT_ROUNDS_MAX: u32 = 8;

/// How long a short question may take before another coordinator is asked.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Why bytes will never be stored, or had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The cluster refuses them.
    #[error("the cluster refuses the blob: {0}")]
    Refused(String),
    /// They are not what they were measured to be.
    #[error("the bytes changed while they were sent: {0}")]
    Changed(String),
    /// The cluster does not have them.
    #[error("no coordinator has blob {0}")]
    Unknown(Digest),
}

/// Stores and fetches blobs. Clones share connections and batches.
#[derive(Clone, Debug)]
pub struct Stores {
    nodes: Nodes,
    small: Arc<SmallPuts>,
    recent: Arc<Recent>,
}

impl Stores {
    /// Stores on the coordinators given.
    #[must_use]
    pub fn new(nodes: Nodes) -> Self {
        let small = Arc::new(SmallPuts::new(nodes.clone()));
        Self { nodes, small, recent: Arc::default() }
    }

    /// The coordinators.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Stores a blob on as many coordinators as the policy asks for. Goes from one coordinator to the next, and round
    /// again, until it is done.
    ///
    /// # Errors
    /// [`StoreError`], where trying again would not help.
    pub async fn put(&self, body: &Body) -> Result<Blob, StoreError> {
        let mut backoff = backoff();
        let small = match &body.source {
            Source::Memory(bytes) if body.size <= SMALL_BLOB_BYTES_MAX => Some(bytes),
            _ => None,
        };
        loop {
            let copies = self.nodes.settings().await.copies;
            if small.is_some()
                && let Some(holders) = self.recent.holders(&body.digest, copies, Instant::now())
            {
                return Ok(Blob { digest: body.digest, size: body.size, holders });
            }
            for (node, channel) in self.nodes.ranked(&body.digest.0).await {
                let stored = match small {
                    Some(bytes) => self.small.put(node, channel, body.digest, bytes.clone()).await,
                    None => put_large(channel, body, copies).await,
                };
                match judge(stored, Sender::Owner)? {
                    Ok(holders) => {
                        self.nodes.note(node, true);
                        if !are_enough(&holders, copies, &body.digest) {
                            continue;
                        }
                        if small.is_some() {
                            self.recent.note(body.digest, copies, &holders, Instant::now());
                        }
                        return Ok(Blob { digest: body.digest, size: body.size, holders });
                    }
                    Err(status) => {
                        tracing::debug!(%node, digest = %body.digest, %status, "a blob was not stored; trying elsewhere");
                        self.nodes.note(node, false);
                    }
                }
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Sees to it that a blob that some coordinator holds is held by as many as the policy asks for.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when nobody has it any more.
    pub async fn put_again(&self, blob: &Blob) -> Result<Blob, StoreError> {
        let mut backoff = backoff();
        loop {
            let copies = self.nodes.settings().await.copies;
            for (node, channel) in self.nodes.ranked(&blob.digest.0).await {
                let mut client = BlobServiceClient::new(channel.clone());
                if let Some(holders) = present(&mut client, &blob.digest, copies).await {
                    return Ok(Blob { holders, ..blob.clone() });
                }
                let bytes = match self.get(&blob.digest).await {
                    Ok(bytes) => bytes,
                    Err(lost) => {
                        // Whoever has its bytes has to send them.
                        self.recent.forget(&blob.digest);
                        return Err(lost);
                    }
                };
                // Where they break off the upload ends, and its receiver finds too few.
                let data = bytes.map_while(|part| part.ok().map(|part| data_part(part.data)));
                let requests = tokio_stream::once(header(&blob.digest, blob.size, 0, copies)).chain(data);
                let stored = client.put_blob(requests).await.map(|answer| nodes_of(answer.into_inner().holders));
                match judge(stored, Sender::Relay)? {
                    Ok(holders) if are_enough(&holders, copies, &blob.digest) => {
                        return Ok(Blob { holders, ..blob.clone() });
                    }
                    Ok(_) => {}
                    Err(_) => self.nodes.note(node, false),
                }
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// A blob's bytes, from whichever coordinator answers first. The caller checks the digest.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when every coordinator says that the cluster does not have it, or some say so again and
    /// again while others do not answer: one that is cut off may just not see who has it.
    pub async fn get(&self, digest: &Digest) -> Result<Streaming<GetBlobResponse>, StoreError> {
        let mut backoff = backoff();
        loop {
            let (mut absent, mut failed) = (0, 0);
            for (node, channel) in self.nodes.ranked(&digest.0).await {
                let request = GetBlobRequest { sha256: wire(digest), ..GetBlobRequest::default() };
                match BlobServiceClient::new(channel).get_blob(request).await {
                    Ok(answer) => return Ok(answer.into_inner()),
                    Err(status) if error_code(&status) == Some(ErrorCode::ArtifactUnknown) => absent += 1,
                    Err(status) => {
                        tracing::debug!(%node, %digest, %status, "a blob was not had; trying elsewhere");
                        self.nodes.note(node, false);
                        failed += 1;
                    }
                }
            }
            if absent > 0 && (failed == 0 || backoff.failures() >= ABSENT_ROUNDS_MAX) {
                return Err(StoreError::Unknown(*digest));
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(50), Duration::from_secs(3))
}

/// Where the bytes of an upload came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sender {
    /// This host has them.
    Owner,
    /// A coordinator had them, and may have broken off.
    Relay,
}

/// Tells what is final from what another coordinator, or another try, may answer otherwise.
fn judge(stored: Result<Vec<NodeId>, Status>, sender: Sender) -> Result<Result<Vec<NodeId>, Status>, StoreError> {
    match stored {
        Ok(holders) => Ok(Ok(holders)),
        Err(status) => match error_code(&status) {
            Some(ErrorCode::BlobTooLarge | ErrorCode::RoleNotAllowed | ErrorCode::InvalidField) => {
                Err(StoreError::Refused(status.message().to_owned()))
            }
            // Other bytes than were announced are final only where all of them are this host's own, and were sent this time.
            Some(ErrorCode::DigestMismatch) if sender == Sender::Owner && !is_worth_beginning_anew(&status) => {
                Err(StoreError::Changed(status.message().to_owned()))
            }
            _ => Ok(Err(status)),
        },
    }
}

/// A coordinator answers a put also where no other took a copy: the next one may, and the registry takes no less than all.
fn are_enough(holders: &[NodeId], copies: u32, digest: &Digest) -> bool {
    let enough = holders.len() >= copies as usize;
    if !enough {
        tracing::debug!(%digest, ?holders, copies, "too few coordinators hold a blob; trying elsewhere");
    }
    enough
}

async fn put_large(channel: Channel, body: &Body, copies: u32) -> Result<Vec<NodeId>, Status> {
    let mut client = BlobServiceClient::new(channel);
    if let Some(holders) = present(&mut client, &body.digest, copies).await {
        return Ok(holders);
    }
    let question = client.upload_offset(UploadOffsetRequest { sha256: wire(&body.digest) });
    let offset = match tokio::time::timeout(QUESTION_TIMEOUT, question).await {
        Ok(answer) => answer?.into_inner().offset.min(body.size),
        Err(_) => return Err(Status::unavailable("no answer in time")),
    };
    let (tx, rx) = mpsc::channel(CHUNKS_WAITING_MAX);
    let read = {
        let body = body.clone();
        tokio::task::spawn_blocking(move || {
            body.chunks_from(offset, &mut |chunk| tx.blocking_send(data_part(chunk)).is_ok())
        })
    };
    let requests = tokio_stream::once(header(&body.digest, body.size, offset, copies)).chain(ReceiverStream::new(rx));
    failpoint::pass(Point::UploadSend);
    let answer = client.put_blob(requests).await.inspect(|_| failpoint::pass(Point::UploadSent));
    // The request stream is gone by now, so the reader ends.
    match read.await {
        Ok(Ok(())) => Ok(nodes_of(answer?.into_inner().holders)),
        Ok(Err(error)) => Err(Status::internal(format!("cannot read what is to be stored: {error}"))),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

/// Who holds a blob, if enough do: then its bytes need not be sent.
async fn present(client: &mut BlobServiceClient<Channel>, digest: &Digest, copies: u32) -> Option<Vec<NodeId>> {
    let question = client.head_blobs(HeadBlobsRequest { sha256: vec![wire(digest)], local: false });
    let answer = tokio::time::timeout(QUESTION_TIMEOUT, question).await.ok()?.ok()?.into_inner();
    let found = answer.blobs.into_iter().next().filter(|found| found.present)?;
    (found.holders.len() >= copies as usize).then(|| nodes_of(found.holders))
}

fn header(digest: &Digest, size: u64, offset: u64, copies: u32) -> PutBlobRequest {
    PutBlobRequest { part: Some(Part::Header(PutBlobHeader { sha256: wire(digest), size, offset, copies })) }
}

fn data_part(data: Bytes) -> PutBlobRequest {
    PutBlobRequest { part: Some(Part::Data(data)) }
}

fn wire(digest: &Digest) -> Bytes {
    Bytes::copy_from_slice(&digest.0)
}

fn nodes_of(holders: Vec<u64>) -> Vec<NodeId> {
    holders.into_iter().map(NodeId).collect()
}

#[cfg(test)]
mod tests {
    use helix_common::status::{RESUMED, status, with_metadata};

    use super::*;

    #[test]
    fn only_what_this_host_alone_answers_for_is_final() {
        let mismatch =
            |resumed: bool| with_metadata(ErrorCode::DigestMismatch, "other bytes", [(RESUMED, resumed.to_string())]);
        let outcome = |status: Status, sender| match judge(Err(status), sender) {
            Ok(Ok(_)) => "stored",
            Ok(Err(_)) => "passing",
            Err(StoreError::Changed(_)) => "changed",
            Err(StoreError::Refused(_)) => "refused",
            Err(StoreError::Unknown(_)) => "unknown",
        };
        for (status, owner, relay) in [
            (mismatch(false), "changed", "passing"),
            (status(ErrorCode::DigestMismatch, "too few bytes"), "changed", "passing"),
            // The part that an earlier upload left is gone: the next begins at 0.
            (mismatch(true), "passing", "passing"),
            (status(ErrorCode::BlobTooLarge, "too large"), "refused", "refused"),
            (status(ErrorCode::RoleNotAllowed, "not you"), "refused", "refused"),
            (status(ErrorCode::WrongState, "not there"), "passing", "passing"),
            (status(ErrorCode::DiskReserve, "full"), "passing", "passing"),
            (Status::unavailable("gone"), "passing", "passing"),
        ] {
            for (sender, expected) in [(Sender::Owner, owner), (Sender::Relay, relay)] {
                assert_eq!(outcome(status.clone(), sender), expected, "{status} {sender:?}");
            }
        }
    }
}
