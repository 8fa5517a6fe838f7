//! The coordinators: real cores over one simulated, ordered log, with a leader that changes.
//!
//! Consensus itself is not simulated: an entry is committed after a while, or lost with its leader; what a new leader finds
//! uncommitted it may commit or not. A node is the core's state, and the rows that it would have stored.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::record::{Applied, Row, RowChange, RowKey};
use helix_core::{Command, InFlight, Liveness, Reply, State, invariants};
use helix_model::{LogTime, NodeId};

use super::random::Random;

/// Coordinators in the cluster.
pub(super) const NODES: usize = 3;

/// What the log holds.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Voters(BTreeSet<NodeId>),
    Commands(LogTime, Vec<Command>),
}

/// Who waits for a command's outcome.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Origin {
    /// The leader itself, or an operator who does not look back.
    Nobody,
    /// An agent, on this session.
    Report { agent: usize, session: u64 },
    /// An agent's introduction: the session opens when it is committed.
    Hello { agent: usize, session: u64, offered: Vec<helix_model::AttemptKey> },
    /// A client's request.
    Request { client: usize, request: u64 },
}

#[derive(Debug)]
pub(super) struct Proposal {
    pub(super) at: LogTime,
    pub(super) commands: Vec<(Command, Origin)>,
}

pub(super) struct Node {
    pub(super) state: State,
    applied: usize,
    rows: BTreeMap<RowKey, Row>,
    /// Rows as they were at an earlier entry: what a restart finds.
    stored: (usize, BTreeMap<RowKey, Row>),
    /// How far its clock is off, in milliseconds ahead.
    clock_ahead_ms: u64,
}

pub(super) struct Registry {
    pub(super) log: Vec<Entry>,
    pub(super) nodes: Vec<Node>,
    pub(super) leader: Option<usize>,
    pub(super) term: u64,
    pub(super) liveness: Liveness,
    pub(super) in_flight: InFlight,
    pub(super) proposals: BTreeMap<u64, Proposal>,
    next_proposal: u64,
}

impl Registry {
    pub(super) fn new(random: &mut Random) -> Self {
        let node = |random: &mut Random| Node {
            state: State::default(),
            applied: 0,
            rows: BTreeMap::new(),
            stored: (0, BTreeMap::new()),
            clock_ahead_ms: random.between(0, 2_000),
        };
        let voters = (1..=NODES as u64).map(NodeId).collect();
        Self {
            log: vec![Entry::Voters(voters)],
            nodes: (0..NODES).map(|_| node(random)).collect(),
            leader: None,
            term: 0,
            liveness: Liveness::default(),
            in_flight: InFlight::default(),
            proposals: BTreeMap::new(),
            next_proposal: 0,
        }
    }

    /// The leader's state, which is ahead of all others.
    pub(super) fn state(&self) -> Option<&State> {
        self.leader.map(|leader| &self.nodes[leader].state)
    }

    /// The time that the leader would stamp now.
    pub(super) fn time(&self, now: u64) -> LogTime {
        let Some(leader) = self.leader else { return LogTime(now) };
        let node = &self.nodes[leader];
        LogTime(now + node.clock_ahead_ms).max(node.state.last_at())
    }

    /// Takes commands for the log; answers the proposal's number. They are under way until committed.
    pub(super) fn propose(&mut self, now: u64, commands: Vec<(Command, Origin)>) -> u64 {
        for (command, _) in &commands {
            self.mark(command, true);
        }
        self.next_proposal += 1;
        let at = self.time(now);
        self.proposals.insert(self.next_proposal, Proposal { at, commands });
        self.next_proposal
    }

    /// Appends a proposal to the log; it is for the caller to have it applied.
    pub(super) fn commit(&mut self, proposal: Proposal) -> Vec<(Command, Origin)> {
        for (command, _) in &proposal.commands {
            self.mark(command, false);
        }
        let commands = proposal.commands.iter().map(|(command, _)| command.clone()).collect();
        self.log.push(Entry::Commands(proposal.at, commands));
        proposal.commands
    }

    fn mark(&mut self, command: &Command, under_way: bool) {
        let flight = &mut self.in_flight;
        match command {
            Command::AssignTask(c) if under_way => {
                flight.assigning.insert((c.key.build.clone(), c.key.task), c.worker.clone());
            }
            Command::AssignTask(c) => {
                flight.assigning.remove(&(c.key.build.clone(), c.key.task));
            }
            Command::ExpireAttempt(helix_core::command::ExpireAttempt { key, .. })
            | Command::EndUnverified(helix_core::command::EndUnverified { key }) => {
                mark(&mut flight.attempts, key, under_way);
            }
            Command::ProbeWorker(c) => mark(&mut flight.workers, &c.worker, under_way),
            Command::LoseWorker(c) => mark(&mut flight.workers, &c.worker, under_way),
            Command::PurgeBuilds(c) => c.builds.iter().for_each(|id| mark(&mut flight.purging, id, under_way)),
            Command::ExpireTombstones(c) => c.builds.iter().for_each(|id| mark(&mut flight.expiring, id, under_way)),
            _ => {}
        }
    }

    /// Makes `node` the leader: it may commit the first of what is left of its predecessor, in order, and forgets the rest.
    pub(super) fn elect(&mut self, node: usize, random: &mut Random) {
        let kept = random.below(self.proposals.len() + 1);
        let left = std::mem::take(&mut self.proposals);
        self.in_flight = InFlight::default();
        for proposal in left.into_values().take(kept) {
            self.commit(proposal);
        }
        self.leader = Some(node);
        self.term += 1;
    }

    /// Applies the next entry on `node`; `None` when it has all. Invariants are checked by the first to apply an
    /// entry, and by everybody at times: the states are compared at the end.
    pub(super) fn apply_next(&mut self, node: usize, first: bool) -> Option<Result<(Vec<Reply>, Applied), String>> {
        let node = &mut self.nodes[node];
        let entry = self.log.get(node.applied)?;
        let mut out = Applied::default();
        let mut replies = Vec::new();
        match entry {
            Entry::Voters(voters) => node.state.apply_membership(voters.clone(), &mut out),
            Entry::Commands(at, commands) => {
                replies.extend(commands.iter().map(|command| node.state.apply(*at, command, &mut out)));
            }
        }
        node.state.finish_entry(&mut out);
        node.applied += 1;
        store(&mut node.rows, &out.rows);
        let checked = if first || node.applied.is_multiple_of(16) { invariants::check(&node.state) } else { Ok(()) };
        Some(checked.map(|()| (replies, out)))
    }

    pub(super) fn applied(&self, node: usize) -> usize {
        self.nodes[node].applied
    }

    /// The node's rows reach its disk.
    pub(super) fn flush(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.stored = (node.applied, node.rows.clone());
    }

    /// The node restarts from its disk, `skipping` entries that it should replay.
    pub(super) fn restart(&mut self, node: usize, skipping: usize) -> Result<(), String> {
        let last = self.log.len();
        let node = &mut self.nodes[node];
        let (applied, rows) = node.stored.clone();
        node.state = State::load(rows.values().cloned()).map_err(|error| error.to_string())?;
        node.applied = (applied + skipping).min(last);
        node.rows = rows;
        Ok(())
    }
}

fn mark<T: Ord + Clone>(set: &mut BTreeSet<T>, value: &T, under_way: bool) {
    if under_way {
        set.insert(value.clone());
    } else {
        set.remove(value);
    }
}

fn store(rows: &mut BTreeMap<RowKey, Row>, changes: &[RowChange]) {
    for change in changes {
        match change {
            RowChange::Put(row) => {
                rows.insert(row.key(), row.clone());
            }
            RowChange::Delete(key) => {
                rows.remove(key);
            }
            RowChange::DeleteAddenda(build) => {
                rows.retain(|key, _| !matches!(key, RowKey::Addendum(attempt, _) if attempt.build == *build));
            }
        }
    }
}
