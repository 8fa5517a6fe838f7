//! Linearizable reads: everybody who waits when a round begins shares it.
//!
//! A round asks the leader for its read index, which it gives only after a majority has confirmed that it still leads
//! (Raft, section 6.4); no lease is trusted, so a leader that was stopped and goes on cannot serve what is old. Then the
//! index is waited for here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_model::NodeId;
use helix_proto::peer;
use helix_proto::peer::peer_service_client::PeerServiceClient;
use openraft::raft::ReadPolicy;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::types::Raft;
use crate::peers::Peers;
use crate::registry::{BarrierRequest, Leadership, ReadError, Shared};

/// How long a read waits for a leader that confirms itself.
const ROUND_WAIT: Duration = Duration::from_secs(3);
/// How long one question to the leader may take.
const ASK_WAIT: Duration = Duration::from_secs(1);
const RETRY_WAIT: Duration = Duration::from_millis(20);
/// Reads in one round, at most.
const ROUND_READS: usize = 65_536;

/// The index that a read must have applied; `None` where this node does not lead, or cannot prove it.
pub(super) async fn read_index(raft: &Raft) -> Option<u64> {
    let round = raft.get_read_linearizer(ReadPolicy::ReadIndex);
    let linearizer = tokio::time::timeout(ASK_WAIT, round).await.ok()?.ok()?;
    Some(linearizer.read_log_id().index())
}

/// The task that makes rounds.
pub(super) struct Reader {
    pub(super) raft: Raft,
    pub(super) shared: Arc<Shared>,
    pub(super) peers: Peers,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) queue: mpsc::Receiver<BarrierRequest>,
    pub(super) stop: CancellationToken,
}

impl Reader {
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        loop {
            let mut readers = Vec::new();
            tokio::select! {
                () = stop.cancelled() => break,
                count = self.queue.recv_many(&mut readers, ROUND_READS) => if count == 0 { return },
            }
            let result = tokio::select! {
                () = stop.cancelled() => Err(ReadError::ShuttingDown),
                result = self.round() => result,
            };
            self.shared.counters.read_rounds.add(1);
            self.shared.counters.reads.add(readers.len() as u64);
            for reader in readers {
                // Whoever went away does not want to know.
                drop(reader.send(result.clone()));
            }
        }
        self.queue.close();
        while let Ok(reader) = self.queue.try_recv() {
            drop(reader.send(Err(ReadError::ShuttingDown)));
        }
    }

    async fn round(&mut self) -> Result<(), ReadError> {
        let deadline = Instant::now() + ROUND_WAIT;
        loop {
            let Leadership { leader, .. } = *self.leadership.borrow_and_update();
            let index = match leader {
                Some(leader) if leader == self.peers.own() => read_index(&self.raft).await,
                Some(leader) => self.ask(leader).await,
                None => None,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(index) = index {
                let mut applied = self.shared.applied();
                let wait = applied.wait_for(|applied| applied.index >= index);
                return match tokio::time::timeout(left.max(ASK_WAIT), wait).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(_)) | Err(_) => Err(ReadError::NoLeader { hint: self.hint(leader) }),
                };
            }
            if left.is_zero() {
                return Err(ReadError::NoLeader { hint: self.hint(leader) });
            }
            let wait = if leader.is_some() { RETRY_WAIT } else { left };
            // A change of leadership, or a moment, whichever comes first.
            let _ = tokio::time::timeout(wait.min(left), self.leadership.changed()).await;
        }
    }

    fn hint(&self, leader: Option<NodeId>) -> Option<String> {
        leader.and_then(|leader| self.shared.grpc_of(leader))
    }

    async fn ask(&self, leader: NodeId) -> Option<u64> {
        let mut service = PeerServiceClient::new(self.peers.control(leader).ok()?);
        let request = peer::ReadIndexRequest { caller: Some(self.peers.caller(leader)) };
        match tokio::time::timeout(ASK_WAIT, service.read_index(request)).await.ok()? {
            Ok(answer) => Some(answer.into_inner().index),
            Err(refusal) => {
                self.peers.heed(leader, &refusal);
                None
            }
        }
    }
}
