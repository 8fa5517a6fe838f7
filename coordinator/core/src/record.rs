//! The registry's rows: what is kept of builds, workers, nodes, logs, and how a change to them is reported.
//!
//! A row is what sled stores and a snapshot carries. The coordinator's shell encodes rows; nothing here does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_model::{
    AttemptKey, AttemptNumber, BuildId, BuildSpec, BuildState, Digest, Instance, LogTime, NodeId, Platform, Reason,
    TaskIndex, WorkerName,
};

use crate::command::WorkerOffer;
use crate::effect::Effect;
use crate::retention::{Expired, Kept, Labels, Rules};

mod image;

pub use image::Image;

/// Bytes in blob stores, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlobRef {
    /// sha256 of the bytes.
    pub digest: Digest,
    /// How many there are.
    pub size: u64,
    /// Coordinators that fsynced them.
    pub holders: BTreeSet<NodeId>,
}

/// A named output of a build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Artifact {
    /// Relative path in the workdir; unique in its task.
    pub name: String,
    /// Its bytes: a file as it is, a directory as a tar.
    pub blob: BlobRef,
}

/// An attempt's whole log as a blob.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedLog {
    /// The compressed log.
    pub blob: BlobRef,
    /// Lines in it.
    pub lines: u64,
}

/// Whether a build is kept from being purged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pinned {
    /// It may be purged.
    #[default]
    No,
    /// It may not.
    Yes,
}

/// A build and everything that is decided about it.
#[derive(Clone, PartialEq, Debug)]
pub struct BuildRecord {
    /// Its id.
    pub id: BuildId,
    /// What was submitted, defaults applied.
    pub spec: Arc<BuildSpec>,
    /// See [`crate::command::SubmitBuild::spec_digest`].
    pub spec_digest: Digest,
    /// `ROLE/NAME` of the submitter.
    pub submitted_by: String,
    /// The build this one repeats.
    pub retry_of: Option<BuildId>,
    /// Its place in the order of all submits; older is smaller.
    pub sequence: u64,
    /// Its state.
    pub state: BuildState,
    /// When the submit was committed.
    pub created_at: LogTime,
    /// The first assignment.
    pub started_at: Option<LogTime>,
    /// The end.
    pub completed_at: Option<LogTime>,
    /// The commit that every task builds.
    pub commit: Option<String>,
    /// A cancel that was committed.
    pub cancel: Option<CancelRequest>,
    /// Why it did not succeed: the first failed task's, in the order of platforms.
    pub reason: Option<Reason>,
    /// `false` when a stop was not seen to work.
    pub verified: bool,
    /// One per platform, at least one.
    pub tasks: Vec<TaskRecord>,
    /// Registered by clients, beside what tasks made.
    pub artifacts: Vec<Artifact>,
    /// Whether retention passes it over.
    pub pinned: Pinned,
    /// What of it has gone before the rest.
    pub expired: Expired,
    /// The task whose running attempt pushes the index of all images once the other tasks have succeeded.
    pub indexing: Option<TaskIndex>,
}

/// A committed cancel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CancelRequest {
    /// When it was committed.
    pub at: LogTime,
    /// Who asked.
    pub by: String,
    /// In their words.
    pub reason: String,
}

/// One platform's part of a build.
#[derive(Clone, PartialEq, Debug)]
pub struct TaskRecord {
    /// `None` means any.
    pub platform: Option<Platform>,
    /// Where it stands.
    pub phase: TaskPhase,
    /// All attempts so far, first to last; the last is the current one.
    pub attempts: Vec<AttemptRecord>,
    /// Retries spent on the user's failures.
    pub user_retries: u32,
    /// Retries spent on the infrastructure's.
    pub infra_retries: u32,
}

/// Where a task stands.
#[derive(Clone, PartialEq, Debug)]
pub enum TaskPhase {
    /// For a worker; not before `not_before`.
    Waiting {
        /// The end of the back-off after a failed attempt; the time of submit at first.
        not_before: LogTime,
    },
    /// Its last attempt runs.
    Running,
    /// It ended.
    Ended {
        /// `Succeeded`, `Failed` or `Cancelled`.
        state: BuildState,
        /// Why, unless it succeeded.
        reason: Option<Reason>,
        /// When.
        at: LogTime,
    },
}

/// One run of a task on one worker.
#[derive(Clone, PartialEq, Debug)]
pub struct AttemptRecord {
    /// From 1.
    pub number: AttemptNumber,
    /// Who runs it.
    pub worker: WorkerName,
    /// Which life of the worker.
    pub instance: Instance,
    /// When the assignment was committed.
    pub assigned_at: LogTime,
    /// The registry's wish that it stop.
    pub stop: Option<StopRequest>,
    /// How it ended; `None` while it runs.
    pub end: Option<AttemptEnd>,
    /// What it made.
    pub artifacts: Vec<Artifact>,
    /// Its sealed log.
    pub log: Option<SealedLog>,
    /// The image that it made, once that is known; gone if the attempt did not succeed.
    pub image: Option<Image>,
}

/// Why and since when an attempt is to stop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StopRequest {
    /// `Cancelled`, `Timeout`, `Silence` or `Drained`.
    pub reason: Reason,
    /// When that was committed.
    pub at: LogTime,
}

/// How an attempt ended.
#[derive(Clone, PartialEq, Debug)]
pub struct AttemptEnd {
    /// When that was committed.
    pub at: LogTime,
    /// `None` for a success.
    pub reason: Option<Reason>,
    /// One line for people.
    pub message: String,
    /// The command's exit code.
    pub exit_code: Option<i32>,
    /// The signal that ended the command.
    pub signal: Option<i32>,
    /// Digest of the result of a success.
    pub digest: Option<Digest>,
    /// Size of the result.
    pub size: u64,
    /// Tag of the result; empty for none.
    pub image_tag: String,
    /// Whether its processes were seen dead.
    pub verified: bool,
    /// The index of the images of all tasks, if this attempt was the one to push it.
    pub index: Option<Digest>,
}

/// A worker as the registry knows it. Its load is not kept: it is the number of attempts that run on it.
#[derive(Clone, PartialEq, Debug)]
pub struct WorkerRecord {
    /// Its name.
    pub name: WorkerName,
    /// Its present or last life.
    pub instance: Instance,
    /// What it offers.
    pub offer: WorkerOffer,
    /// Whether the registry counts on it.
    pub standing: Standing,
    /// Set while it takes no new work by an operator's or its own wish.
    pub drain: Option<Drain>,
    /// Attempts of this instance that ended unverified: while any is left, it gets no work.
    pub held: BTreeSet<AttemptKey>,
    /// When it last registered.
    pub registered_at: LogTime,
    /// Whether its own failures keep it from work. Outlives its lives: a host does not mend by starting anew.
    pub trust: Trust,
}

/// What a worker's own failures make of it. Only [`crate::apply`] moves it on, and an operator's undrain resets it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// Work as usual.
    Full {
        /// Builds that failed here by the worker's fault since one last went well; fewer than policy bears.
        failed: BTreeSet<BuildId>,
    },
    /// No new work.
    Quarantined {
        /// When it is tried again.
        until: LogTime,
        /// How many probes have failed.
        round: u32,
    },
    /// One attempt at a time, until one goes well.
    Probing {
        /// Attempts that were assigned from then on are probes.
        since: LogTime,
        /// How many probes have failed.
        round: u32,
    },
}

impl Default for Trust {
    fn default() -> Self {
        Self::Full { failed: BTreeSet::new() }
    }
}

/// Whether the registry counts on a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It has a lease, as far as the registry knows.
    Present,
    /// It said that it will be back by then, and its attempts run on meanwhile.
    Detached {
        /// When its absence becomes a loss.
        until: LogTime,
    },
    /// Its lease lapsed.
    Lost,
}

/// See [`WorkerRecord::drain`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drain {
    /// When what still runs is stopped.
    pub deadline: Option<LogTime>,
    /// Who wished it: an agent's own wish ends when the worker registers again, an operator's does not.
    pub by: DrainedBy,
}

/// Who wished a worker's drain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DrainedBy {
    /// An operator: it lasts until an operator ends it, and takes the place of the agent's own.
    #[default]
    Operator,
    /// The agent, which is about to go: it lasts until the worker registers again. While an operator's is set it changes nothing.
    Agent,
}

/// A coordinator as the registry knows it; kept for ever, since ids are never reused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeRecord {
    /// Its number.
    pub id: NodeId,
    /// The epoch of its data directory.
    pub epoch: u64,
    /// Where clients and agents dial it.
    pub grpc: String,
    /// Its version.
    pub version: String,
    /// The highest command format it understands.
    pub format: u32,
    /// When it was removed from the cluster, for ever.
    pub removed_at: Option<LogTime>,
}

/// What is left of a purged build, so that a late retry of its submit starts nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tombstone {
    /// The purged id.
    pub id: BuildId,
    /// Its spec's digest.
    pub spec_digest: Digest,
    /// How it had ended.
    pub state: BuildState,
    /// When it was purged.
    pub purged_at: LogTime,
}

/// Limits and times that `apply` and the leader's decisions read. Replicated; changed by a command alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// How long a silent worker keeps its attempts.
    pub worker_lease_ms: u64,
    /// How long a stop waits for proof after the lease lapsed.
    pub cancel_unverified_after_ms: u64,
    /// How long a detached agent may stay away.
    pub detach_for_ms: u64,
    /// Retries after failures that are the infrastructure's fault.
    pub infra_retries: u32,
    /// The first back-off between attempts; doubles up to a minute.
    pub retry_backoff_ms: u64,
    /// Unfinished builds the registry takes.
    pub queue_max: u64,
    /// Coordinators that must hold a blob before a success counts; 0 leaves it to the number of voters: see [`Self::copies_of`].
    pub copies: u32,
    /// How long an agent tries to store artifacts and log.
    pub store_deadline_ms: u64,
    /// Wall-clock limit of attempts whose build names none.
    pub timeout_default_ms: u64,
    /// How much later than the agent a coordinator enforces a time-out.
    pub timeout_grace_ms: u64,
    /// How long finished builds are kept, where no rule says otherwise.
    pub retain_ms: u64,
    /// How long their logs are kept, and no longer than they themselves.
    pub retain_logs_ms: u64,
    /// How long their artifacts are kept, and no longer than they themselves.
    pub retain_artifacts_ms: u64,
    /// Other lifetimes for builds of certain states or labels.
    pub retain_rules: Rules,
    /// How many finished builds are kept.
    pub retain_builds: u64,
    /// How long tombstones are kept.
    pub tombstone_ms: u64,
    /// Largest blob.
    pub blob_bytes_max: u64,
    /// Largest log of one attempt; beyond it the middle is dropped, visibly.
    pub log_bytes_max: u64,
    /// A coordinator with less free disk refuses submits and bytes.
    pub disk_reserve_bytes: u64,
    /// Builds in a row that may fail on a worker by its own fault before it is quarantined; 0 for never.
    pub quarantine_after: u32,
    /// How long the first quarantine is; it doubles with each probe that fails, up to an hour.
    pub quarantine_ms: u64,
    /// How long the log of an attempt whose worker was lost waits for that worker before a coordinator seals what it has.
    pub seal_lost_after_ms: u64,
    /// How many bytes of its blobs each coordinator reads and checks a second; 0 for none.
    pub scrub_bytes: u64,
}

/// As long as anything may be kept: ten years.
pub const DURATION_MS_MAX: u64 = 3_650 * 86_400_000;

/// From so many voters on, two may be lost at once and the rest goes on: with three copies no blob is lost then.
const VOTERS_OF_THREE_COPIES: usize = 5;

impl Policy {
    /// What a new cluster is given at its birth, and what a key has that is reset.
    #[must_use]
    pub fn of_new_clusters() -> Self {
        Self { copies: 0, ..Self::default() }
    }

    /// How many of so many voters must hold a blob: never more than there are, and one at least.
    #[must_use]
    pub fn copies_of(&self, voters: usize) -> u32 {
        let copies = match self.copies {
            0 if voters >= VOTERS_OF_THREE_COPIES => 3,
            0 => 2,
            copies => copies,
        };
        copies.min(u32::try_from(voters).unwrap_or(u32::MAX)).max(1)
    }
}

/// What is in force as long as nobody set a policy. It never changes: nodes of all versions must have the same.
impl Default for Policy {
    fn default() -> Self {
        Self {
            worker_lease_ms: 15_000,
            cancel_unverified_after_ms: 60_000,
            detach_for_ms: 300_000,
            infra_retries: 2,
            retry_backoff_ms: 1_000,
            queue_max: 1_000_000,
            copies: 2,
            store_deadline_ms: 600_000,
            timeout_default_ms: 86_400_000,
            timeout_grace_ms: 10_000,
            retain_ms: 30 * 86_400_000,
            retain_logs_ms: DURATION_MS_MAX,
            retain_artifacts_ms: DURATION_MS_MAX,
            retain_rules: Rules::new(),
            retain_builds: 100_000,
            tombstone_ms: 7 * 86_400_000,
            blob_bytes_max: 64 << 30,
            log_bytes_max: 4 << 30,
            disk_reserve_bytes: 1 << 30,
            quarantine_after: 3,
            quarantine_ms: 60_000,
            seal_lost_after_ms: 120_000,
            scrub_bytes: 4 << 20,
        }
    }
}

/// What memory keeps of a finished build; the record is in the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FinishedBuild {
    /// See [`BuildRecord::spec_digest`].
    pub spec_digest: Digest,
    /// Its terminal state.
    pub state: BuildState,
    /// Its end.
    pub completed_at: LogTime,
    /// Its place in the order of all submits.
    pub sequence: u64,
    /// Whether retention passes it over.
    pub pinned: Pinned,
    /// `ROLE/NAME` of the submitter.
    pub submitted_by: Arc<str>,
    /// Attempts whose log was not sealed when the build ended, and who ran them: only that worker may seal it, once.
    pub unsealed: BTreeSet<(TaskIndex, AttemptNumber, WorkerName)>,
    /// Artifacts that clients registered, by name.
    pub registered: BTreeMap<String, Digest>,
    /// Its labels: rules of retention ask for them.
    pub labels: Labels,
    /// What of it has gone.
    pub expired: Expired,
}

/// A fact that arrived after its build was finished and its record left memory; kept in a row of its own
/// and put together with the record by whoever reads it.
#[derive(Clone, PartialEq, Debug)]
pub enum Addendum {
    /// The log of a failed attempt, sealed behind its end.
    Log(SealedLog),
    /// An artifact that a client registered; the key's attempt is task 0, attempt 0.
    Artifact(Artifact),
    /// What [`BuildRecord::pinned`] became; the key's attempt is task 0, attempt 0.
    Pinned(Pinned),
}

/// What counts once for the whole registry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// The next build's place in the order of submits.
    pub next_sequence: u64,
    /// The last log time applied.
    pub last_at: LogTime,
    /// The voters by the last membership applied.
    pub voters: BTreeSet<NodeId>,
}

/// A row's identity. The order is the order in the store.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RowKey {
    /// [`Counters`].
    Counters,
    /// [`Policy`].
    Policy,
    /// [`NodeRecord`].
    Node(NodeId),
    /// [`WorkerRecord`].
    Worker(WorkerName),
    /// [`BuildRecord`].
    Build(BuildId),
    /// [`Addendum`]; the text tells apart several of one attempt (an artifact's name; empty for the log, and for the pin).
    Addendum(AttemptKey, String),
    /// [`Tombstone`].
    Tombstone(BuildId),
}

/// A row's contents.
#[derive(Clone, PartialEq, Debug)]
pub enum Row {
    /// Under [`RowKey::Counters`].
    Counters(Counters),
    /// Under [`RowKey::Policy`].
    Policy(Policy),
    /// Under [`RowKey::Node`].
    Node(NodeRecord),
    /// Under [`RowKey::Worker`].
    Worker(Arc<WorkerRecord>),
    /// Under [`RowKey::Build`].
    Build(Arc<BuildRecord>),
    /// Under [`RowKey::Addendum`].
    Addendum(AttemptKey, Addendum),
    /// Under [`RowKey::Tombstone`].
    Tombstone(Tombstone),
}

/// What becomes of a row.
#[derive(Clone, PartialEq, Debug)]
pub enum RowChange {
    /// It now reads so.
    Put(Row),
    /// It is gone.
    Delete(RowKey),
    /// All addenda of this build are gone.
    DeleteAddenda(BuildId),
    /// The build's row, which is not in memory, forgets that ([`BuildRecord::expire`]), and its addenda about it are gone.
    Expire(BuildId, Kept, LogTime),
}

/// What applying commands did, for the shell to carry out. One buffer serves many commands in turn.
#[derive(Debug, Default)]
pub struct Applied {
    /// Rows to write, in order; a later change of the same row replaces an earlier one.
    pub rows: Vec<RowChange>,
    /// Hints for the leader's shell, and changes for whoever waits for them on any node.
    pub effects: Vec<Effect>,
}

impl Row {
    /// The key this row is kept under.
    #[must_use]
    pub fn key(&self) -> RowKey {
        match self {
            Self::Counters(_) => RowKey::Counters,
            Self::Policy(_) => RowKey::Policy,
            Self::Node(node) => RowKey::Node(node.id),
            Self::Worker(worker) => RowKey::Worker(worker.name.clone()),
            Self::Build(build) => RowKey::Build(build.id.clone()),
            Self::Addendum(key, Addendum::Log(_) | Addendum::Pinned(_)) => RowKey::Addendum(key.clone(), String::new()),
            Self::Addendum(key, Addendum::Artifact(artifact)) => RowKey::Addendum(key.clone(), artifact.name.clone()),
            Self::Tombstone(tombstone) => RowKey::Tombstone(tombstone.id.clone()),
        }
    }
}

impl TaskRecord {
    /// The attempt that runs, if one does.
    #[must_use]
    pub fn running(&self) -> Option<&AttemptRecord> {
        match self.phase {
            TaskPhase::Running => self.attempts.last(),
            TaskPhase::Waiting { .. } | TaskPhase::Ended { .. } => None,
        }
    }
}
