//! One node with all its parts, running in this process: what `run` serves, and what tests start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use helix_common::accept::bind;
use helix_common::identity::Role;
use helix_common::tls::TlsStore;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::blobs::bucket::Bucket;
use crate::blobs::{self, Blobs};
use crate::config::{Config, RaftTimings, S3};
use crate::disk::DiskRoom;
use crate::http;
use crate::leader::{Leader, LeaderLoop, LivenessHandle};
use crate::logs::LogHub;
use crate::membership::{Membership, belong};
use crate::metrics::Metrics;
use crate::node_dir::{NodeDir, NodeIdentity};
use crate::plane::ClusterPlane;
use crate::raft::{self, Options, RenewWhen, Started, Timing};
use crate::registry::Registry;
use crate::repair;
use crate::rpc::changes::Changes;
use crate::rpc::cluster::ClusterRpc;
use crate::rpc::members::MemberRpc;
use crate::rpc::services::Services;
use crate::rpc::{Port, ports, roles};

/// Clients' calls may take so long to end, once this node is asked to.
const DRAIN_MAX: Duration = Duration::from_secs(3);

/// Handing over leadership and stopping consensus may take so long.
const HAND_OVER_MAX: Duration = Duration::from_secs(4);

/// A running node.
pub struct Node {
    dir: Arc<NodeDir>,
    tls: Arc<TlsStore>,
    services: Services,
    leader: Leader,
    /// Ends sessions and the leader's loop.
    leader_stop: CancellationToken,
    /// Ends what stands on port 7420, and HTTP.
    clients_stop: CancellationToken,
    /// Ends what stands on port 7421.
    peers_stop: CancellationToken,
    clients: TaskTracker,
    peers: TaskTracker,
    consensus: tokio::task::JoinHandle<()>,
    ended: watch::Receiver<Option<&'static str>>,
    addresses: Addresses,
}

/// Where a node listens, with real port numbers.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    grpc: SocketAddr,
    peer: SocketAddr,
    http: SocketAddr,
}

struct Sockets {
    grpc: TcpListener,
    peer: TcpListener,
    http: TcpListener,
}

impl Node {
    /// Opens the data directory, checks who this node is, listens, and starts everything.
    ///
    /// # Errors
    /// What is wrong, in one line, and what to do about it.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        Self::start_with(config, repair::Schedule::default()).await
    }

    /// The same, with copies looked after by another schedule. For tests: the times are the same everywhere.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(config: &Config, copies: repair::Schedule) -> anyhow::Result<Self> {
        let (dir, tls) = open(config).await?;
        check_identity(dir.identity(), &tls)?;
        let sockets = Sockets {
            grpc: bind(config.listen.grpc).await?,
            peer: bind(config.listen.peer).await?,
            http: bind(config.listen.http).await?,
        };
        let disk = DiskRoom::of(dir.path())
            .with_context(|| format!("the file system of {} does not answer", dir.path().display()))?;
        let started = raft::start(Arc::clone(&dir), Arc::clone(&tls), options(config)).await?;
        Self::assemble(dir, tls, sockets, disk, started, config, copies).await
    }

    async fn assemble(
        dir: Arc<NodeDir>,
        tls: Arc<TlsStore>,
        sockets: Sockets,
        disk: DiskRoom,
        started: Started,
        config: &Config,
        copies: repair::Schedule,
    ) -> anyhow::Result<Self> {
        let Started { registry, peers: others, raft, peer, task: consensus } = started;
        let addresses = sockets.addresses()?;
        let [leader_stop, clients_stop, peers_stop] = std::array::from_fn(|_| CancellationToken::new());
        let (clients, peers) = (TaskTracker::new(), TaskTracker::new());
        let leader = LeaderLoop::spawn(registry.clone(), leader_stop.clone());
        peer.set_liveness(Arc::new(leader.clone()));

        let plane = Arc::new(ClusterPlane { registry: registry.clone(), peers: others.clone() });
        let stopping = CancellationToken::new();
        let (blobs, logs) = open_bytes(&dir, plane, config.blobs.s3.clone(), &clients, &stopping).await?;
        let services = Services {
            liveness: LivenessHandle::new(leader.clone(), others.clone()),
            leader: leader.metrics().clone(),
            changes: Changes::default(),
            metrics: Metrics::new(registry.counters(), leader.metrics()),
            tasks: clients.clone(),
            stopping,
            registry: registry.clone(),
            blobs,
            logs,
            disk,
        };
        clients.spawn(services.changes.clone().listen(registry.effects(), clients_stop.clone()));
        clients.spawn(services.disk.clone().watch(clients_stop.clone()));

        let membership = Membership::new(registry.clone(), others.clone());
        clients.spawn(membership.repair().keep(copies, clients_stop.clone()));
        clients.spawn(belong(registry, others.clone(), clients_stop.clone()));
        let members = MemberRpc::new(services.clone(), others.clone(), &config.advertise);
        let cluster = ClusterRpc::new(services.clone(), others, membership);
        let (ended_tx, ended) = watch::channel(None);
        let client_port = Port {
            listener: sockets.grpc,
            table: roles::client_port,
            routes: ports::clients(&services, &cluster, leader.clone(), &clients, &clients_stop)?,
        };
        let peer_port = Port {
            listener: sockets.peer,
            table: roles::peer_port,
            routes: ports::peers(&services, &cluster, members, raft, peer),
        };
        serve(client_port, "client", &tls, &clients, &clients_stop, ended_tx.clone());
        serve(peer_port, "coordinator", &tls, &peers, &peers_stop, ended_tx.clone());
        let (page, stop) = (http::serve(sockets.http, services.clone(), clients_stop.clone()), clients_stop.clone());
        clients.spawn(async move {
            let outcome = page.await;
            report("http", outcome.map_err(anyhow::Error::from), &stop, &ended_tx);
        });
        Ok(Self {
            dir,
            tls,
            services,
            leader,
            leader_stop,
            clients_stop,
            peers_stop,
            clients,
            peers,
            consensus,
            ended,
            addresses,
        })
    }

    /// Who this node is.
    #[must_use]
    pub fn identity(&self) -> &NodeIdentity {
        self.dir.identity()
    }

    /// Its certificates.
    #[must_use]
    pub fn tls(&self) -> Arc<TlsStore> {
        Arc::clone(&self.tls)
    }

    /// Its handle on consensus.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.services.registry
    }

    /// Where clients and agents are served.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.addresses.grpc
    }

    /// Where coordinators are served.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.addresses.peer
    }

    /// Where health and metrics are served.
    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        self.addresses.http
    }

    /// `Some(why)` once the node cannot go on.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.services.registry.failure()
    }

    /// Waits until a port ends without having been asked to, and names it.
    pub async fn port_ended(&self) -> &'static str {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(port) => port.unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Leaves in order: sends agents and followers of logs elsewhere, lets clients' calls end, hands over leadership,
    /// stops consensus, and closes the coordinators' port last.
    pub async fn stop(self) {
        self.services.stopping.cancel();
        self.leader_stop.cancel();
        self.leader.finished().await;
        self.clients_stop.cancel();
        self.clients.close();
        if tokio::time::timeout(DRAIN_MAX, self.clients.wait()).await.is_err() {
            tracing::warn!(left = self.clients.len(), "calls of clients are cut short");
        }
        self.services.registry.transfer_leadership_and_stop(HAND_OVER_MAX).await;
        // The transfer is an RPC to the successor, whose answers come in here until now.
        self.peers_stop.cancel();
        self.peers.close();
        if tokio::time::timeout(Duration::from_secs(1), self.peers.wait()).await.is_err() {
            tracing::debug!("calls of coordinators are cut short");
        }
        if let Err(error) = self.consensus.await {
            tracing::error!(%error, "consensus ended badly");
        }
        tracing::info!("ended in order");
    }
}

impl Sockets {
    fn addresses(&self) -> std::io::Result<Addresses> {
        Ok(Addresses { grpc: self.grpc.local_addr()?, peer: self.peer.local_addr()?, http: self.http.local_addr()? })
    }
}

async fn open(config: &Config) -> anyhow::Result<(Arc<NodeDir>, Arc<TlsStore>)> {
    let (path, files) = (config.data_dir.clone(), config.tls.clone());
    let opened = tokio::task::spawn_blocking(move || {
        // The directory first: without a node there is nothing that certificates could be for.
        let dir = NodeDir::open(&path)?;
        let tls = TlsStore::load(files)?;
        anyhow::Ok((Arc::new(dir), tls))
    });
    opened.await.context("opening the data directory panicked")?
}

/// The certificate speaks for the node that the data directory is.
fn check_identity(node: &NodeIdentity, tls: &TlsStore) -> anyhow::Result<()> {
    let identity = tls.own_identity();
    let cert = tls.files().cert.display();
    let issue = format!("issue one with `helix pki issue coordinator {}`", node.node);
    if identity.role != Role::Coordinator {
        bail!("{cert} is {identity}, and a coordinator needs the role coordinator: {issue}");
    }
    if identity.cluster != node.cluster.as_str() {
        bail!(
            "{cert} is of cluster {}, and the data directory of cluster {}: use the right one of both",
            identity.cluster,
            node.cluster
        );
    }
    if identity.node() != Some(node.id()) {
        bail!("{cert} is {identity}, and the data directory is node {}'s: {issue}", node.node);
    }
    Ok(())
}

fn options(config: &Config) -> Options {
    let defaults = Options::default();
    Options {
        grpc: config.advertise.clone(),
        timing: timing(&config.raft),
        snapshot_log_bytes: config.raft.snapshot_log_bytes.unwrap_or(defaults.snapshot_log_bytes),
        store_renewal: RenewWhen {
            from_bytes: config.raft.registry_renew_bytes.unwrap_or(defaults.store_renewal.from_bytes),
            ..defaults.store_renewal
        },
        ..defaults
    }
}

/// All three or none: the configuration was checked for that.
fn timing(raft: &RaftTimings) -> Option<Timing> {
    Some(Timing {
        heartbeat: raft.heartbeat_interval?,
        election_min: raft.election_timeout_min?,
        election_max: raft.election_timeout_max?,
    })
}

async fn open_bytes(
    dir: &Arc<NodeDir>,
    plane: Arc<ClusterPlane>,
    s3: Option<S3>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<(Arc<Blobs>, LogHub)> {
    let path = dir.path().to_owned();
    let shown = path.display().to_string();
    let stopping = stop.clone();
    let moves = s3.as_ref().map(S3::moves);
    let node = format!("{}.{}", dir.identity().cluster, dir.identity().node);
    let opening = tokio::task::spawn_blocking(move || {
        let root = path.join("blobs");
        let bucket = s3.map(|s3| Bucket::open(&s3, &root, &node)).transpose()?;
        let opened = Blobs::open(&root, plane.clone(), bucket)?;
        let logs = LogHub::open(&path.join("logs"), plane, Arc::clone(&opened.blobs), stopping)?;
        anyhow::Ok((opened, logs))
    });
    let opened = opening.await.context("opening blobs and logs panicked")?;
    let (opened, logs) = opened.with_context(|| format!("blobs or logs in {shown} cannot be opened"))?;
    let blobs::Opened { blobs, collection, scrub, offload } = opened;
    if let (Some(offload), Some(moves)) = (offload, moves) {
        tasks.spawn(offload.run(moves, stop.clone()));
    }
    tasks.spawn(collection.run(blobs::Schedule::default(), stop.clone()));
    tasks.spawn(scrub.run(stop.clone()));
    tasks.spawn(logs.clone().seal_what_is_left());
    tasks.spawn(logs.clone().keep());
    Ok((blobs, logs))
}

fn serve(
    port: Port,
    name: &'static str,
    tls: &Arc<TlsStore>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    ended: watch::Sender<Option<&'static str>>,
) {
    let (tls, stop) = (Arc::clone(tls), stop.clone());
    tasks.spawn(async move {
        let outcome = port.serve(tls, stop.clone().cancelled_owned()).await;
        report(name, outcome.map_err(anyhow::Error::from), &stop, &ended);
    });
}

fn report(
    port: &'static str,
    outcome: anyhow::Result<()>,
    stop: &CancellationToken,
    ended: &watch::Sender<Option<&'static str>>,
) {
    if let Err(error) = outcome {
        tracing::error!(port, %error, "a port failed");
    }
    if !stop.is_cancelled() {
        ended.send_replace(Some(port));
    }
}
