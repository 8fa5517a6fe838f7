//! The coordinators' port: consensus, and what coordinators ask each other beside it.
//!
//! Nothing is believed before [`Peers::admit`] has looked at certificate, cluster, node and epoch, and nothing of consensus before
//! [`Peers::expect_one_run`] has looked at the process.

mod incoming;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use helix_common::auth;
use helix_common::status::{not_leader, status};
use helix_common::tls::PeerInfo;
use helix_failpoint::{self as failpoint, Point};
use helix_model::ErrorCode;
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_proto::peer::peer_service_server::{PeerService, PeerServiceServer};
use helix_proto::raft::SnapshotStep;
use helix_proto::raft::raft_service_server::{RaftService, RaftServiceServer};
use helix_proto::{peer, raft};
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::Fatal;
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest, VoteRequest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use self::incoming::Announced;
pub(in crate::raft) use self::incoming::Incoming;
use super::proposer::{decode_commands, upgrade_pending};
use super::reader::read_index;
use super::snapshot::meta_from_wire;
use super::types::{Entry, Raft, TypeConfig, Vote};
use super::wire::{entry, log_id, log_id_to_wire, vote, vote_to_wire};
use crate::codec::{CodecError, format_of_batch, reply_to_wire};
use crate::peers::{LivenessSource, Peers};
use crate::registry::{COMMAND_FORMAT, ProposeError, Registry, Shared};

type Answer<T> = Result<Response<T>, Status>;

/// Handles `helix.raft.v1.RaftService`.
#[derive(Clone)]
pub struct RaftHandler {
    raft: Raft,
    peers: Peers,
    shared: Arc<Shared>,
    incoming: Arc<Incoming>,
    stop: CancellationToken,
}

fn garbled(error: CodecError) -> Status {
    match error {
        CodecError::Newer { .. } => status(ErrorCode::VersionSkew, error.to_string()),
        CodecError::Malformed { .. } => status(ErrorCode::InvalidField, error.to_string()),
    }
}

fn stopped(error: impl std::fmt::Display) -> Status {
    status(ErrorCode::ShuttingDown, format!("consensus does not run: {error}"))
}

impl RaftHandler {
    pub(super) fn new(
        raft: Raft,
        peers: Peers,
        shared: Arc<Shared>,
        incoming: Arc<Incoming>,
        stop: CancellationToken,
    ) -> Self {
        Self { raft, peers, shared, incoming, stop }
    }

    /// The service to put on the coordinators' port.
    #[must_use]
    pub fn service(self) -> RaftServiceServer<Self> {
        // An entry may be as large as a batch of the largest commands; a message as several entries.
        RaftServiceServer::new(self).max_decoding_message_size(4 * MESSAGE_BYTES_MAX)
    }

    async fn admit(&self, info: &PeerInfo, envelope: Option<&raft::Envelope>) -> Result<u64, Status> {
        let from = self.peers.admit(info, envelope)?;
        self.peers.expect_one_run(from, envelope.map_or(0, |envelope| envelope.from_run)).await?;
        self.shared.clock.observe(from, envelope.map_or(0, |envelope| envelope.clock_ms));
        Ok(from.0)
    }

    fn envelope(&self, to: u64) -> Option<raft::Envelope> {
        Some(self.peers.envelope(helix_model::NodeId(to)))
    }

    async fn append_request(
        &self,
        info: &PeerInfo,
        request: raft::AppendRequest,
    ) -> Result<(u64, AppendEntriesRequest<TypeConfig>), Status> {
        let from = self.admit(info, request.envelope.as_ref()).await?;
        let entries = request.entries.into_iter().map(entry).collect::<Result<Vec<_>, _>>();
        let entries = entries.map_err(|error| {
            if matches!(error, CodecError::Newer { .. }) {
                // Waiting would not help: this program can never apply it.
                self.peers.fail(error.to_string());
            }
            garbled(error)
        })?;
        self.expect_known(&entries)?;
        let request = AppendEntriesRequest {
            vote: vote(request.vote).map_err(garbled)?,
            prev_log_id: request.prev.map(log_id),
            entries,
            leader_commit: request.leader_commit.map(log_id),
        };
        Ok((from, request))
    }

    /// A node that plays an older version must stop at what that would not know.
    #[allow(clippy::result_large_err)]
    fn expect_known(&self, entries: &[Entry]) -> Result<(), Status> {
        let known = self.peers.format();
        if known >= COMMAND_FORMAT {
            return Ok(());
        }
        for entry in entries {
            let EntryPayload::Normal(batch) = &entry.payload else { continue };
            let needed = format_of_batch(batch.encoded()).map_err(garbled)?;
            if needed > known {
                let error = CodecError::Newer { what: "commands", needed, known };
                self.peers.fail(error.to_string());
                return Err(garbled(error));
            }
        }
        Ok(())
    }

    fn append_answer(&self, to: u64, result: StreamAppendResult<TypeConfig>) -> raft::AppendResponse {
        use raft::append_response::Result as Wire;
        let result = match result {
            Ok(flushed) => Wire::Flushed(raft::Flushed { log_id: flushed.as_ref().map(log_id_to_wire) }),
            Err(StreamAppendError::Conflict(at)) => Wire::Conflict(log_id_to_wire(&at)),
            Err(StreamAppendError::HigherVote(higher)) => Wire::HigherVote(vote_to_wire(&higher)),
        };
        raft::AppendResponse { envelope: self.envelope(to), result: Some(result) }
    }

    fn append_stream(
        self,
        info: PeerInfo,
        requests: Streaming<raft::AppendRequest>,
    ) -> impl Stream<Item = Result<raft::AppendResponse, Status>> {
        // What ended the stream of requests; told after the answers to those before.
        let refusal: Arc<Mutex<Option<Status>>> = Arc::default();
        let sender = info.identity.node().map_or(0, |node| node.0);
        let input = {
            let (handler, refusal) = (self.clone(), Arc::clone(&refusal));
            futures::stream::unfold((requests, info), move |(mut requests, info)| {
                let (handler, refusal) = (handler.clone(), Arc::clone(&refusal));
                async move {
                    let request = match requests.message().await {
                        Ok(Some(request)) => handler.append_request(&info, request).await.map(|(_, it)| Some(it)),
                        Ok(None) => Ok(None),
                        Err(status) => Err(status),
                    };
                    let request = request.unwrap_or_else(|status| {
                        *refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                        None
                    });
                    Some((request?, (requests, info)))
                }
            })
        };
        // A leader's stream has no end of its own: a server that drains its connections must not wait for one. Both
        // directions end, because openraft holds on to the requests in a task of its own.
        let stop = self.stop.clone();
        let answers =
            owned_answers(self.raft.clone(), input.take_until(stop.clone().cancelled_owned())).map(move |answer| {
                match answer {
                    Ok(result) => {
                        failpoint::pass(Point::AppendAnswer);
                        Ok(self.append_answer(sender, result))
                    }
                    Err(fatal) => Err(stopped(fatal)),
                }
            });
        let last =
            futures::stream::once(
                async move { refusal.lock().unwrap_or_else(PoisonError::into_inner).take().map(Err) },
            );
        let answers = answers.chain(last.filter_map(|refusal| async move { refusal }));
        answers.take_until(stop.cancelled_owned())
    }

    /// Takes what a call brings of a snapshot. Answers the vote to answer with, and how much of the file is here.
    async fn take_snapshot(
        &self,
        header: raft::SnapshotHeader,
        mut parts: Streaming<raft::SnapshotRequest>,
    ) -> Result<(Vote, u64), Status> {
        let leader = vote(header.vote).map_err(garbled)?;
        let step = if self.incoming.takes_parts() { header.step() } else { SnapshotStep::Whole };
        if i32::from(header.step()) != header.step {
            let unknown = format!("step {} of a snapshot is not known here", header.step);
            return Err(status(ErrorCode::VersionSkew, unknown));
        }
        let (bytes, crc32) = (header.bytes, header.file_crc32);
        let of = Announced { meta: meta_from_wire(header).map_err(garbled)?, bytes, crc32 };
        let mut held = self.incoming.hold().await?;
        if step == SnapshotStep::Part {
            let own = self.raft.metrics().borrow_watched().vote;
            // A leader of the past hears so before it has sent all.
            let offset = if own > leader { 0 } else { self.incoming.receive(&mut held, &of, &mut parts).await? };
            return Ok((own, offset));
        }
        if step == SnapshotStep::Whole {
            // It begins with its first chunk, whatever is here, and is not gone on with.
            let received = self.incoming.receive(&mut held, &of, &mut parts).await;
            if !received.as_ref().is_ok_and(|received| *received == bytes) {
                *held = None;
                return Err(received.err().unwrap_or_else(incoming::missing));
            }
        }
        let install = Arc::clone(&self.incoming).install(self.raft.clone(), leader, of, held);
        // Not given up with the call: the file must stay for as long as openraft may want it.
        let installed = tokio::spawn(install).await;
        Ok((installed.map_err(|error| status(ErrorCode::Internal, error.to_string()))??, bytes))
    }
}

/// openraft's answers borrow its handle; here they own it. The task ends with the stream.
fn owned_answers(
    raft: Raft,
    input: impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static,
) -> impl Stream<Item = Result<StreamAppendResult<TypeConfig>, Fatal<TypeConfig>>> + Send + 'static {
    let (tx, rx) = mpsc::channel(64);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut answers = std::pin::pin!(raft.stream_append(input));
        while let Some(answer) = answers.next().await {
            if tx.send(answer).await.is_err() {
                return;
            }
        }
    });
    futures::stream::unfold((rx, task), |(mut rx, task)| async move { Some((rx.recv().await?, (rx, task))) })
}

#[tonic::async_trait]
impl RaftService for RaftHandler {
    type AppendStream = BoxStream<'static, Result<raft::AppendResponse, Status>>;

    async fn append(&self, request: Request<Streaming<raft::AppendRequest>>) -> Answer<Self::AppendStream> {
        let info = auth::peer(&request)?;
        Ok(Response::new(self.clone().append_stream(info, request.into_inner()).boxed()))
    }

    async fn heartbeat(&self, request: Request<raft::AppendRequest>) -> Answer<raft::AppendResponse> {
        let info = auth::peer(&request)?;
        let (from, request) = self.append_request(&info, request.into_inner()).await?;
        let input = futures::stream::once(async move { request });
        let mut answers = std::pin::pin!(self.raft.stream_append(input));
        match answers.next().await {
            Some(Ok(result)) => Ok(Response::new(self.append_answer(from, result))),
            Some(Err(fatal)) => Err(stopped(fatal)),
            None => Err(stopped("no answer")),
        }
    }

    async fn vote(&self, request: Request<raft::VoteRequest>) -> Answer<raft::VoteResponse> {
        let info = auth::peer(&request)?;
        let request = request.into_inner();
        let from = self.admit(&info, request.envelope.as_ref()).await?;
        let mut rpc = VoteRequest::new(vote(request.vote).map_err(garbled)?, request.last_log_id.map(log_id));
        rpc.leadership_transfer = request.leadership_transfer;
        let answer = if request.pre { self.raft.pre_vote(rpc).await } else { self.raft.vote(rpc).await };
        let answer = answer.map_err(stopped)?;
        if answer.vote_granted && !request.pre {
            failpoint::pass(Point::VoteAnswer);
        }
        Ok(Response::new(raft::VoteResponse {
            envelope: self.envelope(from),
            vote: Some(vote_to_wire(&answer.vote)),
            granted: answer.vote_granted,
            last_log_id: answer.last_log_id.as_ref().map(log_id_to_wire),
        }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<raft::SnapshotRequest>>,
    ) -> Answer<raft::SnapshotResponse> {
        let info = auth::peer(&request)?;
        let mut parts = request.into_inner();
        let Some(raft::SnapshotRequest { part: Some(raft::snapshot_request::Part::Header(header)) }) =
            parts.message().await?
        else {
            return Err(status(ErrorCode::DigestMismatch, "a snapshot begins with its header"));
        };
        let from = self.admit(&info, header.envelope.as_ref()).await?;
        let (vote, offset) = self.take_snapshot(header, parts).await?;
        let vote = Some(vote_to_wire(&vote));
        Ok(Response::new(raft::SnapshotResponse { envelope: self.envelope(from), vote, offset }))
    }

    async fn transfer_leader(
        &self,
        request: Request<raft::TransferLeaderRequest>,
    ) -> Answer<raft::TransferLeaderResponse> {
        let info = auth::peer(&request)?;
        let request = request.into_inner();
        let from = self.admit(&info, request.envelope.as_ref()).await?;
        let leader = vote(request.from_leader).map_err(garbled)?;
        let rpc = TransferLeaderRequest::new(leader, request.to, request.last_log_id.map(log_id));
        let answer = self.raft.handle_transfer_leader(rpc).await.map_err(stopped)?;
        let refused = answer.err().map_or_else(String::new, |error| error.to_string());
        Ok(Response::new(raft::TransferLeaderResponse { envelope: self.envelope(from), refused }))
    }

    async fn identify(&self, request: Request<raft::IdentifyRequest>) -> Answer<raft::IdentifyResponse> {
        let info = auth::peer(&request)?;
        // Whoever asks is not asked in turn: two that start at once would wait for each other.
        let from = self.peers.admit(&info, request.into_inner().envelope.as_ref())?;
        let envelope = Some(self.peers.identify(from)?);
        Ok(Response::new(raft::IdentifyResponse { envelope }))
    }
}

/// Handles `helix.peer.v1.PeerService`.
#[derive(Clone)]
pub struct PeerHandler {
    registry: Registry,
    raft: Raft,
    peers: Peers,
    liveness: Arc<OnceLock<Arc<dyn LivenessSource>>>,
}

impl PeerHandler {
    pub(super) fn new(registry: Registry, raft: Raft, peers: Peers) -> Self {
        Self { registry, raft, peers, liveness: Arc::default() }
    }

    /// Says who answers for the workers' liveness; the first one stays.
    pub fn set_liveness(&self, source: Arc<dyn LivenessSource>) {
        let _ = self.liveness.set(source);
    }

    /// The service to put on the coordinators' port.
    #[must_use]
    pub fn service(self) -> PeerServiceServer<Self> {
        PeerServiceServer::new(self).max_decoding_message_size(4 * MESSAGE_BYTES_MAX)
    }

    fn refusal(&self, error: &ProposeError) -> Status {
        match error {
            ProposeError::NoLeader { hint } => not_leader(hint.as_deref()),
            ProposeError::OutcomeUnknown => status(ErrorCode::OutcomeUnknown, error.to_string()),
            ProposeError::ShuttingDown => status(ErrorCode::ShuttingDown, error.to_string()),
            ProposeError::UpgradePending { node, version, known, .. } => upgrade_pending(error, *node, version, *known),
            ProposeError::Storage(_) => status(ErrorCode::Internal, error.to_string()),
        }
    }
}

#[tonic::async_trait]
impl PeerService for PeerHandler {
    async fn propose(&self, request: Request<peer::ProposeRequest>) -> Answer<peer::ProposeResponse> {
        let info = auth::peer(&request)?;
        let request = request.into_inner();
        self.peers.admit_caller(&info, request.caller)?;
        let commands = decode_commands(request.format, request.commands, self.peers.format()).map_err(garbled)?;
        let replies = self.registry.propose_forwarded(commands).await.map_err(|error| self.refusal(&error))?;
        failpoint::pass(Point::ForwardAnswer);
        Ok(Response::new(peer::ProposeResponse { replies: replies.iter().map(reply_to_wire).collect() }))
    }

    async fn read_index(&self, request: Request<peer::ReadIndexRequest>) -> Answer<peer::ReadIndexResponse> {
        let info = auth::peer(&request)?;
        self.peers.admit_caller(&info, request.into_inner().caller)?;
        match read_index(&self.raft).await {
            Some(index) => Ok(Response::new(peer::ReadIndexResponse { index })),
            None => Err(not_leader(self.registry.leader_hint().as_deref())),
        }
    }

    async fn liveness(&self, request: Request<peer::LivenessRequest>) -> Answer<peer::LivenessResponse> {
        let info = auth::peer(&request)?;
        self.peers.admit_caller(&info, request.into_inner().caller)?;
        match self.liveness.get() {
            Some(source) => source.liveness().await.map(Response::new),
            None => Err(not_leader(None)),
        }
    }
}
