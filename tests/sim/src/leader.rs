//! What a node does while it leads, and what consensus does with what it proposes: elections, ticks, commits, answers.

use std::collections::BTreeMap;

use helix_core::command::{self as cmd, Command};
use helix_core::record::{Policy, Standing};
use helix_core::{InFlight, Liveness, Reply, due, schedule};
use helix_model::{AttemptKey, LogTime, WorkerName};

use super::Bug;
use super::client::Answered;
use super::registry::{Entry, NODES, Origin, mark};
use super::session::{Session, Subject};
use super::store::Images;
use super::world::{Event, World};

/// How far behind the leader may leave what it does by itself, in virtual milliseconds.
const TICK_MS: u64 = 50;

/// One term of leading: fresh with each, gone with its end.
#[derive(Default)]
pub(super) struct Leading {
    pub(super) liveness: Liveness,
    pub(super) in_flight: InFlight,
    pub(super) sessions: BTreeMap<usize, Session>,
    /// When the leader began, and when it heard each agent, by the one clock that is never set.
    pub(super) since: u64,
    pub(super) heard: BTreeMap<usize, u64>,
}

/// What becomes of a report once its command's fate is known.
#[derive(Clone, Debug)]
pub(super) enum Follow {
    /// A refusal means that nobody wants the attempt.
    Unwanted(Subject, AttemptKey),
    Finished(Subject, Box<cmd::FinishAttempt>),
    Sealed(Subject, AttemptKey),
    Released(Subject, AttemptKey),
    Detached(Subject),
    Left(Subject),
}

impl World {
    pub(super) fn elect(&mut self) {
        let able = |node: &usize| self.registry.nodes[*node].up && self.registry.nodes[*node].joined;
        let able: Vec<usize> = (0..NODES).filter(able).collect();
        if !self.registry.has_quorum() || able.is_empty() {
            return self.after(200, Event::Elect);
        }
        let node = able[self.random.below(able.len())];
        let lost = self.registry.elect(node, &mut self.random);
        let (id, term) = (self.registry.nodes[node].id, self.registry.term);
        self.oracle.summary.terms += 1;
        self.oracle.summary.lost_proposals += lost as u64;
        self.trace.note(
            self.now,
            format_args!("node {id} leads (term {term}); {lost} proposals of the leader before are lost"),
        );
        // What is left of its predecessor it applies before it acts, unless it leads on in the term of its former life.
        if self.bug != Some(Bug::LedBehind) {
            self.catch_up(node);
        }
        let early = self.bug == Some(Bug::LostAfterFailover);
        let leader_since = if early { LogTime(0) } else { self.registry.time(self.now) };
        let liveness = Liveness { leader_since, ..Liveness::default() };
        self.leading = Leading { liveness, since: self.now, ..Leading::default() };
        let verdict = self.registry.state().map_or(Ok(()), |state| self.oracle.judge_leader(state));
        self.check(verdict);
        if term == 1 {
            let policy = self.policy();
            self.propose(vec![(Command::SetPolicy(cmd::SetPolicy { policy, expected: None }), Origin::Nobody)]);
            (0..NODES).for_each(|node| self.register_node(node));
        }
        self.after(10, Event::LeaderTick(term));
    }

    /// A coordinator makes itself known.
    pub(super) fn register_node(&mut self, node: usize) {
        let node = self.registry.nodes[node].id;
        let (grpc, version) = (format!("https://node{node}:1"), "1".to_owned());
        let register = cmd::RegisterNode { node, epoch: node.0, grpc, version, format: 1 };
        self.propose(vec![(Command::RegisterNode(register), Origin::Nobody)]);
    }

    /// The leader is gone; another one is elected some time later.
    pub(super) fn fell_leader(&mut self) {
        if let Some(leader) = self.registry.leader.take() {
            self.registry.isolated = false;
            let id = self.registry.nodes[leader].id;
            self.trace.note(self.now, format_args!("the leader, node {id}, is gone"));
            self.leading = Leading::default();
            let ms = self.random.between(50, 2_000);
            self.after(ms, Event::Elect);
        }
    }

    /// The leader loses its peers, and does not know it for a while: others talk to it, and nothing comes of it.
    pub(super) fn isolate_leader(&mut self) {
        if let Some(leader) = self.registry.leader.filter(|_| !self.registry.isolated) {
            let id = self.registry.nodes[leader].id;
            self.trace.note(self.now, format_args!("the leader, node {id}, hears its peers no more"));
            self.registry.isolated = true;
            let (term, ms) = (self.registry.term, self.random.between(100, 2_000));
            self.after(ms, Event::Deposed(term));
        }
    }

    pub(super) fn deposed(&mut self, term: u64) {
        if term == self.registry.term {
            self.fell_leader();
        }
    }

    pub(super) fn leader_tick(&mut self, term: u64) {
        if term != self.registry.term {
            return;
        }
        let Some(leader) = self.registry.leader else { return };
        self.after(TICK_MS, Event::LeaderTick(term));
        let time = self.registry.time(self.now);
        self.mark_late(time);
        let state = &self.registry.nodes[leader].state;
        let leading = &mut self.leading;
        leading.liveness.brake = due::brake(state, &leading.liveness, time);
        leading.liveness.claims = schedule::claims(state, &leading.liveness, time);
        self.oracle.summary.claims += u64::from(!leading.liveness.claims.is_empty());
        let overdue = super::oracle::overdue_probe(state, time);
        let wall = self.registry.nodes[leader].wall_ahead_ms;
        let looked = if self.bug == Some(Bug::WallClockLease) { time.plus_ms(wall) } else { time };
        let mut commands = due::due(state, &leading.in_flight, &leading.liveness, looked);
        if self.bug == Some(Bug::NeverProbed) {
            commands.retain(|command| !matches!(command, Command::ProbeWorker(_)));
        }
        let assignments = schedule::schedule(state, &leading.in_flight, &leading.liveness, time, 5);
        commands.extend(self.within_memory(assignments));
        self.propose_own(commands);
        self.check(overdue);
        self.look_after_nodes(leader);
    }

    /// Followers catch up, rows reach disks, snapshots are walked: each in its own time.
    fn look_after_nodes(&mut self, leader: usize) {
        let images = if self.bug == Some(Bug::UnsavedImage) { Images::Forgotten } else { Images::Saved };
        for node in 0..NODES {
            if !self.registry.nodes[node].up {
                continue;
            }
            if node != leader && !self.registry.isolated && self.random.chance(30) {
                self.catch_up(node);
            }
            if self.random.chance(8) {
                self.registry.flush(node, images);
            }
            if self.random.chance(40) && self.registry.nodes[node].store.walk(4) {
                self.oracle.summary.snapshots += 1;
            }
        }
    }

    /// The leader proposes what it found to be due.
    pub(super) fn propose_own(&mut self, commands: Vec<Command>) {
        if !commands.is_empty() {
            self.judge_losses(&commands);
            self.send_early(&commands);
            self.propose(commands.into_iter().map(|command| (command, Origin::Nobody)).collect());
        }
    }

    /// A loss needs a whole lease of silence towards this leader.
    fn judge_losses(&mut self, commands: &[Command]) {
        for command in commands {
            let Command::LoseWorker(c) = command else { continue };
            let Some(state) = self.registry.state() else { return };
            let detached = state.worker(&c.worker).is_some_and(|row| matches!(row.standing, Standing::Detached { .. }));
            let agent = self.agents.iter().position(|agent| agent.name == c.worker);
            let heard = agent.and_then(|agent| self.leading.heard.get(&agent)).copied().unwrap_or(0);
            let silent = self.now - heard.max(self.leading.since);
            if !detached && silent < state.policy().worker_lease_ms {
                let why = format!("worker {} is to be declared lost after {silent} ms of silence", c.worker);
                self.check(Err(why));
            }
        }
    }

    /// For a leader that sends before it has committed.
    fn send_early(&mut self, commands: &[Command]) {
        if self.bug != Some(Bug::AssignBeforeCommit) {
            return;
        }
        let Some(state) = self.registry.state() else { return };
        let mut early = Vec::new();
        for command in commands {
            let Command::AssignTask(c) = command else { continue };
            let Some(helix_core::Known::Open(build)) = state.build(&c.key.build) else { continue };
            let assignment = helix_agent_core::Assignment {
                key: c.key.clone(),
                spec: (*build.spec).clone(),
                commit: build.commit.clone(),
                platform: build.task(c.key.task).and_then(|task| task.platform.clone()),
                previous: String::new(),
            };
            early.push((c.worker.clone(), helix_agent_core::Order::Assign(Box::new(assignment))));
        }
        for (worker, order) in early {
            let agent = self.agents.iter().position(|agent| agent.name == worker);
            let open = agent.and_then(|agent| Some((agent, self.leading.sessions.get(&agent)?.number)));
            if let Some((agent, session)) = open {
                self.send_down(agent, session, super::session::Down::Order(order));
            }
        }
    }

    /// For a leader that counts room by what it assigned itself.
    fn within_memory(&self, mut commands: Vec<Command>) -> Vec<Command> {
        let Some(state) = self.registry.state().filter(|_| self.bug == Some(Bug::CapacityFromMemory)) else {
            return commands;
        };
        let since = self.leading.liveness.leader_since;
        let mut given: BTreeMap<WorkerName, u32> = BTreeMap::new();
        for worker in self.leading.in_flight.assigning.values() {
            *given.entry(worker.clone()).or_default() += 1;
        }
        commands.retain(|command| {
            let Command::AssignTask(c) = command else { return true };
            let own =
                |key: &&AttemptKey| state.running_attempt(key).is_some_and(|attempt| attempt.assigned_at >= since);
            let own = state.running_on(&c.worker).filter(own).count() as u32;
            let (given, capacity) = (given.entry(c.worker.clone()).or_default(), self.oracle.capacities.get(&c.worker));
            let room = capacity.is_some_and(|(now, _)| own + *given < *now);
            *given += u32::from(room);
            room
        });
        commands
    }

    /// Hands commands to the leader's log; they are committed after a while, if the leader lasts.
    pub(super) fn propose(&mut self, mut commands: Vec<(Command, Origin)>) {
        for (command, origin) in &mut commands {
            self.sabotage(command, origin);
            mark(&mut self.leading.in_flight, command, true);
        }
        let proposal = self.registry.propose(self.now, commands);
        let (term, ms) = (self.registry.term, self.random.between(1, 30));
        self.after(ms, Event::Commit { proposal, term });
    }

    pub(super) fn commit(&mut self, proposal: u64, term: u64) {
        let Some(leader) = self.registry.leader.filter(|_| term == self.registry.term && !self.registry.isolated)
        else {
            return;
        };
        // The log is ordered: what was proposed earlier is committed first.
        let numbers: Vec<u64> = self.registry.proposals.range(..=proposal).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(proposal) = self.registry.proposals.remove(&number) else { continue };
            let commands = self.registry.commit(proposal);
            for (command, _) in &commands {
                mark(&mut self.leading.in_flight, command, false);
            }
            self.catch_up_to_commit(leader, commands);
        }
    }

    fn catch_up_to_commit(&mut self, leader: usize, commands: Vec<(Command, Origin)>) {
        // Entries of consensus itself may stand before it.
        let mut last = None;
        while let Some(done) = self.apply_next(leader) {
            last = Some(done);
        }
        let Some((replies, effects)) = last else { return };
        for ((_, origin), reply) in commands.into_iter().zip(replies) {
            self.answer(origin, reply);
        }
        self.on_effects(&effects);
    }

    pub(super) fn catch_up(&mut self, node: usize) {
        if self.registry.needs_snapshot(node) {
            let id = self.registry.nodes[node].id;
            self.trace.note(self.now, format_args!("node {id} is too far behind the log and installs a snapshot"));
            self.oracle.summary.installs += 1;
            let installed = self.registry.install(node);
            self.check(installed);
        }
        while self.apply_next(node).is_some() {}
    }

    fn apply_next(&mut self, node: usize) -> Option<(Vec<Reply>, Vec<helix_core::Effect>)> {
        let place = self.registry.applied(node);
        let first = place >= self.oracle.seen;
        let done = match self.registry.apply_next(node, first)? {
            Ok(done) => done,
            Err(why) => {
                let id = self.registry.nodes[node].id;
                self.check(Err(format!("node {id}, entry {place}: {why}")));
                return None;
            }
        };
        let Entry::Commands(at, commands) = &self.registry.log[place] else {
            self.oracle.seen = self.oracle.seen.max(place + 1);
            return Some((Vec::new(), done.applied.effects));
        };
        if self.bug == Some(Bug::PurgedRunning) && commands.iter().any(|c| matches!(c, Command::PurgeBuilds(_))) {
            self.registry.nodes[node].lose_oldest_open();
        }
        if first {
            for (command, reply) in commands.iter().zip(&done.replies) {
                let now = self.now;
                self.trace
                    .note(now, format_args!("the registry commits at {at}: {}", super::words::told(command, reply)));
            }
            let node = &self.registry.nodes[node];
            let verdict = self.oracle.judge(&node.state, commands, &done.replies, &done.applied, &self.hosts);
            let verdict = verdict.and_then(|()| self.oracle.judge_bytes(&done.applied, &self.blobs));
            self.check(verdict);
        }
        Some((done.replies, done.applied.effects))
    }

    /// Tells whoever waits for a command's outcome.
    fn answer(&mut self, origin: Origin, reply: Reply) {
        match origin {
            Origin::Nobody => {}
            Origin::Request { client, request } => self.answer_client(client, request, Answered::Reply(reply)),
            Origin::Report { agent, session, follow } => self.follow(agent, session, follow, &reply),
            Origin::Hello { agent, session, last } => self.introduced(agent, session, last, &reply),
        }
    }

    /// Times short enough that much happens in a minute.
    fn policy(&self) -> Policy {
        Policy {
            worker_lease_ms: 3_000,
            cancel_unverified_after_ms: 5_000,
            detach_for_ms: 5_000,
            infra_retries: 3,
            retry_backoff_ms: 100,
            timeout_default_ms: 30_000,
            timeout_grace_ms: 1_000,
            store_deadline_ms: 20_000,
            retain_builds: 8,
            retain_logs_ms: 12_000,
            retain_artifacts_ms: 6_000,
            tombstone_ms: if self.bug == Some(Bug::ShortTombstone) { 0 } else { Policy::default().tombstone_ms },
            quarantine_after: 2,
            quarantine_ms: 4_000,
            ..Policy::default()
        }
    }
}
