//! The coordinators: real cores over one simulated, ordered log, with a leader that changes.
//!
//! Consensus itself is not simulated: an entry is committed after a while, or lost with its leader; what a new leader finds
//! uncommitted it may commit or not. A node is the core's state, a store of rows behind it, and the part of the log that
//! it has not purged; one that is too far behind is given a snapshot.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::record::{Applied, RowChange, RowKey};
use helix_core::{Command, InFlight, Reply, State, invariants};
use helix_model::{AttemptKey, LogTime, NodeId};

use super::leader::Follow;
use super::random::Random;
use super::store::{Images, Rows, Store, change_row};

/// Coordinators in the cluster.
pub(super) const NODES: usize = 3;

/// What the log holds.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Voters(BTreeSet<NodeId>),
    Commands(LogTime, Vec<Command>),
}

/// Who waits for a command's outcome.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// The leader itself, or an operator who does not look back.
    Nobody,
    /// An agent's report, on this session.
    Report { agent: usize, session: u64, follow: Follow },
    /// An agent's introduction: the session is ready when the last of its commands is committed.
    Hello { agent: usize, session: u64, last: bool },
    /// A client's request.
    Request { client: usize, request: u64 },
}

#[derive(Debug)]
pub(super) struct Proposal {
    pub(super) at: LogTime,
    pub(super) commands: Vec<(Command, Origin)>,
}

pub(super) struct Node {
    /// Its number: a node whose disk was lost comes back under another.
    pub(super) id: NodeId,
    pub(super) state: State,
    /// All rows as applied.
    pub(super) rows: Rows,
    pub(super) up: bool,
    /// Whether it is a member again after its disk was lost.
    pub(super) joined: bool,
    /// How far its wall clock is off, in milliseconds ahead, since somebody set it.
    pub(super) wall_ahead_ms: u64,
    pub(super) store: Store,
    applied: usize,
    /// Changes that the store does not have yet.
    pending: Vec<RowChange>,
    /// How far its log time is ahead of others'.
    clock_ahead_ms: u64,
}

pub(super) struct Registry {
    pub(super) log: Vec<Entry>,
    pub(super) nodes: Vec<Node>,
    pub(super) leader: Option<usize>,
    /// The leader hears no peer: it takes what it is given, and commits nothing.
    pub(super) isolated: bool,
    pub(super) term: u64,
    pub(super) proposals: BTreeMap<u64, Proposal>,
    next_proposal: u64,
    next_node: u64,
}

/// What applying an entry did.
pub(super) struct Done {
    pub(super) replies: Vec<Reply>,
    pub(super) applied: Applied,
}

impl Registry {
    pub(super) fn new(random: &mut Random) -> Self {
        let nodes: Vec<Node> = (1..=NODES as u64).map(|id| Node::new(NodeId(id), random)).collect();
        Self {
            log: vec![Entry::Voters(nodes.iter().map(|node| node.id).collect())],
            nodes,
            leader: None,
            isolated: false,
            term: 0,
            proposals: BTreeMap::new(),
            next_proposal: 0,
            next_node: NODES as u64,
        }
    }

    /// The leader's state, which is ahead of all others.
    pub(super) fn state(&self) -> Option<&State> {
        self.leader.map(|leader| &self.nodes[leader].state)
    }

    /// The leader's rows.
    pub(super) fn rows(&self) -> Option<&Rows> {
        self.leader.map(|leader| &self.nodes[leader].rows)
    }

    pub(super) fn voters(&self) -> BTreeSet<NodeId> {
        self.nodes.iter().filter(|node| node.joined).map(|node| node.id).collect()
    }

    /// Whether a leader is there that a majority hears.
    pub(super) fn is_led(&self) -> bool {
        self.leader.is_some() && !self.isolated
    }

    /// Whether enough nodes run to commit anything.
    pub(super) fn has_quorum(&self) -> bool {
        let voters = self.nodes.iter().filter(|node| node.joined);
        voters.clone().filter(|node| node.up).count() * 2 > voters.count()
    }

    /// The time that the leader would stamp now.
    pub(super) fn time(&self, now: u64) -> LogTime {
        let Some(leader) = self.leader else { return LogTime(now) };
        let node = &self.nodes[leader];
        LogTime(now + node.clock_ahead_ms).max(node.state.last_at())
    }

    /// Takes commands for the log; answers the proposal's number.
    pub(super) fn propose(&mut self, now: u64, commands: Vec<(Command, Origin)>) -> u64 {
        self.next_proposal += 1;
        let at = self.time(now);
        self.proposals.insert(self.next_proposal, Proposal { at, commands });
        self.next_proposal
    }

    /// Appends a proposal to the log; it is for the caller to have it applied.
    pub(super) fn commit(&mut self, proposal: Proposal) -> Vec<(Command, Origin)> {
        let commands = proposal.commands.iter().map(|(command, _)| command.clone()).collect();
        self.log.push(Entry::Commands(proposal.at, commands));
        proposal.commands
    }

    /// Makes `node` the leader: it may commit the first of what is left of its predecessor, in order, and forgets the
    /// rest. How many proposals were lost.
    pub(super) fn elect(&mut self, node: usize, random: &mut Random) -> usize {
        let kept = random.below(self.proposals.len() + 1);
        let left = std::mem::take(&mut self.proposals);
        let lost = left.len() - kept;
        for proposal in left.into_values().take(kept) {
            self.commit(proposal);
        }
        self.leader = Some(node);
        self.term += 1;
        lost
    }

    /// Applies the next entry on a node; `None` when it has all. Invariants are checked by the first to apply an
    /// entry, and by everybody at times: the states are compared at the end.
    pub(super) fn apply_next(&mut self, node: usize, first: bool) -> Option<Result<Done, String>> {
        let node = &mut self.nodes[node];
        let entry = self.log.get(node.applied)?;
        let mut applied = Applied::default();
        let mut replies = Vec::new();
        match entry {
            Entry::Voters(voters) => node.state.apply_membership(voters.clone(), &mut applied),
            Entry::Commands(at, commands) => {
                replies.extend(commands.iter().map(|command| node.state.apply(*at, command, &mut applied)));
            }
        }
        node.state.finish_entry(&mut applied);
        node.applied += 1;
        applied.rows.iter().for_each(|change| change_row(&mut node.rows, change));
        node.pending.extend(applied.rows.iter().cloned());
        let checked = if first || node.applied.is_multiple_of(32) { invariants::check(&node.state) } else { Ok(()) };
        Some(checked.map(|()| Done { replies, applied }))
    }

    pub(super) fn applied(&self, node: usize) -> usize {
        self.nodes[node].applied
    }

    /// Whether the entry that the node needs next is no longer in anybody's log.
    pub(super) fn needs_snapshot(&self, node: usize) -> bool {
        let leader = self.leader.map(|leader| &self.nodes[leader]);
        leader.is_some_and(|leader| self.nodes[node].applied < leader.store.purged())
    }

    /// Gives a node the leader's newest snapshot.
    pub(super) fn install(&mut self, node: usize) -> Result<(), String> {
        let newest = self.leader.and_then(|leader| self.nodes[leader].store.snapshots.last()).cloned();
        let Some(snapshot) = newest else { return Ok(()) };
        self.nodes[node].store.install(snapshot);
        self.nodes[node].load(0, self.log.len())
    }

    /// Changes applied on the node reach its disk.
    pub(super) fn flush(&mut self, node: usize, images: Images) {
        let node = &mut self.nodes[node];
        let changes = std::mem::take(&mut node.pending);
        node.store.write(node.applied, &changes, images);
    }

    /// The node restarts from its disk, `skipping` entries that it should replay.
    pub(super) fn restart(&mut self, node: usize, skipping: usize) -> Result<(), String> {
        self.nodes[node].store.crash();
        self.nodes[node].load(skipping, self.log.len())
    }

    /// The node's rows are damaged: it restarts from its newest snapshot.
    pub(super) fn rebuild(&mut self, node: usize) -> Result<(), String> {
        self.nodes[node].store.rebuild();
        self.nodes[node].load(0, self.log.len())
    }

    /// The node's disk is gone. An empty one takes its place, under a new id, and is no member yet. The old id.
    pub(super) fn replace(&mut self, node: usize, random: &mut Random) -> NodeId {
        self.next_node += 1;
        let fresh = Node { joined: false, ..Node::new(NodeId(self.next_node), random) };
        std::mem::replace(&mut self.nodes[node], fresh).id
    }

    /// Commits the present voters.
    pub(super) fn commit_voters(&mut self) {
        self.log.push(Entry::Voters(self.voters()));
    }
}

impl Node {
    fn new(id: NodeId, random: &mut Random) -> Self {
        Self {
            id,
            state: State::default(),
            rows: Rows::new(),
            up: true,
            joined: true,
            wall_ahead_ms: 0,
            store: Store::default(),
            applied: 0,
            pending: Vec::new(),
            clock_ahead_ms: random.between(0, 2_000),
        }
    }

    /// For a node whose retention deletes what runs.
    pub(super) fn lose_oldest_open(&mut self) {
        let oldest = self.state.open_builds().last().map(|build| build.id.clone());
        let gone = oldest.map(|id| RowChange::Delete(RowKey::Build(id)));
        if let Some(change) = gone {
            change_row(&mut self.rows, &change);
            self.pending.push(change);
        }
    }

    fn load(&mut self, skipping: usize, last: usize) -> Result<(), String> {
        self.rows.clone_from(&self.store.rows);
        self.state = State::load(self.rows.values().cloned()).map_err(|error| error.to_string())?;
        self.applied = (self.store.applied + skipping).min(last);
        self.pending.clear();
        Ok(())
    }
}

/// Marks what the leader's own command concerns as under way, or as no longer.
pub(super) fn mark(flight: &mut InFlight, command: &Command, under_way: bool) {
    match command {
        Command::AssignTask(c) if under_way => {
            flight.assigning.insert((c.key.build.clone(), c.key.task), c.worker.clone());
        }
        Command::AssignTask(c) => {
            flight.assigning.remove(&(c.key.build.clone(), c.key.task));
        }
        Command::ExpireAttempt(c) => mark_one::<AttemptKey>(&mut flight.attempts, &c.key, under_way),
        Command::EndUnverified(c) => mark_one(&mut flight.attempts, &c.key, under_way),
        Command::ProbeWorker(c) => mark_one(&mut flight.workers, &c.worker, under_way),
        Command::LoseWorker(c) => mark_one(&mut flight.workers, &c.worker, under_way),
        Command::PurgeBuilds(c) => c.builds.iter().for_each(|id| mark_one(&mut flight.purging, id, under_way)),
        Command::ExpireBytes(c) => {
            c.builds.iter().for_each(|id| mark_one(&mut flight.letting_go, &(id.clone(), c.kept), under_way));
        }
        Command::ExpireTombstones(c) => c.builds.iter().for_each(|id| mark_one(&mut flight.expiring, id, under_way)),
        _ => {}
    }
}

fn mark_one<T: Ord + Clone>(set: &mut BTreeSet<T>, value: &T, under_way: bool) {
    if under_way {
        set.insert(value.clone());
    } else {
        set.remove(value);
    }
}
