//! The virtual clock, the events, and what ties coordinators, agents, hosts and clients together.

use std::collections::{BTreeMap, VecDeque};

use helix_core::command::{self as cmd, Command};
use helix_core::record::Policy;
use helix_core::{Effect, Reply, SessionState, WorkerLiveness, due, schedule};
use helix_model::AttemptKey;

use super::agent::{Agent, Down, Up};
use super::client::{Client, Op};
use super::host::Host;
use super::oracle::Oracle;
use super::random::Random;
use super::registry::{Entry, NODES, Origin, Registry};
use super::{Bug, Failure, Summary};

/// How long things go wrong.
const CHAOS_MS: u64 = 60_000;

/// How long the healed cluster may take to end everything.
const PATIENCE_MS: u64 = 400_000;

/// Happenings remembered for a failure's report.
const TAIL: usize = 60;

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub(super) enum Event {
    LeaderTick(u64),
    Commit { proposal: u64, term: u64 },
    Elect,
    Up { agent: usize, message: Box<Up> },
    Down { agent: usize, session: u64, message: Down },
    AgentTick(usize),
    AgentStart(usize),
    Exit { host: usize, boot: u64, key: AttemptKey },
    Killed { host: usize, boot: u64, key: AttemptKey },
    ClientTick(usize),
    Request { client: usize, request: u64, op: Op },
    Answer { client: usize, request: u64, reply: Reply },
    Fault,
    Heal,
}

pub(super) struct World {
    seed: u64,
    pub(super) bug: Option<Bug>,
    pub(super) now: u64,
    pub(super) random: Random,
    events: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    pub(super) registry: Registry,
    /// Sessions open at the present leader.
    pub(super) sessions: BTreeMap<usize, u64>,
    pub(super) agents: Vec<Agent>,
    pub(super) hosts: Vec<Host>,
    pub(super) clients: Vec<Client>,
    pub(super) oracle: Oracle,
    pub(super) healed: bool,
    tail: VecDeque<String>,
    wrong: Option<String>,
}

impl World {
    pub(super) fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut random = Random::new(seed);
        let registry = Registry::new(&mut random);
        let agents: Vec<Agent> = (0..2 + random.below(5)).map(|number| Agent::new(number, &mut random)).collect();
        let hosts = (0..agents.len()).map(|number| Host::new(number, &mut random)).collect();
        let clients = (0..3).map(|number| Client::new(number, &mut random)).collect();
        Self {
            seed,
            bug,
            now: 0,
            random,
            events: BTreeMap::new(),
            next_event: 0,
            registry,
            sessions: BTreeMap::new(),
            agents,
            hosts,
            clients,
            oracle: Oracle::default(),
            healed: false,
            tail: VecDeque::new(),
            wrong: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Summary, Box<Failure>> {
        self.at(0, Event::Elect);
        self.at(100, Event::Fault);
        self.at(CHAOS_MS, Event::Heal);
        for agent in 0..self.agents.len() {
            self.at(agent as u64, Event::AgentTick(agent));
        }
        for client in 0..self.clients.len() {
            self.at(500 + client as u64, Event::ClientTick(client));
        }
        while self.now < CHAOS_MS + PATIENCE_MS && self.wrong.is_none() && !self.is_over() {
            let Some(((time, _), event)) = self.events.pop_first() else { break };
            self.now = time;
            self.handle(event);
        }
        self.end();
        match self.wrong {
            None => Ok(self.oracle.summary),
            Some(why) => Err(Box::new(Failure { seed: self.seed, at_ms: self.now, why, tail: self.tail.into() })),
        }
    }

    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.events.insert((time, self.next_event), event);
    }

    pub(super) fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
    }

    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        let line = format!("{:>7} {}", self.now, what());
        self.tail.push_back(line);
    }

    pub(super) fn check(&mut self, outcome: Result<(), String>) {
        if let Err(why) = outcome {
            self.wrong.get_or_insert(why);
        }
    }

    fn is_over(&self) -> bool {
        let ended = |state: &helix_core::State| state.open_builds().next().is_none() && state.totals().load == 0;
        self.healed
            && self.clients.iter().all(Client::is_done)
            && self.registry.proposals.is_empty()
            && self.registry.state().is_some_and(ended)
    }

    fn end(&mut self) {
        if self.wrong.is_some() {
            return;
        }
        for node in 0..NODES {
            self.catch_up(node);
        }
        let Some(leader) = self.registry.leader else { return self.check(Err("there is no leader".to_owned())) };
        let verdict = self.oracle.judge_end(&self.registry.nodes[leader].state);
        self.check(verdict);
        let first = &self.registry.nodes[0].state;
        let differs = self.registry.nodes.iter().any(|node| node.state != *first);
        if differs {
            self.check(Err("coordinators disagree after applying the same log".to_owned()));
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::LeaderTick(term) => self.leader_tick(term),
            Event::Commit { proposal, term } => self.commit(proposal, term),
            Event::Elect => self.elect(),
            Event::Up { agent, message } => self.hear_agent(agent, *message),
            Event::Down { agent, session, message } => self.agent_hears(agent, session, message),
            Event::AgentTick(agent) => self.agent_tick(agent),
            Event::AgentStart(agent) => self.agent_start(agent),
            Event::Exit { host, boot, key } => self.process_exits(host, boot, &key),
            Event::Killed { host, boot, key } => self.process_dies(host, boot, &key),
            Event::ClientTick(client) => self.client_tick(client),
            Event::Request { client, request, op } => self.hear_client(client, request, &op),
            Event::Answer { client, request, reply } => self.client_hears(client, request, &reply),
            Event::Fault => self.fault(),
            Event::Heal => self.heal(),
        }
    }

    fn elect(&mut self) {
        let node = self.random.below(NODES);
        self.registry.elect(node, &mut self.random);
        self.oracle.summary.terms += 1;
        self.note(|| format!("node {node} leads"));
        self.catch_up(node);
        self.sessions.clear();
        let leader_since = self.registry.time(self.now);
        self.registry.liveness = helix_core::Liveness { leader_since, ..Default::default() };
        let verdict = self.registry.state().map_or(Ok(()), |state| self.oracle.judge_leader(state));
        self.check(verdict);
        if self.registry.term == 1 {
            let policy = policy();
            self.propose(vec![(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }), Origin::Nobody)]);
        }
        let term = self.registry.term;
        self.after(10, Event::LeaderTick(term));
    }

    fn leader_tick(&mut self, term: u64) {
        if self.registry.leader.is_none() || term != self.registry.term {
            return;
        }
        self.after(50, Event::LeaderTick(term));
        let time = self.registry.time(self.now);
        for live in self.registry.liveness.workers.values_mut() {
            if live.session == SessionState::Open && time.since_ms(live.last_seen) > 1_500 {
                live.session = SessionState::Late;
            }
        }
        let registry = &mut self.registry;
        let Some(leader) = registry.leader else { return };
        let state = &registry.nodes[leader].state;
        registry.liveness.brake = due::brake(state, &registry.liveness, time);
        registry.liveness.claims = schedule::claims(state, &registry.liveness, time);
        self.oracle.summary.claims += u64::from(!registry.liveness.claims.is_empty());
        let overdue = super::oracle::overdue_probe(state, time);
        let mut commands = due::due(state, &registry.in_flight, &registry.liveness, time);
        if self.bug == Some(Bug::NeverProbed) {
            commands.retain(|command| !matches!(command, Command::ProbeWorker(_)));
        }
        commands.extend(schedule::schedule(state, &registry.in_flight, &registry.liveness, time, 5));
        if !commands.is_empty() {
            self.propose(commands.into_iter().map(|command| (command, Origin::Nobody)).collect());
        }
        self.check(overdue);
        for node in 0..NODES {
            if Some(node) != self.registry.leader && self.random.chance(30) {
                self.catch_up(node);
            }
            if self.random.chance(5) {
                self.registry.flush(node);
            }
        }
    }

    /// Hands commands to the leader's log; they are committed after a while, if the leader lasts.
    pub(super) fn propose(&mut self, commands: Vec<(Command, Origin)>) {
        let proposal = self.registry.propose(self.now, commands);
        let (term, ms) = (self.registry.term, self.random.between(1, 30));
        self.after(ms, Event::Commit { proposal, term });
    }

    fn commit(&mut self, proposal: u64, term: u64) {
        let Some(leader) = self.registry.leader.filter(|_| term == self.registry.term) else { return };
        // The log is ordered: what was proposed earlier is committed first.
        let numbers: Vec<u64> = self.registry.proposals.range(..=proposal).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(proposal) = self.registry.proposals.remove(&number) else { continue };
            let commands = self.registry.commit(proposal);
            let Some((replies, effects)) = self.apply_next(leader) else { continue };
            for ((command, origin), reply) in commands.into_iter().zip(replies) {
                self.note(|| format!("{} => {reply:?}", brief(&command)));
                self.answer(&command, origin, reply);
            }
            for effect in effects {
                self.send_effect(effect);
            }
        }
    }

    pub(super) fn catch_up(&mut self, node: usize) {
        while self.apply_next(node).is_some() {}
    }

    fn apply_next(&mut self, node: usize) -> Option<(Vec<Reply>, Vec<Effect>)> {
        let place = self.registry.applied(node);
        match self.registry.apply_next(node, place >= self.oracle.seen)? {
            Err(why) => {
                self.check(Err(format!("node {node}, entry {place}: {why}")));
                None
            }
            Ok((replies, applied)) => {
                if place >= self.oracle.seen {
                    let state = &self.registry.nodes[node].state;
                    let commands = match &self.registry.log[place] {
                        Entry::Commands(_, commands) => commands.as_slice(),
                        Entry::Voters(_) => &[],
                    };
                    let verdict = self.oracle.judge(state, commands, &replies, &applied, &self.hosts);
                    self.check(verdict);
                }
                Some((replies, applied.effects))
            }
        }
    }

    /// Tells whoever waits for a command's outcome.
    fn answer(&mut self, command: &Command, origin: Origin, reply: Reply) {
        match (origin, command) {
            (Origin::Nobody, _) => {}
            (Origin::Request { client, request }, _) => {
                if !self.random.chance(10) || self.healed {
                    let ms = self.random.between(1, 40);
                    self.after(ms, Event::Answer { client, request, reply });
                }
            }
            (Origin::Report { agent, session }, command) => {
                let (key, sealing) = match command {
                    Command::FinishAttempt(c) => (c.key.clone(), false),
                    Command::RecordImage(c) if matches!(reply, Reply::Rejected(_)) => (c.key.clone(), false),
                    Command::SealLog(c) => (c.key.clone(), true),
                    _ => return,
                };
                self.send_down(agent, session, Down::Answered { key, sealing, reply });
            }
            (Origin::Hello { agent, session, offered }, Command::RegisterWorker(c)) => {
                if matches!(reply, Reply::Done | Reply::Unchanged) {
                    self.open_session(agent, session, c, &offered);
                }
            }
            (Origin::Hello { .. }, _) => {}
        }
    }

    fn open_session(&mut self, agent: usize, session: u64, c: &cmd::RegisterWorker, offered: &[AttemptKey]) {
        let live = WorkerLiveness {
            instance: c.instance.clone(),
            session: SessionState::Open,
            last_seen: self.registry.time(self.now),
            pressure: String::new(),
            silent_ms: BTreeMap::new(),
        };
        self.registry.liveness.workers.insert(c.worker.clone(), live);
        self.sessions.insert(agent, session);
        let Some(state) = self.registry.state() else { return };
        let verdict = |key: &AttemptKey| (key.clone(), state.offered(key, &c.worker, &c.instance));
        let (offered, pending) = if self.bug == Some(Bug::ForgottenEffects) {
            (Vec::new(), Vec::new())
        } else {
            (offered.iter().map(verdict).collect(), state.pending_effects_for(&c.worker))
        };
        let held = state.worker(&c.worker).map(|worker| worker.held.clone()).unwrap_or_default();
        self.send_down(agent, session, Down::Welcome { offered, pending, held });
    }

    fn send_effect(&mut self, effect: Effect) {
        let worker = match &effect {
            Effect::SendAssignment { worker, .. }
            | Effect::SendCommit { worker, .. }
            | Effect::SendImages { worker, .. }
            | Effect::SendStop { worker, .. }
            | Effect::SendForget { worker, .. } => worker,
            Effect::BuildChanged(_)
            | Effect::LogSealed(_)
            | Effect::BuildPurged(_)
            | Effect::WorkerChanged(_)
            | Effect::NodeChanged => return,
        };
        let agent = self.agents.iter().position(|agent| agent.name == *worker);
        if let Some((agent, session)) = agent.and_then(|agent| Some((agent, *self.sessions.get(&agent)?))) {
            self.send_down(agent, session, Down::Effect(effect));
        }
    }
}

/// Times short enough that much happens in a minute.
fn policy() -> Policy {
    Policy {
        worker_lease_ms: 3_000,
        cancel_unverified_after_ms: 5_000,
        detach_for_ms: 5_000,
        infra_retries: 3,
        retry_backoff_ms: 100,
        timeout_default_ms: 30_000,
        timeout_grace_ms: 1_000,
        retain_builds: 15,
        quarantine_after: 2,
        quarantine_ms: 4_000,
        ..Policy::default()
    }
}

fn brief(command: &Command) -> String {
    let text = match command {
        Command::SubmitBuild(c) => return format!("submit {}", c.build),
        Command::RegisterWorker(c) => return format!("register {} {}", c.worker, c.instance),
        Command::FinishAttempt(c) => {
            return format!("finish {} by {} {}: {:?}", c.key, c.worker, c.instance, c.outcome);
        }
        command => format!("{command:?}"),
    };
    text.chars().take(160).collect()
}
