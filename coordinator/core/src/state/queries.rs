//! Questions about the registry that read and change nothing.

use std::collections::BTreeSet;
use std::ops::Bound::{self, Excluded, Included, Unbounded};
use std::sync::Arc;

use helix_model::{AttemptKey, BuildId, Digest, LogTime, NodeId, WorkerName};

use crate::record::{AttemptRecord, BuildRecord, FinishedBuild, NodeRecord, Policy, Tombstone, WorkerRecord};

use super::State;
use super::fit::Used;
use super::index::Ended;

/// What the registry knows under an id.
#[derive(Clone, Copy, Debug)]
pub enum Known<'a> {
    /// The build has not ended; this is all of it.
    Open(&'a Arc<BuildRecord>),
    /// It has ended; its record is in the store.
    Finished(&'a FinishedBuild),
    /// It has ended and was purged.
    Purged(&'a Tombstone),
}

/// Numbers over the whole registry, kept by every change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Workers known, in whatever condition.
    pub workers: u64,
    /// The sum of their capacities.
    pub capacity: u64,
    /// Attempts that run.
    pub load: u64,
    /// Unfinished builds of which nothing runs: never assigned yet, or between attempts.
    pub queued: u64,
    /// Builds of which an attempt runs.
    pub running: u64,
    /// Finished builds that are kept, by state.
    pub succeeded: u64,
    /// See `succeeded`.
    pub failed: u64,
    /// See `succeeded`.
    pub cancelled: u64,
}

impl State {
    /// What is known under `id`.
    #[must_use]
    pub fn build(&self, id: &BuildId) -> Option<Known<'_>> {
        if let Some(open) = self.open.get(id) {
            return Some(Known::Open(open));
        }
        if let Some(finished) = self.finished.get(id) {
            return Some(Known::Finished(finished));
        }
        self.tombstones.get(id).map(Known::Purged)
    }

    /// Ids of open and finished builds that begin with `prefix`, at most `max`, in their order.
    #[must_use]
    pub fn builds_with_prefix(&self, prefix: &str, max: usize) -> Vec<BuildId> {
        let from = (Included(prefix), Unbounded);
        let open = self.open.range::<str, _>(from).map(|(id, _)| id);
        let finished = self.finished.range::<str, _>(from).map(|(id, _)| id);
        let begins = |id: &&BuildId| id.as_str().starts_with(prefix);
        let found: BTreeSet<_> =
            open.take_while(begins).take(max).chain(finished.take_while(begins).take(max)).cloned().collect();
        found.into_iter().take(max).collect()
    }

    /// Builds that have not ended, newest first.
    pub fn open_builds(&self) -> impl Iterator<Item = &Arc<BuildRecord>> {
        self.open_builds_after(None, false)
    }

    /// Those behind a place in that order; all of them, or those alone that are not queued any more.
    pub(crate) fn open_builds_after(
        &self,
        sequence: Option<u64>,
        begun_alone: bool,
    ) -> impl Iterator<Item = &Arc<BuildRecord>> {
        let builds = if begun_alone { &self.index.begun } else { &self.index.by_sequence };
        let older = (Unbounded, sequence.map_or(Unbounded, Excluded));
        builds.range(older).rev().filter_map(|(_, id)| self.open.get(id))
    }

    /// Finished builds, newest end first.
    pub fn finished_builds(&self) -> impl Iterator<Item = (&BuildId, &FinishedBuild)> {
        self.finished_builds_after(None).map(|((_, _, id), build)| (id, build))
    }

    /// Those behind a place in that order.
    pub(crate) fn finished_builds_after<'a>(
        &'a self,
        place: Option<&Ended>,
    ) -> impl Iterator<Item = (&'a Ended, &'a FinishedBuild)> + use<'a> {
        let earlier: (Bound<&Ended>, Bound<&Ended>) = (Unbounded, place.map_or(Unbounded, Excluded));
        self.index.by_end.range(earlier).rev().filter_map(|place| Some((place, self.finished.get(&place.2)?)))
    }

    /// The newest build that `submitter` (`ROLE/NAME`) submitted and that was not purged. Walks until it is found.
    #[must_use]
    pub fn newest_of(&self, submitter: &str) -> Option<BuildId> {
        let open = self.open_builds().find(|build| build.submitted_by == submitter);
        let finished = self.finished.iter().filter(|(_, build)| *build.submitted_by == *submitter);
        let finished = finished.max_by_key(|(_, build)| build.sequence);
        match (open, finished) {
            (Some(open), Some((id, finished))) if finished.sequence > open.sequence => Some(id.clone()),
            (Some(open), _) => Some(open.id.clone()),
            (None, finished) => finished.map(|(id, _)| id.clone()),
        }
    }

    /// A worker's row.
    #[must_use]
    pub fn worker(&self, name: &WorkerName) -> Option<&Arc<WorkerRecord>> {
        self.workers.get(name)
    }

    /// All workers, by name.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<WorkerRecord>> {
        self.workers.values()
    }

    /// How many attempts run on the worker.
    #[must_use]
    pub fn load_of(&self, name: &WorkerName) -> u32 {
        self.index.load(name)
    }

    /// What the attempts on the worker take beside slots.
    #[must_use]
    pub fn used_of(&self, name: &WorkerName) -> Used {
        self.index.used(name)
    }

    /// How many more its capacity allows, whatever its condition.
    #[must_use]
    pub fn remaining(&self, name: &WorkerName) -> u32 {
        self.workers.get(name).map_or(0, |worker| worker.offer.capacity.saturating_sub(self.load_of(name)))
    }

    /// What runs on the worker.
    pub fn running_on(&self, name: &WorkerName) -> impl Iterator<Item = &AttemptKey> {
        self.index.running.get(name).into_iter().flatten()
    }

    /// An attempt of an open build.
    #[must_use]
    pub fn attempt(&self, key: &AttemptKey) -> Option<&AttemptRecord> {
        let task = self.open.get(&key.build)?.task(key.task)?;
        task.attempts.iter().find(|attempt| attempt.number == key.attempt)
    }

    /// The attempt under `key`, if it runs.
    #[must_use]
    pub fn running_attempt(&self, key: &AttemptKey) -> Option<&AttemptRecord> {
        let task = self.open.get(&key.build)?.task(key.task)?;
        task.running().filter(|attempt| attempt.number == key.attempt)
    }

    /// Whether the registry still wants the log of an attempt that `worker` ran and that has ended.
    #[must_use]
    pub fn wants_log(&self, key: &AttemptKey, worker: &WorkerName) -> bool {
        if let Some(finished) = self.finished.get(&key.build) {
            return finished.unsealed.contains(&(key.task, key.attempt, worker.clone()));
        }
        let attempt = self.attempt(key);
        attempt.is_some_and(|attempt| attempt.worker == *worker && attempt.end.is_some() && attempt.log.is_none())
    }

    /// Numbers over the whole registry.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let counts = self.index.counts;
        Totals {
            workers: self.workers.len() as u64,
            capacity: counts.capacity,
            load: counts.load,
            queued: counts.queued,
            running: counts.running,
            succeeded: counts.succeeded,
            failed: counts.failed,
            cancelled: counts.cancelled,
        }
    }

    /// All coordinators that ever made themselves known.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values()
    }

    /// One coordinator.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        self.nodes.get(&id)
    }

    /// The limits in force.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The voters of the last membership applied.
    #[must_use]
    pub fn voters(&self) -> &BTreeSet<NodeId> {
        &self.counters.voters
    }

    /// The last log time applied.
    #[must_use]
    pub fn last_at(&self) -> LogTime {
        self.counters.last_at
    }

    /// Whether an open build names the blob: as its source, an artifact or a log.
    #[must_use]
    pub fn names_blob(&self, digest: &Digest) -> bool {
        self.index.blobs.contains_key(digest)
    }
}
