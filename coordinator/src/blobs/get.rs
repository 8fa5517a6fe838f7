//! Reading a blob from here, or from whichever peer holds it, and going on elsewhere when that one fails half-way.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use helix_common::status::error_code;
use helix_model::{Digest, ErrorCode, NodeId};
use helix_proto::v1;
use tonic::{Status, Streaming};

use super::store::LocalBlob;
use super::{BlobError, Blobs, PEER_ANSWER, STALL};

/// Whether a reader is content with this coordinator's own blobs only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// This coordinator alone.
    Local,
    /// Whoever holds it.
    Cluster,
}

/// A blob being read: one chunk in memory at a time.
pub struct Reading {
    blobs: Arc<Blobs>,
    digest: Digest,
    reach: Reach,
    size: u64,
    at: u64,
    end: u64,
    source: Source,
    /// Peers that failed in this reading.
    failed: BTreeSet<NodeId>,
}

enum Source {
    Local(LocalBlob),
    Peer(NodeId, Box<Streaming<v1::GetBlobResponse>>),
}

impl Blobs {
    /// Opens `length` bytes of a blob from `offset` on; 0 for all that follow.
    ///
    /// # Errors
    /// [`BlobError::Absent`] when nobody reachable holds it.
    pub async fn read(
        self: &Arc<Self>,
        digest: Digest,
        offset: u64,
        length: u64,
        reach: Reach,
    ) -> Result<Reading, BlobError> {
        let mut failed = BTreeSet::new();
        let local = match self.store.read(digest).await {
            Ok(local) => local,
            Err(error) => {
                self.suspect(digest, &error);
                if reach == Reach::Local {
                    return Err(error);
                }
                None
            }
        };
        let (size, source) = match (local, reach) {
            (Some(blob), _) => (blob.size(), Source::Local(blob)),
            (None, Reach::Local) => return Err(BlobError::Absent(digest)),
            (None, Reach::Cluster) => self.find(digest, offset, length, &mut failed).await?,
        };
        let end = if length == 0 { size } else { offset.saturating_add(length).min(size) };
        Ok(Reading { blobs: Arc::clone(self), digest, reach, size, at: offset.min(end), end, source, failed })
    }

    /// Opens a blob at a peer that is not among `bad`; which one that is.
    pub(super) async fn read_elsewhere(
        self: &Arc<Self>,
        digest: Digest,
        mut bad: BTreeSet<NodeId>,
    ) -> Result<(NodeId, Reading), BlobError> {
        let (size, source) = self.find(digest, 0, 0, &mut bad).await?;
        let Source::Peer(node, _) = &source else { return Err(BlobError::Absent(digest)) };
        let (node, blobs, reach) = (*node, Arc::clone(self), Reach::Cluster);
        Ok((node, Reading { blobs, digest, reach, size, at: 0, end: size, source, failed: bad }))
    }

    /// Some bytes of a blob, at most `length`; fewer at its end.
    ///
    /// # Errors
    /// As [`Blobs::read`].
    pub async fn read_range(self: &Arc<Self>, digest: Digest, offset: u64, length: u64) -> Result<Bytes, BlobError> {
        let mut reading = self.read(digest, offset, length.max(1), Reach::Cluster).await?;
        let mut out = BytesMut::new();
        while let Some(chunk) = reading.next().await? {
            if out.is_empty() && chunk.len() as u64 >= length {
                return Ok(chunk);
            }
            out.extend_from_slice(&chunk);
        }
        Ok(out.freeze())
    }

    /// A blob could not be read here. That a bucket does not answer says nothing about its blobs.
    fn suspect(&self, digest: Digest, error: &BlobError) {
        if !matches!(error, BlobError::Bucket(_)) {
            self.health().suspect(digest);
        }
    }

    /// Asks all peers at once, and opens the blob at the first that has it.
    async fn find(
        &self,
        digest: Digest,
        offset: u64,
        length: u64,
        failed: &mut BTreeSet<NodeId>,
    ) -> Result<(u64, Source), BlobError> {
        let asked = v1::HeadBlobsRequest { sha256: vec![digest.0.to_vec().into()], local: true };
        let peers = self.plane.others().into_iter().filter(|node| !failed.contains(node));
        let mut answers: FuturesUnordered<_> = peers
            .map(|node| {
                let asked = asked.clone();
                async move { (node, self.ask_head(node, asked).await) }
            })
            .collect();
        while let Some((node, answer)) = answers.next().await {
            if !answer.is_ok_and(|answer| answer.blobs.first().is_some_and(|blob| blob.present)) {
                continue;
            }
            match self.open_at(node, digest, offset, length).await {
                Ok((size, stream)) => return Ok((size, Source::Peer(node, Box::new(stream)))),
                Err(error) => {
                    tracing::warn!(%digest, %node, %error, "a holder does not serve a blob");
                    failed.insert(node);
                }
            }
        }
        Err(BlobError::Absent(digest))
    }

    async fn open_at(
        &self,
        node: NodeId,
        digest: Digest,
        offset: u64,
        length: u64,
    ) -> Result<(u64, Streaming<v1::GetBlobResponse>), Status> {
        let mut client = self.client(node)?;
        let request = v1::GetBlobRequest { sha256: digest.0.to_vec().into(), offset, length, local: true };
        let opened = async {
            let mut stream = client.get_blob(request).await?.into_inner();
            // The first message carries the size and no bytes.
            let first = stream.message().await?;
            first.map(|first| (first.size, stream)).ok_or_else(|| Status::internal("the peer's answer is empty"))
        };
        tokio::time::timeout(PEER_ANSWER, opened)
            .await
            .map_err(|_| Status::deadline_exceeded("the peer does not answer"))?
    }
}

impl Reading {
    /// The whole blob's size.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    #[cfg(test)]
    pub(super) fn peer(&self) -> Option<NodeId> {
        match &self.source {
            Source::Local(_) => None,
            Source::Peer(node, _) => Some(*node),
        }
    }

    /// The next bytes; `None` at the end. Damaged bytes are never among them.
    ///
    /// # Errors
    /// When no holder is left that could go on.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        while self.at < self.end {
            let chunk = match self.take().await {
                Ok(chunk) if !chunk.is_empty() => chunk,
                Ok(_) => {
                    self.elsewhere(BlobError::Absent(self.digest)).await?;
                    continue;
                }
                Err(error) => {
                    self.elsewhere(error).await?;
                    continue;
                }
            };
            let wanted = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
            let chunk = chunk.slice(..chunk.len().min(wanted));
            self.at += chunk.len() as u64;
            return Ok(Some(chunk));
        }
        Ok(None)
    }

    async fn take(&mut self) -> Result<Bytes, BlobError> {
        match &mut self.source {
            Source::Local(blob) => blob.chunk(self.at).await,
            Source::Peer(_, stream) => {
                let message = tokio::time::timeout(STALL, stream.message()).await.map_err(|_| BlobError::Stalled)?;
                let message = message.map_err(|status| BlobError::Peer(Box::new(status)))?;
                Ok(message.map_or_else(Bytes::new, |message| message.data))
            }
        }
    }

    async fn elsewhere(&mut self, error: BlobError) -> Result<(), BlobError> {
        match &self.source {
            Source::Local(_) => self.blobs.suspect(self.digest, &error),
            Source::Peer(node, _) => {
                self.failed.insert(*node);
            }
        }
        if self.reach == Reach::Local {
            return Err(error);
        }
        if is_in_bucket(&error) {
            // Told once a minute, and not for every reader.
            tracing::debug!(digest = %self.digest, at = self.at, %error, "a blob is read on from another holder");
        } else {
            tracing::warn!(digest = %self.digest, at = self.at, %error, "a blob is read on from another holder");
        }
        let length = self.end - self.at;
        match self.blobs.find(self.digest, self.at, length, &mut self.failed).await {
            Ok((_, source)) => {
                self.source = source;
                Ok(())
            }
            // Nobody else has it, and it is not lost: it is in a bucket that does not answer.
            Err(BlobError::Absent(_)) if is_in_bucket(&error) => Err(error),
            Err(error) => Err(error),
        }
    }
}

/// Whether a holder said that its bucket does not serve the blob.
fn is_in_bucket(error: &BlobError) -> bool {
    match error {
        BlobError::Bucket(_) => true,
        BlobError::Peer(status) => error_code(status) == Some(ErrorCode::BucketUnreachable),
        _ => false,
    }
}
