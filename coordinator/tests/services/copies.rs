//! Three coordinators with real blobs, of which one dies and comes back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_common::channel::{Traffic, connect};
use helix_common::identity::Role;
use helix_common::pki::Authority;
use helix_common::tls::TlsStore;
use helix_coordinator::config::Config;
use helix_coordinator::node_dir;
use helix_coordinator::program::Node;
use helix_coordinator::repair::Schedule;
use helix_core::command::{SetPolicy, SubmitBuild};
use helix_core::{Command, Policy};
use helix_model::{BuildId, BuildSpec, Digest, Executor, NodeId, Source};
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::node::{CLUSTER, config, files, free_address};

/// Longer than anything here takes, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a coordinator may be silent here.
const SILENCE: Duration = Duration::from_millis(500);

struct Three {
    configs: BTreeMap<NodeId, Config>,
    nodes: BTreeMap<NodeId, Node>,
    client: Arc<TlsStore>,
    _directory: TempDir,
}

async fn start(config: &Config) -> Node {
    let schedule = Schedule { look_every: Duration::from_millis(50), patience: SILENCE, ..Schedule::default() };
    let began = Instant::now();
    loop {
        match Node::start_with(config, schedule).await {
            Ok(node) => return node,
            // What a node before it had in hand is let go of a moment after it has stopped.
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Three {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::create(CLUSTER).unwrap();
        authority.save(directory.path()).unwrap();
        let addresses: BTreeMap<NodeId, _> = (1..=3).map(|id| (NodeId(id), (free_address(), free_address()))).collect();
        let members: BTreeMap<NodeId, String> =
            addresses.iter().map(|(id, (_, peer))| (*id, peer.to_string())).collect();
        let (mut configs, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        for (id, (grpc, peer)) in addresses {
            let data_dir = directory.path().join(id.to_string());
            node_dir::init(&data_dir, CLUSTER, id, &members).unwrap();
            let tls = files(directory.path(), &authority, Role::Coordinator, &id.to_string());
            configs.insert(id, config(data_dir, grpc, peer, tls, [50, 500, 1_000]));
        }
        for (id, config) in &configs {
            nodes.insert(*id, start(config).await);
        }
        let began = Instant::now();
        while nodes.values().any(|node: &Node| node.registry().voters().len() < 3) {
            assert!(began.elapsed() < PATIENCE, "nobody leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let client = TlsStore::load(files(directory.path(), &authority, Role::Operator, "olga")).unwrap();
        Self { configs, nodes, client, _directory: directory }
    }

    async fn channel(&self, node: NodeId) -> Channel {
        let endpoint = format!("https://{}", self.nodes[&node].grpc_address());
        connect(&endpoint, &self.client, self.client.expect_any(), Traffic::Control).await.unwrap()
    }

    /// Which of these a node has itself.
    async fn has(&self, node: NodeId, blobs: &[Digest]) -> Vec<bool> {
        let sha256 = blobs.iter().map(|digest| digest.0.to_vec().into()).collect();
        let mut client = BlobServiceClient::new(self.channel(node).await);
        let heads = client.head_blobs(v1::HeadBlobsRequest { sha256, local: true }).await.unwrap().into_inner();
        heads.blobs.into_iter().map(|blob| blob.present).collect()
    }

    /// On how many of those that run each of these is.
    async fn copies(&self, blobs: &[Digest]) -> Vec<usize> {
        let mut copies = vec![0; blobs.len()];
        for node in self.nodes.keys() {
            let held = self.has(*node, blobs).await;
            copies.iter_mut().zip(held).for_each(|(count, held)| *count += usize::from(held));
        }
        copies
    }

    /// What the leader warns of.
    async fn warnings(&self) -> Vec<String> {
        let leads = |node: &Node| node.registry().leadership().borrow().is_leader;
        let Some((leader, _)) = self.nodes.iter().find(|(_, node)| leads(node)) else { return Vec::new() };
        let mut client = ClusterServiceClient::new(self.channel(*leader).await);
        let status = client.get_cluster_status(v1::GetClusterStatusRequest { stale: true }).await;
        status.unwrap().into_inner().warnings
    }

    /// Waits until copies and warnings are so.
    async fn wait(&self, what: &str, blobs: &[Digest], expected: &[usize], warns: bool) {
        let began = Instant::now();
        loop {
            let (copies, warnings) = (self.copies(blobs).await, self.warnings().await);
            assert!(!warnings.iter().any(|word| word == "blobs_lost"), "{what}: {warnings:?}");
            if copies == expected && warnings.iter().any(|word| word == "blobs_short") == warns {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain until {what}: {copies:?}, {warnings:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stores bytes on a node, and has copies of them made by it.
    async fn put(&self, node: NodeId, data: &'static [u8], copies: u32) -> Digest {
        let digest = Digest(Sha256::digest(data).into());
        let blob = v1::SmallBlob { sha256: digest.0.to_vec().into(), data: data.into() };
        let mut client = BlobServiceClient::new(self.channel(node).await);
        client.put_small_blobs(v1::PutSmallBlobsRequest { blobs: vec![blob], copies }).await.unwrap();
        digest
    }

    /// Has a build name a blob.
    async fn name(&self, digest: Digest) {
        let spec = BuildSpec {
            source: Some(Source { digest, size: 1 }),
            executor: Some(Executor::Exec),
            park: true,
            ..BuildSpec::default()
        };
        self.propose(Command::SubmitBuild(SubmitBuild {
            build: BuildId::new(&digest.to_string()).unwrap(),
            spec: Arc::new(spec),
            spec_digest: digest,
            submitted_by: "client/c".to_owned(),
            retry_of: None,
        }))
        .await;
    }

    async fn propose(&self, command: Command) {
        let began = Instant::now();
        let node = self.nodes.values().next().unwrap();
        while let Err(error) = node.registry().propose(command.clone()).await {
            assert!(began.elapsed() < PATIENCE, "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_coordinator_held_has_its_copies_on_those_that_live() {
    let mut three = Three::start().await;
    // How full the disk of this machine is must not decide.
    let policy = Policy { disk_reserve_bytes: 0, ..Policy::default() };
    three.propose(Command::SetPolicy(SetPolicy { policy, expected: None })).await;
    let dead = NodeId(3);
    let (both, alone) = (three.put(dead, b"on two", 2).await, three.put(dead, b"on one", 1).await);
    let blobs = [both, alone];
    // Nothing names them yet: nobody looks after them.
    assert_eq!(three.copies(&blobs).await, [2, 1]);
    three.nodes.remove(&dead).unwrap().stop().await;
    assert_eq!(three.copies(&blobs).await, [1, 0]);
    for digest in blobs {
        three.name(digest).await;
    }
    three.wait("the one has two copies, and the other may have one", &blobs, &[2, 0], true).await;
    let node = start(&three.configs[&dead]).await;
    three.nodes.insert(dead, node);
    // One copy more than need be is harmless.
    three.wait("all have their copies", &blobs, &[3, 2], false).await;
    for (_, node) in three.nodes {
        node.stop().await;
    }
}
