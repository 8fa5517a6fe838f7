//! The registry in memory: open builds whole, what is kept of finished ones, workers, nodes, policy.
//!
//! Rows are changed only through the `put_*` and `remove_*` functions here, which keep the indexes in step and
//! report every change. Reading is in [`queries`](self), loading in `load`; who decides is in `apply`.
//! Invariant: the indexes are exactly what the rows and the last log time say (see [`crate::invariants`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use helix_model::{AttemptKey, AttemptNumber, BuildId, BuildState, LogTime, NodeId, TaskIndex, WorkerName};

use crate::effect::Effect;
use crate::record::{
    Addendum, Applied, BuildRecord, Counters, FinishedBuild, NodeRecord, Pinned, Policy, Row, RowChange, RowKey,
    TaskPhase, Tombstone, WorkerRecord,
};
use crate::retention::{Kept, Labels};

pub mod fit;
pub(crate) mod index;
mod listing;
mod load;
mod pending;
mod queries;

pub use listing::{Listed, Walk};
pub use load::LoadError;
pub(crate) use load::check_build;
pub use pending::Offered;
pub use queries::{Known, Totals};

use index::Index;

/// The replicated registry. Equal logs make equal states on every node.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub(crate) counters: Counters,
    counters_changed: bool,
    pub(crate) policy: Policy,
    pub(crate) nodes: BTreeMap<NodeId, NodeRecord>,
    pub(crate) workers: BTreeMap<WorkerName, Arc<WorkerRecord>>,
    pub(crate) open: BTreeMap<BuildId, Arc<BuildRecord>>,
    pub(crate) finished: BTreeMap<BuildId, FinishedBuild>,
    pub(crate) tombstones: BTreeMap<BuildId, Tombstone>,
    pub(crate) index: Index,
}

/// Two states are equal when their rows are; indexes follow from them.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.counters == other.counters
            && self.policy == other.policy
            && self.nodes == other.nodes
            && self.workers == other.workers
            && self.open == other.open
            && self.finished == other.finished
            && self.tombstones == other.tombstones
    }
}

impl State {
    /// Reports the counters' row if anything in it changed since it was last reported. The shell calls this once
    /// after the commands of a log entry, so that a thousand commands write the row once.
    pub fn finish_entry(&mut self, out: &mut Applied) {
        if std::mem::take(&mut self.counters_changed) {
            out.rows.push(RowChange::Put(Row::Counters(self.counters.clone())));
        }
    }

    /// Moves log time on, never back, and answers what it is now.
    pub(crate) fn advance(&mut self, at: LogTime) -> LogTime {
        if at > self.counters.last_at {
            self.counters.last_at = at;
            self.counters_changed = true;
            self.index.advance(at, &self.open);
        }
        self.counters.last_at
    }

    pub(crate) fn take_sequence(&mut self) -> u64 {
        let sequence = self.counters.next_sequence;
        self.counters.next_sequence = sequence.saturating_add(1);
        self.counters_changed = true;
        sequence
    }

    pub(crate) fn set_voters(&mut self, voters: std::collections::BTreeSet<NodeId>) {
        if voters != self.counters.voters {
            self.counters.voters = voters;
            self.counters_changed = true;
        }
    }

    /// Stores an open build as it reads now. One whose state is terminal leaves memory but for a trace.
    pub(crate) fn put_build(&mut self, mut record: BuildRecord, out: &mut Applied) {
        crate::apply::settle_index(&mut record, out);
        let record = Arc::new(record);
        if let Some(before) = self.open.remove(&record.id) {
            self.index.remove_build(&before, &self.workers);
        }
        out.rows.push(RowChange::Put(Row::Build(Arc::clone(&record))));
        out.effects.push(Effect::BuildChanged(record.id.clone()));
        if record.state.is_terminal() {
            let finished = FinishedBuild::of(&record);
            self.put_finished(record.id.clone(), finished);
        } else {
            self.insert_open(record);
        }
    }

    pub(crate) fn insert_open(&mut self, record: Arc<BuildRecord>) {
        self.index.add_build(&record, self.counters.last_at, &self.workers);
        self.open.insert(record.id.clone(), record);
    }

    pub(crate) fn put_finished(&mut self, id: BuildId, finished: FinishedBuild) {
        if let Some(before) = self.finished.get(&id) {
            self.index.remove_finished(&id, before, &self.policy);
        }
        self.index.add_finished(&id, &finished, &self.policy);
        self.finished.insert(id, finished);
    }

    /// Adds a fact to a finished build, in a row of its own.
    pub(crate) fn put_addendum(&mut self, key: AttemptKey, addendum: Addendum, out: &mut Applied) {
        if let Some(mut finished) = self.finished.get(&key.build).cloned() {
            finished.add(&key, &addendum);
            self.put_finished(key.build.clone(), finished);
            out.effects.push(Effect::BuildChanged(key.build.clone()));
            out.rows.push(RowChange::Put(Row::Addendum(key, addendum)));
        }
    }

    /// Lets go of the logs or artifacts of a finished build. Its record, which is in the store, is changed there.
    pub(crate) fn expire(&mut self, id: &BuildId, kept: Kept, at: LogTime, out: &mut Applied) {
        let Some(mut finished) = self.finished.get(id).cloned() else { return };
        finished.expire(kept, at);
        self.put_finished(id.clone(), finished);
        out.rows.push(RowChange::Expire(id.clone(), kept, at));
        out.effects.push(Effect::BuildChanged(id.clone()));
        if kept == Kept::Logs {
            out.effects.push(Effect::LogsExpired(id.clone()));
        }
    }

    /// Puts another policy in force. Lifetimes that change are looked up for each finished build once, here.
    pub(crate) fn replace_policy(&mut self, policy: Policy) {
        let before = std::mem::replace(&mut self.policy, policy);
        if !self.policy.retains_as(&before) {
            self.index.forget_lifetimes();
            for (id, build) in &self.finished {
                self.index.add_lifetimes(id, build, &self.policy);
            }
        }
    }

    /// Replaces a finished build by its tombstone.
    pub(crate) fn bury(&mut self, id: &BuildId, at: LogTime, out: &mut Applied) {
        let Some(finished) = self.finished.remove(id) else { return };
        self.index.remove_finished(id, &finished, &self.policy);
        let tombstone =
            Tombstone { id: id.clone(), spec_digest: finished.spec_digest, state: finished.state, purged_at: at };
        out.rows.push(RowChange::Delete(RowKey::Build(id.clone())));
        out.rows.push(RowChange::DeleteAddenda(id.clone()));
        out.rows.push(RowChange::Put(Row::Tombstone(tombstone.clone())));
        out.effects.push(Effect::BuildPurged(id.clone()));
        self.insert_tombstone(tombstone);
    }

    pub(crate) fn insert_tombstone(&mut self, tombstone: Tombstone) {
        self.index.tombstones.insert((tombstone.purged_at, tombstone.id.clone()));
        self.tombstones.insert(tombstone.id.clone(), tombstone);
    }

    pub(crate) fn remove_tombstone(&mut self, id: &BuildId, out: &mut Applied) {
        if let Some(tombstone) = self.tombstones.remove(id) {
            self.index.tombstones.remove(&(tombstone.purged_at, id.clone()));
            out.rows.push(RowChange::Delete(RowKey::Tombstone(id.clone())));
        }
    }

    pub(crate) fn put_worker(&mut self, record: WorkerRecord, out: &mut Applied) {
        let record = Arc::new(record);
        out.rows.push(RowChange::Put(Row::Worker(Arc::clone(&record))));
        out.effects.push(Effect::WorkerChanged(record.name.clone()));
        self.insert_worker(record);
    }

    pub(crate) fn insert_worker(&mut self, record: Arc<WorkerRecord>) {
        let before = self.workers.insert(record.name.clone(), Arc::clone(&record));
        self.index.change_worker(before.as_deref(), Some(&record));
    }

    pub(crate) fn remove_worker_row(&mut self, name: &WorkerName, out: &mut Applied) {
        if let Some(before) = self.workers.remove(name) {
            self.index.change_worker(Some(&before), None);
            out.rows.push(RowChange::Delete(RowKey::Worker(name.clone())));
            out.effects.push(Effect::WorkerChanged(name.clone()));
        }
    }

    /// A copy of an open build to change and to put back.
    pub(crate) fn open_copy(&self, id: &BuildId) -> Option<BuildRecord> {
        self.open.get(id).map(|record| BuildRecord::clone(record))
    }
}

impl FinishedBuild {
    /// What memory keeps of `record`, which has ended.
    #[must_use]
    pub fn of(record: &BuildRecord) -> Self {
        let mut unsealed = std::collections::BTreeSet::new();
        for (index, task) in record.indexed_tasks() {
            let without = task.attempts.iter().filter(|attempt| attempt.log.is_none());
            unsealed.extend(without.map(|attempt| (index, attempt.number, attempt.worker.clone())));
        }
        let mut finished = Self {
            spec_digest: record.spec_digest,
            state: record.state,
            completed_at: record.completed_at.unwrap_or_default(),
            sequence: record.sequence,
            pinned: record.pinned,
            submitted_by: Arc::from(record.submitted_by.as_str()),
            unsealed,
            registered: record.artifacts.iter().map(|a| (a.name.clone(), a.blob.digest)).collect(),
            labels: Labels::of(&record.spec.labels),
            expired: record.expired,
        };
        finished.forget_expired();
        finished
    }

    pub(crate) fn expire(&mut self, kept: Kept, at: LogTime) {
        self.expired.note(kept, at);
        self.forget_expired();
    }

    /// What has gone is not waited for any more.
    fn forget_expired(&mut self) {
        if self.expired.logs.is_some() {
            self.unsealed.clear();
        }
        if self.expired.artifacts.is_some() {
            self.registered.clear();
        }
    }

    /// Takes in a fact that arrived after the end.
    pub(crate) fn add(&mut self, key: &AttemptKey, addendum: &Addendum) {
        match addendum {
            Addendum::Log(_) => {
                self.unsealed.retain(|(task, attempt, _)| (*task, *attempt) != (key.task, key.attempt));
            }
            Addendum::Artifact(artifact) => {
                self.registered.insert(artifact.name.clone(), artifact.blob.digest);
            }
            Addendum::Pinned(pinned) => self.pinned = *pinned,
        }
    }
}

impl BuildRecord {
    /// The tasks with their places.
    pub fn indexed_tasks(&self) -> impl Iterator<Item = (TaskIndex, &crate::record::TaskRecord)> {
        self.tasks.iter().enumerate().map(|(place, task)| (TaskIndex(u16::try_from(place).unwrap_or(u16::MAX)), task))
    }

    /// The fencing token of one of its attempts.
    #[must_use]
    pub fn attempt_key(&self, task: TaskIndex, attempt: AttemptNumber) -> AttemptKey {
        AttemptKey { build: self.id.clone(), task, attempt }
    }

    /// One of its tasks.
    #[must_use]
    pub fn task(&self, task: TaskIndex) -> Option<&crate::record::TaskRecord> {
        self.tasks.get(usize::from(task.0))
    }

    /// Draws the conclusion for the whole build, once every task has ended; until then nothing changes.
    pub(crate) fn settle(&mut self, at: LogTime) {
        let mut reason = None;
        for task in &self.tasks {
            let TaskPhase::Ended { state, reason: why, .. } = &task.phase else { return };
            if *state != BuildState::Succeeded {
                reason = reason.or(*why);
            }
        }
        self.state = match (&self.cancel, reason) {
            (Some(_), _) => BuildState::Cancelled,
            (None, Some(_)) => BuildState::Failed,
            (None, None) => BuildState::Succeeded,
        };
        self.reason = match self.state {
            BuildState::Cancelled => Some(helix_model::Reason::Cancelled),
            BuildState::Queued | BuildState::Running | BuildState::Succeeded | BuildState::Failed => reason,
        };
        self.completed_at = Some(at);
        // A cancelled build claims that nothing of it is left, so every attempt counts; else what was stopped, and the last.
        let cancelled = self.state == BuildState::Cancelled;
        self.verified = self.tasks.iter().all(|task| {
            let count = task.attempts.len();
            let claims = |(place, attempt): (usize, &crate::record::AttemptRecord)| {
                let counts = cancelled || attempt.stop.is_some() || place + 1 == count;
                !counts || attempt.end.as_ref().is_none_or(|end| end.verified)
            };
            task.attempts.iter().enumerate().all(claims)
        });
    }

    /// Whether retention may take it, once it has ended.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pinned == Pinned::Yes
    }
}
