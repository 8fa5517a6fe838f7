//! What goes wrong, and the healing.

use helix_core::command::{self as cmd, Command};
use helix_core::record::DrainedBy;
use helix_model::AttemptKey;

use super::Bug;
use super::registry::{NODES, Origin};
use super::world::{Event, World};

/// Between two rounds of an operator who boots hosts that nobody can prove clean.
const TEND_EVERY_MS: u64 = 5_000;

impl World {
    /// One fault, and the next one some time later.
    pub(super) fn fault(&mut self) {
        if self.healed {
            return;
        }
        let ms = self.random.between(200, 4_000);
        self.after(ms, Event::Fault);
        let agent = self.random.below(self.agents.len());
        let node = self.random.below(NODES);
        match self.random.below(20) {
            0 => self.fell_leader(),
            1 => self.isolate_leader(),
            2..5 => self.crash_node(node),
            5 => self.lose_disk(node),
            6 => self.set_clock(node),
            7 => self.crash_agent(agent),
            8 => self.reboot_host(agent),
            9 => self.wipe_agent(agent),
            10 | 11 => self.cut_off(agent),
            12 => self.ask_agent_to_go(agent),
            13 => self.operate(agent),
            14..17 => self.kill_runner(agent),
            17 => {
                self.agents[agent].capacity = self.random.between(1, 3) as u32;
                self.trace.note(self.now, format_args!("w{agent} is configured anew"));
                self.disconnect(agent);
            }
            _ => {
                self.trace.note(self.now, format_args!("the connection of w{agent} breaks"));
                self.disconnect(agent);
            }
        }
    }

    /// A coordinator crashes: it starts from what its disk has, soon, or much later.
    fn crash_node(&mut self, node: usize) {
        if !self.registry.nodes[node].up || !self.registry.nodes[node].joined {
            return;
        }
        let id = self.registry.nodes[node].id;
        self.trace.note(self.now, format_args!("node {id} crashes"));
        self.registry.nodes[node].up = false;
        if self.registry.leader == Some(node) || !self.registry.has_quorum() {
            self.fell_leader();
        }
        let long = self.random.chance(30);
        let ms = if long { self.random.between(4_000, 15_000) } else { self.random.between(1, 1_500) };
        self.after(ms, Event::NodeStart(node));
    }

    pub(super) fn start_node(&mut self, node: usize) {
        let rebuilt = self.random.chance(15);
        let id = self.registry.nodes[node].id;
        let how = if rebuilt { "whose rows are damaged: it begins from its snapshot" } else { "from its rows" };
        self.trace.note(self.now, format_args!("node {id} starts, {how}"));
        self.registry.nodes[node].up = true;
        let skipping = usize::from(self.bug == Some(Bug::SkippedEntry));
        let started = if rebuilt { self.registry.rebuild(node) } else { self.registry.restart(node, skipping) };
        self.check(started);
        self.blobs_restart(node);
    }

    /// A coordinator's blobs are lost, or all that it has. There is never a second such loss before all copies were looked
    /// after: nobody promises more.
    fn lose_disk(&mut self, node: usize) {
        let whole = self.registry.nodes.iter().all(|node| node.up && node.joined);
        if !whole || !self.registry.is_led() || !self.blobs.may_lose_one() {
            return;
        }
        let id = self.registry.nodes[node].id;
        if self.random.chance(50) || self.registry.leader == Some(node) {
            self.trace.note(self.now, format_args!("the blobs of node {id} are lost"));
            return self.lose_blobs(node);
        }
        self.trace.note(self.now, format_args!("the disk of node {id} is lost; another node is to take its place"));
        self.lose_blobs(node);
        let old = self.registry.replace(node, &mut self.random);
        self.oracle.summary.replaced += 1;
        self.registry.commit_voters();
        self.propose(vec![(Command::RetireNode(cmd::RetireNode { node: old }), Origin::Nobody)]);
        let ms = self.random.between(200, 6_000);
        self.after(ms, Event::NodeJoins(node));
    }

    /// A node that took a lost one's place has the log and gets its vote.
    pub(super) fn join_node(&mut self, node: usize) {
        if !self.registry.is_led() {
            return self.after(200, Event::NodeJoins(node));
        }
        let id = self.registry.nodes[node].id;
        self.trace.note(self.now, format_args!("node {id} joins"));
        self.catch_up(node);
        self.registry.nodes[node].joined = true;
        self.registry.commit_voters();
        self.register_node(node);
    }

    /// Somebody sets a coordinator's clock. Nothing that is measured may follow from it.
    fn set_clock(&mut self, node: usize) {
        let id = self.registry.nodes[node].id;
        let ms = self.random.between(1_000, 100_000);
        self.trace.note(self.now, format_args!("the clock of node {id} is set {ms} ms ahead"));
        self.registry.nodes[node].wall_ahead_ms += ms;
    }

    fn crash_agent(&mut self, agent: usize) {
        self.trace.note(self.now, format_args!("the agent of w{agent} crashes"));
        let ms = self.random.between(1, 8_000);
        self.agent_down(agent, ms);
    }

    fn reboot_host(&mut self, agent: usize) {
        self.trace.note(self.now, format_args!("the host of w{agent} boots"));
        let ms = self.random.between(500, 5_000);
        self.agent_down(agent, ms);
        self.hosts[agent].boots();
    }

    /// The data directory is gone; what its runners ran ends when they see that.
    fn wipe_agent(&mut self, agent: usize) {
        self.trace.note(self.now, format_args!("the data of w{agent} is gone"));
        let ms = self.random.between(100, 3_000);
        self.agent_down(agent, ms);
        self.agents[agent].data += 1;
        self.agents[agent].spool.clear();
        self.hosts[agent].ended.clear();
        let boot = self.hosts[agent].boot;
        let orphans: Vec<AttemptKey> = self.hosts[agent].processes.keys().cloned().collect();
        for key in orphans {
            let ms = self.random.between(3_000, 6_000);
            self.after(ms, Event::Killed { host: agent, boot, key });
        }
    }

    fn cut_off(&mut self, agent: usize) {
        let ms = self.random.between(500, 15_000);
        self.trace.note(self.now, format_args!("w{agent} is cut off for {ms} ms"));
        self.agents[agent].cut_off_until = self.now + ms;
    }

    /// The agent is to go: when its work is done, at once, or for an upgrade.
    fn ask_agent_to_go(&mut self, agent: usize) {
        use helix_agent_core::Event as Happening;
        let (how, happening) = match self.random.below(3) {
            0 => ("when it is done", Happening::DrainAsked),
            1 => ("and to stop everything", Happening::StopAllAsked),
            _ => ("for an upgrade", Happening::DetachAsked),
        };
        self.trace.note(self.now, format_args!("the agent of w{agent} is asked to go, {how}"));
        let upgrade = happening == Happening::DetachAsked;
        self.take(agent, happening);
        if upgrade {
            let life = self.agents[agent].life;
            self.after(1_500, Event::DetachTimedOut { agent, life });
        }
    }

    fn operate(&mut self, agent: usize) {
        if self.registry.leader.is_none() {
            return;
        }
        let worker = self.agents[agent].name.clone();
        let time = self.registry.time(self.now);
        let command = match self.random.below(5) {
            0 => Command::RemoveWorker(cmd::RemoveWorker { worker }),
            1 | 2 => {
                let deadline = self.random.chance(70).then(|| time.plus_ms(2_000));
                Command::DrainWorker(cmd::DrainWorker { worker, deadline, by: DrainedBy::Operator })
            }
            _ => Command::UndrainWorker(cmd::UndrainWorker { worker }),
        };
        self.propose(vec![(command, Origin::Nobody)]);
    }

    /// Ends all faults. What is down comes back by itself; a cluster without a leader gets one.
    pub(super) fn heal(&mut self) {
        if !self.registry.is_led() {
            // Its election is under way.
            return self.after(100, Event::Heal);
        }
        self.trace.note(self.now, format_args!("all is healed"));
        self.healed = true;
        for agent in 0..self.agents.len() {
            self.agents[agent].cut_off_until = 0;
            let worker = self.agents[agent].name.clone();
            self.propose(vec![(Command::UndrainWorker(cmd::UndrainWorker { worker }), Origin::Nobody)]);
        }
        self.after(0, Event::Tend);
    }

    /// What cannot be proven dead holds its worker until somebody boots the host.
    pub(super) fn tend(&mut self) {
        self.after(TEND_EVERY_MS, Event::Tend);
        for agent in 0..self.agents.len() {
            let row = self.registry.state().and_then(|state| state.worker(&self.agents[agent].name));
            let held = row.is_some_and(|row| !row.held.is_empty());
            if self.agents[agent].up && (held || !self.hosts[agent].hidden.is_empty()) {
                self.reboot_host(agent);
            }
        }
    }
}
