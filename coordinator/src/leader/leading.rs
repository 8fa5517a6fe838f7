//! What a node knows while it leads: sessions, liveness, proposals under way. Fresh with each term, gone with its end.
//!
//! Invariant: a worker gets new work only while its session is ready, its heartbeat in time, and its life the registry's.

use std::collections::BTreeSet;

use helix_common::status::status;
use helix_core::record::Standing;
use helix_core::state::State;
use helix_core::{Effect, InFlight, Liveness, SessionState, WorkerLiveness};
use helix_model::{AttemptKey, ErrorCode, LogTime, WorkerName};
use helix_proto::agent::coordinator_message::Message;
use helix_proto::{AGENT_PROTOCOL, agent};
use tracing::{debug, info, warn};

use super::event::{Beat, CannotOpen};
use super::outbox::Outbox;
use super::reports::{Answer, unwanted};
use super::sessions::{SessionId, Sessions};
use super::settings::{is_late, settings};
use super::wire::{self, Speaker, SpooledAttempt};

/// One term of leading.
#[derive(Debug)]
pub(crate) struct Leading {
    pub(crate) term: u64,
    pub(crate) liveness: Liveness,
    pub(crate) in_flight: InFlight,
    pub(crate) sessions: Sessions,
    settings: agent::Settings,
    /// How far the log clock had leapt when that was last looked at.
    leapt_ms: u64,
}

impl Leading {
    /// The beginning of a term: nobody has spoken, and everybody has a full lease.
    /// `leapt_ms` was asked for after `now` had brought the clock up to date.
    pub(crate) fn begin(term: u64, leapt_ms: u64, now: LogTime, state: &State, cluster: &str) -> Self {
        Self {
            term,
            liveness: Liveness { leader_since: now, ..Liveness::default() },
            in_flight: InFlight::default(),
            sessions: Sessions::default(),
            settings: settings(state, cluster),
            leapt_ms,
        }
    }

    /// Opens a session, unless another life of the worker is alive.
    pub(crate) fn open(
        &mut self,
        state: &State,
        who: &Speaker,
        outbox: Outbox,
        now: LogTime,
    ) -> Result<SessionId, CannotOpen> {
        if let Some(why) = self.double(state, who, now) {
            warn!(worker = %who.worker, instance = %who.instance, why, "second agent under one name refused");
            return Err(CannotOpen::Refused(ErrorCode::WorkerNameTaken, why));
        }
        let id = self.sessions.open(who, outbox, now);
        if let Some(live) = self.liveness.workers.get_mut(&who.worker) {
            // Not to be given anything before it is reconciled.
            live.session = SessionState::Late;
            if live.instance == who.instance {
                live.last_seen = now;
            }
        }
        Ok(id)
    }

    /// Why this life of a worker must wait: another one is alive, or may be.
    fn double(&self, state: &State, who: &Speaker, now: LogTime) -> Option<String> {
        let lease_ms = state.policy().worker_lease_ms;
        let name = &who.worker;
        let row = state.worker(name)?;
        if row.standing != Standing::Present {
            return None;
        }
        if let Some(session) = self.sessions.get(name) {
            if session.instance == who.instance {
                return None;
            }
            let live = self.liveness.workers.get(name).filter(|live| live.instance == session.instance);
            let heard = live.map_or(session.opened_at, |live| live.last_seen.max(session.opened_at));
            let alive = now.since_ms(heard) < lease_ms;
            return alive.then(|| {
                format!("another agent is connected as {name:?} (instance {}): names must be unique", session.instance)
            });
        }
        // After a fail-over the rightful agent may not have been the first to find the new leader. Its attempts
        // must not die of that. A boot of the same host is no double.
        let unheard = !self.liveness.workers.contains_key(name);
        let early = now.since_ms(self.liveness.leader_since) < lease_ms;
        let other_host = data_id(row.instance.as_str()) != data_id(who.instance.as_str());
        let doubtful = unheard && early && other_host && state.load_of(name) > 0;
        doubtful.then(|| {
            format!("worker {name:?} runs attempts as instance {}, which has {lease_ms} ms to come back", row.instance)
        })
    }

    /// Welcomes a registered agent and tells it all that the state says about what it has and what it should have.
    pub(crate) fn ready(
        &mut self,
        state: &State,
        who: &Speaker,
        id: SessionId,
        spooled: &[SpooledAttempt],
        now: LogTime,
    ) {
        self.update_settings(state);
        let Some(session) = self.sessions.get_mut(&who.worker, id) else { return };
        let counted = state
            .worker(&who.worker)
            .is_some_and(|row| row.instance == who.instance && row.standing == Standing::Present);
        if !counted {
            let text = "the registry changed its mind about this worker: introduce yourself again";
            self.sessions.end(&who.worker, Some(status(ErrorCode::StaleAttempt, text)));
            return;
        }
        let welcome = Message::Welcome(agent::Welcome {
            protocol: AGENT_PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: Some(self.settings.clone()),
        });
        session.begin(std::iter::once(welcome).chain(reconcile(state, who, spooled)));
        let before = self.liveness.workers.remove(&who.worker).filter(|live| live.instance == who.instance);
        let mut live = before.unwrap_or_else(|| WorkerLiveness::opened(who.instance.clone(), now));
        (live.session, live.last_seen) = (SessionState::Open, now);
        self.liveness.workers.insert(who.worker.clone(), live);
    }

    /// A heartbeat. Answers whether the worker became fit for work by it.
    pub(crate) fn heard(&mut self, worker: &WorkerName, id: SessionId, beat: Beat, now: LogTime) -> bool {
        let Some(session) = self.sessions.get_mut(worker, id).filter(|session| session.ready) else { return false };
        session.drain_backlog();
        let Some(live) = self.liveness.workers.get_mut(worker) else { return false };
        live.last_seen = live.last_seen.max(now);
        let relieved = !live.pressure.is_empty() && beat.pressure.is_empty();
        if live.pressure != beat.pressure {
            info!(%worker, before = live.pressure, pressure = beat.pressure, "pressure on a worker's host changed");
        }
        live.pressure = beat.pressure;
        live.silent_ms = beat.silent_ms;
        live.certificate_not_after_ms = beat.certificate_not_after_ms;
        let was = std::mem::replace(&mut live.session, SessionState::Open);
        relieved || was != SessionState::Open
    }

    /// The agent's stream is gone. Its lease goes on; new work stops at once.
    pub(crate) fn closed(&mut self, worker: &WorkerName, id: SessionId) {
        if self.sessions.get_mut(worker, id).is_some() {
            self.sessions.end(worker, None);
            self.mark_closed(worker);
            info!(%worker, "agent disconnected");
        }
    }

    pub(crate) fn mark_closed(&mut self, worker: &WorkerName) {
        if let Some(live) = self.liveness.workers.get_mut(worker) {
            live.session = SessionState::Closed;
        }
    }

    /// Looks at the clock: late heartbeats stop new work; a session that is silent for a lease is no session.
    pub(crate) fn mark_late(&mut self, now: LogTime) {
        let interval_ms = self.settings.heartbeat_interval_ms;
        let mut dead = Vec::new();
        // Both are in the order of names: thousands are looked at each time.
        let mut known = self.liveness.workers.iter_mut().peekable();
        for (worker, session) in self.sessions.ready() {
            while known.next_if(|(name, _)| *name < worker).is_some() {}
            let Some((_, live)) = known.next_if(|(name, _)| *name == worker) else { continue };
            if !is_late(live.last_seen, now, interval_ms) {
                continue;
            }
            if live.session == SessionState::Open {
                info!(%worker, instance = %session.instance, "heartbeat late, no new work");
                live.session = SessionState::Late;
            }
            if now.since_ms(live.last_seen) >= self.settings.worker_lease_ms {
                dead.push(worker.clone());
            }
        }
        for worker in dead {
            self.sessions.end(&worker, Some(status(ErrorCode::StaleAttempt, "no heartbeat for a whole lease")));
            self.mark_closed(&worker);
        }
    }

    /// Log time that leaps to where most clocks are is no time in which anybody could have spoken.
    pub(crate) fn forgive_leaps(&mut self, leapt_ms: u64, now: LogTime) {
        let ms = leapt_ms.saturating_sub(self.leapt_ms);
        self.leapt_ms = leapt_ms;
        if ms == 0 {
            return;
        }
        warn!(ms, "log time has leapt: leases are extended by as much");
        self.forgive(ms);
        // Who was heard behind the leap was not heard in the future.
        self.liveness.leader_since = self.liveness.leader_since.min(now);
        for live in self.liveness.workers.values_mut() {
            live.last_seen = live.last_seen.min(now);
        }
    }

    /// Time in which this node did not listen does not count against anybody.
    pub(crate) fn forgive(&mut self, ms: u64) {
        self.liveness.leader_since = self.liveness.leader_since.plus_ms(ms);
        for live in self.liveness.workers.values_mut() {
            live.last_seen = live.last_seen.plus_ms(ms);
        }
    }

    /// Tells all agents, if anything of it changed.
    pub(crate) fn update_settings(&mut self, state: &State) {
        let wanted = settings(state, &self.settings.cluster);
        if wanted == self.settings {
            return;
        }
        self.settings = wanted;
        let workers: Vec<_> = self.sessions.ready().map(|(worker, _)| worker.clone()).collect();
        for worker in workers {
            self.send(&worker, Message::Settings(self.settings.clone()));
        }
    }

    /// Sends to a worker; an agent that does not read loses its session.
    pub(crate) fn send(&mut self, worker: &WorkerName, message: Message) {
        if !self.sessions.send(worker, message) {
            warn!(%worker, "agent does not read its session, which is closed");
            self.mark_closed(worker);
        }
    }

    /// Effects were lost: everything that must be sent is derived from the state again. Agents take repeats.
    pub(crate) fn resend(&mut self, state: &State) {
        let workers: Vec<_> = self.sessions.ready().map(|(worker, _)| worker.clone()).collect();
        for worker in workers {
            debug!(%worker, "sending everything again");
            self.on_effects(state, &state.pending_effects_for(&worker));
            self.check_worker(state, &worker);
        }
    }

    /// Drops what contradicts the worker's row: a session of a life that the registry does not count on.
    pub(crate) fn check_worker(&mut self, state: &State, worker: &WorkerName) {
        let row = state.worker(worker);
        if let Some(session) = self.sessions.get(worker) {
            let counted = row.is_some_and(|row| row.instance == session.instance && row.standing != Standing::Lost);
            if session.ready && !counted {
                let text = "the registry no longer counts on this worker: introduce yourself again";
                self.sessions.end(worker, Some(status(ErrorCode::StaleAttempt, text)));
                self.mark_closed(worker);
            }
        }
        if row.is_none() && self.sessions.get(worker).is_none() {
            self.liveness.workers.remove(worker);
        }
    }
}

/// What a reconnected agent must be told about what it has, what it should have, and what is to stop.
fn reconcile(state: &State, who: &Speaker, spooled: &[SpooledAttempt]) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut has: BTreeSet<&AttemptKey> = BTreeSet::new();
    for attempt in spooled {
        has.insert(&attempt.key);
        match unwanted(state, who, &attempt.key) {
            // Its report follows by itself, and says that it is dead.
            Answer::Send(message) if attempt.ended && matches!(*message, Message::Stop(_)) => {}
            Answer::Send(message) => messages.push(*message),
            Answer::Nothing | Answer::Obsolete => {}
        }
    }
    for effect in state.pending_effects_for(&who.worker) {
        match effect {
            Effect::SendAssignment { key, instance, .. } if instance == who.instance && !has.contains(&key) => {
                messages.extend(wire::assign(state, &key));
            }
            Effect::SendStop { key, reason, .. } if !has.contains(&key) => messages.push(wire::stop(&key, reason)),
            _ => {}
        }
    }
    messages
}

/// The part of an instance that belongs to the agent's data directory.
fn data_id(instance: &str) -> &str {
    instance.split_once('.').map_or("", |(data, _)| data)
}
