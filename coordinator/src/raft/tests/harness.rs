//! Builders for these tests: commands, stores in temporary directories, nodes that talk over real TLS on loopback, and a registry with
//! nothing behind it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_common::accept::{self, Limits};
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::ports;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_core::command::SubmitBuild;
use helix_core::{Command, Reply, State};
use helix_model::{BuildId, BuildSpec, Digest, Executor, NodeId};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::node_dir::{NodeDir, NodeDirError, NodeIdentity, init};
use crate::peers::Peers;
use crate::raft::{Options, StartError, Started, Timing, Transfer, start};
use crate::registry::{
    Applied, COMMAND_FORMAT, Consistency, Leadership, Ports, Proposal, ProposeError, RaftStatus, Registry, Shared,
};

/// Longer than anything here takes, on a machine that does much else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn id(name: &str) -> BuildId {
    BuildId::new(name).unwrap()
}

/// A submit of a small build, the same for the same name.
pub(crate) fn submit(name: &str) -> Command {
    submit_with(name, "")
}

/// A submit of a build whose spec is as large as its environment.
pub(crate) fn submit_with(name: &str, padding: &str) -> Command {
    let spec = BuildSpec {
        repo_url: "https://example.com/p".to_owned(),
        executor: Some(Executor::Exec),
        env: BTreeMap::from([("PADDING".to_owned(), padding.to_owned())]),
        park: true,
        ..BuildSpec::default()
    };
    Command::SubmitBuild(SubmitBuild {
        build: id(name),
        spec: Arc::new(spec),
        spec_digest: Digest([1; 32]),
        submitted_by: "client/c".to_owned(),
        retry_of: None,
    })
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An authority, addresses, and nodes.
pub(crate) struct Cluster {
    pub(crate) root: TempDir,
    authority: Authority,
    pub(crate) addresses: BTreeMap<NodeId, SocketAddr>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) snapshot_log_bytes: u64,
    /// Nodes that play an older version: the highest command format that they know.
    pub(crate) formats: BTreeMap<NodeId, u32>,
    /// What nodes serve beside consensus.
    pub(crate) routes: BTreeMap<NodeId, Routes>,
    /// Nodes that send and receive snapshots otherwise than usual.
    pub(crate) transfers: BTreeMap<NodeId, Transfer>,
    /// Nodes that are dialled by way of a [`Link`](super::link::Link): where they listen.
    pub(crate) behind: BTreeMap<NodeId, SocketAddr>,
}

/// A node that runs.
pub(crate) struct Node {
    pub(crate) registry: Registry,
    pub(crate) peers: Peers,
    stop: CancellationToken,
    server: JoinHandle<()>,
    task: JoinHandle<()>,
}

impl Cluster {
    /// Nodes 1 to `count`, made, not started.
    pub(crate) async fn new(count: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let authority = Authority::create("demo").unwrap();
        authority.save(root.path()).unwrap();
        let mut addresses = BTreeMap::new();
        for number in 1..=count {
            addresses.insert(NodeId(number), SocketAddr::from(([127, 0, 0, 1], ports::free(1).unwrap())));
        }
        let cluster = Self {
            root,
            authority,
            addresses,
            nodes: BTreeMap::new(),
            snapshot_log_bytes: 128 << 20,
            formats: BTreeMap::new(),
            routes: BTreeMap::new(),
            transfers: BTreeMap::new(),
            behind: BTreeMap::new(),
        };
        for number in 1..=count {
            cluster.init(NodeId(number));
        }
        cluster
    }

    pub(crate) fn path(&self, node: NodeId) -> PathBuf {
        self.root.path().join(format!("node-{node}"))
    }

    pub(crate) fn init(&self, node: NodeId) {
        let members = self.addresses.iter().map(|(id, address)| (*id, address.to_string())).collect();
        init(&self.path(node), "demo", node, &members).unwrap();
    }

    /// Makes a node that waits to be added, and starts it.
    pub(crate) async fn join(&mut self, node: NodeId) {
        self.addresses.insert(node, SocketAddr::from(([127, 0, 0, 1], ports::free(1).unwrap())));
        init(&self.path(node), "demo", node, &BTreeMap::new()).unwrap();
        self.start(node).await;
    }

    /// Opens a node's directory, which nobody uses.
    pub(crate) fn open(&self, node: NodeId) -> Result<NodeDir, NodeDirError> {
        NodeDir::open(&self.path(node))
    }

    /// What a node that does not run has of the others.
    pub(crate) fn peers(&self, node: NodeId) -> Peers {
        Peers::new(Arc::new(self.open(node).unwrap()), self.tls(node), COMMAND_FORMAT)
    }

    fn tls(&self, node: NodeId) -> Arc<TlsStore> {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let issued = self.authority.issue(Role::Coordinator, &node.to_string(), &names, VALID_FOR_DEFAULT).unwrap();
        let (cert, key) = issued.save(self.root.path(), &format!("coordinator-{node}")).unwrap();
        TlsStore::load(TlsFiles { ca: self.root.path().join(CA_FILE), cert, key, revoked: None }).unwrap()
    }

    fn options(&self, node: NodeId) -> Options {
        let ms = Duration::from_millis;
        Options {
            grpc: "https://127.0.0.1:1".to_owned(),
            // Slack for a machine that compiles meanwhile.
            timing: Some(Timing { heartbeat: ms(50), election_min: ms(500), election_max: ms(1_000) }),
            snapshot_log_bytes: self.snapshot_log_bytes,
            log_chunk_bytes: 1 << 20,
            version: if self.formats.contains_key(&node) { "0.0.9".to_owned() } else { "0.1.0".to_owned() },
            transfer: self.transfers.get(&node).copied().unwrap_or_default(),
            command_format: self.formats.get(&node).copied().unwrap_or(COMMAND_FORMAT),
            ..Options::default()
        }
    }

    pub(crate) async fn start(&mut self, node: NodeId) {
        let address = *self.behind.get(&node).unwrap_or(&self.addresses[&node]);
        let started = self.start_in(&self.path(node), node, address).await;
        self.nodes.insert(node, started);
    }

    /// Starts a node on a directory that may be a copy, at an address that nobody else may know.
    pub(crate) async fn start_in(&self, path: &Path, node: NodeId, address: SocketAddr) -> Node {
        let dir = Arc::new(NodeDir::open(path).unwrap());
        let tls = self.tls(node);
        let listener = accept::bind(address).await.unwrap();
        let began = Instant::now();
        let Started { registry, peers, raft, peer, task, .. } = loop {
            match start(Arc::clone(&dir), Arc::clone(&tls), self.options(node)).await {
                // Tasks of the library let go of the log a moment after a node has stopped; the end of a process takes them with it.
                Err(StartError::Io { source, .. })
                    if source.kind() == ErrorKind::WouldBlock && began.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                started => break started.unwrap(),
            }
        };
        let stop = CancellationToken::new();
        let server = {
            let stop = stop.clone();
            let incoming = accept::serve(listener, tls, Limits::default());
            let beside = self.routes.get(&node).cloned().unwrap_or_default();
            let router = accept::server().add_routes(beside).add_service(raft.service()).add_service(peer.service());
            tokio::spawn(async move { router.serve_with_incoming_shutdown(incoming, stop.cancelled()).await.unwrap() })
        };
        Node { registry, peers, stop, server, task }
    }

    pub(crate) async fn start_all(&mut self) {
        for node in self.addresses.keys().copied().collect::<Vec<_>>() {
            self.start(node).await;
        }
    }

    /// Stops a node; with no time to hand leadership over, as a crash would.
    pub(crate) async fn stop(&mut self, node: NodeId, deadline: Duration) {
        self.nodes.remove(&node).unwrap().end(deadline).await;
    }

    pub(crate) async fn stop_all(&mut self) {
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.stop(node, Duration::ZERO).await;
        }
    }

    pub(crate) fn registry(&self, node: NodeId) -> &Registry {
        &self.nodes[&node].registry
    }

    /// The node that leads, once one does.
    pub(crate) async fn leader(&self) -> NodeId {
        let began = Instant::now();
        loop {
            let leads = |node: &&NodeId| self.nodes[node].registry.leadership().borrow().is_leader;
            if let Some(leader) = self.nodes.keys().find(leads) {
                return *leader;
            }
            assert!(began.elapsed() < PATIENCE, "nobody leads");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A node that runs and does not lead.
    pub(crate) async fn follower(&self) -> NodeId {
        let leader = self.leader().await;
        *self.nodes.keys().find(|node| **node != leader).unwrap()
    }

    /// Submits until it is acknowledged, as a client does: the same id again is the same build.
    pub(crate) async fn submit(&self, node: NodeId, command: &Command) {
        let began = Instant::now();
        loop {
            match self.registry(node).propose(command.clone()).await {
                Ok(Reply::Submitted | Reply::SameBuild) => return,
                Ok(other) => panic!("{other:?}"),
                Err(ProposeError::NoLeader { .. } | ProposeError::OutcomeUnknown) => {}
                Err(other) => panic!("{other}"),
            }
            assert!(began.elapsed() < PATIENCE, "nobody takes a submit");
        }
    }

    pub(crate) async fn has(&self, node: NodeId, name: &str) -> bool {
        let registry = self.registry(node);
        let began = Instant::now();
        while let Err(error) = registry.barrier(Consistency::Linearizable).await {
            assert!(began.elapsed() < PATIENCE, "{error}");
        }
        registry.build(&id(name)).await.unwrap().is_some()
    }
}

impl Node {
    pub(crate) async fn end(self, deadline: Duration) {
        let Self { registry, stop, server, task, .. } = self;
        registry.transfer_leadership_and_stop(deadline).await;
        // Connections outlive a server that is merely dropped, and would go on answering for a node that is gone.
        stop.cancel();
        tokio::time::timeout(PATIENCE, server).await.expect("connections end").unwrap();
        task.await.unwrap();
    }
}

/// A registry with a test behind it, which takes what is proposed and says how consensus stands.
pub(crate) struct Backstage {
    pub(crate) registry: Registry,
    pub(crate) proposals: mpsc::Receiver<Proposal>,
    pub(crate) status: watch::Sender<RaftStatus>,
}

impl Backstage {
    /// Node 1, which leads.
    pub(crate) fn new() -> Self {
        let (node, members) = (NodeId(1), BTreeMap::from([(1, "127.0.0.1:1".to_owned())]));
        let leadership = Leadership { leader: Some(node), term: 1, is_leader: true };
        let (proposals, taken) = mpsc::channel(64);
        let status = watch::Sender::new(RaftStatus::default());
        let registry = Registry::new(Ports {
            identity: NodeIdentity { cluster: "demo".to_owned(), node: node.0, epoch: 1, members },
            shared: Arc::new(Shared::new(node, State::default(), Applied::default(), Arc::default())),
            proposals,
            barriers: mpsc::channel(1).0,
            lookups: mpsc::channel(1).0,
            control: mpsc::channel(1).0,
            names_blob: Box::new(|_| false),
            leadership: watch::Sender::new(leadership).subscribe(),
            status: status.subscribe(),
            failure: watch::Sender::new(None).subscribe(),
        });
        Self { registry, proposals: taken, status }
    }
}

/// Removes a directory tree that may not exist.
pub(crate) fn wipe(path: &Path) {
    std::fs::remove_dir_all(path).unwrap();
}
