//! Asking the core and proposing what it says: assignments one batch at a time, and what time makes due.
//!
//! Whatever becomes of a proposal, it is no longer under way afterwards; the next look at the state tells the rest.

use std::time::Duration;

use helix_core::{Command, Reply, due, schedule};
use tokio::task::JoinError;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use super::consensus::Consensus;
use super::in_flight::{enter, leave};
use super::{LeaderLoop, TICK_MS_MAX, TICK_MS_MIN, TICKS_PER_LEASE};
use crate::registry::ProposeError;

/// Assignments in one proposal: few enough for one log entry.
const ASSIGN_MAX: usize = 512;
/// Pause after a batch of assignments of which none was made.
const DISAGREED: Duration = Duration::from_millis(100);

/// What was proposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Batch {
    /// Assignments.
    Assignments,
    /// What time made due.
    Due,
}

/// A batch's fate.
#[derive(Debug)]
pub(super) struct Completed {
    batch: Batch,
    commands: Vec<Command>,
    outcome: Result<Vec<Reply>, ProposeError>,
}

impl<C: Consensus> LeaderLoop<C> {
    /// One pass of the scheduler, if something changed and no batch is under way.
    pub(super) fn schedule(&mut self) {
        if !self.dirty || self.assigning || Instant::now() < self.not_before {
            return;
        }
        let Some(leading) = &self.leading else { return };
        let now = self.consensus.now();
        let commands = self
            .consensus
            .with_state(|state| schedule::schedule(state, &leading.in_flight, &leading.liveness, now, ASSIGN_MAX));
        self.dirty = commands.len() >= ASSIGN_MAX;
        if !commands.is_empty() {
            self.assigning = true;
            self.propose(Batch::Assignments, commands);
        }
    }

    /// Looks at the clock.
    pub(super) fn on_tick(&mut self) {
        let now = Instant::now();
        let stood_still = now.saturating_duration_since(self.ticked_at + self.tick);
        self.ticked_at = now;
        self.tick = Duration::from_millis(TICK_MS_MAX);
        let Some(leading) = &mut self.leading else { return };
        // Back-offs may have ended.
        self.dirty = true;
        let now = self.consensus.now();
        // Asked for after the time: whatever is in that is in this, too.
        leading.forgive_leaps(self.consensus.leapt_ms(), now);
        let (commands, next, lease_ms) = self.consensus.with_state(|state| {
            let lease_ms = state.policy().worker_lease_ms;
            let stood_still_ms = u64::try_from(stood_still.as_millis()).unwrap_or(u64::MAX);
            if stood_still_ms > lease_ms / TICKS_PER_LEASE {
                warn!(ms = stood_still_ms, "the leader stood still: leases are extended by as much");
                leading.forgive(stood_still_ms);
            }
            leading.update_settings(state);
            leading.mark_late(now);
            leading.liveness.brake = due::brake(state, &leading.liveness, now);
            leading.liveness.claims = schedule::claims(state, &leading.liveness, now);
            let commands = due::due(state, &leading.in_flight, &leading.liveness, now);
            (commands, due::next(state, &leading.liveness), lease_ms)
        });
        let longest = (lease_ms / TICKS_PER_LEASE).clamp(TICK_MS_MIN, TICK_MS_MAX);
        let wait_ms = next.map_or(longest, |next| next.since_ms(now)).clamp(TICK_MS_MIN, longest);
        self.tick = Duration::from_millis(wait_ms);
        if self.not_before > self.ticked_at {
            self.wake_at(self.not_before);
        }
        if !commands.is_empty() {
            debug!(count = commands.len(), "due");
            self.propose(Batch::Due, commands);
        }
    }

    fn propose(&mut self, batch: Batch, commands: Vec<Command>) {
        let Some(leading) = &mut self.leading else { return };
        for command in &commands {
            enter(&mut leading.in_flight, command);
        }
        let (consensus, term) = (self.consensus.clone(), leading.term);
        self.proposals.spawn(async move {
            let outcome = consensus.propose_in_term(term, commands.clone()).await;
            Completed { batch, commands, outcome }
        });
    }

    pub(super) fn on_completed(&mut self, completed: &Completed) {
        let Some(leading) = &mut self.leading else { return };
        for command in &completed.commands {
            leave(&mut leading.in_flight, command);
        }
        self.dirty = true;
        if completed.batch == Batch::Assignments {
            self.assigning = false;
        }
        let done = match &completed.outcome {
            Ok(replies) => {
                for (command, reply) in completed.commands.iter().zip(replies) {
                    if let Reply::Rejected(rejection) = reply {
                        // Mostly a race with a report or a cancel.
                        debug!(?command, ?rejection, "the registry refused what the leader proposed");
                    }
                }
                replies.iter().any(|reply| !matches!(reply, Reply::Rejected(_)))
            }
            // The members' status tells of it; it is asked again at every tick.
            Err(error @ ProposeError::UpgradePending { .. }) => {
                debug!(%error, "a decision waits for an upgrade");
                false
            }
            Err(error) => {
                warn!(%error, count = completed.commands.len(), "the leader's own proposal failed; it is derived again");
                false
            }
        };
        if !done && completed.batch == Batch::Assignments {
            // If the scheduler and `apply` keep disagreeing, they do so in no hurry.
            self.not_before = Instant::now() + DISAGREED;
            self.wake_at(self.not_before);
        }
    }

    /// A proposal's task panicked: nobody knows which. All books of what is under way begin anew.
    pub(super) fn on_broken_proposal(&mut self, broken: &JoinError) {
        error!(%broken, "a proposal's task broke");
        self.assigning = false;
        self.dirty = true;
        if let Some(leading) = &mut self.leading {
            leading.in_flight = helix_core::InFlight::default();
        }
    }

    /// Makes the next tick come no later than `when`.
    fn wake_at(&mut self, when: Instant) {
        let wait = when.saturating_duration_since(self.ticked_at);
        self.tick = self.tick.min(wait);
    }
}
