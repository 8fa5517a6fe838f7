//! A coordinator that does what the test says: real TLS, real gRPC, everything in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use helix_common::accept::{self, Limits};
use helix_common::identity::Role;
use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
use helix_common::sealed_log::SealedLogReader;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_model::{BuildSpec, Command, Outputs};
use helix_proto::agent::agent_service_server::{AgentService, AgentServiceServer};
use helix_proto::agent::{
    AgentMessage, Assign, AttemptId, CoordinatorAddress, CoordinatorMessage, Finished, Hello, PushLog, PushLogAck,
    Settings, Welcome, agent_message, coordinator_message,
};
use helix_proto::convert::spec_to_wire;
use helix_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use helix_proto::v1::{self, put_blob_request::Part};
use sha2::{Digest as _, Sha256};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Longer than anything should take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The session that is open, if one is.
type ToAgent = Arc<Mutex<Option<mpsc::Sender<Result<CoordinatorMessage, Status>>>>>;

/// What the coordinator was told.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) hellos: Vec<Hello>,
    pub(crate) messages: Vec<agent_message::Message>,
    /// Lines by build, attempt and number; a number with two texts is an error.
    pub(crate) lines: BTreeMap<(String, u32, u64), String>,
    pub(crate) logs_ended: Vec<String>,
    pub(crate) push_streams: u32,
    /// Messages of the build `refused`, none of which is taken.
    pub(crate) refusals: u32,
    /// Whether lines of the build `forgotten` were asked for again, which is done once.
    pub(crate) asked_again: bool,
    pub(crate) blobs: HashMap<Vec<u8>, Bytes>,
    pub(crate) uploads: u32,
}

/// What lies between an agent and the coordinator, and may be cut.
pub(crate) struct Link {
    cut: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Leads from this listener to a port.
    fn new(listener: TcpListener, port: u16) -> Self {
        let cut = watch::Sender::new(false);
        let is_cut = cut.subscribe();
        let task = tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut is_cut = is_cut.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        biased;
                        _ = is_cut.wait_for(|cut| *cut) => {}
                        () = async {
                            let mut far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                            // However it ends, both are closed.
                            let _ = copy_bidirectional(&mut near, &mut far).await;
                        } => {}
                    }
                });
            }
        });
        Self { cut, task }
    }

    /// Ends all connections, and lets no new one be made.
    pub(crate) fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub(crate) fn mend(&self) {
        self.cut.send_replace(false);
    }
}

/// The coordinator.
pub(crate) struct Cluster {
    seen: Arc<Mutex<Seen>>,
    changed: watch::Sender<u64>,
    /// The coordinators that take blobs; while there are none, uploads wait.
    pub(crate) holders: watch::Sender<Vec<u64>>,
    to_agent: ToAgent,
    pub(crate) endpoint: String,
    pub(crate) tls: TlsFiles,
    task: JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Service {
    seen: Arc<Mutex<Seen>>,
    changed: watch::Sender<u64>,
    holders: watch::Sender<Vec<u64>>,
    to_agent: ToAgent,
    endpoint: String,
}

impl Cluster {
    pub(crate) async fn start(dir: &Path) -> Self {
        let listener = accept::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        Self::serve(dir, listener, port)
    }

    /// One that its agent reaches through a link alone.
    pub(crate) async fn behind_a_link(dir: &Path) -> (Self, Link) {
        let any = "127.0.0.1:0".parse().unwrap();
        let (near, far) = (accept::bind(any).await.unwrap(), accept::bind(any).await.unwrap());
        let (shown, real) = (near.local_addr().unwrap().port(), far.local_addr().unwrap().port());
        (Self::serve(dir, far, shown), Link::new(near, real))
    }

    /// Serves on this listener; agents are told this port.
    fn serve(dir: &Path, listener: TcpListener, port: u16) -> Self {
        let authority = Authority::create("test").unwrap();
        authority.save(dir).unwrap();
        let files = |role, name: &str, stem: &str| {
            let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
            let (cert, key) = authority.issue(role, name, &names, VALID_FOR_DEFAULT).unwrap().save(dir, stem).unwrap();
            TlsFiles { ca: dir.join("ca.pem"), cert, key, revoked: None }
        };
        let own = TlsStore::load(files(Role::Coordinator, "1", "coordinator")).unwrap();
        let endpoint = format!("https://127.0.0.1:{port}");
        let changed = watch::Sender::new(0);
        let holders = watch::Sender::new(vec![1]);
        let service = Service {
            seen: Arc::default(),
            changed: changed.clone(),
            holders: holders.clone(),
            to_agent: Arc::default(),
            endpoint: endpoint.clone(),
        };
        let (seen, to_agent) = (Arc::clone(&service.seen), Arc::clone(&service.to_agent));
        let mut server = accept::server();
        let router =
            server.add_service(AgentServiceServer::new(service.clone())).add_service(BlobServiceServer::new(service));
        let task = tokio::spawn(async move {
            router.serve_with_incoming(accept::serve(listener, own, Limits::default())).await.unwrap();
        });
        Self { seen, changed, holders, to_agent, endpoint, tls: files(Role::Agent, "w1", "agent"), task }
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// Waits until what was seen gives an answer.
    pub(crate) async fn wait_for<T>(&self, what: &str, mut look: impl FnMut(&Seen) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        let found = async {
            loop {
                changed.borrow_and_update();
                if let Some(found) = look(&self.seen()) {
                    return found;
                }
                changed.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(found) => found,
            Err(_) => panic!("waited in vain for {what}; seen: {:?}", self.seen().messages),
        }
    }

    pub(crate) async fn say(&self, message: coordinator_message::Message) {
        let tx = self.to_agent.lock().unwrap().clone().expect("a session");
        tx.send(Ok(CoordinatorMessage { message: Some(message) })).await.unwrap();
    }

    pub(crate) async fn assign(&self, build: &str, spec: &BuildSpec) -> AttemptId {
        self.assign_attempt(build, 1, spec).await
    }

    pub(crate) async fn assign_attempt(&self, build: &str, attempt: u32, spec: &BuildSpec) -> AttemptId {
        let id = AttemptId { build_id: build.to_owned(), task: 0, attempt };
        let assign = Assign { id: Some(id.clone()), spec: Some(spec_to_wire(spec)), ..Assign::default() };
        self.say(coordinator_message::Message::Assign(assign)).await;
        id
    }

    pub(crate) async fn finished(&self, id: &AttemptId) -> Finished {
        self.wait_for(&format!("the end of {}", id.build_id), |seen| {
            seen.messages.iter().find_map(|message| match message {
                agent_message::Message::Finished(finished) if finished.id.as_ref() == Some(id) => {
                    Some(finished.clone())
                }
                _ => None,
            })
        })
        .await
    }

    /// The sealed log of an attempt, wherever it was reported.
    pub(crate) async fn sealed_log(&self, id: &AttemptId) -> Vec<String> {
        let bytes = self
            .wait_for("a sealed log", |seen| {
                let log = seen.messages.iter().find_map(|message| match message {
                    agent_message::Message::Finished(said) if said.id.as_ref() == Some(id) => said.log.clone(),
                    agent_message::Message::LogSealed(said) if said.id.as_ref() == Some(id) => said.log.clone(),
                    _ => None,
                })?;
                seen.blobs.get(log.blob?.sha256.as_ref()).cloned()
            })
            .await;
        let reader = SealedLogReader::open(std::io::Cursor::new(bytes)).unwrap();
        reader.map(|record| String::from_utf8_lossy(&record.unwrap().data).into_owned()).collect()
    }

    pub(crate) fn live_lines(&self, id: &AttemptId) -> Vec<String> {
        let seen = self.seen();
        seen.lines.iter().filter(|((build, ..), _)| *build == id.build_id).map(|(_, line)| line.clone()).collect()
    }
}

/// A spec that runs a line and needs no output.
pub(crate) fn line(text: &str) -> BuildSpec {
    BuildSpec { command: Some(Command::Shell(text.to_owned())), outputs: Outputs::None, ..BuildSpec::default() }
}

/// What agents are told when they are welcomed.
pub(crate) fn settings(endpoint: &str) -> Settings {
    Settings {
        heartbeat_interval_ms: 100,
        worker_lease_ms: 15_000,
        coordinators: vec![CoordinatorAddress { id: 1, grpc: endpoint.to_owned() }],
        copies: 1,
        store_deadline_ms: 600_000,
        blob_bytes_max: 1 << 31,
        log_bytes_max: 1 << 28,
        timeout_default_ms: 600_000,
        cluster: "test".to_owned(),
    }
}

impl Service {
    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap());
        self.changed.send_modify(|count| *count += 1);
    }

    /// Takes a blob, and says who holds it then.
    async fn store(&self, data: Bytes) -> Vec<u64> {
        let holders = self.holders.subscribe().wait_for(|holders| !holders.is_empty()).await.unwrap().clone();
        let digest = Sha256::digest(&data).to_vec();
        self.note(|seen| {
            seen.uploads += 1;
            seen.blobs.insert(digest, data);
        });
        holders
    }
}

#[tonic::async_trait]
impl AgentService for Service {
    type SessionStream = Answers<CoordinatorMessage>;
    type PushLogsStream = Answers<PushLogAck>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut messages = request.into_inner();
        let (tx, rx) = mpsc::channel(64);
        let this = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                match message.message.unwrap() {
                    agent_message::Message::Hello(hello) => {
                        let settings = Some(settings(&this.endpoint));
                        let welcome = Welcome { protocol: 1, version: "t".to_owned(), settings };
                        let message = Some(coordinator_message::Message::Welcome(welcome));
                        tx.send(Ok(CoordinatorMessage { message })).await.unwrap();
                        *this.to_agent.lock().unwrap() = Some(tx.clone());
                        this.note(|seen| seen.hellos.push(hello));
                    }
                    other => this.note(|seen| seen.messages.push(other)),
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn push_logs(&self, request: Request<Streaming<PushLog>>) -> Result<Response<Self::PushLogsStream>, Status> {
        let this = self.clone();
        this.note(|seen| seen.push_streams += 1);
        let acks = request.into_inner().map(move |push| {
            let push = push?;
            let id = push.id.clone().unwrap();
            let seq = push.records.last().map_or(0, |record| record.seq);
            let mut ack = PushLogAck { id: push.id.clone(), seq, ..PushLogAck::default() };
            this.note(|seen| {
                if id.build_id == "refused" {
                    seen.refusals += 1;
                    ack.refused = "the log is too long".to_owned();
                    return;
                }
                if id.build_id == "forgotten" && !push.records.is_empty() && !seen.asked_again {
                    seen.asked_again = true;
                    (ack.seq, ack.again) = (0, true);
                    return;
                }
                for record in &push.records {
                    let text = String::from_utf8_lossy(&record.data).into_owned();
                    let before = seen.lines.insert((id.build_id.clone(), id.attempt, record.seq), text.clone());
                    assert!(before.is_none_or(|before| before == text), "line {} changed", record.seq);
                }
                if push.last {
                    seen.logs_ended.push(id.build_id.clone());
                }
            });
            Ok(ack)
        });
        Ok(Response::new(Box::pin(acks)))
    }
}

#[tonic::async_trait]
impl BlobService for Service {
    type GetBlobStream = Answers<v1::GetBlobResponse>;

    async fn head_blobs(
        &self,
        request: Request<v1::HeadBlobsRequest>,
    ) -> Result<Response<v1::HeadBlobsResponse>, Status> {
        let seen = self.seen.lock().unwrap();
        let blobs = request.into_inner().sha256.into_iter().map(|sha256| {
            let found = seen.blobs.get(sha256.as_ref());
            let holders = if found.is_some() { self.holders.borrow().clone() } else { Vec::new() };
            v1::BlobPresence {
                present: found.is_some(),
                size: found.map_or(0, |data| data.len() as u64),
                holders,
                sha256,
            }
        });
        Ok(Response::new(v1::HeadBlobsResponse { blobs: blobs.collect() }))
    }

    async fn put_blob(
        &self,
        request: Request<Streaming<v1::PutBlobRequest>>,
    ) -> Result<Response<v1::PutBlobResponse>, Status> {
        let mut parts = request.into_inner();
        let mut data = Vec::new();
        let mut expected = Vec::new();
        while let Some(part) = parts.message().await? {
            match part.part.unwrap() {
                Part::Header(header) => expected = header.sha256.to_vec(),
                Part::Data(bytes) => data.extend_from_slice(&bytes),
            }
        }
        assert_eq!(Sha256::digest(&data).to_vec(), expected);
        let holders = self.store(data.into()).await;
        Ok(Response::new(v1::PutBlobResponse { holders }))
    }

    async fn put_small_blobs(
        &self,
        request: Request<v1::PutSmallBlobsRequest>,
    ) -> Result<Response<v1::PutSmallBlobsResponse>, Status> {
        let mut blobs = Vec::new();
        for blob in request.into_inner().blobs {
            assert_eq!(Sha256::digest(&blob.data).to_vec(), blob.sha256.to_vec());
            let holders = self.store(blob.data).await;
            blobs.push(v1::PutBlobResponse { holders });
        }
        Ok(Response::new(v1::PutSmallBlobsResponse { blobs }))
    }

    async fn upload_offset(
        &self,
        _: Request<v1::UploadOffsetRequest>,
    ) -> Result<Response<v1::UploadOffsetResponse>, Status> {
        Ok(Response::new(v1::UploadOffsetResponse { offset: 0 }))
    }

    async fn get_blob(&self, request: Request<v1::GetBlobRequest>) -> Result<Response<Self::GetBlobStream>, Status> {
        let sha256 = request.into_inner().sha256;
        let data = self.seen.lock().unwrap().blobs.get(sha256.as_ref()).cloned();
        let data =
            data.ok_or_else(|| helix_common::status::status(helix_model::ErrorCode::ArtifactUnknown, "no such blob"))?;
        let size = data.len() as u64;
        let parts: Vec<_> = data
            .chunks(1000)
            .map(|part| Ok(v1::GetBlobResponse { size, data: Bytes::copy_from_slice(part) }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }
}
