//! Knows what clients were told, what hosts really ran and what disks really hold, and compares every committed change
//! with it.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::AssignTask;
use helix_core::record::{Applied, AttemptRecord, BuildRecord, Row, RowChange, TaskPhase, TaskRecord, Trust};
use helix_core::{Command, Effect, Known, Reply, State};
use helix_model::{
    AttemptKey, BuildId, BuildState, Death, Digest, Instance, LogTime, NodeId, Platform, Reason, WorkerName,
};

use super::Summary;
use super::blobs::Copies;
use super::client::Stage;
use super::host::{Fate, Host};
use super::store::Rows;
use super::words::{short, stage_word};

/// How much later than its time a probe may come: leaders change, and proposals are lost with them.
const PROBE_LATE_MS: u64 = 20_000;

/// Whether a worker is kept in quarantine longer than it should be.
pub(super) fn overdue_probe(state: &State, now: LogTime) -> Result<(), String> {
    for worker in state.workers() {
        if let Trust::Quarantined { until, .. } = worker.trust
            && now.since_ms(until) > PROBE_LATE_MS
        {
            return Err(format!("worker {} is in quarantine since {until}, and it is {now}", worker.name));
        }
    }
    Ok(())
}

fn host_of<'a>(hosts: &'a [Host], worker: &WorkerName) -> Option<&'a Host> {
    let number: usize = worker.as_str().strip_prefix('w')?.parse().ok()?;
    hosts.get(number)
}

#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Builds that somebody asked for.
    pub(super) wished: BTreeSet<BuildId>,
    /// Submits that clients were told of.
    pub(super) submitted: BTreeSet<BuildId>,
    /// Cancels that clients were told of.
    pub(super) cancelled: BTreeSet<BuildId>,
    /// Pins that clients were told of.
    pub(super) pinned: BTreeSet<BuildId>,
    /// Indexes that were pushed, and what they name.
    pub(super) indexes: BTreeMap<Digest, Vec<(Platform, Digest)>>,
    /// Bytes that were ever synced on a node.
    pub(super) held: BTreeSet<(NodeId, Digest)>,
    /// Bytes that were lost by no fault of the cluster's.
    pub(super) excused: BTreeSet<Digest>,
    /// What agents said that they have room for: last, and at most.
    pub(super) capacities: BTreeMap<WorkerName, (u32, u32)>,
    /// Entries seen: each is judged once, when the first node applies it.
    pub(super) seen: usize,
    pub(super) summary: Summary,
    looks: BTreeMap<BuildId, Stage>,
    /// Who was given what by the registry.
    assigned: BTreeMap<AttemptKey, (WorkerName, Instance)>,
    /// What ran, and of which commit.
    began: BTreeSet<AttemptKey>,
    commits: BTreeMap<BuildId, String>,
    /// Attempts whose processes really ended well, or badly by the user's fault.
    succeeded: BTreeSet<AttemptKey>,
    failed: BTreeSet<AttemptKey>,
    ended: BTreeMap<BuildId, BuildState>,
    /// Ends that were committed without proof, and where.
    unproven: BTreeSet<(WorkerName, AttemptKey)>,
}

impl Oracle {
    /// An agent says what it has room for.
    pub(super) fn offered(&mut self, worker: &WorkerName, capacity: u32) {
        let (now, most) = self.capacities.entry(worker.clone()).or_default();
        (*now, *most) = (capacity, capacity.max(*most));
    }

    /// A host begins to run an attempt.
    pub(super) fn began(
        &mut self,
        key: &AttemptKey,
        worker: &WorkerName,
        instance: &Instance,
        commit: Option<String>,
    ) -> Result<(), String> {
        if !self.began.insert(key.clone()) {
            return Err(format!("{key} is run a second time, on {worker}"));
        }
        match self.assigned.get(key) {
            None => return Err(format!("{worker} runs {key}, which the registry never assigned")),
            Some((to, life)) if to != worker || life != instance => {
                return Err(format!("{worker} runs {key} as {instance}, but it was assigned to {to} as {life}"));
            }
            Some(_) => {}
        }
        let Some(commit) = commit else { return Ok(()) };
        let first = self.commits.entry(key.build.clone()).or_insert_with(|| commit.clone());
        if *first != commit {
            return Err(format!("{key} builds commit {commit}, and its build began with {first}"));
        }
        Ok(())
    }

    /// A process ended by itself.
    pub(super) fn exited(&mut self, key: &AttemptKey, fate: Fate) {
        match fate {
            Fate::Succeeds => drop(self.succeeded.insert(key.clone())),
            Fate::Fails => drop(self.failed.insert(key.clone())),
            Fate::Breaks | Fate::Hangs => {}
        }
    }

    /// How far a build is known to be by what clients were told so far.
    pub(super) fn stage(&self, id: &BuildId) -> Stage {
        let there = if self.submitted.contains(id) { Stage::There } else { Stage::Absent };
        self.looks.get(id).copied().unwrap_or_default().max(there)
    }

    /// A client saw a build, having asked when it was known to be so far.
    pub(super) fn saw(&mut self, id: &BuildId, known: Stage, seen: Stage) -> Result<(), String> {
        let (was, is) = (stage_word(known), stage_word(seen));
        let other_end = matches!((known, seen), (Stage::Ended(a), Stage::Ended(b)) if a != b);
        if seen < known || other_end {
            return Err(format!("a client saw of {id} that {is}, after it was known that {was}"));
        }
        let looks = self.looks.entry(id.clone()).or_default();
        *looks = seen.max(*looks);
        Ok(())
    }

    /// Judges what an entry did.
    pub(super) fn judge(
        &mut self,
        state: &State,
        commands: &[Command],
        replies: &[Reply],
        applied: &Applied,
        hosts: &[Host],
    ) -> Result<(), String> {
        self.seen += 1;
        self.summary.entries += 1;
        for (command, reply) in commands.iter().zip(replies) {
            if *reply == Reply::Done {
                self.judge_done(state, command, hosts)?;
            }
        }
        for change in &applied.rows {
            if let RowChange::Put(Row::Build(build)) = change {
                self.judge_build(build, hosts)?;
            }
        }
        let purged = applied.effects.iter().filter_map(|effect| match effect {
            Effect::BuildPurged(id) => Some(id),
            _ => None,
        });
        for id in purged {
            self.summary.purged += 1;
            if !self.ended.contains_key(id) {
                return Err(format!("build {id} was purged before it had ended"));
            }
            if self.pinned.contains(id) {
                return Err(format!("build {id} was purged, and a client was told that it is kept"));
            }
        }
        Ok(())
    }

    fn judge_build(&mut self, build: &BuildRecord, hosts: &[Host]) -> Result<(), String> {
        let id = &build.id;
        if !self.wished.contains(id) {
            return Err(format!("build {id} is there, and nobody submitted it"));
        }
        if let Some(before) = self.ended.get(id) {
            return Err(format!("build {id} ended as {before} and changed to {}", build.state));
        }
        self.judge_failures(build)?;
        if !build.state.is_terminal() {
            return Ok(());
        }
        self.ended.insert(id.clone(), build.state);
        self.summary.unverified += u64::from(!build.verified);
        match build.state {
            BuildState::Succeeded => {
                self.summary.succeeded += 1;
                self.judge_index(build)?;
                for (task, record) in build.indexed_tasks() {
                    let last = record.attempts.last().map(|attempt| build.attempt_key(task, attempt.number));
                    if !last.as_ref().is_some_and(|key| self.succeeded.contains(key)) {
                        let last = last.map_or_else(|| "no attempt of it".to_owned(), |key| key.to_string());
                        return Err(format!("build {id} succeeded, but {last} never did"));
                    }
                }
            }
            BuildState::Cancelled => {
                self.summary.cancelled += 1;
                let left = hosts.iter().find_map(|host| host.runs_any_of(id));
                if let Some(key) = left.filter(|_| build.verified) {
                    return Err(format!("build {id} is cancelled and verified, but {key} lives"));
                }
            }
            BuildState::Failed => self.summary.failed += 1,
            BuildState::Queued | BuildState::Running => {}
        }
        self.judge_cancelled(id)
    }

    /// A cancel that a client was told of is what the build ends as.
    pub(super) fn judge_cancelled(&self, id: &BuildId) -> Result<(), String> {
        match self.ended.get(id).filter(|_| self.cancelled.contains(id)) {
            Some(state) if *state != BuildState::Cancelled => {
                Err(format!("a client was told that {id} is cancelled, but it ended as {state}"))
            }
            _ => Ok(()),
        }
    }

    /// What a user's command did wrong is never tried more often than the user asked for, nor invented.
    fn judge_failures(&self, build: &BuildRecord) -> Result<(), String> {
        for (task, record) in build.indexed_tasks() {
            let reason = |attempt: &AttemptRecord| attempt.end.as_ref().and_then(|end| end.reason);
            let key = |attempt: &AttemptRecord| build.attempt_key(task, attempt.number);
            let invented = |attempt: &&AttemptRecord| {
                reason(attempt) == Some(Reason::Exit) && !self.failed.contains(&key(attempt))
            };
            if let Some(attempt) = record.attempts.iter().find(invented) {
                return Err(format!("{} is said to have failed, and did not", key(attempt)));
            }
            let stopped = |reason| {
                matches!(
                    reason,
                    Reason::WorkerLost | Reason::Drained | Reason::Timeout | Reason::Silence | Reason::Cancelled
                )
            };
            let failed = |attempt: &&AttemptRecord| {
                self.failed.contains(&key(attempt)) && reason(attempt).is_some_and(|reason| !stopped(reason))
            };
            let failures = record.attempts.iter().filter(failed).count();
            if failures > build.spec.retries as usize && record.attempts.len() > failures_end(record, &failed) {
                let id = &build.id;
                return Err(format!("build {id} failed {failures} times by its own fault and is tried again"));
            }
        }
        Ok(())
    }

    /// A build that was to have an index has one, and it names what the tasks made.
    fn judge_index(&mut self, build: &BuildRecord) -> Result<(), String> {
        let last = |task: &TaskRecord| task.attempts.last().cloned();
        let ends = build.tasks.iter().filter_map(|task| last(task)?.end);
        let indexes: Vec<Digest> = ends.filter_map(|end| end.index).collect();
        let expected = usize::from(build.spec.pushes_index());
        if indexes.len() != expected {
            return Err(format!("build {} succeeded with {} indexes instead of {expected}", build.id, indexes.len()));
        }
        let Some(index) = indexes.first() else { return Ok(()) };
        self.summary.indexes += 1;
        let named = |task: &TaskRecord| Some((task.platform.clone()?, last(task)?.end?.digest?));
        let made: Option<Vec<_>> = build.tasks.iter().map(named).collect();
        if self.indexes.get(index) != made.as_ref() {
            return Err(format!("the index of build {} does not name what its tasks made: {made:?}", build.id));
        }
        Ok(())
    }

    fn judge_done(&mut self, state: &State, command: &Command, hosts: &[Host]) -> Result<(), String> {
        match command {
            Command::AssignTask(c) => {
                self.assigned.insert(c.key.clone(), (c.worker.clone(), c.instance.clone()));
                self.summary.reruns += u64::from(c.key.attempt.0 > 1);
                let capacity = state.worker(&c.worker).map_or(0, |worker| worker.offer.capacity);
                let most = self.capacities.get(&c.worker).map_or(0, |(_, most)| *most);
                let load = state.running_on(&c.worker).count();
                if load > capacity.min(most) as usize {
                    let (key, name) = (&c.key, &c.worker);
                    return Err(format!("{name} was given {key} as one of {load}; its capacity is {most} at most"));
                }
                host_of(hosts, &c.worker).map_or(Ok(()), |host| self.judge_host(state, c, host))?;
            }
            Command::LoseWorker(_) => self.summary.losses += 1,
            Command::ProbeWorker(_) => self.summary.probes += 1,
            Command::FinishAttempt(c) if c.death == Death::Unproven => {
                self.summary.unproven += 1;
                self.unproven.insert((c.worker.clone(), c.key.clone()));
            }
            Command::FinishAttempt(c)
                if host_of(hosts, &c.worker).is_some_and(|host| host.processes.contains_key(&c.key)) =>
            {
                return Err(format!("{} was reported dead and lives on {}", c.key, c.worker));
            }
            // An operator's word stands for a proof.
            Command::RemoveWorker(c) => self.unproven.retain(|(worker, _)| *worker != c.worker),
            _ => {}
        }
        Ok(())
    }

    /// Whether a worker could be given this, as its host really is.
    fn judge_host(&self, state: &State, c: &AssignTask, host: &Host) -> Result<(), String> {
        let name = &c.worker;
        let lives = |key: &&AttemptKey| host.hidden.contains(*key) && host.processes.contains_key(*key);
        let unproven = self.unproven.iter().filter(|(worker, _)| worker == name).map(|(_, key)| key);
        if let Some(key) = unproven.clone().find(lives) {
            return Err(format!("{name} was given {}, but {key}, which nobody saw dead, lives there", c.key));
        }
        let asked = state.running_on(name).filter_map(|key| match state.build(&key.build) {
            Some(Known::Open(build)) => Some(build.spec.resources.memory_bytes),
            _ => None,
        });
        let asked: u64 = asked.sum();
        if host.memory > 0 && asked > host.memory {
            let key = &c.key;
            return Err(format!("with {key}, {name} has work for {asked} of memory, and has {}", host.memory));
        }
        let count = state.running_on(name).count();
        match state.worker(name).map(|worker| &worker.trust) {
            Some(Trust::Quarantined { .. }) => Err(format!("{name} was given {} in quarantine", c.key)),
            Some(Trust::Probing { .. }) if count > 1 => Err(format!("{name} was probed with {count} attempts")),
            _ => Ok(()),
        }
    }

    /// A success names bytes that exist, and nobody who does not have them.
    pub(super) fn judge_bytes(&self, applied: &Applied, copies: &Copies) -> Result<(), String> {
        for change in &applied.rows {
            let RowChange::Put(Row::Build(build)) = change else { continue };
            for (digest, holders) in named_by_success(build) {
                if let Some(node) = holders.iter().find(|node| !self.held.contains(&(**node, digest))) {
                    let id = &build.id;
                    return Err(format!(
                        "build {id} succeeded with {} on node {node}, which never had it",
                        short(&digest)
                    ));
                }
                self.judge_blob(&build.id, &digest, copies)?;
            }
        }
        Ok(())
    }

    fn judge_blob(&self, id: &BuildId, digest: &Digest, copies: &Copies) -> Result<(), String> {
        if copies.exist(digest) || self.excused.contains(digest) {
            return Ok(());
        }
        Err(format!("build {id} succeeded with {}, which nobody has", short(digest)))
    }

    /// What must hold at every moment for whoever leads.
    pub(super) fn judge_leader(&self, state: &State) -> Result<(), String> {
        match self.submitted.iter().find(|id| state.build(id).is_none()) {
            Some(id) => Err(format!("a client was told that {id} is submitted, but it is unknown")),
            None => Ok(()),
        }
    }

    /// What must hold at the end.
    pub(super) fn judge_end(&self, state: &State, rows: &Rows, copies: &Copies) -> Result<(), String> {
        self.judge_leader(state)?;
        for id in &self.submitted {
            if let Some(Known::Open(build)) = state.build(id) {
                return Err(format!("build {id} never ended: {}", unfinished(build)));
            }
            self.judge_cancelled(id)?;
        }
        if state.totals().load > 0 {
            return Err("something still runs".to_owned());
        }
        for row in rows.values() {
            let Row::Build(build) = row else { continue };
            for (digest, _) in named_by_success(build) {
                self.judge_blob(&build.id, &digest, copies)?;
            }
        }
        Ok(())
    }
}

/// What keeps a build from its end.
fn unfinished(build: &BuildRecord) -> String {
    let told = build.indexed_tasks().filter_map(|(task, record)| {
        let last = record.attempts.last();
        match &record.phase {
            TaskPhase::Running => {
                let attempt = last?;
                Some(format!("{} runs on {}", build.attempt_key(task, attempt.number), attempt.worker))
            }
            TaskPhase::Waiting { .. } => Some(format!("task {task} waits after {} attempts", record.attempts.len())),
            TaskPhase::Ended { .. } => None,
        }
    });
    told.collect::<Vec<_>>().join(", ")
}

/// How many attempts a task has up to its last failure.
fn failures_end<'a>(record: &'a TaskRecord, failed: &impl Fn(&&'a AttemptRecord) -> bool) -> usize {
    record.attempts.iter().rposition(|attempt| failed(&attempt)).map_or(0, |place| place + 1)
}

/// The blobs that a build's success stands on, and who is said to hold them.
fn named_by_success(build: &BuildRecord) -> Vec<(Digest, &BTreeSet<NodeId>)> {
    if build.state != BuildState::Succeeded {
        return Vec::new();
    }
    let last = build.tasks.iter().filter_map(|task| task.attempts.last());
    last.flat_map(|attempt| {
        let artifacts = attempt.artifacts.iter().map(|artifact| &artifact.blob);
        artifacts.chain(attempt.log.iter().map(|log| &log.blob))
    })
    .map(|blob| (blob.digest, &blob.holders))
    .collect()
}
