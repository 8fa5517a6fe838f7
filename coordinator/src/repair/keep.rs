//! The leader's passes in the background: when one is due, and whose copies count in it.
//!
//! Whether a voter answers is asked at each look, with the very question that a pass asks. One that falls silent ends the pass
//! that asks it; the next begins when it is back, or without it when it has been silent for long.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use futures::future::join_all;
use helix_model::{Digest, NodeId};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::silence::{Silence, Turn};
use super::{Pace, Plan, Repair, Tally};

/// When the leader looks after the copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// How often it looks whether a pass is due.
    pub look_every: Duration,
    /// A voter that has not answered for so long counts as one that holds nothing. Long enough for a restart, an upgrade and a
    /// switch that is replaced, as nothing is copied for them; what is short of copies is looked at again after as long.
    pub patience: Duration,
    /// A pass that found all as it should be is repeated after so long.
    pub pass_every: Duration,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            look_every: Duration::from_secs(5),
            patience: Duration::from_secs(600),
            pass_every: Duration::from_secs(3_600),
        }
    }
}

/// The last pass that came to its end.
pub(super) struct Done {
    pub(super) plan: Plan,
    pub(super) short: u64,
    pub(super) at: Instant,
}

impl Done {
    /// Whether such a pass need not begin yet.
    pub(super) fn suffices(&self, plan: &Plan, now: Instant, schedule: &Schedule) -> bool {
        let whole = self.short == 0 && self.plan.silent.is_empty();
        let every = if whole { schedule.pass_every } else { schedule.patience };
        self.plan == *plan && now.saturating_duration_since(self.at) < every
    }
}

impl Repair {
    /// Looks after the copies while this node leads, until `stop`: soon after it began to lead, when the voters, those of them
    /// that answer or the policy's number of copies changed, and every hour; sooner where copies are missing.
    pub async fn keep(self, schedule: Schedule, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(schedule.look_every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silence = Silence::default();
        let mut done: Option<Done> = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if !self.registry.leadership().borrow().is_leader {
                (silence, done) = (Silence::default(), None);
                // Whoever leads now knows better.
                self.note_lost(Vec::new());
                self.note_short(0);
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.look(&schedule, &mut silence, &mut done) => {}
            }
        }
    }

    /// Begins a pass if one is due, and sees it through.
    async fn look(&self, schedule: &Schedule, silence: &mut Silence, done: &mut Option<Done>) {
        let voters = self.registry.voters();
        if voters.len() < 2 {
            // Nobody else could hold anything.
            self.note_short(0);
            return;
        }
        let asked = Instant::now();
        self.ask(&voters, schedule, silence).await;
        let plan = self.plan_without(silence.left_out());
        if plan.keepers.len() < 2 || done.as_ref().is_some_and(|done| done.suffices(&plan, asked, schedule)) {
            return;
        }
        if let Some(node) = silence.awaited() {
            tracing::debug!(%node, "a coordinator does not answer; copies are looked after when it does, or without it");
            return;
        }
        let pass = tokio::select! {
            pass = self.while_leading(&plan) => pass,
            () = self.one_back(&voters, schedule, silence) => {
                Err(Status::cancelled("a coordinator that was left out answers again"))
            }
        };
        match pass {
            Ok(mut tally) => {
                self.note_lost(std::mem::take(&mut tally.lost));
                self.note_short(tally.short);
                let before = done.as_ref().map_or(0, |done| done.short);
                if tally.copied > 0 || (tally.short > 0 && tally.short != before) {
                    tracing::info!(?tally, "copies of blobs were looked after");
                }
                *done = Some(Done { plan, short: tally.short, at: Instant::now() });
            }
            Err(error) => tracing::debug!(%error, "not all copies could be looked after; again soon"),
        }
    }

    /// What is to be so while these do not answer.
    fn plan_without(&self, silent: &BTreeSet<NodeId>) -> Plan {
        let mut plan = self.plan(None, Pace::Background);
        plan.silent = plan.keepers.intersection(silent).copied().collect();
        plan.keepers.retain(|node| !silent.contains(node));
        plan.copies = plan.copies.min(plan.keepers.len()).max(1);
        plan
    }

    /// Asks all voters, and tells what has become of them.
    async fn ask(&self, voters: &BTreeSet<NodeId>, schedule: &Schedule, silence: &mut Silence) -> Vec<Turn> {
        let asked = Instant::now();
        // Of no blob at all: it is the answer that counts.
        let answers = voters.iter().map(|node| async move { self.held(*node, &[]).await.is_ok().then_some(*node) });
        let answered = join_all(answers).await.into_iter().flatten().collect();
        let turns = silence.note(voters, &answered, asked, schedule.patience);
        turns.iter().for_each(|turn| tell(*turn, schedule.patience));
        turns
    }

    /// Goes on asking, until one that was left out is back.
    async fn one_back(&self, voters: &BTreeSet<NodeId>, schedule: &Schedule, silence: &mut Silence) {
        loop {
            tokio::time::sleep(schedule.look_every).await;
            if self.ask(voters, schedule, silence).await.iter().any(|turn| matches!(turn, Turn::Back(_))) {
                return;
            }
        }
    }

    async fn while_leading(&self, plan: &Plan) -> Result<Tally, Status> {
        let mut pass = self.pass(plan).await?;
        while pass.step().await? {
            if !self.registry.leadership().borrow().is_leader {
                return Err(Status::cancelled("this node leads no more"));
            }
        }
        Ok(pass.tally)
    }

    /// Says once which blobs are lost.
    fn note_lost(&self, found: Vec<Digest>) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in found.iter().filter(|digest| !lost.contains(digest)) {
            tracing::error!(%digest, "a blob that a build names is on no coordinator: its bytes are lost");
        }
        self.registry.counters().blobs_missing.set(found.len() as u64);
        *lost = found;
    }

    fn note_short(&self, count: u64) {
        self.registry.counters().blobs_short.set(count);
    }
}

fn tell(turn: Turn, patience: Duration) {
    match turn {
        Turn::LeftOut(node) => tracing::warn!(
            %node,
            ?patience,
            "a coordinator has not answered for long: what it should hold is copied to the others, as far as they have it"
        ),
        Turn::Back(node) => tracing::info!(%node, "a coordinator that was left out answers again: its copies count"),
    }
}
