//! A cluster on hosts of its own: three coordinators and some agents, each in a network namespace, joined by a switch that
//! can be told to fail. Clients sit on a host of their own, which is this process.
//!
//! Everything ends with this process: hosts and daemons are told by the kernel when it dies.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::endpoints::Endpoints;
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::tls::{TlsFiles, TlsStore};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::chaos::switch::{self, MTU, Switch};
use crate::cluster::{PATIENCE, alive, programs, signal, wait_for};

/// The host of clients.
pub(super) const CLIENTS: u8 = 100;

/// The first agent's host; coordinators count from 1.
const FIRST_AGENT: u8 = 11;

const CLUSTER: &str = "chaos";

/// A coordinator or an agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Node {
    /// By its id.
    Coordinator(u8),
    /// By its number, from 1.
    Agent(u8),
}

impl Node {
    /// The host it runs on.
    #[must_use]
    pub(super) fn host(self) -> u8 {
        match self {
            Self::Coordinator(id) => id,
            Self::Agent(number) => FIRST_AGENT + number - 1,
        }
    }

    /// How it is called in files.
    #[must_use]
    pub(super) fn name(self) -> String {
        match self {
            Self::Coordinator(id) => format!("coordinator-{id}"),
            Self::Agent(number) => format!("agent-{number}"),
        }
    }
}

/// A host: the process that keeps its network.
struct Host {
    keeper: Child,
}

/// The whole of it.
pub(super) struct Site {
    root: tempfile::TempDir,
    hosts: BTreeMap<u8, Host>,
    /// Told to fail by the nemesis.
    pub(super) switch: Switch,
    running: BTreeMap<Node, Child>,
    nodes: Vec<Node>,
}

fn ip(host: u8) -> String {
    format!("10.77.0.{host}")
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Names the device's addresses and everybody else's hardware addresses, so that nobody has to ask for them.
fn configure(enter: &[String], host: u8, all: &[u8]) -> anyhow::Result<()> {
    let mut script = format!(
        "ip link set lo up; ip link set eth0 address {} mtu {MTU}; ip addr add {}/24 dev eth0; ip link set eth0 up\n",
        switch::address(host),
        ip(host)
    );
    for other in all.iter().filter(|other| **other != host) {
        let line =
            format!("ip neigh replace {} lladdr {} dev eth0 nud permanent\n", ip(*other), switch::address(*other));
        script.push_str(&line);
    }
    let mut argv = enter.to_vec();
    argv.extend(["sh", "-euc", &script].map(str::to_owned));
    run(Command::new(&argv[0]).args(&argv[1..]))?;
    Ok(())
}

fn enter(host: &Host) -> Vec<String> {
    vec!["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", host.keeper.id())]
}

/// Starts a host and makes its device.
fn start_host() -> anyhow::Result<(Host, File)> {
    let keeper = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "86400"])
        .stdin(Stdio::null())
        .spawn()?;
    let path = format!("/proc/{}/ns/net", keeper.id());
    let own = fs::read_link("/proc/self/ns/net")?;
    wait_for("a host's network", PATIENCE, || fs::read_link(&path).is_ok_and(|network| network != own).then_some(()));
    let network = File::open(&path)?;
    // A thread of its own, which ends in that network.
    let device = std::thread::spawn(move || {
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&network), Some(LinkNameSpaceType::Network))?;
        switch::tap()
    });
    let device = device.join().map_err(|_| io::Error::other("a thread panicked"))??;
    Ok((Host { keeper }, device))
}

impl Site {
    /// Makes hosts and a cluster on them, and waits until it serves. This process must be in a network namespace of its own.
    ///
    /// # Errors
    /// When something cannot be made, or does not become ready.
    pub(super) fn start(coordinators: u8, agents: u8, seed: u64) -> anyhow::Result<Self> {
        let root = tempfile::Builder::new().prefix("helix-chaos-").tempdir()?;
        let nodes: Vec<Node> = (1..=coordinators).map(Node::Coordinator).chain((1..=agents).map(Node::Agent)).collect();
        let all: Vec<u8> = nodes.iter().map(|node| node.host()).chain([CLIENTS]).collect();
        let (mut hosts, mut ports) = (BTreeMap::new(), BTreeMap::new());
        ports.insert(CLIENTS, switch::tap()?);
        configure(&["env".to_owned()], CLIENTS, &all)?;
        for node in &nodes {
            let (host, device) = start_host()?;
            configure(&enter(&host), node.host(), &all)?;
            hosts.insert(node.host(), host);
            ports.insert(node.host(), device);
        }
        let switch = Switch::start(ports, seed)?;
        let mut site = Self { root, hosts, switch, running: BTreeMap::new(), nodes };
        site.lay_out()?;
        for node in site.nodes.clone() {
            site.spawn(node)?;
        }
        wait_for("all nodes to be healthy", PATIENCE, || site.is_whole().then_some(()));
        Ok(site)
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

    fn endpoint_list(&self) -> Vec<String> {
        self.coordinators().map(|node| format!("https://{}:7420", ip(node.host()))).collect()
    }

    /// The clients' view of the cluster.
    ///
    /// # Errors
    /// When the operator's certificate cannot be read.
    pub(super) fn endpoints(&self) -> anyhow::Result<Endpoints> {
        let pki = self.root().join("pki");
        let files = TlsFiles {
            ca: pki.join(CA_FILE),
            cert: pki.join("operator-chaos.pem"),
            key: pki.join("operator-chaos-key.pem"),
            revoked: None,
        };
        Ok(Endpoints::new(&self.endpoint_list(), TlsStore::load(files)?)?)
    }

    fn lay_out(&self) -> anyhow::Result<()> {
        let pki = self.root().join("pki");
        let authority = Authority::create(CLUSTER)?;
        authority.save(&pki)?;
        authority.issue(Role::Operator, "chaos", &[], VALID_FOR_DEFAULT)?.save(&pki, "operator-chaos")?;
        let members: Vec<String> =
            self.coordinators().map(|node| format!("{0}={1}:7421", node.host(), ip(node.host()))).collect();
        for node in &self.nodes {
            let (name, host) = (node.name(), node.host());
            let role = match node {
                Node::Coordinator(id) => (Role::Coordinator, id.to_string()),
                Node::Agent(_) => (Role::Agent, name.clone()),
            };
            authority.issue(role.0, &role.1, &[ip(host)], VALID_FOR_DEFAULT)?.save(&pki, &name)?;
            let tls = format!(
                "[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
                pki.join(CA_FILE),
                pki.join(format!("{name}.pem")),
                pki.join(format!("{name}-key.pem"))
            );
            let data = self.data_dir(*node);
            let text = match node {
                Node::Coordinator(id) => {
                    let mut init = Command::new(programs().join("helix-coordinator"));
                    init.args(["init", "--cluster", CLUSTER, "--id", &id.to_string(), "--members", &members.join(",")]);
                    run(init.arg("--data-dir").arg(&data))?;
                    format!(
                        "data_dir = {data:?}\nadvertise = \"https://{0}:7420\"\n[listen]\ngrpc = \"{0}:7420\"\n\
                         peer = \"{0}:7421\"\nhttp = \"{0}:7422\"\n{tls}",
                        ip(host)
                    )
                }
                Node::Agent(_) => format!(
                    "name = {name:?}\ncoordinators = {:?}\ncapacity = 6\ndata_dir = {data:?}\nisolation = \"none\"\n{tls}\
                     [exec]\nallow_job_commands = true\n[podman]\nenabled = false\n",
                    self.endpoint_list()
                ),
            };
            fs::write(self.config(*node), text)?;
        }
        let context = format!(
            "cluster = {CLUSTER:?}\nendpoints = {:?}\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
            self.endpoint_list(),
            pki.join(CA_FILE),
            pki.join("operator-chaos.pem"),
            pki.join("operator-chaos-key.pem")
        );
        fs::write(self.root().join("context.toml"), context)?;
        Ok(())
    }

    /// A node's data.
    #[must_use]
    pub(super) fn data_dir(&self, node: Node) -> PathBuf {
        self.root().join(node.name())
    }

    fn config(&self, node: Node) -> PathBuf {
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
        command.args(["--pdeathsig", "KILL"]).args(enter(host)).arg(programs().join(program));
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

    /// Runs `helix` from the clients' host.
    ///
    /// # Errors
    /// When it fails.
    pub(super) fn helix(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(programs().join("helix"));
        command.env_remove("HELIX_FORMAT").env_remove("HELIX_CONTEXT").stdin(Stdio::null());
        run(command.arg("--context").arg(self.root().join("context.toml")).args(arguments))
    }

    fn status(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&self.helix(&["cluster", "status", "-o", "json", "--connect-timeout", "3s"]).ok()?).ok()
    }

    /// The leader's id, if one is known.
    #[must_use]
    pub(super) fn leader(&self) -> Option<u8> {
        self.status()?["leader"].as_u64().and_then(|id| u8::try_from(id).ok())
    }

    /// Whether all coordinators and agents are there.
    #[must_use]
    pub(super) fn is_whole(&self) -> bool {
        let Some(status) = self.status() else { return false };
        let healthy = |member: &serde_json::Value| member["healthy"] == true;
        let members = status["members"].as_array().is_some_and(|all| all.iter().all(healthy));
        members && status["workers"].as_u64() == Some(self.agents().count() as u64)
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
        let attempts: Vec<PathBuf> = self.agents().map(|agent| self.data_dir(agent).join("attempts")).collect();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter(|entry| {
                let directory = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
                attempts.iter().any(|above| directory.starts_with(above))
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
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
    }
}
