//! `helix.v1.BlobService`, on both ports: clients, agents and operators on one, coordinators on the other.
//!
//! Only the wire is here: form, sizes, flow control, codes. The same handler serves everybody: a blob's name is its contents, so
//! that whoever may speak to it at all can do no harm with a name.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use helix_common::status::{RESUMED, error_code, invalid, status, with_metadata};
use helix_model::{Digest, ErrorCode, InvalidField, NodeId};
use helix_proto::v1;
use helix_proto::v1::blob_service_server::BlobService;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::blobs::{Announce, BlobError, Blobs, Presence, Reach, STALL};

/// Digests in one question.
const HEADS_MAX: usize = 256;

/// Small blobs in one message.
const SMALL_BLOBS_MAX: usize = 1024;

/// The service.
#[derive(Clone)]
pub struct BlobRpc {
    blobs: Arc<Blobs>,
}

impl BlobRpc {
    /// Serves these blobs.
    #[must_use]
    pub fn new(blobs: Arc<Blobs>) -> Self {
        Self { blobs }
    }
}

#[tonic::async_trait]
impl BlobService for BlobRpc {
    async fn head_blobs(
        &self,
        request: Request<v1::HeadBlobsRequest>,
    ) -> Result<Response<v1::HeadBlobsResponse>, Status> {
        let v1::HeadBlobsRequest { sha256, local } = request.into_inner();
        if sha256.len() > HEADS_MAX {
            return Err(invalid(&InvalidField::new("sha256", format!("more than {HEADS_MAX} digests"))));
        }
        let digests = sha256.iter().map(|bytes| digest(bytes)).collect::<Result<Vec<_>, _>>()?;
        let found = if local { self.blobs.head_local(&digests) } else { self.blobs.head(&digests).await };
        let voters = self.blobs.voters();
        let blobs = sha256.into_iter().zip(found).map(|(sha256, Presence { size, holders })| v1::BlobPresence {
            sha256,
            present: !holders.is_empty(),
            size,
            holders: if local { numbers(&holders) } else { counted(&holders, &voters) },
        });
        Ok(Response::new(v1::HeadBlobsResponse { blobs: blobs.collect() }))
    }

    async fn put_blob(
        &self,
        request: Request<Streaming<v1::PutBlobRequest>>,
    ) -> Result<Response<v1::PutBlobResponse>, Status> {
        let mut stream = request.into_inner();
        let first =
            tokio::time::timeout(STALL, stream.message()).await.map_err(|_| to_status(BlobError::Stalled))??;
        let Some(v1::PutBlobRequest { part: Some(v1::put_blob_request::Part::Header(header)) }) = first else {
            return Err(invalid(&InvalidField::new("header", "must be the first message")));
        };
        let announce = Announce {
            digest: digest(&header.sha256)?,
            size: header.size,
            offset: header.offset,
            copies: header.copies,
        };
        let chunks = stream.map(|message| match message?.part {
            Some(v1::put_blob_request::Part::Data(data)) => Ok(data),
            Some(v1::put_blob_request::Part::Header(_)) | None => {
                Err(invalid(&InvalidField::new("data", "missing from a message after the first")))
            }
        });
        let holders = self.blobs.put(announce, chunks).await.map_err(to_status)?;
        Ok(Response::new(v1::PutBlobResponse { holders: counted(&holders, &self.blobs.voters()) }))
    }

    async fn put_small_blobs(
        &self,
        request: Request<v1::PutSmallBlobsRequest>,
    ) -> Result<Response<v1::PutSmallBlobsResponse>, Status> {
        let v1::PutSmallBlobsRequest { blobs, copies } = request.into_inner();
        if blobs.len() > SMALL_BLOBS_MAX {
            return Err(invalid(&InvalidField::new("blobs", format!("more than {SMALL_BLOBS_MAX}"))));
        }
        let pairs = blobs.into_iter().map(|blob| Ok((digest(&blob.sha256)?, blob.data)));
        let pairs = pairs.collect::<Result<Vec<(Digest, Bytes)>, Status>>()?;
        let holders = self.blobs.put_small(pairs, copies).await.map_err(to_status)?;
        let voters = self.blobs.voters();
        let blobs = holders.iter().map(|holders| v1::PutBlobResponse { holders: counted(holders, &voters) });
        Ok(Response::new(v1::PutSmallBlobsResponse { blobs: blobs.collect() }))
    }

    async fn upload_offset(
        &self,
        request: Request<v1::UploadOffsetRequest>,
    ) -> Result<Response<v1::UploadOffsetResponse>, Status> {
        let digest = digest(&request.into_inner().sha256)?;
        let offset = self.blobs.store().upload_offset(digest).await.map_err(to_status)?;
        Ok(Response::new(v1::UploadOffsetResponse { offset }))
    }

    type GetBlobStream = Pin<Box<dyn Stream<Item = Result<v1::GetBlobResponse, Status>> + Send>>;

    async fn get_blob(&self, request: Request<v1::GetBlobRequest>) -> Result<Response<Self::GetBlobStream>, Status> {
        let v1::GetBlobRequest { sha256, offset, length, local } = request.into_inner();
        let reach = if local { Reach::Local } else { Reach::Cluster };
        let mut reading = self.blobs.read(digest(&sha256)?, offset, length, reach).await.map_err(to_status)?;
        let (tx, rx) = mpsc::channel(2);
        let size = reading.size();
        // Ends with the reader, or when the reader does not read for too long.
        tokio::spawn(async move {
            let mut message = Ok(v1::GetBlobResponse { size, data: Bytes::new() });
            loop {
                let failed = message.is_err();
                if tx.send_timeout(message, STALL).await.is_err() || failed {
                    return;
                }
                message = match reading.next().await {
                    Ok(Some(data)) => Ok(v1::GetBlobResponse { size: 0, data }),
                    Ok(None) => return,
                    Err(error) => Err(to_status(error)),
                };
            }
        });
        Ok(Response::new(ReceiverStream::new(rx).boxed()))
    }
}

// A status is what a handler answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn digest(bytes: &[u8]) -> Result<Digest, Status> {
    Digest::from_slice(bytes).map_err(|error| invalid(&error))
}

fn numbers(nodes: &BTreeSet<NodeId>) -> Vec<u64> {
    nodes.iter().map(|node| node.0).collect()
}

/// Those whose copies count. Who stores something goes by their number, and would else take it for stored where the registry does not.
fn counted(holders: &BTreeSet<NodeId>, voters: &[NodeId]) -> Vec<u64> {
    holders.iter().filter(|node| voters.contains(node)).map(|node| node.0).collect()
}

/// What the other side is told.
pub(crate) fn to_status(error: BlobError) -> Status {
    let text = error.to_string();
    match error {
        BlobError::TooLarge { max, .. } => {
            with_metadata(ErrorCode::BlobTooLarge, text, [("blob_bytes_max", max.to_string())])
        }
        BlobError::DiskReserve { .. } => status(ErrorCode::DiskReserve, text),
        BlobError::Digest { resumed, .. } => {
            with_metadata(ErrorCode::DigestMismatch, text, [(RESUMED, resumed.to_string())])
        }
        BlobError::Size { .. } => status(ErrorCode::DigestMismatch, text),
        BlobError::Offset { have } => with_metadata(ErrorCode::WrongState, text, [("offset", have.to_string())]),
        BlobError::TakenOver => status(ErrorCode::OutcomeUnknown, text),
        BlobError::Absent(_) | BlobError::Damaged(_) => status(ErrorCode::ArtifactUnknown, text),
        BlobError::Bucket(_) => status(ErrorCode::BucketUnreachable, text),
        BlobError::Busy => status(ErrorCode::QueueFull, text),
        BlobError::Stalled => Status::deadline_exceeded(text),
        BlobError::Source(status) => *status,
        BlobError::Peer(said) if error_code(&said) == Some(ErrorCode::BucketUnreachable) => *said,
        BlobError::Peer(_) => status(ErrorCode::PeerUnreachable, text),
        BlobError::Io(error) => {
            tracing::error!(%error, "the blob store's disk fails");
            status(ErrorCode::Internal, text)
        }
        BlobError::Closed => status(ErrorCode::ShuttingDown, text),
    }
}
