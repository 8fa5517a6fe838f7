//! A cluster on hosts of its own: coordinators and agents, each in a network namespace, with a disk and a wall clock of its own,
//! joined by a switch that can be told to fail. Clients sit on a host of their own, which is this process.
//!
//! Everything ends with this process: hosts and daemons are told by the kernel when it dies, and what is mounted is seen by nobody
//! else.

pub(super) mod clock;
pub(super) mod disk;
mod host;
pub(super) mod layout;
mod members;
mod operator;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::pki::Authority;
use rustix::process::Signal;

use crate::chaos::site::clock::Clock;
use crate::chaos::site::disk::Disk;
use crate::chaos::site::host::{Host, configure, enter, start_host};
use crate::chaos::site::layout::Beginning;
use crate::chaos::switch::{self, Switch};
use crate::cluster::{PATIENCE, alive, programs, signal, wait_for};

/// The host of clients.
pub(super) const CLIENTS: u8 = 100;

/// The first agent's host; coordinators' seats count from 1.
const FIRST_AGENT: u8 = 11;

/// Hosts for coordinators: one more than there are at first.
pub(super) const SEATS: u8 = 4;

const CLUSTER: &str = "chaos";

/// Bytes of each disk; they take room only where something is written.
const COORDINATOR_DISK: u64 = 4 << 30;
const AGENT_DISK: u64 = 1 << 30;

/// A coordinator or an agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Node {
    /// By its seat, from 1.
    Coordinator(u8),
    /// By its number, from 1.
    Agent(u8),
}

impl Node {
    /// The host it runs on.
    #[must_use]
    pub(super) fn host(self) -> u8 {
        match self {
            Self::Coordinator(seat) => seat,
            Self::Agent(number) => FIRST_AGENT + number - 1,
        }
    }

    /// How it is called in files.
    #[must_use]
    pub(super) fn name(self) -> String {
        match self {
            Self::Coordinator(seat) => format!("seat-{seat}"),
            Self::Agent(number) => format!("agent-{number}"),
        }
    }
}

/// The whole of it.
pub(super) struct Site {
    root: tempfile::TempDir,
    hosts: BTreeMap<u8, Host>,
    /// Told to fail by the nemesis.
    pub(super) switch: Switch,
    running: BTreeMap<Node, Child>,
    nodes: Vec<Node>,
    ids: BTreeMap<Node, u64>,
    next_id: u64,
    authority: Authority,
    disks: BTreeMap<Node, Disk>,
    clocks: BTreeMap<Node, Clock>,
    clock_library: PathBuf,
}

/// Runs a command that must succeed; what it said.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Site {
    /// Makes hosts and a cluster on them, and waits until it serves. This process must have network and mounts to itself.
    ///
    /// # Errors
    /// When something cannot be made, or does not become ready.
    pub(super) fn start(coordinators: u8, agents: u8, seed: u64) -> anyhow::Result<Self> {
        let root = tempfile::Builder::new().prefix("helix-chaos-").tempdir()?;
        let seats: Vec<Node> = (1..=SEATS).map(Node::Coordinator).collect();
        let all: Vec<Node> = seats.iter().copied().chain((1..=agents).map(Node::Agent)).collect();
        let numbers: Vec<u8> = all.iter().map(|node| node.host()).chain([CLIENTS]).collect();
        let (mut hosts, mut ports) = (BTreeMap::new(), BTreeMap::new());
        ports.insert(CLIENTS, switch::tap()?);
        configure(&["env".to_owned()], CLIENTS, &numbers)?;
        for node in &all {
            let (host, device) = start_host()?;
            configure(&enter(&host), node.host(), &numbers)?;
            hosts.insert(node.host(), host);
            ports.insert(node.host(), device);
        }
        let mut site = Self {
            switch: Switch::start(ports, seed)?,
            hosts,
            running: BTreeMap::new(),
            nodes: all
                .into_iter()
                .filter(|node| !matches!(node, Node::Coordinator(seat) if *seat > coordinators))
                .collect(),
            ids: (1..=coordinators).map(|id| (Node::Coordinator(id), u64::from(id))).collect(),
            next_id: u64::from(coordinators) + 1,
            authority: Self::authority()?,
            disks: BTreeMap::new(),
            clocks: BTreeMap::new(),
            clock_library: clock::build(root.path())?,
            root,
        };
        site.lay_out(&seats)?;
        for node in site.nodes.clone() {
            site.spawn(node)?;
        }
        wait_for("all nodes to be healthy", PATIENCE, || site.is_whole().then_some(()));
        Ok(site)
    }

    fn lay_out(&mut self, seats: &[Node]) -> anyhow::Result<()> {
        for node in seats.iter().copied().chain(self.agents()).collect::<Vec<_>>() {
            let bytes = if matches!(node, Node::Agent(_)) { AGENT_DISK } else { COORDINATOR_DISK };
            let image = self.root().join(format!("{}.img", node.name()));
            let disk = Disk::make(image, self.root().join(node.name()), bytes)?;
            self.disks.insert(node, disk);
            self.clocks.insert(node, Clock::make(self.root().join(format!("{}.clock", node.name())))?);
        }
        self.lay_out_clients()?;
        for node in self.nodes.clone() {
            match node {
                Node::Coordinator(seat) => self.lay_out_coordinator(seat, &Beginning::Member)?,
                Node::Agent(_) => self.lay_out_agent(node)?,
            }
        }
        Ok(())
    }

    /// Where everything is kept.
    #[must_use]
    pub(super) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Keeps the directory when this ends.
    pub(super) fn keep(&mut self) {
        self.root.disable_cleanup(true);
    }

    /// All nodes there are.
    #[must_use]
    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Coordinators alone.
    pub(super) fn coordinators(&self) -> impl Iterator<Item = Node> + '_ {
        self.nodes.iter().copied().filter(|node| matches!(node, Node::Coordinator(_)))
    }

    /// Agents alone.
    pub(super) fn agents(&self) -> impl Iterator<Item = Node> + '_ {
        self.nodes.iter().copied().filter(|node| matches!(node, Node::Agent(_)))
    }

    /// A node's data.
    #[must_use]
    pub(super) fn data_dir(&self, node: Node) -> PathBuf {
        let disk = self.root().join(node.name());
        match node {
            Node::Coordinator(_) => disk.join(format!("coordinator-{}", self.id(node))),
            Node::Agent(_) => disk.join("agent"),
        }
    }

    /// A node's disk.
    ///
    /// # Errors
    /// When there is no such node.
    pub(super) fn disk(&self, node: Node) -> anyhow::Result<&Disk> {
        self.disks.get(&node).context("a node's disk")
    }

    /// A node's clock.
    ///
    /// # Errors
    /// When there is no such node.
    pub(super) fn clock(&self, node: Node) -> anyhow::Result<&Clock> {
        self.clocks.get(&node).context("a node's clock")
    }

    fn context_of(&self, node: Node) -> PathBuf {
        self.root().join(format!("context-{}.toml", node.name()))
    }

    /// A node's configuration.
    #[must_use]
    pub(super) fn config(&self, node: Node) -> PathBuf {
        self.root().join(format!("{}.toml", node.name()))
    }

    /// Where a node logs.
    #[must_use]
    pub(super) fn log(&self, node: Node) -> PathBuf {
        self.root().join(format!("{}.log", node.name()))
    }

    /// Starts a node. To be called by the thread that lives longest: nodes die with it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn spawn(&mut self, node: Node) -> anyhow::Result<()> {
        let program = match node {
            Node::Coordinator(_) => "helix-coordinator",
            Node::Agent(_) => "helix-agent",
        };
        let host = self.hosts.get(&node.host()).context("a host")?;
        let log = File::options().create(true).append(true).open(self.log(node))?;
        let mut command = Command::new("setpriv");
        let clock = &self.clocks.get(&node).context("a clock")?.path;
        command.args(["--pdeathsig", "KILL"]).args(enter(host));
        command.arg("env").arg(format!("LD_PRELOAD={}", self.clock_library.display()));
        command.arg(format!("{}={}", clock::VARIABLE, clock.display())).arg(programs().join(program));
        command.args(["run", "--config"]).arg(self.config(node));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.running.insert(node, command.spawn()?);
        Ok(())
    }

    /// A node's process, if it runs.
    #[must_use]
    pub(super) fn pid(&self, node: Node) -> Option<i32> {
        self.running.get(&node).and_then(|child| i32::try_from(child.id()).ok())
    }

    /// Sends a signal to a node.
    pub(super) fn signal(&self, node: Node, what: Signal) {
        if let Some(pid) = self.pid(node) {
            signal(pid, what);
        }
    }

    /// Kills a node and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub(super) fn kill(&mut self, node: Node) -> anyhow::Result<()> {
        if let Some(mut child) = self.running.remove(&node) {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts nodes that have ended. Says which, and how they ended.
    ///
    /// # Errors
    /// When one cannot be started.
    pub(super) fn start_fallen(&mut self) -> anyhow::Result<Vec<String>> {
        let mut said = Vec::new();
        for node in self.nodes.clone() {
            let fallen = match self.running.get_mut(&node) {
                Some(child) => child.try_wait()?.map(|status| format!("{} ended by itself: {status}", node.name())),
                None => {
                    self.spawn(node)?;
                    continue;
                }
            };
            if let Some(fallen) = fallen {
                said.push(fallen);
                self.spawn(node)?;
            }
        }
        Ok(said)
    }

    /// Whether a node's process has ended, and how.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub(super) fn ended(&mut self, node: Node) -> anyhow::Result<Option<std::process::ExitStatus>> {
        match self.running.get_mut(&node) {
            Some(child) => Ok(child.try_wait()?),
            None => Ok(None),
        }
    }

    /// Runs `helix` from the clients' host.
    ///
    /// # Errors
    /// When it fails.
    pub(super) fn helix(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Self::helix_with(&self.root().join("context.toml"), arguments)
    }

    /// Runs `helix` against one coordinator alone.
    ///
    /// # Errors
    /// When it fails.
    pub(super) fn helix_at(&self, node: Node, arguments: &[&str]) -> anyhow::Result<String> {
        Self::helix_with(&self.context_of(node), arguments)
    }

    fn helix_with(context: &Path, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(programs().join("helix"));
        command.env_remove("HELIX_FORMAT").env_remove("HELIX_CONTEXT").stdin(Stdio::null());
        run(command.arg("--context").arg(context).args(arguments))
    }

    fn status(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&self.helix(&["cluster", "status", "-o", "json", "--connect-timeout", "3s"]).ok()?).ok()
    }

    /// The coordinator that leads, if one is known.
    #[must_use]
    pub(super) fn leader(&self) -> Option<Node> {
        let id = self.status()?["leader"].as_u64()?;
        self.coordinators().find(|node| self.id(*node) == id)
    }

    /// What is missing until all coordinators that were added, and all agents, are there; nothing if it is whole.
    #[must_use]
    pub(super) fn missing(&self) -> Option<String> {
        let Some(status) = self.status() else { return Some("nobody tells of a leader".to_owned()) };
        let members = status["members"].as_array().cloned().unwrap_or_default();
        let well = |node: Node| {
            let id = self.id(node);
            members.iter().any(|it| it["id"] == id && it["healthy"] == true && it["role"] != "learner")
        };
        let unwell: Vec<Node> = self.coordinators().filter(|node| !well(*node)).collect();
        let agents = self.agents().count() as u64;
        if unwell.is_empty() && members.len() == self.coordinators().count() && status["workers"] == agents {
            return None;
        }
        Some(format!(
            "{unwell:?} of {} members are not well, {} of {agents} workers are there",
            members.len(),
            status["workers"]
        ))
    }

    /// Whether all coordinators and agents are there.
    #[must_use]
    pub(super) fn is_whole(&self) -> bool {
        self.missing().is_none()
    }

    /// Processes on the agents' hosts that are neither the keeper nor ours: of builds.
    #[must_use]
    pub(super) fn strangers(&self) -> Vec<String> {
        let networks: Vec<PathBuf> = self
            .hosts
            .values()
            .filter_map(|host| fs::read_link(format!("/proc/{}/ns/net", host.keeper.id())).ok())
            .collect();
        let keepers: Vec<u32> = self.hosts.values().map(|host| host.keeper.id()).collect();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let of_ours = fs::read_link(entry.path().join("ns/net")).is_ok_and(|network| networks.contains(&network));
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let alive = i32::try_from(pid).is_ok_and(alive);
            if of_ours && alive && !keepers.contains(&pid) && !line.contains("/helix-") {
                found.push(format!("{pid}: {line}"));
            }
        }
        found
    }

    /// Runners of agents' builds: each works in its attempt's directory.
    pub(super) fn runners(&self) -> Vec<i32> {
        self.agents().flat_map(|agent| self.runners_of(agent)).collect()
    }

    /// Runners of one agent's builds.
    pub(super) fn runners_of(&self, agent: Node) -> Vec<i32> {
        let attempts = self.data_dir(agent).join("attempts");
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|within| within.starts_with(&attempts)))
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// Lets an agent go for an upgrade.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn detach(&self, agent: Node) -> anyhow::Result<()> {
        run(Command::new(programs().join("helix-agent")).args(["detach", "--config"]).arg(self.config(agent)))?;
        Ok(())
    }

    /// States of a node's threads, as the kernel says them.
    fn threads(&self, node: Node) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid(node).unwrap_or(0)));
        let stats =
            threads.into_iter().flatten().flatten().map(|thread| fs::read_to_string(thread.path().join("stat")));
        stats
            .flatten()
            .filter_map(|stat| Some(stat.rsplit(')').next()?.split_whitespace().next()?.to_owned()))
            .collect()
    }

    /// Stops a node and waits until no thread of it is within a call.
    ///
    /// # Errors
    /// When one does not come to rest.
    pub(super) fn halt(&self, node: Node) -> anyhow::Result<()> {
        self.signal(node, Signal::STOP);
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.threads(node).iter().any(|state| !["T", "Z", "X"].contains(&state.as_str())) {
            ensure!(Instant::now() < deadline, "{} does not come to rest", node.name());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Watches a node for a while; whether it was seen to wait for its disk.
    #[must_use]
    pub(super) fn waits_for_disk(&self, node: Node, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        let mut waited = false;
        while Instant::now() < deadline {
            waited |= self.threads(node).iter().any(|state| state == "D");
            std::thread::sleep(Duration::from_millis(10));
        }
        waited
    }

    /// How much a node has logged.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub(super) fn log_length(&self, node: Node) -> anyhow::Result<u64> {
        Ok(fs::metadata(self.log(node))?.len())
    }

    /// Whether a node has logged one of these words since its log was so long.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub(super) fn said_since(&self, node: Node, length: u64, words: &[&str]) -> anyhow::Result<bool> {
        let mut file = File::open(self.log(node))?;
        file.seek(SeekFrom::Start(length))?;
        let mut said = Vec::new();
        file.read_to_end(&mut said)?;
        let said = String::from_utf8_lossy(&said);
        Ok(words.iter().any(|word| said.contains(word)))
    }

    /// Ends all nodes in order: agents, then coordinators. Says which did not end by themselves.
    ///
    /// # Errors
    /// When one cannot be waited for.
    pub(super) fn stop(&mut self) -> anyhow::Result<Vec<String>> {
        let mut said = Vec::new();
        for node in self.agents().chain(self.coordinators()).collect::<Vec<_>>() {
            let Some(mut child) = self.running.remove(&node) else { continue };
            signal(i32::try_from(child.id())?, Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(30);
            while child.try_wait()?.is_none() {
                if Instant::now() > deadline {
                    said.push(format!("{} did not end within 30 s", node.name()));
                    child.kill()?;
                    child.wait()?;
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(said)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in self.runners() {
            signal(pid, Signal::KILL);
        }
        for host in self.hosts.values_mut() {
            let _ = host.keeper.kill();
            let _ = host.keeper.wait();
        }
        for disk in self.disks.values() {
            disk.detach();
        }
    }
}
