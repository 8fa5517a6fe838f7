//! openraft's network: one client per peer and purpose, each on a connection of its own.
//!
//! A peer that cannot be reached is `Unreachable`, with a back-off of tens of milliseconds. An append stream takes its
//! first request before it calls, because openraft's back-off is applied inside the request stream. Every request
//! says who speaks to whom, and every answer is checked for the same.

mod sending;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::stream::{BoxStream, once, unfold};
use futures::{Stream, StreamExt};
use helix_model::NodeId;
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_proto::raft;
use helix_proto::raft::raft_service_client::RaftServiceClient;
use openraft::base::BoxFuture;
use openraft::errors::{NetworkError, RPCError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderError, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tonic::Status;
use tonic::transport::Channel;

use super::transfer::Transfer;
use super::types::{LogId, Member, TypeConfig};
use super::wire::{entry_to_wire, log_id, log_id_to_wire, vote, vote_to_wire};
use crate::codec::CodecError;
use crate::peers::{Peers, Purpose};
use crate::registry::Shared;

/// An append stream with requests unanswered for so long is given up and made anew.
const STALLED_AFTER: Duration = Duration::from_secs(3);

/// Room in front of four megabytes, for an entry at its largest.
const APPEND_BYTES_MAX: usize = 4 * MESSAGE_BYTES_MAX;

type Rpc<T> = Result<T, RPCError<TypeConfig>>;
type Answers<'s> = BoxStream<'s, Rpc<StreamAppendResult<TypeConfig>>>;

/// Makes clients.
pub(crate) struct Network {
    peers: Peers,
    shared: Arc<Shared>,
    transfer: Transfer,
}

impl Network {
    pub(crate) fn new(peers: Peers, shared: Arc<Shared>, transfer: Transfer) -> Self {
        Self { peers, shared, transfer }
    }

    fn client(&self, target: u64, member: &Member, purpose: Purpose) -> Client {
        Client {
            link: Link {
                peers: self.peers.clone(),
                shared: Arc::clone(&self.shared),
                target: NodeId(target),
                address: member.address.clone(),
            },
            purpose,
            transfer: self.transfer,
            told: false,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node, Purpose::Append)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node, Purpose::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node, Purpose::Snapshot)
    }
}

/// One peer, for one purpose.
pub(crate) struct Client {
    link: Link,
    purpose: Purpose,
    transfer: Transfer,
    /// Whether it was said that the snapshot does not get through.
    told: bool,
}

#[derive(Clone)]
struct Link {
    peers: Peers,
    shared: Arc<Shared>,
    target: NodeId,
    address: String,
}

fn unreachable(why: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(why))
}

impl Link {
    fn service(&self, purpose: Purpose) -> Rpc<RaftServiceClient<Channel>> {
        let channel = self.peers.channel_at(self.target, &self.address, purpose).map_err(unreachable)?;
        let client = RaftServiceClient::new(channel);
        Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(APPEND_BYTES_MAX))
    }

    fn envelope(&self) -> Option<raft::Envelope> {
        Some(self.peers.envelope(self.target))
    }

    /// Looks at who answered, and at their clock.
    async fn check(&self, envelope: Option<&raft::Envelope>) -> Rpc<()> {
        let refused = |refusal: Status| unreachable(refusal.message());
        self.peers.check_answer(self.target, envelope).map_err(refused)?;
        let run = envelope.map_or(0, |envelope| envelope.from_run);
        self.peers.expect_one_run(self.target, run).await.map_err(refused)?;
        self.shared.clock.observe(self.target, envelope.map_or(0, |envelope| envelope.clock_ms));
        Ok(())
    }

    fn failed(&self, status: &Status) -> RPCError<TypeConfig> {
        self.peers.heed(self.target, status);
        unreachable(format!("node {}: {:?}: {}", self.target, status.code(), status.message()))
    }

    fn garbled(&self, error: &CodecError) -> RPCError<TypeConfig> {
        RPCError::Network(NetworkError::from_string(format!("node {}: {error}", self.target)))
    }

    fn append_to_wire(&self, request: &AppendEntriesRequest<TypeConfig>) -> raft::AppendRequest {
        raft::AppendRequest {
            envelope: self.envelope(),
            vote: Some(vote_to_wire(&request.vote)),
            prev: request.prev_log_id.as_ref().map(log_id_to_wire),
            entries: request.entries.iter().map(entry_to_wire).collect(),
            leader_commit: request.leader_commit.as_ref().map(log_id_to_wire),
        }
    }

    async fn append_answer(&self, answer: raft::AppendResponse) -> Rpc<StreamAppendResult<TypeConfig>> {
        self.check(answer.envelope.as_ref()).await?;
        let missing = || RPCError::Network(NetworkError::from_string("an answer without a result"));
        Ok(match answer.result.ok_or_else(missing)? {
            raft::append_response::Result::Flushed(it) => Ok(it.log_id.map(log_id)),
            raft::append_response::Result::Conflict(it) => Err(StreamAppendError::Conflict(log_id(it))),
            raft::append_response::Result::HigherVote(it) => {
                Err(StreamAppendError::HigherVote(vote(Some(it)).map_err(|error| self.garbled(&error))?))
            }
        })
    }

    async fn heartbeat(
        &self,
        request: &AppendEntriesRequest<TypeConfig>,
        limit: Duration,
    ) -> Rpc<StreamAppendResult<TypeConfig>> {
        let mut service = self.service(Purpose::Heartbeat)?;
        let call = service.heartbeat(self.append_to_wire(request));
        let answer =
            tokio::time::timeout(limit, call).await.map_err(|_| unreachable("a heartbeat was not answered"))?;
        self.append_answer(answer.map_err(|status| self.failed(&status))?.into_inner()).await
    }

    async fn append<S>(&self, mut input: S) -> Rpc<Answers<'static>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let Some(first) = input.next().await else { return Ok(futures::stream::empty().boxed()) };
        let sent = Arc::new(AtomicU64::new(0));
        let requests = {
            let (link, sent) = (self.clone(), Arc::clone(&sent));
            once(async move { first }).chain(input).map(move |request| {
                sent.fetch_add(1, Ordering::Relaxed);
                link.append_to_wire(&request)
            })
        };
        let mut service = self.service(Purpose::Append)?;
        let answers = tokio::time::timeout(STALLED_AFTER, service.append(requests)).await;
        let answers = answers.map_err(|_| unreachable("the append stream did not open"))?;
        let answers = answers.map_err(|status| self.failed(&status))?.into_inner();
        let state = Some((self.clone(), answers, sent, 0u64));
        Ok(unfold(state, |state| async move {
            let (link, mut answers, sent, received) = state?;
            let answer = match next_answer(&mut answers, &sent, received).await {
                Ok(None) => return None,
                Ok(Some(answer)) => link.append_answer(answer).await,
                Err(status) => Err(link.failed(&status)),
            };
            let next = matches!(answer, Ok(Ok(_))).then_some((link, answers, sent, received + 1));
            Some((answer, next))
        })
        .boxed())
    }
}

/// The next answer; an error when requests stay unanswered.
async fn next_answer(
    answers: &mut tonic::Streaming<raft::AppendResponse>,
    sent: &AtomicU64,
    received: u64,
) -> Result<Option<raft::AppendResponse>, Status> {
    let mut waiting = Duration::ZERO;
    let tick = Duration::from_millis(500);
    loop {
        match tokio::time::timeout(tick, answers.message()).await {
            Ok(answer) => return answer,
            Err(_) if sent.load(Ordering::Relaxed) <= received => waiting = Duration::ZERO,
            Err(_) => waiting += tick,
        }
        if waiting >= STALLED_AFTER {
            return Err(Status::unavailable("appends are not answered"));
        }
    }
}

impl NetBackoff<TypeConfig> for Client {
    fn backoff(&self) -> Option<Backoff> {
        let (first, then) = match self.purpose {
            // Whoever lacks a whole snapshot can wait a little longer.
            Purpose::Snapshot => ([50, 200, 500], 1_000),
            Purpose::Heartbeat | Purpose::Append | Purpose::Control | Purpose::Bulk => ([10, 20, 40], 50),
        };
        let waits = first.into_iter().chain(std::iter::repeat(then));
        Some(Backoff::new(waits.map(Duration::from_millis)))
    }
}

impl NetStreamAppend<TypeConfig> for Client {
    fn stream_append<'s, S>(&'s mut self, mut input: S, option: RPCOption) -> BoxFuture<'s, Rpc<Answers<'s>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        if self.purpose != Purpose::Heartbeat {
            let link = self.link.clone();
            return Box::pin(async move { link.append(input).await });
        }
        // The interval between heartbeats is openraft's limit here; a stalled peer may take a few of them to answer.
        let limit = option.hard_ttl() * 4;
        let link = self.link.clone();
        Box::pin(async move {
            let Some(first) = input.next().await else { return Ok(futures::stream::empty().boxed()) };
            let state = Some((link, Some(first), input));
            Ok(unfold(state, move |state| async move {
                let (link, first, mut input) = state?;
                let request = match first {
                    Some(first) => first,
                    None => input.next().await?,
                };
                let answer = link.heartbeat(&request, limit).await;
                let next = matches!(answer, Ok(Ok(_))).then_some((link, None, input));
                Some((answer, next))
            })
            .boxed())
        })
    }
}

impl Client {
    async fn ask_vote(
        &self,
        rpc: VoteRequest<TypeConfig>,
        pre: bool,
        option: &RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        let link = &self.link;
        let request = raft::VoteRequest {
            envelope: link.envelope(),
            vote: Some(vote_to_wire(&rpc.vote)),
            last_log_id: rpc.last_log_id.as_ref().map(log_id_to_wire),
            leadership_transfer: rpc.leadership_transfer,
            pre,
        };
        let mut service = link.service(Purpose::Heartbeat)?;
        let answer = tokio::time::timeout(option.hard_ttl(), service.vote(request)).await;
        let answer = answer.map_err(|_| unreachable("a vote was not answered"))?;
        let answer = answer.map_err(|status| link.failed(&status))?.into_inner();
        link.check(answer.envelope.as_ref()).await?;
        let vote = vote(answer.vote).map_err(|error| link.garbled(&error))?;
        Ok(VoteResponse::new(vote, answer.last_log_id.map(log_id), answer.granted))
    }
}

impl NetVote<TypeConfig> for Client {
    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, false, &option).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, true, &option).await
    }
}

impl NetTransferLeader<TypeConfig> for Client {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        let link = &self.link;
        let wire = raft::TransferLeaderRequest {
            envelope: link.envelope(),
            from_leader: Some(vote_to_wire(request.from_leader())),
            to: *request.to_node_id(),
            last_log_id: request.last_log_id().map(log_id_to_wire),
        };
        let mut service = link.service(Purpose::Heartbeat)?;
        let answer = tokio::time::timeout(option.hard_ttl().max(STALLED_AFTER), service.transfer_leader(wire)).await;
        let answer = answer.map_err(|_| unreachable("the transfer was not answered"))?;
        let answer = answer.map_err(|status| link.failed(&status))?.into_inner();
        link.check(answer.envelope.as_ref()).await?;
        if answer.refused.is_empty() {
            return Ok(Ok(()));
        }
        tracing::info!(node = link.target.0, why = answer.refused, "the successor does not stand");
        let expected: Option<LogId> = request.last_log_id().cloned();
        Ok(Err(TransferLeaderError::LogNotFlushed { expected, actual: None }))
    }
}
