//! Who is alive, asked on any coordinator: the leader's loop knows, others ask it.

use std::collections::BTreeMap;

use futures::FutureExt;
use futures::future::BoxFuture;
use helix_common::status::not_leader;
use helix_core::{Brake, Claim, Liveness, SessionState, WorkerLiveness};
use helix_model::{Instance, InvalidField, LogTime, NodeId, TaskIndex, WorkerName};
use helix_proto::peer;
use helix_proto::peer::peer_service_client::PeerServiceClient;
use tonic::Status;
use tracing::debug;

use super::Leader;
use super::consensus::Consensus;
use crate::peers::{LivenessSource, Peers};
use crate::registry::{ReadError, Registry};

/// How long the leader may take to answer another coordinator.
const ANSWER_WAIT: std::time::Duration = std::time::Duration::from_secs(2);

/// What the leader knows of the workers, and its log time when it said so: silences are counted from there.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Who is connected and who spoke when.
    pub liveness: Liveness,
    /// The leader's log time.
    pub now: LogTime,
}

/// Asks whoever leads what it knows of the workers. Clones share everything.
#[derive(Clone)]
pub struct LivenessHandle<C = Registry> {
    leader: Leader<C>,
    peers: Peers,
}

impl<C: Consensus> LivenessHandle<C> {
    /// A handle on this node's loop and on the way to others'.
    #[must_use]
    pub fn new(leader: Leader<C>, peers: Peers) -> Self {
        Self { leader, peers }
    }

    /// What the leader knows of all workers now.
    ///
    /// # Errors
    /// [`ReadError`] when no leader is known or it does not answer in time.
    pub async fn liveness(&self) -> Result<Heard, ReadError> {
        if let Some(liveness) = self.leader.snapshot().await {
            return Ok(Heard { liveness, now: self.leader.consensus.now() });
        }
        let leader = self.leader.consensus.leadership().borrow().leader;
        let hint = leader.and_then(|leader| self.endpoint(leader));
        let unknown = || ReadError::NoLeader { hint: hint.clone() };
        let leader = leader.filter(|leader| *leader != self.peers.own()).ok_or_else(unknown)?;
        let answer = tokio::time::timeout(ANSWER_WAIT, self.ask(leader)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        answer.and_then(|response| from_wire(response).map_err(|wrong| Status::internal(wrong.to_string()))).map_err(
            |status| {
                debug!(node = leader.0, status = status.message(), "the leader did not say who is alive");
                unknown()
            },
        )
    }

    async fn ask(&self, leader: NodeId) -> Result<peer::LivenessResponse, Status> {
        let channel = self.peers.control(leader).map_err(|error| Status::unavailable(error.to_string()))?;
        let mut client = PeerServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let request = peer::LivenessRequest { caller: Some(self.peers.caller(leader)) };
        Ok(client.liveness(request).await?.into_inner())
    }

    fn endpoint(&self, node: NodeId) -> Option<String> {
        self.leader.consensus.with_state(|state| state.node(node).map(|record| record.grpc.clone()))
    }
}

/// Five thousand workers of the largest capacity, each with its attempts.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

impl<C: Consensus> LivenessSource for Leader<C> {
    fn liveness(&self) -> BoxFuture<'static, Result<peer::LivenessResponse, Status>> {
        let this = self.clone();
        async move {
            let liveness = this.snapshot().await.ok_or_else(|| not_leader(None))?;
            Ok(to_wire(&liveness, this.consensus.now()))
        }
        .boxed()
    }
}

fn to_wire(liveness: &Liveness, now: LogTime) -> peer::LivenessResponse {
    let workers = liveness.workers.iter().map(|(worker, live)| peer::WorkerLiveness {
        worker: worker.to_string(),
        instance: live.instance.to_string(),
        session: session_word(live.session).to_owned(),
        last_seen_ms: live.last_seen.0,
        pressure: live.pressure.clone(),
        silences: live.silent_ms.iter().map(|(key, silent_ms)| silence(key, *silent_ms)).collect(),
        certificate_not_after_ms: live.certificate_not_after_ms,
    });
    let brake = liveness.brake.as_ref().map(|brake| peer::Brake {
        since_ms: brake.since.0,
        watched: brake.watched.iter().map(ToString::to_string).collect(),
    });
    peer::LivenessResponse {
        leader_since_ms: liveness.leader_since.0,
        workers: workers.collect(),
        brake,
        now_ms: now.0,
        claims: liveness.claims.iter().map(|(worker, claim)| claim_to_wire(worker, *claim)).collect(),
    }
}

fn claim_to_wire(worker: &WorkerName, claim: Claim) -> peer::Claim {
    let Claim { priority, sequence, task } = claim;
    peer::Claim { worker: worker.to_string(), priority, sequence, task: u32::from(task.0) }
}

fn claim_from_wire(wire: &peer::Claim) -> Result<(WorkerName, Claim), InvalidField> {
    let task =
        u16::try_from(wire.task).map_err(|_| InvalidField::new("task", format!("{} is too large", wire.task)))?;
    let claim = Claim { priority: wire.priority, sequence: wire.sequence, task: TaskIndex(task) };
    Ok((WorkerName::new(&wire.worker)?, claim))
}

fn session_word(session: SessionState) -> &'static str {
    match session {
        SessionState::Open => "open",
        SessionState::Late => "late",
        SessionState::Closed => "closed",
    }
}

fn silence(key: &helix_model::AttemptKey, silent_ms: u64) -> peer::Silence {
    let key = helix_proto::store::AttemptKey {
        build: key.build.to_string(),
        task: u32::from(key.task.0),
        attempt: key.attempt.0,
    };
    peer::Silence { key: Some(key), silent_ms }
}

fn from_wire(wire: peer::LivenessResponse) -> Result<Heard, InvalidField> {
    let mut workers = BTreeMap::new();
    for worker in wire.workers {
        let name = WorkerName::new(&worker.worker)?;
        workers.insert(name, worker_from_wire(worker)?);
    }
    let brake = wire.brake.map(|brake| {
        let watched = brake.watched.iter().map(|name| WorkerName::new(name)).collect::<Result<_, _>>()?;
        Ok::<_, InvalidField>(Brake { since: LogTime(brake.since_ms), watched })
    });
    let claims = wire.claims.iter().map(claim_from_wire).collect::<Result<_, _>>()?;
    let leader_since = LogTime(wire.leader_since_ms);
    let liveness = Liveness { leader_since, workers, brake: brake.transpose()?, claims };
    Ok(Heard { liveness, now: LogTime(wire.now_ms) })
}

fn worker_from_wire(wire: peer::WorkerLiveness) -> Result<WorkerLiveness, InvalidField> {
    let mut silent_ms = BTreeMap::new();
    for silence in wire.silences {
        let key = silence.key.map(|key| helix_proto::agent::AttemptId {
            build_id: key.build,
            task: key.task,
            attempt: key.attempt,
        });
        silent_ms.insert(helix_proto::convert::attempt_from_wire(key)?, silence.silent_ms);
    }
    let session = match wire.session.as_str() {
        "open" => SessionState::Open,
        "late" => SessionState::Late,
        // A word of a later version means nothing that could be counted on.
        _ => SessionState::Closed,
    };
    let (instance, last_seen) = (Instance::new(&wire.instance)?, LogTime(wire.last_seen_ms));
    let peer::WorkerLiveness { pressure, certificate_not_after_ms, .. } = wire;
    Ok(WorkerLiveness { instance, session, last_seen, pressure, silent_ms, certificate_not_after_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_leader_knows_survives_the_wire() {
        let worker = WorkerName::new("w").unwrap();
        let live = WorkerLiveness {
            instance: Instance::new("d.b").unwrap(),
            session: SessionState::Late,
            last_seen: LogTime(5),
            pressure: "disk".to_owned(),
            silent_ms: BTreeMap::from([("b.1.2".parse().unwrap(), 7)]),
            certificate_not_after_ms: 11,
        };
        let liveness = Liveness {
            leader_since: LogTime(3),
            workers: BTreeMap::from([(worker.clone(), live)]),
            claims: BTreeMap::from([(worker.clone(), Claim { priority: -2, sequence: 8, task: TaskIndex(1) })]),
            brake: Some(Brake { since: LogTime(4), watched: [worker].into() }),
        };
        let heard = from_wire(to_wire(&liveness, LogTime(9))).unwrap();
        assert_eq!(heard.liveness.claims, liveness.claims);
        assert_eq!((heard.now, heard.liveness.workers), (LogTime(9), liveness.workers));
        assert_eq!((heard.liveness.leader_since, heard.liveness.brake), (liveness.leader_since, liveness.brake));
    }
}
