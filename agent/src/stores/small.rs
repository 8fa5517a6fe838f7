//! Small blobs, many to a call: while one call to a coordinator is under way, what arrives meanwhile goes with the next, so
//! that one fsync there covers many builds.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use helix_failpoint::{self as failpoint, Point};
use helix_model::{Digest, NodeId};
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::{PutSmallBlobsRequest, SmallBlob};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::transport::Channel;

use super::{Nodes, nodes_of, wire};

/// Bytes of one call, at most: well under the limit of a message.
const CALL_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Blobs of one call, at most.
const CALL_BLOBS_MAX: usize = 256;

/// Blobs that wait for a coordinator; more make their builds wait.
const WAITING_MAX: usize = 256;

/// How long a call may take: two disks and a network.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

struct Put {
    digest: Digest,
    data: Bytes,
    done: oneshot::Sender<Result<Vec<NodeId>, Status>>,
}

struct Lane {
    tx: mpsc::Sender<(Channel, Put)>,
    _task: AbortOnDropHandle<()>,
}

/// A lane for each coordinator.
pub(super) struct SmallPuts {
    nodes: Nodes,
    lanes: Mutex<HashMap<NodeId, Lane>>,
}

impl SmallPuts {
    pub(super) fn new(nodes: Nodes) -> Self {
        Self { nodes, lanes: Mutex::new(HashMap::new()) }
    }

    /// Stores a blob by way of one coordinator.
    pub(super) async fn put(
        &self,
        node: NodeId,
        channel: Channel,
        digest: Digest,
        data: Bytes,
    ) -> Result<Vec<NodeId>, Status> {
        let (done, answer) = oneshot::channel();
        let lane = self.lane(node);
        let gone = || Status::unavailable("the agent is ending");
        lane.send((channel, Put { digest, data, done })).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    fn lane(&self, node: NodeId) -> mpsc::Sender<(Channel, Put)> {
        // Nothing panics while holding it.
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.entry(node).or_insert_with(|| {
            let (tx, rx) = mpsc::channel(WAITING_MAX);
            Lane { tx, _task: AbortOnDropHandle::new(tokio::spawn(serve(self.nodes.clone(), rx))) }
        });
        lane.tx.clone()
    }
}

impl std::fmt::Debug for SmallPuts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SmallPuts")
    }
}

async fn serve(nodes: Nodes, mut rx: mpsc::Receiver<(Channel, Put)>) {
    while let Some((channel, first)) = rx.recv().await {
        let mut bytes = first.data.len();
        let mut batch = vec![first];
        while bytes < CALL_BYTES_MAX && batch.len() < CALL_BLOBS_MAX {
            let Ok((_, next)) = rx.try_recv() else { break };
            bytes += next.data.len();
            batch.push(next);
        }
        let copies = nodes.settings().await.copies;
        call(channel, batch, copies).await;
    }
}

/// Sends a batch, each distinct blob once, and tells everybody who waits.
async fn call(channel: Channel, batch: Vec<Put>, copies: u32) {
    let mut places: HashMap<Digest, usize> = HashMap::new();
    let mut blobs = Vec::new();
    for put in &batch {
        places.entry(put.digest).or_insert_with(|| {
            blobs.push(SmallBlob { sha256: wire(&put.digest), data: put.data.clone() });
            blobs.len() - 1
        });
    }
    let count = blobs.len();
    let mut client = BlobServiceClient::new(channel);
    failpoint::pass(Point::SmallSend);
    let call = client.put_small_blobs(PutSmallBlobsRequest { blobs, copies });
    let answer = match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map(|answer| answer.into_inner().blobs),
        Err(_) => Err(Status::unavailable("no answer in time")),
    };
    let answer = answer.and_then(|blobs| {
        failpoint::pass(Point::SmallSent);
        if blobs.len() == count { Ok(blobs) } else { Err(Status::internal("an answer for another number of blobs")) }
    });
    for put in batch {
        let place = places.get(&put.digest).copied().unwrap_or_default();
        let stored = answer.as_ref().map(|blobs| nodes_of(blobs[place].holders.clone())).map_err(Status::clone);
        // Nobody waits any more when the build was stopped meanwhile.
        let _ = put.done.send(stored);
    }
}
