//! What an operator does about a worker that is held: the registry has not seen an attempt on it dead, so it gets no work until its
//! host was started anew. Hosts here share one kernel and cannot be started anew; everything on one can be ended.

use std::fs;

use rustix::process::Signal;

use crate::chaos::site::{Node, Site, signal};

impl Site {
    /// Agents whose workers are held.
    ///
    /// # Errors
    /// When nobody says.
    pub(in crate::chaos) fn held(&self) -> anyhow::Result<Vec<Node>> {
        let said = self.helix(&["workers", "ls", "-o", "jsonl", "--connect-timeout", "10s"])?;
        let rows: Vec<serde_json::Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let is_held = |node: &Node| rows.iter().any(|row| row["name"] == node.name() && row["held"] == true);
        Ok(self.agents().filter(is_held).collect())
    }

    /// Ends everything on an agent's host, the agent first, and has the cluster forget the worker: it comes back as a new one.
    ///
    /// # Errors
    /// When something cannot be ended, or the worker not be removed.
    pub(in crate::chaos) fn start_anew(&mut self, agent: Node) -> anyhow::Result<()> {
        self.kill(agent)?;
        // Whoever is ended may just have started another.
        loop {
            let there = self.processes_on(agent);
            if there.is_empty() {
                break;
            }
            there.into_iter().for_each(|pid| signal(pid, Signal::KILL));
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        self.helix(&["workers", "remove", "--force", &agent.name()])?;
        self.spawn(agent)
    }

    /// Processes in a host's network, the keeper apart.
    fn processes_on(&self, node: Node) -> Vec<i32> {
        let Some(host) = self.hosts.get(&node.host()) else { return Vec::new() };
        let keeper = i32::try_from(host.keeper.id()).unwrap_or(0);
        let Ok(network) = fs::read_link(format!("/proc/{keeper}/ns/net")) else { return Vec::new() };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter(|entry| fs::read_link(entry.path().join("ns/net")).is_ok_and(|its| its == network))
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != keeper && super::alive(*pid))
            .collect()
    }
}
