//! What follows from the rows and is kept beside them, so that no decision walks all builds or all workers.
//!
//! Every entry is derived: `Index::rebuilt` makes the whole from rows, and the invariants compare the two.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_model::{AttemptKey, BuildId, BuildState, Digest, LogTime, TaskIndex, WorkerName};

use crate::record::{BuildRecord, FinishedBuild, Pinned, Policy, Standing, TaskPhase, TaskRecord, Trust, WorkerRecord};
use crate::retention::Kept;

use super::fit::{Room, Used, unready};

mod queue;

pub(crate) use queue::Queue;

/// A finished build's end, its place in the order of submits, its id.
pub(crate) type Ended = (LogTime, u64, BuildId);

/// Finished builds by their end.
pub(crate) type ByEnd = BTreeSet<Ended>;

type Workers = BTreeMap<WorkerName, Arc<WorkerRecord>>;

/// A waiting task's place in the order: higher priority first, then older.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Waiting {
    pub(crate) priority: Reverse<i32>,
    pub(crate) sequence: u64,
    pub(crate) task: TaskIndex,
}

/// How many builds there are of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) queued: u64,
    pub(crate) running: u64,
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    pub(crate) load: u64,
    pub(crate) capacity: u64,
}

#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Index {
    /// Open builds in the order of submits.
    pub(crate) by_sequence: BTreeMap<u64, BuildId>,
    /// Those that are not queued any more: few among many.
    pub(crate) begun: BTreeMap<u64, BuildId>,
    /// Waiting tasks, and the workers with room for them.
    pub(crate) queue: Queue,
    /// What runs where; a worker's load is the size of its set, and an empty set is not kept.
    pub(crate) running: BTreeMap<WorkerName, BTreeSet<AttemptKey>>,
    /// What it takes there beside slots; nothing is kept of a worker that runs nothing.
    pub(crate) used: BTreeMap<WorkerName, Used>,
    /// Ends of wall-clock limits that builds name, of attempts not asked to stop.
    pub(crate) limited: BTreeSet<(LogTime, AttemptKey)>,
    /// Beginnings of attempts under the policy's limit, not asked to stop.
    pub(crate) unlimited: BTreeSet<(LogTime, AttemptKey)>,
    /// Attempts with a limit on silence, not asked to stop.
    pub(crate) silence: BTreeSet<AttemptKey>,
    /// Attempts asked to stop, and since when.
    pub(crate) stopping: BTreeSet<(LogTime, AttemptKey)>,
    /// Workers with a lease.
    pub(crate) present: BTreeSet<WorkerName>,
    /// Workers that said when they will be back.
    pub(crate) detached: BTreeSet<(LogTime, WorkerName)>,
    /// Quarantined workers, by the end of their quarantine.
    pub(crate) quarantined: BTreeSet<(LogTime, WorkerName)>,
    /// Draining workers with a deadline.
    pub(crate) drains: BTreeSet<(LogTime, WorkerName)>,
    /// Finished builds by end.
    pub(crate) by_end: ByEnd,
    /// The same without pinned ones: what retention may take.
    pub(crate) purgeable: ByEnd,
    /// The same by what is kept of them and for how long, then by end: those that go first are first in each. As many
    /// groups as policy knows lifetimes. Logs and artifacts stand here only while they go before their build.
    pub(crate) lifetimes: BTreeMap<(Kept, u64), ByEnd>,
    /// Tombstones by age.
    pub(crate) tombstones: BTreeSet<(LogTime, BuildId)>,
    /// How often open builds name each blob.
    pub(crate) blobs: BTreeMap<Digest, u32>,
    pub(crate) counts: Counts,
}

impl Index {
    /// Lets tasks whose back-off is over into the queue.
    pub(crate) fn advance(&mut self, now: LogTime, open: &BTreeMap<BuildId, Arc<BuildRecord>>) {
        while let Some(waiting) = self.queue.pop_rested(now) {
            let build = self.by_sequence.get(&waiting.sequence).and_then(|id| open.get(id));
            if let Some((build, task)) = build.and_then(|build| Some((build, build.task(waiting.task)?))) {
                self.queue.insert_ready(waiting, &build.spec, task.platform.as_ref());
            }
        }
    }

    pub(crate) fn add_build(&mut self, build: &BuildRecord, now: LogTime, workers: &Workers) {
        self.by_sequence.insert(build.sequence, build.id.clone());
        if build.state != BuildState::Queued {
            self.begun.insert(build.sequence, build.id.clone());
        }
        *self.count_of(standing(build)) += 1;
        each_blob(build, |digest| *self.blobs.entry(*digest).or_default() += 1);
        for (index, task) in build.indexed_tasks() {
            match &task.phase {
                TaskPhase::Waiting { not_before } => {
                    let waiting = Waiting::of(build, index);
                    self.queue.add(waiting, *not_before, now, &build.spec, task.platform.as_ref(), workers);
                }
                TaskPhase::Running => self.add_running(build, index, task, workers),
                TaskPhase::Ended { .. } => {}
            }
        }
    }

    pub(crate) fn remove_build(&mut self, build: &BuildRecord, workers: &Workers) {
        self.by_sequence.remove(&build.sequence);
        self.begun.remove(&build.sequence);
        *self.count_of(standing(build)) -= 1;
        each_blob(build, |digest| {
            if let Some(count) = self.blobs.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    self.blobs.remove(digest);
                }
            }
        });
        for (index, task) in build.indexed_tasks() {
            match &task.phase {
                TaskPhase::Waiting { not_before } => {
                    let waiting = Waiting::of(build, index);
                    self.queue.remove(waiting, *not_before, &build.spec, task.platform.as_ref());
                }
                TaskPhase::Running => self.remove_running(build, index, task, workers),
                TaskPhase::Ended { .. } => {}
            }
        }
    }

    fn add_running(&mut self, build: &BuildRecord, index: TaskIndex, task: &TaskRecord, workers: &Workers) {
        let Some(attempt) = task.running() else { return };
        let key = build.attempt_key(index, attempt.number);
        self.running.entry(attempt.worker.clone()).or_default().insert(key.clone());
        self.used.entry(attempt.worker.clone()).or_default().add(&build.spec.resources);
        self.counts.load += 1;
        self.note_room(&attempt.worker, workers);
        if let Some(stop) = &attempt.stop {
            self.stopping.insert((stop.at, key));
            return;
        }
        if build.spec.silence_timeout_ms > 0 {
            self.silence.insert(key.clone());
        }
        if build.spec.timeout_ms > 0 {
            self.limited.insert((attempt.assigned_at.plus_ms(build.spec.timeout_ms), key));
        } else {
            self.unlimited.insert((attempt.assigned_at, key));
        }
    }

    fn remove_running(&mut self, build: &BuildRecord, index: TaskIndex, task: &TaskRecord, workers: &Workers) {
        let Some(attempt) = task.running() else { return };
        let key = build.attempt_key(index, attempt.number);
        if let Some(keys) = self.running.get_mut(&attempt.worker) {
            keys.remove(&key);
            if let Some(used) = self.used.get_mut(&attempt.worker) {
                used.subtract(&build.spec.resources);
            }
            if keys.is_empty() {
                self.running.remove(&attempt.worker);
                self.used.remove(&attempt.worker);
            }
        }
        self.counts.load -= 1;
        self.note_room(&attempt.worker, workers);
        if let Some(stop) = &attempt.stop {
            self.stopping.remove(&(stop.at, key));
            return;
        }
        self.silence.remove(&key);
        self.limited.remove(&(attempt.assigned_at.plus_ms(build.spec.timeout_ms), key.clone()));
        self.unlimited.remove(&(attempt.assigned_at, key));
    }

    pub(crate) fn load(&self, worker: &WorkerName) -> u32 {
        self.running.get(worker).map_or(0, |keys| u32::try_from(keys.len()).unwrap_or(u32::MAX))
    }

    pub(crate) fn used(&self, worker: &WorkerName) -> Used {
        self.used.get(worker).copied().unwrap_or_default()
    }

    fn note_room(&mut self, name: &WorkerName, workers: &Workers) {
        if let Some(worker) = workers.get(name) {
            let room = room(worker, self.load(name), &self.used(name));
            self.queue.set_room(worker, room);
        }
    }

    /// Takes in that a worker's row changed, appeared or went.
    pub(crate) fn change_worker(&mut self, before: Option<&WorkerRecord>, after: Option<&WorkerRecord>) {
        if let Some(worker) = before {
            self.counts.capacity -= u64::from(worker.offer.capacity);
            self.present.remove(&worker.name);
            if let Standing::Detached { until } = worker.standing {
                self.detached.remove(&(until, worker.name.clone()));
            }
            if let Some(deadline) = worker.drain.and_then(|drain| drain.deadline) {
                self.drains.remove(&(deadline, worker.name.clone()));
            }
            if let Trust::Quarantined { until, .. } = worker.trust {
                self.quarantined.remove(&(until, worker.name.clone()));
            }
            self.queue.forget_worker(worker);
        }
        if let Some(worker) = after {
            self.counts.capacity += u64::from(worker.offer.capacity);
            match worker.standing {
                Standing::Present => {
                    self.present.insert(worker.name.clone());
                }
                Standing::Detached { until } => {
                    self.detached.insert((until, worker.name.clone()));
                }
                Standing::Lost => {}
            }
            if let Some(deadline) = worker.drain.and_then(|drain| drain.deadline) {
                self.drains.insert((deadline, worker.name.clone()));
            }
            if let Trust::Quarantined { until, .. } = worker.trust {
                self.quarantined.insert((until, worker.name.clone()));
            }
            let room = room(worker, self.load(&worker.name), &self.used(&worker.name));
            self.queue.learn_worker(worker, room);
        }
    }

    pub(crate) fn add_finished(&mut self, id: &BuildId, build: &FinishedBuild, policy: &Policy) {
        self.add_lifetimes(id, build, policy);
        let entry = (build.completed_at, build.sequence, id.clone());
        if build.pinned == Pinned::No {
            self.purgeable.insert(entry.clone());
        }
        self.by_end.insert(entry);
        *self.count_of(build.state) += 1;
    }

    pub(crate) fn remove_finished(&mut self, id: &BuildId, build: &FinishedBuild, policy: &Policy) {
        let entry = (build.completed_at, build.sequence, id.clone());
        for group in lifetimes(build, policy) {
            if let Some(entries) = self.lifetimes.get_mut(&group) {
                entries.remove(&entry);
                if entries.is_empty() {
                    self.lifetimes.remove(&group);
                }
            }
        }
        self.purgeable.remove(&entry);
        self.by_end.remove(&entry);
        *self.count_of(build.state) -= 1;
    }

    pub(crate) fn add_lifetimes(&mut self, id: &BuildId, build: &FinishedBuild, policy: &Policy) {
        for group in lifetimes(build, policy) {
            self.lifetimes.entry(group).or_default().insert((build.completed_at, build.sequence, id.clone()));
        }
    }

    pub(crate) fn forget_lifetimes(&mut self) {
        self.lifetimes.clear();
    }

    fn count_of(&mut self, state: BuildState) -> &mut u64 {
        match state {
            BuildState::Queued => &mut self.counts.queued,
            BuildState::Running => &mut self.counts.running,
            BuildState::Succeeded => &mut self.counts.succeeded,
            BuildState::Failed => &mut self.counts.failed,
            BuildState::Cancelled => &mut self.counts.cancelled,
        }
    }
}

impl Waiting {
    pub(crate) fn of(build: &BuildRecord, task: TaskIndex) -> Self {
        Self { priority: Reverse(build.spec.priority), sequence: build.sequence, task }
    }
}

/// What an open build is counted as. Its state is `running` from its first assignment to its end, but between attempts
/// nothing of it runs, and numbers are about load.
fn standing(build: &BuildRecord) -> BuildState {
    let runs = build.tasks.iter().any(|task| task.running().is_some());
    if runs { BuildState::Running } else { BuildState::Queued }
}

/// What of a finished build will go by age, and how long after its end.
fn lifetimes(build: &FinishedBuild, policy: &Policy) -> impl Iterator<Item = (Kept, u64)> {
    let whole = policy.lifetime_ms(Kept::Build, build);
    let unpinned = build.pinned == Pinned::No;
    let all = Kept::ALL.map(|kept| {
        let keep_ms = policy.lifetime_ms(kept, build);
        let goes = unpinned && build.expired.at(kept).is_none() && (kept == Kept::Build || keep_ms < whole);
        goes.then_some((kept, keep_ms))
    });
    all.into_iter().flatten()
}

/// What more the worker may be given: nothing unless it stands ready.
fn room(worker: &WorkerRecord, load: u32, used: &Used) -> Room {
    if unready(worker, load).is_some() {
        return Room::NONE;
    }
    let probing = matches!(worker.trust, Trust::Probing { .. });
    let slots = if probing { 1 } else { worker.offer.capacity.saturating_sub(load) };
    Room { slots, left: used.left_of(&worker.offer.resources) }
}

fn each_blob(build: &BuildRecord, mut visit: impl FnMut(&Digest)) {
    if let Some(source) = &build.spec.source {
        visit(&source.digest);
    }
    build.artifacts.iter().for_each(|artifact| visit(&artifact.blob.digest));
    for attempt in build.tasks.iter().flat_map(|task| &task.attempts) {
        attempt.artifacts.iter().for_each(|artifact| visit(&artifact.blob.digest));
        if let Some(log) = &attempt.log {
            visit(&log.blob.digest);
        }
    }
}
