//! Knows what clients were told and what hosts really ran, and compares every committed change with it.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::record::{Applied, BuildRecord, Row, RowChange};
use helix_core::{Command, Effect, Known, Reply, State};
use helix_model::{AttemptKey, BuildId, BuildState};

use super::Summary;
use super::host::Host;

#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Submits that clients were told of.
    pub(super) submitted: BTreeSet<BuildId>,
    /// Cancels that clients were told of.
    pub(super) cancelled: BTreeSet<BuildId>,
    /// Attempts whose processes really ended well.
    pub(super) succeeded: BTreeSet<AttemptKey>,
    ended: BTreeMap<BuildId, BuildState>,
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
                self.judge_done(state, command)?;
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

    fn judge_done(&mut self, state: &State, command: &Command) -> Result<(), String> {
        match command {
            Command::AssignTask(c) => {
                self.summary.reruns += u64::from(c.key.attempt.0 > 1);
                let capacity = state.worker(&c.worker).map_or(0, |worker| worker.offer.capacity);
                let load = state.running_on(&c.worker).count();
                if load > capacity as usize {
                    return Err(format!("worker {} was given {load} attempts; its capacity is {capacity}", c.worker));
                }
            }
            Command::LoseWorker(_) => self.summary.losses += 1,
            _ => {}
        }
        Ok(())
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
