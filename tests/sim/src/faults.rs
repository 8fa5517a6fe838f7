//! What goes wrong, and the healing.

use helix_core::command::{self as cmd, Command};
use helix_core::record::DrainedBy;
use helix_model::AttemptKey;

use super::Bug;
use super::registry::{NODES, Origin};
use super::world::{Event, World};

impl World {
    /// One fault, and the next one some time later.
    pub(super) fn fault(&mut self) {
        if self.healed {
            return;
        }
        let ms = self.random.between(200, 4_000);
        self.after(ms, Event::Fault);
        let agent = self.random.below(self.agents.len());
        match self.random.below(14) {
            0..2 => self.fell_leader(),
            2..4 => self.restart_node(),
            4 => self.crash_agent(agent, 1, 8_000),
            5 => self.reboot_host(agent),
            6 => self.wipe_agent(agent),
            7 => {
                self.note(|| format!("w{agent} is cut off"));
                let ms = self.random.between(500, 15_000);
                self.agents[agent].cut_off_until = self.now + ms;
            }
            8 => {
                self.send_detach(agent);
                self.crash_agent(agent, 100, 8_000);
            }
            9 => self.operate(agent),
            10 | 11 => self.kill_runner(agent),
            12 => {
                self.agents[agent].capacity = self.random.between(1, 3) as u32;
                self.agents[agent].disconnect();
            }
            _ => self.agents[agent].disconnect(),
        }
    }

    fn fell_leader(&mut self) {
        if self.registry.leader.take().is_some() {
            self.note(|| "the leader is gone".to_owned());
            self.sessions.clear();
            let ms = self.random.between(50, 2_000);
            self.after(ms, Event::Elect);
        }
    }

    /// A follower restarts from what its disk has, or the leader falls and does.
    fn restart_node(&mut self) {
        let node = self.random.below(NODES);
        if self.registry.leader == Some(node) {
            self.fell_leader();
        }
        self.note(|| format!("node {node} restarts"));
        let skipping = usize::from(self.bug == Some(Bug::SkippedEntry));
        let restarted = self.registry.restart(node, skipping);
        self.check(restarted);
    }

    fn crash_agent(&mut self, agent: usize, least_ms: u64, most_ms: u64) {
        if self.agents[agent].up {
            self.note(|| format!("w{agent} crashes"));
            self.agents[agent].up = false;
            self.agents[agent].disconnect();
            let ms = self.random.between(least_ms, most_ms);
            self.after(ms, Event::AgentStart(agent));
        }
    }

    fn reboot_host(&mut self, agent: usize) {
        self.note(|| format!("w{agent}'s host boots"));
        self.crash_agent(agent, 500, 5_000);
        self.hosts[agent].boot += 1;
        self.hosts[agent].processes.clear();
        self.hosts[agent].unproven.clear();
        self.hosts[agent].hidden.clear();
        self.agents[agent].wipe();
    }

    /// The data directory is gone; processes of the earlier life are found and killed by the next one.
    fn wipe_agent(&mut self, agent: usize) {
        self.note(|| format!("w{agent}'s data is gone"));
        self.crash_agent(agent, 100, 3_000);
        self.agents[agent].data += 1;
        self.agents[agent].wipe();
        let boot = self.hosts[agent].boot;
        let orphans: Vec<AttemptKey> = self.hosts[agent].processes.keys().cloned().collect();
        for key in orphans {
            let ms = self.random.between(3_000, 6_000);
            self.after(ms, Event::Killed { host: agent, boot, key });
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

    /// Ends all faults. Agents that are down come back by themselves; a cluster without a leader gets one.
    pub(super) fn heal(&mut self) {
        if self.registry.leader.is_none() {
            // Its election is under way.
            return self.after(100, Event::Heal);
        }
        self.note(|| "all is healed".to_owned());
        self.healed = true;
        for agent in 0..self.agents.len() {
            self.agents[agent].cut_off_until = 0;
            // What cannot be proven dead holds its worker until somebody boots the host.
            if !self.hosts[agent].unproven.is_empty() {
                self.reboot_host(agent);
            }
            let worker = self.agents[agent].name.clone();
            self.propose(vec![(Command::UndrainWorker(cmd::UndrainWorker { worker }), Origin::Nobody)]);
        }
    }
}
