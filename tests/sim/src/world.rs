//! The virtual clock, the events, and what ties coordinators, agents, hosts and clients together.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::Command;
use helix_model::{AttemptKey, Digest, NodeId};

use super::agent::Agent;
use super::attempt::Step;
use super::blobs::{Copies, Put};
use super::client::{Answered, CLIENTS, Client, Op};
use super::host::Host;
use super::leader::Leading;
use super::oracle::Oracle;
use super::random::Random;
use super::registry::{NODES, Origin, Registry};
use super::session::{Down, Up};
use super::trace::{Keep, Line, Trace};
use super::{Bug, Summary};

/// How long things go wrong.
const CHAOS_MS: u64 = 60_000;

/// How long the healed cluster may take to end everything.
const PATIENCE_MS: u64 = 400_000;

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub(super) enum Event {
    LeaderTick(u64),
    Commit {
        proposal: u64,
        term: u64,
    },
    Elect,
    /// An isolated leader of this term learns that it leads no more.
    Deposed(u64),
    NodeStart(usize),
    NodeJoins(usize),
    Up {
        agent: usize,
        message: Up,
    },
    Down {
        agent: usize,
        session: u64,
        message: Down,
    },
    Closed {
        agent: usize,
        session: u64,
    },
    AgentTick(usize),
    AgentStart(usize),
    DetachTimedOut {
        agent: usize,
        life: u64,
    },
    Step {
        agent: usize,
        life: u64,
        key: AttemptKey,
        step: Step,
    },
    Exit {
        host: usize,
        boot: u64,
        key: AttemptKey,
    },
    Killed {
        host: usize,
        boot: u64,
        key: AttemptKey,
    },
    Put {
        node: usize,
        put: Put,
    },
    Synced {
        node: usize,
        boot: u64,
        digest: Digest,
    },
    Stored {
        put: Put,
        holder: NodeId,
    },
    Collect(usize),
    Repair,
    Repaired {
        term: u64,
        lost: u64,
        digests: BTreeSet<Digest>,
    },
    ClientTick(usize),
    Request {
        client: usize,
        request: u64,
        op: Op,
    },
    Answer {
        client: usize,
        request: u64,
        answer: Answered,
    },
    /// A forgetful leader remembers what it acknowledged.
    Remembered {
        term: u64,
        command: Box<Command>,
    },
    Fault,
    Heal,
    Tend,
}

pub(super) struct World {
    pub(super) bug: Option<Bug>,
    pub(super) now: u64,
    pub(super) random: Random,
    events: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    pub(super) registry: Registry,
    pub(super) leading: Leading,
    pub(super) agents: Vec<Agent>,
    pub(super) hosts: Vec<Host>,
    pub(super) clients: Vec<Client>,
    pub(super) blobs: Copies,
    pub(super) oracle: Oracle,
    pub(super) healed: bool,
    pub(super) trace: Trace,
    pub(super) wrong: Option<String>,
}

/// How a run ended.
pub(super) struct Outcome {
    pub(super) summary: Summary,
    pub(super) at_ms: u64,
    pub(super) wrong: Option<String>,
    pub(super) lines: Vec<Line>,
}

impl World {
    pub(super) fn new(seed: u64, bug: Option<Bug>, keep: Keep) -> Self {
        let mut random = Random::new(seed);
        let registry = Registry::new(&mut random);
        let agents: Vec<Agent> = (0..2 + random.below(5)).map(|number| Agent::new(number, &mut random)).collect();
        let hosts = (0..agents.len()).map(|number| Host::new(number, &mut random)).collect();
        let clients = (0..CLIENTS).map(|number| Client::new(number, &mut random)).collect();
        Self {
            bug,
            now: 0,
            random,
            events: BTreeMap::new(),
            next_event: 0,
            registry,
            leading: Leading::default(),
            agents,
            hosts,
            clients,
            blobs: Copies::new(),
            oracle: Oracle::default(),
            healed: false,
            trace: Trace::new(keep),
            wrong: None,
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        self.at(0, Event::Elect);
        self.at(100, Event::Fault);
        self.at(CHAOS_MS, Event::Heal);
        self.at(1_000, Event::Repair);
        for agent in 0..self.agents.len() {
            self.at(agent as u64, Event::AgentTick(agent));
        }
        for node in 0..NODES {
            self.at(700 * node as u64, Event::Collect(node));
        }
        for client in 0..self.clients.len() {
            self.at(500 + client as u64, Event::ClientTick(client));
        }
        while self.now < CHAOS_MS + PATIENCE_MS && self.wrong.is_none() && !self.is_over() {
            let Some(((time, number), event)) = self.events.pop_first() else { break };
            self.now = time;
            self.trace.fold([time, number, self.random.place()]);
            self.handle(event);
        }
        self.end();
        self.oracle.summary.digest = self.trace.digest();
        Outcome { summary: self.oracle.summary, at_ms: self.now, wrong: self.wrong, lines: self.trace.into_lines() }
    }

    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.events.insert((time, self.next_event), event);
    }

    pub(super) fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
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
            && self.registry.nodes.iter().all(|node| node.up && node.joined)
            && self.blobs.may_lose_one()
            && self.agents.iter().all(|agent| agent.owed().is_none())
            && self.registry.state().is_some_and(ended)
    }

    fn end(&mut self) {
        if self.wrong.is_some() {
            return;
        }
        for node in 0..NODES {
            self.catch_up(node);
        }
        if let Some((agent, key)) = self.agents.iter().find_map(|agent| Some((&agent.name, agent.owed()?))) {
            let why = format!("{agent} still has {key}, and nobody tells it to forget it");
            return self.check(Err(why));
        }
        let Some(leader) = self.registry.leader else { return self.check(Err("there is no leader".to_owned())) };
        let node = &self.registry.nodes[leader];
        let verdict = self.oracle.judge_end(&node.state, &node.rows, &self.blobs);
        self.check(verdict);
        let first = &self.registry.nodes[0];
        let differs = self.registry.nodes.iter().any(|node| node.state != first.state || node.rows != first.rows);
        if differs {
            return self.check(Err("coordinators disagree after applying the same log".to_owned()));
        }
        self.oracle.summary.blobs = self.count_held() as u64;
        let now = self.now;
        self.trace.note(now, format_args!("the end: {:?}", self.registry.nodes[0].rows));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::LeaderTick(term) => self.leader_tick(term),
            Event::Commit { proposal, term } => self.commit(proposal, term),
            Event::Elect => self.elect(),
            Event::Deposed(term) => self.deposed(term),
            Event::NodeStart(node) => self.start_node(node),
            Event::NodeJoins(node) => self.join_node(node),
            Event::Up { agent, message } => self.hear_agent(agent, message),
            Event::Down { agent, session, message } => self.agent_hears(agent, session, message),
            Event::Closed { agent, session } => self.closed(agent, session),
            Event::AgentTick(agent) => self.agent_tick(agent),
            Event::AgentStart(agent) => self.agent_start(agent),
            Event::DetachTimedOut { agent, life } => self.detach_timed_out(agent, life),
            Event::Step { agent, life, key, step } => self.steps(agent, life, &key, step),
            Event::Exit { host, boot, key } => self.process_exits(host, boot, &key),
            Event::Killed { host, boot, key } => self.process_dies(host, boot, &key),
            Event::Put { node, put } => self.put_arrives(node, put),
            Event::Synced { node, boot, digest } => self.synced(node, boot, digest),
            Event::Stored { put, holder } => self.stored(&put, holder),
            Event::Collect(node) => self.collect(node),
            Event::Repair => self.repair(),
            Event::Repaired { term, lost, digests } => self.repaired(term, lost, digests),
            Event::ClientTick(client) => self.client_tick(client),
            Event::Request { client, request, op } => self.hear_client(client, request, &op),
            Event::Answer { client, request, answer } => self.client_hears(client, request, &answer),
            Event::Remembered { term, command } => {
                if self.registry.leader.is_some() && self.registry.term == term {
                    self.propose(vec![(*command, Origin::Nobody)]);
                }
            }
            Event::Fault => self.fault(),
            Event::Heal => self.heal(),
            Event::Tend => self.tend(),
        }
    }

    fn detach_timed_out(&mut self, agent: usize, life: u64) {
        if self.agents[agent].life == life {
            self.take(agent, helix_agent_core::Event::DetachTimedOut);
        }
    }
}
