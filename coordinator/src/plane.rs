//! What the bytes plane (blobs and logs) needs to know of the registry and of the other coordinators, and no more.
//!
//! A seam: tests stand real servers on loopback behind it, with a registry in memory. Nothing here decides anything.

use std::sync::Arc;

use futures::future::BoxFuture;
use helix_core::command::SealLog;
use helix_core::record::{AttemptRecord, BuildRecord, Policy, SealedLog, Standing};
use helix_core::{Command, Effect, Reply};
use helix_model::{AttemptKey, Digest, LogTime, NodeId, Reason, WorkerName};
use tokio::sync::broadcast;
use tonic::transport::Channel;

use crate::peers::Peers;
use crate::registry::{Consistency, Registry};

/// The registry and the peers, as the bytes plane sees them.
pub trait Plane: Send + Sync + 'static {
    /// This coordinator.
    fn node(&self) -> NodeId;

    /// All coordinators, this one among them.
    fn nodes(&self) -> Vec<NodeId>;

    /// All coordinators but this one.
    fn others(&self) -> Vec<NodeId> {
        let own = self.node();
        self.nodes().into_iter().filter(|node| *node != own).collect()
    }

    /// Those whose copies of bytes count.
    fn voters(&self) -> Vec<NodeId>;

    /// A channel for bulk data to a peer: its `BlobService` and `LogPeerService`. `None` for a node that is not known.
    /// Connects when used; a peer that is down is an error of the call.
    fn bulk(&self, node: NodeId) -> Option<Channel>;

    /// The policy in force.
    fn policy(&self) -> Policy;

    /// Waits until what this node knows is at least as new as everything acknowledged before the call.
    fn barrier(&self) -> BoxFuture<'_, Result<(), Unavailable>>;

    /// Whether any build's record names the blob. May read the store: called off the async threads.
    fn names_blob(&self, digest: &Digest) -> bool;

    /// What this node knows of an attempt, without a barrier.
    fn attempt<'a>(&'a self, key: &'a AttemptKey) -> BoxFuture<'a, Result<AttemptFacts, Unavailable>>;

    /// Log time.
    fn now(&self) -> LogTime;

    /// Commits that an attempt's log is sealed. What is sealed already, or wanted no more, is no error.
    fn seal_log(&self, command: SealLog) -> BoxFuture<'_, Result<(), Unavailable>>;

    /// What changes, as it is applied here.
    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>>;
}

/// The registry cannot answer now; in words.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub String);

/// What the registry knows of an attempt, as far as its log is concerned.
#[derive(Clone, PartialEq, Debug)]
pub enum AttemptFacts {
    /// There is no such attempt, or its build was purged.
    Unknown,
    /// Its log is not sealed: it runs, or it ended and the log follows, or never will.
    Open {
        /// Who runs it, or ran it.
        worker: WorkerName,
        /// How it ended, if it has.
        end: Option<EndFacts>,
    },
    /// Its log was not kept as long as its build.
    Expired,
    /// Its log is sealed.
    Sealed {
        /// The log.
        log: SealedLog,
    },
}

/// How an attempt ended, as far as its log is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndFacts {
    /// When.
    pub at: LogTime,
    /// Why, unless it succeeded.
    pub reason: Option<Reason>,
    /// Whether the life of the worker that ran it is still counted on: its agent then brings the log itself, however long
    /// that takes.
    pub agent_lives: bool,
}

impl EndFacts {
    /// Whether the attempt's worker was gone, so that what it had not yet sent may never come.
    #[must_use]
    pub fn worker_gone(&self) -> bool {
        self.reason == Some(Reason::WorkerLost)
    }
}

/// The plane as it is outside tests: the registry by consensus, the peers over mutual TLS.
#[derive(Clone)]
pub struct ClusterPlane {
    /// Consensus.
    pub registry: Registry,
    /// The other coordinators.
    pub peers: Peers,
}

impl Plane for ClusterPlane {
    fn node(&self) -> NodeId {
        self.registry.node()
    }

    fn nodes(&self) -> Vec<NodeId> {
        self.peers.ids().into_iter().collect()
    }

    fn voters(&self) -> Vec<NodeId> {
        let voters = self.registry.voters();
        // Before any membership is known, whoever holds bytes counts.
        if voters.is_empty() { self.nodes() } else { voters.into_iter().collect() }
    }

    fn bulk(&self, node: NodeId) -> Option<Channel> {
        self.peers.bulk(node).ok()
    }

    fn policy(&self) -> Policy {
        self.registry.policy()
    }

    fn barrier(&self) -> BoxFuture<'_, Result<(), Unavailable>> {
        Box::pin(async {
            let passed = self.registry.barrier(Consistency::Linearizable).await;
            passed.map_err(|error| Unavailable(error.to_string()))
        })
    }

    fn names_blob(&self, digest: &Digest) -> bool {
        self.registry.names_blob(digest)
    }

    fn attempt<'a>(&'a self, key: &'a AttemptKey) -> BoxFuture<'a, Result<AttemptFacts, Unavailable>> {
        Box::pin(async {
            let view = self.registry.build(&key.build).await.map_err(|error| Unavailable(error.to_string()))?;
            let lives = |attempt: &AttemptRecord| {
                self.registry.with_state(|state| {
                    let row = state.worker(&attempt.worker);
                    row.is_some_and(|row| row.instance == attempt.instance && row.standing != Standing::Lost)
                })
            };
            Ok(view.map_or(AttemptFacts::Unknown, |view| facts_of(&view.record, key, lives)))
        })
    }

    fn now(&self) -> LogTime {
        self.registry.now()
    }

    fn seal_log(&self, command: SealLog) -> BoxFuture<'_, Result<(), Unavailable>> {
        Box::pin(async {
            match self.registry.propose(Command::SealLog(command)).await {
                Ok(Reply::Rejected(rejection)) => Err(Unavailable(crate::rpc::answer::rejection_text(&rejection))),
                Ok(_) => Ok(()),
                Err(error) => Err(Unavailable(error.to_string())),
            }
        })
    }

    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        self.registry.effects()
    }
}

fn facts_of(record: &BuildRecord, key: &AttemptKey, lives: impl Fn(&AttemptRecord) -> bool) -> AttemptFacts {
    let task = record.tasks.get(usize::from(key.task.0));
    let attempt = task.and_then(|task| task.attempts.iter().find(|attempt| attempt.number == key.attempt));
    match attempt {
        None => AttemptFacts::Unknown,
        Some(_) if record.expired.logs.is_some() => AttemptFacts::Expired,
        Some(AttemptRecord { log: Some(log), .. }) => AttemptFacts::Sealed { log: log.clone() },
        Some(attempt) => {
            let end = attempt.end.as_ref().map(|end| EndFacts {
                at: end.at,
                reason: end.reason,
                agent_lives: lives(attempt),
            });
            AttemptFacts::Open { worker: attempt.worker.clone(), end }
        }
    }
}

#[cfg(test)]
pub(crate) mod recorded;
