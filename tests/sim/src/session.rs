//! The leader's side of agents' sessions: introductions, reconciliation, heartbeats. What becomes of reports is in `reports`.
//!
//! It does what the coordinator's `leader/` does around the core, message for message. A session's messages arrive in
//! order, or the session is over.

use std::collections::{BTreeMap, BTreeSet};

use helix_agent_core::{Message, Order};
use helix_core::command::{self as cmd, Command, WorkerOffer};
use helix_core::record::{DrainedBy, Standing};
use helix_core::state::Offered;
use helix_core::{Effect, Reply, SessionState, State, WorkerLiveness};
use helix_model::{AttemptKey, Instance, LogTime, Reason};

use super::Bug;
use super::registry::Origin;
use super::wire::{self, Speaker};
use super::world::World;

mod reports;

/// From an agent to the leader.
#[derive(Clone, Debug)]
pub(super) enum Up {
    Hello(Box<Hello>),
    Beat { session: u64, silent_ms: BTreeMap<AttemptKey, u64> },
    Said { session: u64, message: Message },
}

/// How an agent introduces itself.
#[derive(Clone, Debug)]
pub(super) struct Hello {
    pub(super) session: u64,
    pub(super) instance: Instance,
    pub(super) offer: WorkerOffer,
    /// What it has, and whether its report follows.
    pub(super) attempts: Vec<(AttemptKey, bool)>,
    pub(super) leaving: bool,
}

/// From the leader to an agent.
#[derive(Clone, Debug)]
pub(super) enum Down {
    Welcome,
    /// The connection works: what keep-alives tell.
    Alive,
    Order(Order),
    /// The session is over.
    Over,
}

/// An agent, connected to the present leader.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) who: Speaker,
    pub(super) ready: bool,
    /// Which life it really is.
    truth: Instance,
    opened_at: LogTime,
    attempts: Vec<(AttemptKey, bool)>,
    busy: BTreeSet<Subject>,
}

/// What a report is about: while one is under way, its repeats are dropped.
pub(super) type Subject = (u8, Option<AttemptKey>);

fn subject(message: &Message) -> Subject {
    match message {
        Message::SourceResolved { key, .. } => (0, Some(key.clone())),
        Message::ImagePushed { key, .. } => (1, Some(key.clone())),
        Message::Finished { key, .. } => (2, Some(key.clone())),
        Message::LogSealed { key, .. } => (3, Some(key.clone())),
        Message::ProvenDead { key } => (4, Some(key.clone())),
        Message::Detaching => (5, None),
        Message::Leaving => (6, None),
    }
}

impl World {
    /// The leader hears an agent.
    pub(super) fn hear_agent(&mut self, agent: usize, message: Up) {
        if self.registry.leader.is_none() {
            return;
        }
        match message {
            Up::Hello(hello) => self.hello(agent, *hello),
            Up::Beat { session, silent_ms } => self.beat(agent, session, silent_ms),
            Up::Said { session, message } => {
                let open = self.leading.sessions.get_mut(&agent).filter(|open| open.number == session && open.ready);
                if open.is_some_and(|open| open.busy.insert(subject(&message))) {
                    self.take_report(agent, message);
                }
            }
        }
    }

    fn hello(&mut self, agent: usize, hello: Hello) {
        let Hello { session, instance, mut offer, attempts, leaving } = hello;
        let name = self.agents[agent].name.clone();
        let mut who = Speaker { worker: name.clone(), instance };
        let time = self.registry.time(self.now);
        if self.is_double(agent, &who, time) {
            return self.send_down(agent, session, Down::Over);
        }
        let truth = who.instance.clone();
        let Some(state) = self.registry.state() else { return };
        if self.bug == Some(Bug::OldInstanceKept)
            && let Some(row) = state.worker(&name)
        {
            who.instance = row.instance.clone();
        }
        self.oracle.offered(&name, offer.capacity);
        if self.bug == Some(Bug::CapacityFromMemory) {
            offer.capacity = 100;
        }
        let commands = registration(state, &who, &offer, leaving);
        if let Some(live) = self.leading.liveness.workers.get_mut(&name) {
            live.session = SessionState::Late;
            if live.instance == who.instance {
                live.last_seen = time;
            }
        }
        let (busy, opened_at) = (BTreeSet::new(), time);
        let open = Session { number: session, who, ready: false, truth, opened_at, attempts, busy };
        self.leading.sessions.insert(agent, open);
        let count = commands.len();
        let origin = |place| Origin::Hello { agent, session, last: place + 1 == count };
        if commands.is_empty() {
            self.welcome(agent, session);
        } else {
            let commands = commands.into_iter().enumerate();
            self.propose(commands.map(|(place, command)| (command, origin(place))).collect());
        }
    }

    /// Whether this life of a worker must wait: another one is alive, or may be.
    fn is_double(&self, agent: usize, who: &Speaker, now: LogTime) -> bool {
        let Some(state) = self.registry.state() else { return true };
        let lease_ms = state.policy().worker_lease_ms;
        let Some(row) = state.worker(&who.worker).filter(|row| row.standing == Standing::Present) else { return false };
        let live = self.leading.liveness.workers.get(&who.worker);
        if let Some(open) = self.leading.sessions.get(&agent) {
            let live = live.filter(|live| live.instance == open.who.instance);
            let heard = live.map_or(open.opened_at, |live| live.last_seen.max(open.opened_at));
            return open.who.instance != who.instance && now.since_ms(heard) < lease_ms;
        }
        let early = now.since_ms(self.leading.liveness.leader_since) < lease_ms;
        let data = |instance: &Instance| instance.as_str().split_once('.').map(|(data, _)| data.to_owned());
        let other_host = data(&row.instance) != data(&who.instance);
        live.is_none() && early && other_host && state.load_of(&who.worker) > 0
    }

    /// An introduction was committed, or there was nothing to commit.
    pub(super) fn introduced(&mut self, agent: usize, session: u64, last: bool, reply: &Reply) {
        let verdict = self.judge_life(agent, session);
        self.check(verdict);
        if matches!(reply, Reply::Rejected(_)) {
            self.end_session(agent, session);
        } else if last {
            self.welcome(agent, session);
        }
    }

    /// Whether what runs on a worker that introduced itself belongs to the life that it really is.
    fn judge_life(&self, agent: usize, session: u64) -> Result<(), String> {
        let Some((state, open)) = self.registry.state().zip(self.leading.sessions.get(&agent)) else { return Ok(()) };
        let earlier = state.running_on(&open.who.worker).find(|key| {
            open.number == session && state.running_attempt(key).is_some_and(|attempt| attempt.instance != open.truth)
        });
        match earlier {
            Some(key) => Err(format!("{key} still runs on w{agent}, which has come back as {}", open.truth)),
            None => Ok(()),
        }
    }

    /// Tells a registered agent all that the state says about what it has and what it should have.
    fn welcome(&mut self, agent: usize, session: u64) {
        let time = self.registry.time(self.now);
        let Some(state) = self.registry.state() else { return };
        let Some(open) = self.leading.sessions.get_mut(&agent).filter(|open| open.number == session) else { return };
        let row = state.worker(&open.who.worker);
        if !row.is_some_and(|row| row.instance == open.who.instance && row.standing == Standing::Present) {
            return self.end_session(agent, session);
        }
        open.ready = true;
        let who = open.who.clone();
        let forgotten = self.bug == Some(Bug::ForgottenEffects);
        let orders = if forgotten { Vec::new() } else { reconcile(state, &who, &open.attempts) };
        let before = self.leading.liveness.workers.remove(&who.worker).filter(|live| live.instance == who.instance);
        let mut live = WorkerLiveness::opened(who.instance.clone(), time);
        live.silent_ms = before.map(|live| live.silent_ms).unwrap_or_default();
        self.leading.liveness.workers.insert(who.worker, live);
        self.leading.heard.insert(agent, self.now);
        self.send_down(agent, session, Down::Welcome);
        for order in orders {
            self.send_down(agent, session, Down::Order(order));
        }
    }

    fn beat(&mut self, agent: usize, session: u64, silent_ms: BTreeMap<AttemptKey, u64>) {
        let time = self.registry.time(self.now);
        let open = self.leading.sessions.get(&agent).filter(|open| open.number == session && open.ready);
        let Some(live) = open.and_then(|open| self.leading.liveness.workers.get_mut(&open.who.worker)) else {
            return self.send_down(agent, session, Down::Over);
        };
        live.last_seen = live.last_seen.max(time);
        live.session = SessionState::Open;
        live.silent_ms = silent_ms;
        self.leading.heard.insert(agent, self.now);
        self.send_down(agent, session, Down::Alive);
    }

    /// Late heartbeats stop new work; a session that is silent for a lease is no session.
    pub(super) fn mark_late(&mut self, now: LogTime) {
        let Some(state) = self.registry.state() else { return };
        let lease_ms = state.policy().worker_lease_ms;
        let mut dead = Vec::new();
        for (agent, open) in self.leading.sessions.iter().filter(|(_, open)| open.ready) {
            let Some(live) = self.leading.liveness.workers.get_mut(&open.who.worker) else { continue };
            let silent = now.since_ms(live.last_seen);
            if silent > 2 * (lease_ms / 3) && live.session == SessionState::Open {
                live.session = SessionState::Late;
            }
            if silent >= lease_ms {
                dead.push((*agent, open.number));
            }
        }
        for (agent, session) in dead {
            self.end_session(agent, session);
        }
    }

    /// The leader ends a session, and says so.
    pub(super) fn end_session(&mut self, agent: usize, session: u64) {
        self.closed(agent, session);
        self.send_down(agent, session, Down::Over);
    }

    /// A connection is gone. Its lease goes on; new work stops at once.
    pub(super) fn closed(&mut self, agent: usize, session: u64) {
        if self.leading.sessions.get(&agent).is_some_and(|open| open.number == session) {
            self.leading.sessions.remove(&agent);
            if let Some(live) = self.leading.liveness.workers.get_mut(&self.agents[agent].name) {
                live.session = SessionState::Closed;
            }
            if self.bug == Some(Bug::LostAtDisconnect) {
                self.lose_at_once(agent);
            }
        }
    }

    fn lose_at_once(&mut self, agent: usize) {
        let name = self.agents[agent].name.clone();
        let row = self.registry.state().and_then(|state| state.worker(&name));
        let Some(row) = row.filter(|row| row.standing == Standing::Present) else { return };
        let loss = cmd::LoseWorker { worker: name, instance: row.instance.clone() };
        self.propose_own(vec![Command::LoseWorker(loss)]);
    }

    /// Sends what effects ask for; each looks its facts up in the state as it is now.
    pub(super) fn on_effects(&mut self, effects: &[Effect]) {
        for effect in effects {
            if let Effect::WorkerChanged(worker) = effect {
                let agent = self.agents.iter().position(|agent| agent.name == *worker);
                agent.into_iter().for_each(|agent| self.check_worker(agent));
            }
            let Some(state) = self.registry.state() else { return };
            let Some((worker, order)) = wire::order(state, effect) else { continue };
            let agent = self.agents.iter().position(|agent| agent.name == worker);
            let open = agent.and_then(|agent| Some((agent, self.leading.sessions.get(&agent)?)));
            let Some((agent, open)) = open.filter(|(_, open)| open.ready) else { continue };
            let other_life =
                matches!(effect, Effect::SendAssignment { instance, .. } if *instance != open.who.instance);
            if !other_life {
                self.send_down(agent, open.number, Down::Order(order));
            }
        }
    }

    /// Ends a session of a life that the registry does not count on.
    fn check_worker(&mut self, agent: usize) {
        let Some((state, open)) = self.registry.state().zip(self.leading.sessions.get(&agent)) else { return };
        let row = state.worker(&open.who.worker);
        let counted = row.is_some_and(|row| row.instance == open.who.instance && row.standing != Standing::Lost);
        if open.ready && !counted {
            self.end_session(agent, open.number);
        }
    }
}

/// What must be committed before the agent's row says what its introduction says; usually nothing.
fn registration(state: &State, who: &Speaker, offer: &WorkerOffer, leaving: bool) -> Vec<Command> {
    let row = state.worker(&who.worker);
    let drained_by = row.and_then(|row| row.drain.as_ref()).map(|drain| drain.by);
    let known =
        row.is_some_and(|row| row.instance == who.instance && row.offer == *offer && row.standing == Standing::Present);
    let mut commands = Vec::new();
    if !known || (drained_by == Some(DrainedBy::Agent) && !leaving) {
        let (worker, instance) = (who.worker.clone(), who.instance.clone());
        commands.push(Command::RegisterWorker(cmd::RegisterWorker { worker, instance, offer: offer.clone() }));
    }
    if leaving && (!commands.is_empty() || drained_by.is_none()) {
        commands.push(drain(who));
    }
    commands
}

fn drain(who: &Speaker) -> Command {
    Command::DrainWorker(cmd::DrainWorker { worker: who.worker.clone(), deadline: None, by: DrainedBy::Agent })
}

/// What to say of an attempt that an agent works on although the registry does not, or no longer.
fn unwanted(state: &State, who: &Speaker, key: &AttemptKey) -> Option<Order> {
    match state.offered(key, &who.worker, &who.instance) {
        Offered::Current => None,
        Offered::Stop(reason) => Some(Order::Stop(key.clone(), reason)),
        Offered::Superseded { log_wanted } => {
            let held = state.worker(&who.worker).is_some_and(|worker| worker.held.contains(key));
            if held || log_wanted {
                let end = state.attempt(key).and_then(|attempt| attempt.end.as_ref());
                return Some(Order::Stop(key.clone(), end.and_then(|end| end.reason).unwrap_or(Reason::Cancelled)));
            }
            Some(Order::Forget(key.clone()))
        }
    }
}

/// What a reconnected agent must be told about what it has, what it should have, and what is to stop.
fn reconcile(state: &State, who: &Speaker, attempts: &[(AttemptKey, bool)]) -> Vec<Order> {
    let mut orders = Vec::new();
    let has: BTreeSet<&AttemptKey> = attempts.iter().map(|(key, _)| key).collect();
    for (key, ended) in attempts {
        match unwanted(state, who, key) {
            // Its report follows by itself, and says that it is dead.
            Some(Order::Stop(..)) if *ended => {}
            order => orders.extend(order),
        }
    }
    for effect in state.pending_effects_for(&who.worker) {
        match effect {
            Effect::SendAssignment { key, instance, .. } if instance == who.instance && !has.contains(&key) => {
                orders.extend(wire::assignment(state, &key));
            }
            Effect::SendStop { key, reason, .. } if !has.contains(&key) => orders.push(Order::Stop(key, reason)),
            _ => {}
        }
    }
    orders
}
