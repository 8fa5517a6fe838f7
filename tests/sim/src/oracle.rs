//! Knows what clients were told and what hosts really ran, and compares every committed change with it.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::AssignTask;
use helix_core::record::{Applied, BuildRecord, Row, RowChange, TaskRecord, Trust};
use helix_core::{Command, Effect, Known, Reply, State};
use helix_model::{AttemptKey, BuildId, BuildState, Death, Digest, LogTime, Platform, WorkerName};

use super::Summary;
use super::host::Host;

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
    let number = hosts.iter().enumerate().find(|(number, _)| worker.as_str() == format!("w{number}"));
    number.map(|(_, host)| host)
}

#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Submits that clients were told of.
    pub(super) submitted: BTreeSet<BuildId>,
    /// Cancels that clients were told of.
    pub(super) cancelled: BTreeSet<BuildId>,
    /// Attempts whose processes really ended well.
    pub(super) succeeded: BTreeSet<AttemptKey>,
    /// Indexes that were pushed, and what they name.
    pub(super) indexes: BTreeMap<Digest, Vec<(Platform, Digest)>>,
    ended: BTreeMap<BuildId, BuildState>,
    /// Ends that were committed without proof, and where.
    unproven: BTreeSet<(WorkerName, AttemptKey)>,
    /// Entries seen: each is judged once, when the first node applies it.
    pub(super) seen: usize,
    pub(super) summary: Summary,
}

impl Oracle {
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
        for change in &applied.rows {
            if let RowChange::Put(Row::Build(build)) = change {
                self.judge_build(build, hosts)?;
            }
        }
        for (command, reply) in commands.iter().zip(replies) {
            if *reply == Reply::Done {
                self.judge_done(state, command, hosts)?;
            }
        }
        let purged = applied.effects.iter().filter_map(|effect| match effect {
            Effect::BuildPurged(id) => Some(id),
            _ => None,
        });
        for id in purged {
            if !self.ended.contains_key(id) {
                return Err(format!("build {id} was purged before it had ended"));
            }
        }
        Ok(())
    }

    fn judge_build(&mut self, build: &BuildRecord, hosts: &[Host]) -> Result<(), String> {
        let id = &build.id;
        if let Some(before) = self.ended.get(id) {
            return Err(format!("build {id} ended as {before} and changed to {}", build.state));
        }
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
                        return Err(format!("build {id} succeeded, but {last:?} never did"));
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
        if self.cancelled.contains(id) && build.state != BuildState::Cancelled {
            return Err(format!("a client was told that {id} is cancelled, but it ended as {}", build.state));
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
                self.summary.reruns += u64::from(c.key.attempt.0 > 1);
                let capacity = state.worker(&c.worker).map_or(0, |worker| worker.offer.capacity);
                let load = state.running_on(&c.worker).count();
                if load > capacity as usize {
                    return Err(format!("worker {} was given {load} attempts; its capacity is {capacity}", c.worker));
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
            return Err(format!("worker {name} was given {}, but {key}, which nobody saw dead, lives there", c.key));
        }
        let asked = state.running_on(name).filter_map(|key| match state.build(&key.build) {
            Some(Known::Open(build)) => Some(build.spec.resources.memory_bytes),
            _ => None,
        });
        let asked: u64 = asked.sum();
        if host.memory > 0 && asked > host.memory {
            return Err(format!("worker {name} was given work for {asked} of memory, and has {}", host.memory));
        }
        let count = state.running_on(name).count();
        match state.worker(name).map(|worker| &worker.trust) {
            Some(Trust::Quarantined { .. }) => Err(format!("worker {name} was given work in quarantine")),
            Some(Trust::Probing { .. }) if count > 1 => Err(format!("worker {name} was probed with {count} attempts")),
            _ => Ok(()),
        }
    }

    /// What must hold at every moment for whoever leads.
    pub(super) fn judge_leader(&self, state: &State) -> Result<(), String> {
        match self.submitted.iter().find(|id| state.build(id).is_none()) {
            Some(id) => Err(format!("a client was told that {id} is submitted, but it is unknown")),
            None => Ok(()),
        }
    }

    /// What must hold at the end.
    pub(super) fn judge_end(&self, state: &State) -> Result<(), String> {
        self.judge_leader(state)?;
        for id in &self.submitted {
            if let Some(Known::Open(build)) = state.build(id) {
                return Err(format!("build {id} never ended: {:?}", build.tasks));
            }
            let ended = self.ended.get(id);
            if self.cancelled.contains(id) && ended != Some(&BuildState::Cancelled) {
                return Err(format!("a client was told that {id} is cancelled, but it ended as {ended:?}"));
            }
        }
        if state.totals().load > 0 {
            return Err("something still runs".to_owned());
        }
        Ok(())
    }
}
