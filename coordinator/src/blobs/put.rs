//! Storing a blob here and on the first reachable peers in its rendezvous order.
//!
//! A large one is passed on while it arrives; where that fails, or the upload began elsewhere, it is sent once it is here.
//! Too few holders is no error of a put: whoever needs more is told who holds it, and decides.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use helix_model::limits::{CHUNK_BYTES, SMALL_BLOB_BYTES_MAX};
use helix_model::placement::rendezvous;
use helix_model::{Digest, NodeId};
use helix_proto::v1;
use tokio::sync::{SemaphorePermit, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::store::{Receiving, Room, blocking};
use super::{BlobError, Blobs, STALL};

/// How long an upload waits for others to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a peer may take to take small blobs: an fsync, and whatever waits before it.
const SMALL_PUT: Duration = Duration::from_secs(20);

/// Bytes that are hashed and written at once.
const WRITE_BYTES: usize = 2 * CHUNK_BYTES;

/// What a sender says before the first byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Announce {
    /// The blob.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// Bytes sent before, to this coordinator.
    pub offset: u64,
    /// Coordinators that shall hold it; 0 for the policy's number.
    pub copies: u32,
}

impl Blobs {
    /// Stores a blob whose bytes arrive as a stream. Answers who holds it, fsynced; what exists is answered at once.
    ///
    /// # Errors
    /// When it cannot be stored here; whether peers have it is in the answer.
    pub async fn put<S>(&self, announce: Announce, chunks: S) -> Result<BTreeSet<NodeId>, BlobError>
    where
        S: Stream<Item = Result<Bytes, Status>> + Send + Unpin,
    {
        let Announce { digest, size, .. } = announce;
        if let Some(held) = self.store.lease(&digest) {
            if held != size {
                return Err(BlobError::Size { announced: size, sent: held });
            }
            return Ok(self.replicate(digest, self.targets(&digest, announce.copies)).await);
        }
        if size <= SMALL_BLOB_BYTES_MAX {
            if announce.offset > 0 {
                return Err(BlobError::Offset { have: 0 });
            }
            let data = collect(chunks, size).await?;
            let mut holders = self.put_small(vec![(digest, data)], announce.copies).await?;
            return Ok(holders.pop().unwrap_or_default());
        }
        let _permit = self.permit(announce.copies).await?;
        let receiving = self.store.upload(digest, size, announce.offset, self.room()).await?;
        let mut targets = self.targets(&digest, announce.copies);
        // An upload that goes on has only its end to pass on: the peer gets the whole afterwards.
        let tee = if announce.offset == 0 { self.tee_to_first(&mut targets, announce) } else { None };
        if let Some(tee) = self.receive(receiving, chunks, tee).await? {
            let node = tee.node;
            let outcome = tee.finish().await;
            if let Err(error) = &outcome {
                tracing::warn!(%digest, %node, %error, "a peer did not take a blob while it arrived");
            }
            targets.settle(node, outcome.is_ok());
        }
        Ok(self.replicate(digest, targets).await)
    }

    /// Stores small blobs. Answers who holds each, fsynced, in the order given.
    ///
    /// # Errors
    /// When one cannot be stored here.
    pub async fn put_small(
        &self,
        blobs: Vec<(Digest, Bytes)>,
        copies: u32,
    ) -> Result<Vec<BTreeSet<NodeId>>, BlobError> {
        let here = self.store.put_small(blobs.clone(), self.room());
        let mut targets: Vec<_> = blobs.iter().map(|(digest, _)| self.targets(digest, copies)).collect();
        let there = async {
            // Round by round: whoever did not answer is replaced by the next in the order.
            loop {
                let mut shares: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
                for (at, target) in targets.iter_mut().enumerate() {
                    while let Some(node) = target.take_one() {
                        shares.entry(node).or_default().push(at);
                    }
                }
                if shares.is_empty() {
                    return;
                }
                let sends = shares.into_iter().map(|(node, share)| {
                    let share_blobs = share.iter().map(|at| &blobs[*at]);
                    let wire = share_blobs
                        .map(|(digest, data)| v1::SmallBlob { sha256: digest.0.to_vec().into(), data: data.clone() });
                    let request = v1::PutSmallBlobsRequest { blobs: wire.collect(), copies: 1 };
                    async move { (node, share, self.send_small(node, request).await) }
                });
                for (node, share, outcome) in futures::future::join_all(sends).await {
                    for at in share {
                        targets[at].settle(node, outcome.is_ok());
                    }
                    if let Err(error) = outcome {
                        tracing::warn!(%node, %error, "a peer did not take small blobs");
                    }
                }
            }
        };
        // Both at once: an fsync here costs no time there. What a peer took although it failed here is collected there.
        let (here, ()) = tokio::join!(here, there);
        here?;
        Ok(targets.into_iter().map(|target| target.found).collect())
    }

    async fn send_small(&self, node: NodeId, request: v1::PutSmallBlobsRequest) -> Result<(), Status> {
        let mut client = self.client(node)?;
        let answer = tokio::time::timeout(SMALL_PUT, client.put_small_blobs(request)).await;
        answer.map_err(|_| Status::deadline_exceeded("the peer does not answer"))??;
        Ok(())
    }

    /// Uploads of clients wait for each other, copies that peers bring among themselves: two coordinators that upload to each
    /// other never wait in a circle.
    async fn permit(&self, copies: u32) -> Result<SemaphorePermit<'_>, BlobError> {
        let pool = if copies == 1 { &self.copies } else { &self.uploads };
        let permit = tokio::time::timeout(PATIENCE, pool.acquire()).await.map_err(|_| BlobError::Busy)?;
        permit.map_err(|_| BlobError::Closed)
    }

    /// Who should hold the blob beside this node.
    fn targets(&self, digest: &Digest, copies: u32) -> Targets {
        // Who joins has not the log yet, and who leaves takes its bytes along: only what voters hold counts.
        let (own, mut voters) = (self.plane.node(), self.plane.voters());
        let copies = if copies == 0 { self.plane.policy().copies_of(voters.len()) } else { copies };
        let votes = voters.contains(&own);
        voters.retain(|node| *node != own);
        let order = rendezvous(&digest.0, voters);
        Targets {
            wanted: usize::try_from(copies).unwrap_or(usize::MAX).max(1).saturating_add(usize::from(!votes)),
            next: order.into_iter(),
            asked: 0,
            found: BTreeSet::from([self.plane.node()]),
        }
    }

    /// Sends a blob that is here to peers until enough hold it or none is left.
    async fn replicate(&self, digest: Digest, mut targets: Targets) -> BTreeSet<NodeId> {
        while let Some(node) = targets.take_one() {
            let outcome = self.send(digest, node).await;
            if let Err(error) = &outcome {
                tracing::warn!(%digest, %node, %error, "a peer did not take a blob");
            }
            targets.settle(node, outcome.is_ok());
        }
        targets.found
    }

    async fn send(&self, digest: Digest, node: NodeId) -> Result<(), BlobError> {
        let blob = self.store.read(digest).await?.ok_or(BlobError::Absent(digest))?;
        let size = blob.size();
        if size <= SMALL_BLOB_BYTES_MAX {
            let data = blob.chunk(0).await?;
            let wire = v1::SmallBlob { sha256: digest.0.to_vec().into(), data };
            let request = v1::PutSmallBlobsRequest { blobs: vec![wire], copies: 1 };
            return self.send_small(node, request).await.map_err(|status| BlobError::Peer(Box::new(status)));
        }
        let announce = Announce { digest, size, offset: 0, copies: 1 };
        let mut tee = self.tee(node, announce).ok_or(BlobError::Closed)?;
        let mut at = 0;
        while at < size && tee.open() {
            let chunk = blob.chunk(at).await?;
            at += chunk.len() as u64;
            tee.push(chunk).await;
        }
        tee.finish().await
    }

    /// Takes a blob's bytes from the stream to the disk, and to the peer that is to have them too. While one batch is hashed
    /// and written, the next arrives.
    async fn receive<S>(
        &self,
        receiving: Receiving,
        mut chunks: S,
        mut tee: Option<Tee>,
    ) -> Result<Option<Tee>, BlobError>
    where
        S: Stream<Item = Result<Bytes, Status>> + Send + Unpin,
    {
        let mut disk = Disk::Idle(Box::new(receiving));
        let mut batch = Vec::new();
        let mut batched = 0;
        loop {
            let chunk = tokio::time::timeout(STALL, chunks.next()).await.map_err(|_| BlobError::Stalled)?;
            let last = chunk.is_none();
            if let Some(chunk) = chunk {
                let chunk = chunk.map_err(|status| BlobError::Source(Box::new(status)))?;
                batched += chunk.len();
                if let Some(tee) = &mut tee {
                    tee.push(chunk.clone()).await;
                }
                batch.push(chunk);
            }
            if last || batched >= WRITE_BYTES {
                disk = disk.write(std::mem::take(&mut batch)).await?;
                batched = 0;
            }
            if last {
                let receiving = disk.idle().await?;
                blocking(move || receiving.finish()).await?;
                return Ok(tee);
            }
        }
    }

    /// Stores a blob here and nowhere else.
    pub(super) async fn put_here<S>(&self, announce: Announce, chunks: S, room: Room) -> Result<(), BlobError>
    where
        S: Stream<Item = Result<Bytes, Status>> + Send + Unpin,
    {
        let Announce { digest, size, offset, .. } = announce;
        if size <= SMALL_BLOB_BYTES_MAX {
            let data = collect(chunks, size).await?;
            return self.store.put_small(vec![(digest, data)], room).await;
        }
        let receiving = self.store.upload(digest, size, offset, room).await?;
        self.receive(receiving, chunks, None).await.map(|_| ())
    }

    fn tee_to_first(&self, targets: &mut Targets, announce: Announce) -> Option<Tee> {
        let node = targets.take_one()?;
        let tee = self.tee(node, announce);
        if tee.is_none() {
            targets.settle(node, false);
        }
        tee
    }

    /// Opens a stream that puts a blob on a peer.
    fn tee(&self, node: NodeId, announce: Announce) -> Option<Tee> {
        let mut client = self.client(node).ok()?;
        let (tx, rx) = mpsc::channel(4);
        let header =
            v1::PutBlobHeader { sha256: announce.digest.0.to_vec().into(), size: announce.size, offset: 0, copies: 1 };
        let first = v1::PutBlobRequest { part: Some(v1::put_blob_request::Part::Header(header)) };
        let requests = futures::stream::iter([first]).chain(ReceiverStream::new(rx));
        let task = tokio::spawn(async move { client.put_blob(requests).await.map(|_| ()) });
        Some(Tee { node, tx: Some(tx), task: Some(task) })
    }
}

/// Peers in the order of their claim on a blob, and how far the search has come.
struct Targets {
    wanted: usize,
    next: std::vec::IntoIter<NodeId>,
    /// Asked and not yet settled.
    asked: usize,
    found: BTreeSet<NodeId>,
}

impl Targets {
    fn take_one(&mut self) -> Option<NodeId> {
        if self.found.len() + self.asked >= self.wanted {
            return None;
        }
        let node = self.next.next()?;
        self.asked += 1;
        Some(node)
    }

    fn settle(&mut self, node: NodeId, holds: bool) {
        self.asked -= 1;
        if holds {
            self.found.insert(node);
        }
    }
}

/// The disk's side of an upload: free for the next batch, or busy with one.
enum Disk {
    Idle(Box<Receiving>),
    Busy(JoinHandle<Result<Box<Receiving>, BlobError>>),
}

impl Disk {
    async fn idle(self) -> Result<Box<Receiving>, BlobError> {
        match self {
            Self::Idle(receiving) => Ok(receiving),
            Self::Busy(job) => job.await.map_err(|_| BlobError::Closed)?,
        }
    }

    async fn write(self, batch: Vec<Bytes>) -> Result<Self, BlobError> {
        let mut receiving = self.idle().await?;
        Ok(Self::Busy(tokio::task::spawn_blocking(move || {
            batch.iter().try_for_each(|chunk| receiving.write(chunk))?;
            Ok(receiving)
        })))
    }
}

/// A stream that puts a blob on a peer while it arrives. It must not hold up the upload for long: a peer that stands still
/// is given up.
struct Tee {
    node: NodeId,
    tx: Option<mpsc::Sender<v1::PutBlobRequest>>,
    task: Option<JoinHandle<Result<(), Status>>>,
}

impl Tee {
    /// Whether the peer still listens.
    fn open(&self) -> bool {
        self.tx.as_ref().is_some_and(|tx| !tx.is_closed())
    }

    /// Passes bytes on. When the peer has gone, or has the blob already, this does nothing.
    async fn push(&mut self, data: Bytes) {
        let Some(tx) = &self.tx else { return };
        for at in (0..data.len()).step_by(CHUNK_BYTES) {
            let part = data.slice(at..data.len().min(at + CHUNK_BYTES));
            let request = v1::PutBlobRequest { part: Some(v1::put_blob_request::Part::Data(part)) };
            if tx.send_timeout(request, PATIENCE).await.is_err() {
                self.tx = None;
                return;
            }
        }
    }

    /// Waits for the peer's word.
    async fn finish(mut self) -> Result<(), BlobError> {
        self.tx = None;
        let Some(mut task) = self.task.take() else { return Err(BlobError::Closed) };
        // It has yet to write and fsync what it was sent.
        match tokio::time::timeout(STALL, &mut task).await {
            Ok(joined) => joined.map_err(|_| BlobError::Closed)?.map_err(|status| BlobError::Peer(Box::new(status))),
            Err(_) => {
                task.abort();
                Err(BlobError::Stalled)
            }
        }
    }
}

impl Drop for Tee {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Takes a small blob into memory; never more of it than was announced.
async fn collect<S>(mut chunks: S, size: u64) -> Result<Bytes, BlobError>
where
    S: Stream<Item = Result<Bytes, Status>> + Send + Unpin,
{
    let mut data = BytesMut::new();
    while let Some(chunk) = tokio::time::timeout(STALL, chunks.next()).await.map_err(|_| BlobError::Stalled)? {
        data.extend_from_slice(&chunk.map_err(|status| BlobError::Source(Box::new(status)))?);
        if data.len() as u64 > size {
            return Err(BlobError::Size { announced: size, sent: data.len() as u64 });
        }
    }
    if (data.len() as u64) < size {
        return Err(BlobError::Size { announced: size, sent: data.len() as u64 });
    }
    Ok(data.freeze())
}
