//! What the services for clients share: handles to the registry, bytes, logs, liveness, and how to read a build.

use std::sync::Arc;
use std::time::Duration;

use helix_common::identity::{Identity, Role};
use helix_common::status::invalid;
use helix_core::command::Authority;
use helix_core::record::BuildRecord;
use helix_core::state::Known;
use helix_core::{Command, Reply};
use helix_model::BuildId;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::blobs::Blobs;
use crate::disk::DiskRoom;
use crate::leader::{LeaderMetrics, LivenessHandle};
use crate::logs::LogHub;
use crate::metrics::Metrics;
use crate::registry::{Consistency, Registry};
use crate::rpc::answer;
use crate::rpc::changes::Changes;

/// Handles that every service for clients holds. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    /// Consensus.
    pub registry: Registry,
    /// Bytes.
    pub blobs: Arc<Blobs>,
    /// Logs.
    pub logs: LogHub,
    /// Who is connected to the leader.
    pub liveness: LivenessHandle,
    /// What the leader's loop measures.
    pub leader: LeaderMetrics,
    /// Wakes those who wait for builds.
    pub changes: Changes,
    /// Room left for data.
    pub disk: DiskRoom,
    /// What is counted.
    pub metrics: Metrics,
    /// Owns the tasks that feed streams.
    pub tasks: TaskTracker,
    /// Cancelled when long answers are to end.
    pub stopping: CancellationToken,
}

impl Services {
    /// Makes what is read next at least as new as everything acknowledged before.
    pub(crate) async fn freshen(&self, consistency: Consistency) -> Result<(), Status> {
        self.registry.barrier(consistency).await.map_err(|error| answer::of_read(&error))
    }

    /// A build as this node has applied it. Call [`Self::freshen`] first where that matters.
    pub(crate) async fn record(&self, id: &BuildId) -> Result<Arc<BuildRecord>, Status> {
        match self.registry.build(id).await.map_err(|error| answer::of_store(&error))? {
            Some(view) => Ok(view.record),
            None => Err(self.absence(id)),
        }
    }

    /// Why there is no record under an id.
    pub(crate) fn absence(&self, id: &BuildId) -> Status {
        let purged = self.registry.with_state(|state| matches!(state.build(id), Some(Known::Purged(_))));
        if purged { answer::build_purged(id) } else { answer::build_unknown(id) }
    }

    /// Commits a command, and counts how long that took.
    pub(crate) async fn propose(&self, command: Command) -> Result<Reply, Status> {
        let begun = std::time::Instant::now();
        let outcome = self.registry.propose(command).await;
        self.metrics.committed(begun.elapsed());
        outcome.map_err(|error| answer::of_propose(&error))
    }

    /// The status for a long answer that ends because this node does.
    pub(crate) fn moved(&self) -> Status {
        answer::shutting_down()
    }
}

/// An id from the wire.
pub(crate) fn build_id(text: &str) -> Result<BuildId, Status> {
    BuildId::new(text).map_err(|wrong| invalid(&wrong))
}

/// What somebody may do: operators all, others to their own.
pub(crate) fn authority(identity: &Identity) -> Authority {
    match identity.role {
        Role::Operator | Role::Coordinator => Authority::Any(identity.principal()),
        Role::Client | Role::Agent => Authority::Owner(identity.principal()),
    }
}

/// How new an answer must be.
pub(crate) fn consistency(stale: bool) -> Consistency {
    if stale { Consistency::Stale } else { Consistency::Linearizable }
}

/// The longest that one call may wait.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);
