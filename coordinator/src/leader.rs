//! The leader's shell around the pure core: one task that owns who is connected, who spoke when and what is under way,
//! asks the core what to do, proposes it, and sends what follows to agents.
//!
//! It decides nothing itself and waits for nobody: proposals run beside it and come back as messages, agents have
//! bounded queues, and whatever is lost is derived from the state again. A node that does not lead keeps none of it.

mod budget;
mod consensus;
mod decisions;
mod effects;
mod event;
mod in_flight;
mod leading;
mod liveness;
mod metrics;
mod outbox;
mod reports;
mod session;
mod sessions;
mod settings;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use helix_common::status::{not_leader, status};
use helix_core::{Effect, Liveness};
use helix_model::{ErrorCode, NodeId, WorkerName};
use helix_proto::agent;
use helix_proto::agent::coordinator_message::Message;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::{info, warn};

use crate::registry::{Leadership, Registry};
use decisions::Completed;
use event::{CannotOpen, Event};
use leading::Leading;
use session::Session;

#[cfg(test)]
pub(crate) use tests::testing;

pub use consensus::Consensus;
pub use liveness::{Heard, LivenessHandle};
pub use metrics::LeaderMetrics;
pub use outbox::Outgoing;

/// Messages to the loop on their way; sessions wait when it is full.
const EVENTS_MAX: usize = 4_096;
/// Messages taken in one go before the core is asked again.
const EVENTS_AT_ONCE: usize = 512;
/// The loop looks at the clock at least this often.
const TICK_MS_MAX: u64 = 1_000;
/// And, when something due does not go away, no more often than this.
const TICK_MS_MIN: u64 = 50;
/// In one lease it looks at the clock at least this many times.
const TICKS_PER_LEASE: u64 = 4;

/// The handle on the loop: opens sessions, answers who is alive. Clones share everything.
#[derive(Clone)]
pub struct Leader<C = Registry> {
    consensus: C,
    events: mpsc::Sender<Event>,
    metrics: LeaderMetrics,
    tasks: TaskTracker,
    /// The loop has ended.
    ended: CancellationToken,
}

/// The loop's own side.
pub struct LeaderLoop<C> {
    consensus: C,
    events: mpsc::Receiver<Event>,
    leadership: watch::Receiver<Leadership>,
    effects: broadcast::Receiver<Arc<[Effect]>>,
    metrics: LeaderMetrics,
    leading: Option<Leading>,
    proposals: JoinSet<Completed>,
    /// There may be something to schedule.
    dirty: bool,
    /// A batch of assignments is under way: what comes meanwhile goes into the next.
    assigning: bool,
    /// After a refusal the scheduler and `apply` disagree: no next pass before this.
    not_before: Instant,
    ticked_at: Instant,
    tick: Duration,
}

impl<C: Consensus> LeaderLoop<C> {
    /// Starts the loop. Cancel `stop` to end it: sessions are told that the leader moved, and all tasks end.
    /// [`Leader::finished`] waits for that.
    pub fn spawn(consensus: C, stop: CancellationToken) -> Leader<C> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let metrics = LeaderMetrics::default();
        let now = Instant::now();
        let this = Self {
            events,
            leadership: consensus.leadership(),
            effects: consensus.effects(),
            metrics: metrics.clone(),
            leading: None,
            proposals: JoinSet::new(),
            dirty: false,
            assigning: false,
            not_before: now,
            ticked_at: now,
            tick: Duration::from_millis(TICK_MS_MIN),
            consensus: consensus.clone(),
        };
        let tasks = TaskTracker::new();
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        tasks.spawn(async move {
            this.run(stop).await;
            drop(end);
        });
        Leader { consensus, events: sender, metrics, tasks, ended }
    }

    async fn run(mut self, stop: CancellationToken) {
        // Whoever leads already is not announced again.
        self.on_leadership();
        loop {
            let due = self.ticked_at + self.tick;
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.leadership.changed() => match changed {
                    Ok(()) => self.on_leadership(),
                    Err(_) => break,
                },
                event = self.events.recv() => match event {
                    Some(event) => self.on_events(event),
                    None => break,
                },
                effects = self.effects.recv() => match effects {
                    Ok(effects) => self.on_effects(&effects),
                    Err(broadcast::error::RecvError::Lagged(_)) => self.on_lag(),
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                Some(completed) = self.proposals.join_next(), if !self.proposals.is_empty() => match completed {
                    Ok(completed) => self.on_completed(&completed),
                    // Its panic was reported by the runtime; what it had under way is derived again.
                    Err(error) => self.on_broken_proposal(&error),
                },
                () = tokio::time::sleep_until(due) => self.on_tick(),
            }
            self.schedule();
            self.metrics.sessions.set(self.leading.as_ref().map_or(0, |leading| leading.sessions.len() as i64));
        }
        self.stop_leading(None);
        self.metrics.sessions.set(0);
    }

    fn on_leadership(&mut self) {
        let leadership = *self.leadership.borrow_and_update();
        let term = leadership.is_leader.then_some(leadership.term);
        if self.leading.as_ref().map(|leading| leading.term) == term {
            return;
        }
        self.stop_leading(leadership.leader);
        let Some(term) = term else { return };
        let (now, cluster) = (self.consensus.now(), self.consensus.cluster());
        let leapt_ms = self.consensus.leapt_ms();
        self.leading = Some(self.consensus.with_state(|state| Leading::begin(term, leapt_ms, now, state, &cluster)));
        info!(term, "leading");
        self.ticked_at = Instant::now();
        self.tick = Duration::from_millis(TICK_MS_MIN);
    }

    /// Sends all agents away; what was under way is somebody else's to derive.
    fn stop_leading(&mut self, next: Option<NodeId>) {
        let Some(mut leading) = self.leading.take() else { return };
        info!(term = leading.term, next = ?next, "no longer leading");
        let leader = self.endpoint(next).unwrap_or_default();
        leading.sessions.end_all(&Message::Moved(agent::Moved { leader }));
        // Dropping only stops waiting for replies: what was proposed may still be committed.
        self.proposals = JoinSet::new();
        (self.assigning, self.dirty) = (false, false);
    }

    fn endpoint(&self, node: Option<NodeId>) -> Option<String> {
        self.consensus.with_state(|state| state.node(node?).map(|record| record.grpc.clone()))
    }

    fn on_events(&mut self, first: Event) {
        self.on_event(first);
        for _ in 1..EVENTS_AT_ONCE {
            match self.events.try_recv() {
                Ok(event) => self.on_event(event),
                Err(_) => return,
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        let now = self.consensus.now();
        match (event, &mut self.leading) {
            (Event::Open { who, outbox, answer }, Some(leading)) => {
                let opened = self.consensus.with_state(|state| leading.open(state, &who, outbox, now));
                // A session that is gone meanwhile says so itself: its outbox ends with it.
                let _ = answer.send(opened);
            }
            (Event::Open { answer, .. }, None) => {
                let leader = self.leadership.borrow().leader;
                let _ = answer.send(Err(CannotOpen::NotLeader(self.endpoint(leader))));
            }
            (Event::Ready { who, id, spooled }, Some(leading)) => {
                self.consensus.with_state(|state| leading.ready(state, &who, id, &spooled, now));
                self.dirty = true;
            }
            (Event::Heard { worker, id, beat }, Some(leading)) => self.dirty |= leading.heard(&worker, id, beat, now),
            (Event::Closed { worker, id }, Some(leading)) => leading.closed(&worker, id),
            (Event::Snapshot(answer), leading) => {
                // Whoever asked may have given up.
                let _ = answer.send(leading.as_ref().map(|leading| leading.liveness.clone()));
            }
            (Event::Ready { .. } | Event::Heard { .. } | Event::Closed { .. }, None) => {}
        }
    }

    fn on_effects(&mut self, effects: &[Effect]) {
        let Some(leading) = &mut self.leading else { return };
        let noticed = self.consensus.with_state(|state| {
            self.metrics.observe(state, effects);
            let noticed = leading.on_effects(state, effects);
            if noticed.nodes {
                leading.update_settings(state);
            }
            noticed
        });
        self.dirty |= noticed.schedule;
    }

    fn on_lag(&mut self) {
        self.dirty = true;
        let Some(leading) = &mut self.leading else { return };
        warn!("effects were lost: everything that must be sent is derived again");
        self.consensus.with_state(|state| leading.resend(state));
    }
}

impl<C: Consensus> Leader<C> {
    /// Serves one agent's session. `worker` is the name in its certificate.
    ///
    /// # Errors
    /// `not_leader` with the leader's endpoint, at once, where this node does not lead.
    // A status is what a handler answers with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    pub fn session<S>(&self, worker: WorkerName, inbound: S) -> Result<Outgoing, Status>
    where
        S: Stream<Item = Result<agent::AgentMessage, Status>> + Send + Unpin + 'static,
    {
        if self.ended.is_cancelled() {
            return Err(status(ErrorCode::ShuttingDown, "the coordinator is stopping"));
        }
        let leadership = *self.consensus.leadership().borrow();
        if !leadership.is_leader {
            let hint = leadership.leader.and_then(|leader| {
                self.consensus.with_state(|state| state.node(leader).map(|record| record.grpc.clone()))
            });
            return Err(not_leader(hint.as_deref()));
        }
        let (outbox, outgoing) = outbox::outbox();
        let session =
            Session { consensus: self.consensus.clone(), events: self.events.clone(), outbox: outbox.clone(), worker };
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = session.run(inbound) => {}
                // The loop has said its last word on those that were open.
                () = ended.cancelled() => outbox.end(Some(status(ErrorCode::ShuttingDown, "the coordinator is stopping"))),
            }
        });
        Ok(outgoing)
    }

    /// What the loop knows of all workers; `None` where this node does not lead.
    pub async fn snapshot(&self) -> Option<Liveness> {
        let (answer, snapshot) = oneshot::channel();
        self.events.send(Event::Snapshot(answer)).await.ok()?;
        snapshot.await.ok()?
    }

    /// What is measured here.
    #[must_use]
    pub fn metrics(&self) -> &LeaderMetrics {
        &self.metrics
    }

    /// Waits until the loop and all sessions have ended, after `stop` was cancelled.
    pub async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}
