//! One node on loopback, clients of every role, and shortcuts to put its registry into a state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use helix_common::channel::{Traffic, connect};
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::ports;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_coordinator::config::{Config, Listen, Log, RaftTimings};
use helix_coordinator::node_dir;
use helix_coordinator::program::Node;
use helix_core::command::{AssignTask, FinishAttempt, Outcome, RegisterWorker, WorkerOffer};
use helix_core::record::{BlobRef, SealedLog};
use helix_core::{Command, Reply};
use helix_model::{
    AttemptKey, AttemptNumber, BuildId, Death, Digest, Executor, Instance, NodeId, Reason, Room, TaskIndex, WorkerName,
};
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::build_service_client::BuildServiceClient;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use helix_proto::v1::worker_service_client::WorkerServiceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

pub(crate) const CLUSTER: &str = "test";

/// A cluster of one, ready.
pub(crate) struct One {
    directory: TempDir,
    authority: Authority,
    pub(crate) node: Node,
}

/// A caller with its own certificate.
pub(crate) struct Caller {
    pub(crate) builds: BuildServiceClient<Channel>,
    pub(crate) workers: WorkerServiceClient<Channel>,
    pub(crate) cluster: ClusterServiceClient<Channel>,
    pub(crate) blobs: BlobServiceClient<Channel>,
}

impl One {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::create(CLUSTER).unwrap();
        authority.save(directory.path()).unwrap();
        let (grpc, peer) = (free_address(), free_address());
        let data_dir = directory.path().join("data");
        node_dir::init(&data_dir, CLUSTER, NodeId(1), &BTreeMap::from([(NodeId(1), peer.to_string())])).unwrap();
        let tls = files(directory.path(), &authority, Role::Coordinator, "1");
        let config = config(data_dir, grpc, peer, tls, [30, 80, 150]);
        let node = Node::start(&config).await.unwrap();
        let mut leadership = node.registry().leadership();
        tokio::time::timeout(Duration::from_secs(20), leadership.wait_for(|seen| seen.is_leader))
            .await
            .unwrap()
            .unwrap();
        Self { directory, authority, node }
    }

    pub(crate) fn tls(&self, role: Role, name: &str) -> Arc<TlsStore> {
        TlsStore::load(files(self.directory.path(), &self.authority, role, name)).unwrap()
    }

    pub(crate) async fn caller(&self, role: Role, name: &str) -> Caller {
        let tls = self.tls(role, name);
        let endpoint = format!("https://{}", self.node.grpc_address());
        let channel = connect(&endpoint, &tls, tls.expect_any(), Traffic::Control).await.unwrap();
        Caller {
            builds: BuildServiceClient::new(channel.clone()),
            workers: WorkerServiceClient::new(channel.clone()),
            cluster: ClusterServiceClient::new(channel.clone()),
            blobs: BlobServiceClient::new(channel),
        }
    }

    pub(crate) async fn client(&self) -> Caller {
        self.caller(Role::Client, "alice").await
    }

    pub(crate) async fn operator(&self) -> Caller {
        self.caller(Role::Operator, "olga").await
    }

    pub(crate) async fn propose(&self, command: Command) -> Reply {
        self.node.registry().propose(command).await.unwrap()
    }

    /// Registers a worker without a session: it is given nothing by itself.
    pub(crate) async fn worker(&self, name: &str, change: impl FnOnce(&mut WorkerOffer)) {
        let mut offer = WorkerOffer {
            capacity: 8,
            executors: BTreeSet::from([Executor::Exec]),
            allows_job_commands: true,
            ..WorkerOffer::default()
        };
        change(&mut offer);
        let worker = WorkerName::new(name).unwrap();
        let reply = self.propose(Command::RegisterWorker(RegisterWorker { worker, instance: instance(), offer })).await;
        assert_eq!(reply, Reply::Done);
    }

    /// Gives the first task of a build to a worker.
    pub(crate) async fn assign(&self, build: &str, worker: &str) -> AttemptKey {
        let key = AttemptKey { build: BuildId::new(build).unwrap(), task: TaskIndex(0), attempt: AttemptNumber(1) };
        let worker = WorkerName::new(worker).unwrap();
        let reply =
            self.propose(Command::AssignTask(AssignTask { key: key.clone(), worker, instance: instance() })).await;
        assert_eq!(reply, Reply::Done);
        key
    }

    /// Ends an attempt: well, or with exit code 3.
    pub(crate) async fn finish(&self, key: AttemptKey, worker: &str, exit_code: i32) {
        let outcome = match exit_code {
            0 => Outcome::Succeeded { digest: None, size: 0, image_tag: String::new() },
            code => Outcome::Failed { reason: Reason::Exit, message: format!("exit code {code}") },
        };
        let blob = BlobRef { digest: Digest([7; 32]), size: 1, holders: BTreeSet::from([NodeId(1)]) };
        let reply = self
            .propose(Command::FinishAttempt(FinishAttempt {
                key,
                worker: WorkerName::new(worker).unwrap(),
                instance: instance(),
                outcome,
                exit_code: Some(exit_code),
                signal: None,
                artifacts: Vec::new(),
                log: Some(SealedLog { blob, lines: 1 }),
                death: Death::Proven,
                image: None,
                index: None,
                room: Room::Host,
            }))
            .await;
        assert_eq!(reply, Reply::Done);
    }

    /// A build that ended, run by a worker that is registered for it.
    pub(crate) async fn ended(&self, client: &mut Caller, id: &str, exit_code: i32) {
        client.submit(shell(id)).await;
        let key = self.assign(id, "w").await;
        self.finish(key, "w", exit_code).await;
    }
}

impl Caller {
    pub(crate) async fn submit(&mut self, request: v1::SubmitBuildRequest) -> v1::SubmitBuildResponse {
        self.builds.submit_build(request).await.unwrap().into_inner()
    }

    pub(crate) async fn status(&mut self, id: &str) -> v1::BuildStatus {
        let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale: false };
        self.builds.get_build_status(request).await.unwrap().into_inner()
    }
}

/// A submit of a shell line without outputs.
pub(crate) fn shell(id: &str) -> v1::SubmitBuildRequest {
    shell_with(id, |_| {})
}

pub(crate) fn shell_with(id: &str, change: impl FnOnce(&mut v1::SpecDetails)) -> v1::SubmitBuildRequest {
    let mut details = v1::SpecDetails {
        command: Some(v1::spec_details::Command::Shell("true".to_owned())),
        no_output: true,
        ..v1::SpecDetails::default()
    };
    change(&mut details);
    v1::SubmitBuildRequest { build_id: id.to_owned(), details: Some(details), ..v1::SubmitBuildRequest::default() }
}

fn instance() -> Instance {
    Instance::new("disk.boot").unwrap()
}

/// Of a node with these times of consensus, in milliseconds: heartbeats, and the least and the most of an election.
pub(crate) fn config(data_dir: PathBuf, grpc: SocketAddr, peer: SocketAddr, tls: TlsFiles, raft: [u64; 3]) -> Config {
    let [heartbeat_interval, election_timeout_min, election_timeout_max] =
        raft.map(|ms| Some(Duration::from_millis(ms)));
    Config {
        data_dir,
        advertise: format!("https://{grpc}"),
        worker_threads: 1,
        listen: Listen { grpc, peer, http: SocketAddr::from(([127, 0, 0, 1], 0)) },
        tls,
        blobs: Default::default(),
        raft: RaftTimings { heartbeat_interval, election_timeout_min, election_timeout_max, ..RaftTimings::default() },
        log: Log::default(),
    }
}

/// An address that nobody else is given.
pub(crate) fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], ports::free(1).unwrap()))
}

/// An identity's files, made where there are none.
pub(crate) fn files(directory: &Path, authority: &Authority, role: Role, name: &str) -> TlsFiles {
    let hosts = ["localhost", "127.0.0.1"].map(str::to_owned);
    let issued = authority.issue(role, name, &hosts, VALID_FOR_DEFAULT).unwrap();
    let (cert, key) = issued.save(directory, &format!("{role}-{name}")).unwrap();
    TlsFiles { ca: directory.join(CA_FILE), cert, key, revoked: None }
}
