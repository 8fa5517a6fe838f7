//! What `apply` answers. A rejection states the fact that stood in the way; it is data, never a panic.

use crate::retention::Kept;
use helix_model::{AttemptKey, AttemptNumber, BuildId, BuildState, ErrorCode, LogTime, Measure, NodeId, WorkerName};

/// The answer to one command.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// Done.
    Done,
    /// Nothing to do: it is so already. Asking twice is harmless.
    Unchanged,
    /// The build exists now.
    Submitted,
    /// The build existed, with the same spec: the same build.
    SameBuild,
    /// The build existed, with the same spec, and was purged after it had ended so.
    SamePurged(BuildState),
    /// The commit every task builds: this one, or an earlier report's.
    SourcePinned(String),
    /// How many builds were removed.
    Purged(u64),
    /// Not done, and nothing changed.
    Rejected(Rejection),
}

/// Why a command was not carried out.
#[derive(Clone, PartialEq, Debug)]
pub enum Rejection {
    /// The id belongs to a build with another spec.
    IdTaken(BuildId),
    /// As many unfinished builds as policy allows.
    QueueFull {
        /// The policy's limit.
        queue_max: u64,
    },
    /// No such build.
    BuildUnknown(BuildId),
    /// The build was purged.
    BuildPurged(BuildId),
    /// That of the build has gone, and nothing is added to it any more.
    Expired(BuildId, Kept),
    /// The state does not allow it.
    WrongState {
        /// The build's state.
        from: BuildState,
        /// What was asked for.
        to: BuildState,
    },
    /// It belongs to somebody else.
    NotOwner {
        /// The build.
        build: BuildId,
        /// Its submitter.
        owner: String,
    },
    /// The build has no such task.
    TaskUnknown(AttemptKey),
    /// The task does not wait for a worker, or not yet.
    TaskNotWaiting(AttemptKey),
    /// The attempt is not the task's current one, or runs under another worker or instance.
    StaleAttempt {
        /// What was reported on.
        key: AttemptKey,
        /// The task's latest attempt.
        current: AttemptNumber,
    },
    /// The attempt has ended already.
    AttemptEnded(AttemptKey),
    /// No such worker.
    WorkerUnknown(WorkerName),
    /// The worker's life is another one.
    InstanceStale(WorkerName),
    /// The worker may not have this task: lost, draining, held, quarantined, full, or not of the right kind.
    WorkerUnfit {
        /// The worker.
        worker: WorkerName,
        /// The fact that stands in the way.
        why: Unfit,
    },
    /// A capacity of 0, or more than one command may carry.
    OfferInvalid(&'static str),
    /// Fewer coordinators hold the bytes than policy demands.
    TooFewHolders {
        /// What the bytes are.
        what: String,
        /// Who holds them.
        holders: u32,
        /// Who should.
        needed: u32,
    },
    /// A success without a log, or something else that contradicts itself.
    ReportInvalid(&'static str),
    /// The commit is not 40 or 64 lower-case hex digits.
    CommitInvalid,
    /// Another node has this id.
    NodeEpochTaken {
        /// The id.
        node: NodeId,
    },
    /// The node was removed from the cluster, for ever.
    NodeRemoved {
        /// The id.
        node: NodeId,
    },
    /// The node has a vote; only one without leaves.
    NodeVotes {
        /// The id.
        node: NodeId,
    },
    /// More ids than one command may touch.
    TooManyRows {
        /// How many were given.
        given: usize,
    },
    /// A policy value that would break the cluster.
    PolicyInvalid(String),
    /// The policy is not the one that was to be changed: somebody else was faster.
    PolicyChanged,
    /// An artifact of that name has another digest.
    ArtifactTaken(String),
    /// The attempt still runs.
    AttemptRunning(AttemptKey),
    /// The attempt's deadline has not passed, or nobody asked it to stop.
    NotDue(AttemptKey),
}

/// Why a worker may not have a task. Also a verdict of `explain`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unfit {
    /// Silent: no session, or its heartbeat is late.
    Unhealthy,
    /// Its lease lapsed.
    Lost,
    /// It is away for an upgrade.
    Detached,
    /// It is draining.
    Draining,
    /// It is held: an attempt on it ended without proof of death.
    Held,
    /// Builds failed on it one after another by its own fault.
    Quarantined {
        /// When it is tried again.
        until: LogTime,
    },
    /// It was quarantined, and the attempt that tries it has not ended.
    Probing,
    /// Its agent says that something is short on the host.
    Pressure(String),
    /// As many attempts as its capacity.
    Full {
        /// The worker's capacity.
        capacity: u32,
    },
    /// It does not build for the platform.
    Platform {
        /// That platform.
        asked: String,
        /// Those it builds for, separated by spaces.
        has: String,
    },
    /// It lacks a label that the build requires.
    Label {
        /// `KEY=VALUE`.
        asked: String,
        /// The value it has under that key, if it has one.
        has: Option<String>,
    },
    /// It does not offer the executor.
    Executor {
        /// Which.
        asked: String,
        /// Why not, as far as it says; may be empty.
        why: String,
    },
    /// It does not have a secret of this name.
    Secret(String),
    /// It takes no commands from builds, or has none of its own for a build without one.
    Command,
    /// It has less of something than is asked for, even when it is idle.
    Resources {
        /// Of what.
        what: Measure,
        /// How much is asked for.
        asked: u64,
        /// How much it has.
        has: u64,
    },
    /// It has less of something left than is asked for.
    Short {
        /// Of what.
        what: Measure,
        /// How much is asked for.
        asked: u64,
        /// How much its attempts leave.
        left: u64,
        /// How much it has in all.
        has: u64,
    },
    /// What it has left is kept for a build that waits longer and asks for more.
    Claimed {
        /// That build.
        build: BuildId,
    },
}

impl Rejection {
    /// The stable code that clients see.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::IdTaken(_) => ErrorCode::IdTaken,
            Self::QueueFull { .. } => ErrorCode::QueueFull,
            Self::BuildUnknown(_) | Self::TaskUnknown(_) => ErrorCode::BuildUnknown,
            Self::BuildPurged(_) => ErrorCode::BuildPurged,
            Self::Expired(..) => ErrorCode::Expired,
            Self::WrongState { .. } | Self::TaskNotWaiting(_) | Self::AttemptRunning(_) | Self::NotDue(_) => {
                ErrorCode::WrongState
            }
            Self::NotOwner { .. } => ErrorCode::NotOwner,
            Self::StaleAttempt { .. } | Self::AttemptEnded(_) | Self::InstanceStale(_) => ErrorCode::StaleAttempt,
            Self::WorkerUnknown(_) => ErrorCode::WorkerUnknown,
            Self::WorkerUnfit { .. } => ErrorCode::Unsatisfiable,
            Self::NodeEpochTaken { .. } => ErrorCode::WrongCluster,
            Self::PolicyChanged => ErrorCode::PolicyChanged,
            Self::NodeRemoved { .. } => ErrorCode::NodeIdUsed,
            Self::NodeVotes { .. } => ErrorCode::MemberExists,
            Self::OfferInvalid(_)
            | Self::TooFewHolders { .. }
            | Self::ReportInvalid(_)
            | Self::CommitInvalid
            | Self::TooManyRows { .. }
            | Self::PolicyInvalid(_)
            | Self::ArtifactTaken(_) => ErrorCode::InvalidField,
        }
    }
}
