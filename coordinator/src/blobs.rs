//! Blobs: immutable bytes named by their sha256, held by several coordinators.
//!
//! [`store`] keeps this coordinator's own; here they become the cluster's: a put is replicated to the first reachable peers
//! in rendezvous order, a get goes to whoever holds it, and what no build names any more is collected.
//! Which builds name what is the registry's to say; how the bytes come over the wire is `rpc::blob`'s.
//! Invariant: a node is reported as a holder only after it fsynced the bytes and checked their digest.

mod adopt;
pub mod bucket;
mod check;
mod collect;
mod frame;
mod get;
mod health;
mod large;
mod leases;
mod mend;
mod offload;
mod put;
mod scrub;
mod segments;
pub mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_model::{Digest, NodeId};
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::transport::Channel;

use self::bucket::Bucket;
pub use self::collect::{Collection, Schedule};
pub use self::get::{Reach, Reading};
pub use self::health::{Damage, Health};
pub use self::leases::LEASE;
pub use self::offload::{Moves, Offload};
pub use self::put::Announce;
pub use self::scrub::Scrub;
use self::store::{BlobStore, Room};
use crate::plane::Plane;

/// How long a peer may take to answer a small question.
const PEER_ANSWER: Duration = Duration::from_secs(3);

/// How long a peer, client or agent may let a transfer stand still.
pub(crate) const STALL: Duration = Duration::from_secs(60);

/// Uploads of large blobs at a time, and as many copies that peers bring: each holds about a megabyte of memory.
const UPLOADS_MAX: usize = 64;

/// The cluster's blobs, as this coordinator serves them.
pub struct Blobs {
    store: Arc<BlobStore>,
    plane: Arc<dyn Plane>,
    uploads: Semaphore,
    copies: Semaphore,
}

/// Who holds a blob.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Presence {
    /// Its size; 0 when nobody holds it.
    pub size: u64,
    /// Coordinators that hold it, fsynced, and leased it.
    pub holders: BTreeSet<NodeId>,
}

/// Why a blob could not be stored or read.
#[derive(thiserror::Error, Debug)]
pub enum BlobError {
    /// Larger than policy allows.
    #[error("the blob has {size} bytes, and policy allows {max}")]
    TooLarge {
        /// Announced.
        size: u64,
        /// Allowed.
        max: u64,
    },
    /// The disk would fall below its reserve.
    #[error("the disk has {free} bytes free, and {reserve} stay in reserve")]
    DiskReserve {
        /// Free.
        free: u64,
        /// To stay free.
        reserve: u64,
    },
    /// The bytes have another digest.
    #[error("the bytes have the digest {actual}, not {announced}; upload it again from the start")]
    Digest {
        /// Promised.
        announced: Digest,
        /// Found.
        actual: Digest,
        /// Part of them came with an earlier upload.
        resumed: bool,
    },
    /// More or fewer bytes than announced.
    #[error("{sent} bytes were sent of a blob of {announced}")]
    Size {
        /// Promised.
        announced: u64,
        /// Found.
        sent: u64,
    },
    /// The upload cannot go on there.
    #[error("the upload cannot go on there: {have} bytes are here")]
    Offset {
        /// Bytes that are here.
        have: u64,
    },
    /// Another upload went on with the same blob.
    #[error("another upload of the same blob took over")]
    TakenOver,
    /// Nobody reachable holds it.
    #[error("no reachable coordinator holds blob {0}")]
    Absent(Digest),
    /// It was here and is damaged.
    #[error("blob {0} is damaged here")]
    Damaged(Digest),
    /// It is in the bucket, which does not serve it.
    #[error("the bucket that the blob lies in does not serve it: {0}")]
    Bucket(String),
    /// The other side stood still for too long.
    #[error("the transfer stood still for {} s", STALL.as_secs())]
    Stalled,
    /// As many uploads as may be.
    #[error("too many uploads at a time; retry")]
    Busy,
    /// The sender's stream failed.
    #[error("the sender's stream failed: {0}")]
    Source(Box<Status>),
    /// A peer failed.
    #[error("peer: {0}")]
    Peer(Box<Status>),
    /// The disk failed.
    #[error("disk: {0}")]
    Io(#[from] io::Error),
    /// The store is closed.
    #[error("the blob store is closed")]
    Closed,
}

impl BlobError {
    /// The same error once more, for another caller who shares its fate.
    fn again(&self) -> Self {
        match self {
            Self::Io(error) => Self::Io(io::Error::new(error.kind(), error.to_string())),
            _ => Self::Closed,
        }
    }
}

/// What is served, and what has to be run beside it.
pub struct Opened {
    /// The blobs.
    pub blobs: Arc<Blobs>,
    /// Collection and repair: to be run until shutdown.
    pub collection: Collection,
    /// What reads all blobs again: to be run until shutdown.
    pub scrub: Scrub,
    /// What moves large blobs to the bucket, where there is one: to be run until shutdown.
    pub offload: Option<Offload>,
}

impl Blobs {
    /// Opens the store beneath `root`, whose large blobs may go to a bucket. Blocks while it reads what is there.
    ///
    /// # Errors
    /// When the directory cannot be read or written, or blobs are in a bucket and there is none to read them from.
    pub fn open(root: &Path, plane: Arc<dyn Plane>, bucket: Option<Bucket>) -> io::Result<Opened> {
        Self::open_with(root, plane, LEASE, bucket)
    }

    fn open_with(root: &Path, plane: Arc<dyn Plane>, lease: Duration, bucket: Option<Bucket>) -> io::Result<Opened> {
        let bucket = bucket.map(Arc::new);
        let (store, damaged) = BlobStore::open(root, lease, bucket.clone())?;
        let away = store.totals().bucket;
        if bucket.is_none() && away > 0 {
            return Err(io::Error::other(format!(
                "{away} blobs of this node are in a bucket, and [blobs.s3] is not configured: configure it as it was; to do without it, \
                 start once with blobs.s3.recall = true until helix_blobs_in_bucket is 0"
            )));
        }
        damaged.into_iter().for_each(|digest| store.health().damaged(digest));
        let blobs =
            Arc::new(Self { store, plane, uploads: Semaphore::new(UPLOADS_MAX), copies: Semaphore::new(UPLOADS_MAX) });
        let (collection, scrub) = (Collection::new(Arc::clone(&blobs)), Scrub::new(Arc::clone(&blobs)));
        let offload = bucket.map(|bucket| Offload::new(Arc::clone(&blobs), bucket));
        Ok(Opened { collection, scrub, offload, blobs })
    }

    /// This coordinator's own blobs.
    #[must_use]
    pub fn store(&self) -> &Arc<BlobStore> {
        &self.store
    }

    /// Who holds these blobs. Each holder leases what it holds. Peers that do not answer in time count as holding nothing.
    pub async fn head(&self, digests: &[Digest]) -> Vec<Presence> {
        let mut found = self.head_local(digests);
        let asked = digests.iter().map(|digest| digest.0.to_vec().into()).collect();
        let request = v1::HeadBlobsRequest { sha256: asked, local: true };
        let answers = self.plane.others().into_iter().map(|node| {
            let request = request.clone();
            async move { (node, self.ask_head(node, request).await) }
        });
        for (node, answer) in futures::future::join_all(answers).await {
            match answer {
                Ok(answer) => {
                    for (presence, blob) in found.iter_mut().zip(answer.blobs).filter(|(_, blob)| blob.present) {
                        presence.size = blob.size;
                        presence.holders.insert(node);
                    }
                }
                Err(error) => tracing::debug!(%node, %error, "a peer does not say which blobs it holds"),
            }
        }
        found
    }

    /// As [`Self::head`], for this coordinator alone.
    #[must_use]
    pub fn head_local(&self, digests: &[Digest]) -> Vec<Presence> {
        let one = |digest| match self.store.lease(digest) {
            Some(size) => Presence { size, holders: BTreeSet::from([self.plane.node()]) },
            None => Presence::default(),
        };
        digests.iter().map(one).collect()
    }

    /// Coordinators whose copies count.
    pub(crate) fn voters(&self) -> Vec<NodeId> {
        self.plane.voters()
    }

    async fn ask_head(&self, node: NodeId, request: v1::HeadBlobsRequest) -> Result<v1::HeadBlobsResponse, Status> {
        let mut client = self.client(node)?;
        let answer = tokio::time::timeout(PEER_ANSWER, client.head_blobs(request)).await;
        Ok(answer.map_err(|_| Status::deadline_exceeded("the peer does not answer"))??.into_inner())
    }

    // A status is what every caller handles here; boxing it would only be undone.
    #[allow(clippy::result_large_err)]
    fn client(&self, node: NodeId) -> Result<BlobServiceClient<Channel>, Status> {
        let channel = self.plane.bulk(node).ok_or_else(|| Status::unavailable(format!("node {node} is not known")))?;
        Ok(BlobServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX + 64 * 1024))
    }

    fn room(&self) -> Room {
        let policy = self.plane.policy();
        Room { blob_bytes_max: policy.blob_bytes_max, disk_reserve_bytes: policy.disk_reserve_bytes }
    }

    /// What is wrong with them.
    #[must_use]
    pub fn health(&self) -> &Health {
        self.store.health()
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
