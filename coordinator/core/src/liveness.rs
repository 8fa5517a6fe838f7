//! What the leader knows without asking the log: who is connected, who spoke when, which proposals are under way.
//!
//! Kept in the leader's memory by its shell and handed to `schedule`, `due` and `explain`; never replicated.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use helix_model::{AttemptKey, BuildId, Instance, LogTime, TaskIndex, WorkerName};

use crate::retention::Kept;
use crate::state::index::Waiting;

/// All workers' liveness, and since when this leader has been watching.
#[derive(Clone, Debug, Default)]
pub struct Liveness {
    /// When this leader began: nobody's lease lapses before a full lease after it.
    pub leader_since: LogTime,
    /// What is known of each worker that spoke to this leader.
    pub workers: BTreeMap<WorkerName, WorkerLiveness>,
    /// Workers whose room is kept for a task that waits long and asks for much. The shell stores what `schedule::claims`
    /// answers, now and then.
    pub claims: BTreeMap<WorkerName, Claim>,
    /// While set, losses are held back: too many workers fell silent at once. The shell stores what
    /// `due::brake` answers before it calls `due::due`.
    pub brake: Option<Brake>,
}

/// A task for which a worker's room is kept: nobody behind it in the order gets any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The build's priority.
    pub priority: i32,
    /// The build's place in the order of submits.
    pub sequence: u64,
    /// Which of its tasks.
    pub task: TaskIndex,
}

impl Claim {
    pub(crate) fn of(waiting: Waiting) -> Self {
        Self { priority: waiting.priority.0, sequence: waiting.sequence, task: waiting.task }
    }

    /// The task's place in the order.
    pub(crate) fn place(self) -> Waiting {
        Waiting { priority: Reverse(self.priority), sequence: self.sequence, task: self.task }
    }
}

/// Losses are held back because most workers fell silent within one lease: then the fault is likely ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Brake {
    /// Since when.
    pub since: LogTime,
    /// The workers that were counted on at that moment.
    pub watched: BTreeSet<WorkerName>,
}

/// What the leader knows of one worker.
#[derive(Clone, PartialEq, Debug)]
pub struct WorkerLiveness {
    /// The life that spoke.
    pub instance: Instance,
    /// Whether its session is open and its heartbeat in time: only then does it get new work.
    pub session: SessionState,
    /// When it last spoke.
    pub last_seen: LogTime,
    /// What is short on its host, in short words; empty when all is well. While it is not, the worker gets no new work.
    pub pressure: String,
    /// For each attempt it runs: how long nothing was printed, in milliseconds, at `last_seen`.
    pub silent_ms: BTreeMap<AttemptKey, u64>,
    /// When its agent's certificate ends (Unix milliseconds); 0 where it does not say. For people: nothing is decided by it.
    pub certificate_not_after_ms: i64,
}

impl WorkerLiveness {
    /// A worker whose session was opened at `now`, and that has said nothing yet.
    #[must_use]
    pub fn opened(instance: Instance, now: LogTime) -> Self {
        Self {
            instance,
            session: SessionState::Open,
            last_seen: now,
            pressure: String::new(),
            silent_ms: BTreeMap::new(),
            certificate_not_after_ms: 0,
        }
    }
}

/// Whether a worker can be given work now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionState {
    /// Connected, heartbeats in time.
    Open,
    /// Connected, reconciled not yet, or its heartbeat is late.
    Late,
    /// Not connected.
    Closed,
}

/// Proposals that are not applied yet, so that none is made twice.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    /// Tasks whose assignment is under way, and to whom.
    pub assigning: BTreeMap<(BuildId, TaskIndex), WorkerName>,
    /// Attempts about which something else is under way (expiry, unverified end).
    pub attempts: BTreeSet<AttemptKey>,
    /// Workers about which something is under way (loss, probe).
    pub workers: BTreeSet<WorkerName>,
    /// Builds whose purge is under way.
    pub purging: BTreeSet<BuildId>,
    /// Builds whose logs or artifacts are about to go.
    pub letting_go: BTreeSet<(BuildId, Kept)>,
    /// Tombstones whose removal is under way.
    pub expiring: BTreeSet<BuildId>,
}
