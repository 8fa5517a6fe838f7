//! What follows from a change, for the shell. Effects are hints: losing one costs time, never truth, because a
//! new leader derives those that matter from the state again (`State::pending_effects`).

use helix_model::{AttemptKey, BuildId, Digest, Instance, Platform, Reason, WorkerName};

/// Something for the shell to do or to tell.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Leader: send this assignment on the worker's session.
    SendAssignment {
        /// The attempt.
        key: AttemptKey,
        /// Who runs it.
        worker: WorkerName,
        /// Which life of it.
        instance: Instance,
    },
    /// Leader: tell the worker which commit to build.
    SendCommit {
        /// The attempt.
        key: AttemptKey,
        /// Who runs it.
        worker: WorkerName,
        /// The commit.
        commit: String,
    },
    /// Leader: tell the worker what follows from its image: push an index of these, or, of none, go on.
    SendImages {
        /// The attempt.
        key: AttemptKey,
        /// Who runs it.
        worker: WorkerName,
        /// The images of all tasks, in their order.
        images: Vec<(Platform, Digest)>,
    },
    /// Leader: tell the worker to kill this attempt and to prove it.
    SendStop {
        /// The attempt.
        key: AttemptKey,
        /// Who runs it.
        worker: WorkerName,
        /// Why.
        reason: Reason,
    },
    /// Leader: the worker may forget this attempt.
    SendForget {
        /// The attempt.
        key: AttemptKey,
        /// Who ran it.
        worker: WorkerName,
    },
    /// Any node: the build changed; whoever waits for it looks again.
    BuildChanged(BuildId),
    /// Any node: the attempt's log is sealed; live copies of it may go.
    LogSealed(AttemptKey),
    /// Any node: the build is gone; its live logs may go.
    BuildPurged(BuildId),
    /// Any node: the build's logs are gone, live ones too.
    LogsExpired(BuildId),
    /// Any node: the worker's row changed.
    WorkerChanged(WorkerName),
    /// Any node: a coordinator's row changed.
    NodeChanged,
}
