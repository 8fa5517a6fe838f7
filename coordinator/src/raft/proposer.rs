//! Proposals on their way into the log: one entry under way, everything that arrives meanwhile in the next.
//!
//! On the leader that entry is proposed; elsewhere the same batch goes to the leader in one call. An error says exactly
//! what is known: a proposal is tried again here only where it certainly was not taken.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_common::status::{error_code, metadata, with_metadata};
use helix_core::{Command, Reply};
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_model::{ErrorCode, NodeId};
use helix_proto::peer::peer_service_client::PeerServiceClient;
use helix_proto::{peer, store};
use openraft::errors::{ClientWriteError, RaftError};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::formats::hold;
use super::types::{Batch, Raft, TypeConfig};
use crate::codec::{CodecError, command_from_wire, reply_from_wire};
use crate::peers::Peers;
use crate::registry::{ENTRY_BYTES, ENTRY_COMMANDS, Leadership, Proposal, ProposeError, Route, Shared};

/// How long a proposal waits for somebody to lead.
const LEADER_WAIT: Duration = Duration::from_secs(3);
/// How long a proposal that was taken waits for its outcome.
const OUTCOME_WAIT: Duration = Duration::from_secs(10);
/// How long a leader that another has followed may still take to answer.
const SUPERSEDED_WAIT: Duration = Duration::from_millis(250);
/// Between attempts at a leader that does not lead any more.
const RETRY_WAIT: Duration = Duration::from_millis(20);

/// Reads commands that another coordinator sends on, on a node that knows the formats up to `known`.
pub(super) fn decode_commands(format: u32, wire: Vec<store::Command>, known: u32) -> Result<Vec<Command>, CodecError> {
    if format > known {
        return Err(CodecError::Newer { what: "a proposal", needed: format, known });
    }
    wire.into_iter().map(command_from_wire).collect()
}

/// The facts of a refusal that waits for an upgrade, as coordinators tell each other.
const PENDING_NODE: &str = "node";
const PENDING_VERSION: &str = "version";
const PENDING_KNOWN: &str = "known";

/// "Not before that node is upgraded."
pub(crate) fn upgrade_pending(error: &ProposeError, node: NodeId, version: &str, known: u32) -> Status {
    let facts =
        [(PENDING_NODE, node.to_string()), (PENDING_VERSION, version.to_owned()), (PENDING_KNOWN, known.to_string())];
    with_metadata(ErrorCode::UpgradePending, error.to_string(), facts)
}

/// The task that proposes.
pub(super) struct Proposer {
    pub(super) raft: Raft,
    pub(super) shared: Arc<Shared>,
    pub(super) peers: Peers,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) queue: mpsc::Receiver<Proposal>,
    pub(super) stop: CancellationToken,
}

/// What became of an attempt.
enum Attempt {
    Done(Vec<Reply>),
    /// Certainly not taken: another attempt is safe.
    NotTaken,
    Failed(ProposeError),
}

impl Proposer {
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let mut carried = None;
        loop {
            let first = match carried.take() {
                Some(proposal) => proposal,
                None => tokio::select! {
                    () = stop.cancelled() => break,
                    proposal = self.queue.recv() => match proposal {
                        Some(proposal) => proposal,
                        None => return,
                    },
                },
            };
            let mut batch = vec![first];
            carried = self.fill(&mut batch);
            tokio::select! {
                () = self.settle(batch) => {}
                // Dropping the proposals answers them with "unknown", which is true of those under way.
                () = stop.cancelled() => break,
            }
        }
        self.queue.close();
        for proposal in carried.into_iter().chain(std::iter::from_fn(|| self.queue.try_recv().ok())) {
            drop(proposal.reply.send(Err(ProposeError::ShuttingDown)));
        }
    }

    /// Adds what has arrived meanwhile; what does not fit is answered back.
    fn fill(&mut self, batch: &mut Vec<Proposal>) -> Option<Proposal> {
        let mut bytes: usize = batch.iter().map(|proposal| proposal.bytes).sum();
        let mut commands: usize = batch.iter().map(|proposal| proposal.commands.len()).sum();
        while let Ok(next) = self.queue.try_recv() {
            bytes += next.bytes;
            commands += next.commands.len();
            // Of one format: what is said of a call, or refused, is then true of all that is in it.
            let same = batch.first().is_none_or(|first| first.format == next.format);
            if bytes > ENTRY_BYTES || commands > ENTRY_COMMANDS || !same {
                return Some(next);
            }
            batch.push(next);
        }
        None
    }

    /// Tries until there is an outcome, or nobody leads for too long.
    async fn settle(&mut self, mut batch: Vec<Proposal>) {
        let deadline = Instant::now() + LEADER_WAIT;
        loop {
            let now = *self.leadership.borrow_and_update();
            let leader = now.leader;
            self.refuse_misplaced(&mut batch, now);
            if batch.is_empty() {
                return;
            }
            let attempt = match leader {
                _ if now.is_leader => {
                    hold(&mut batch, &self.shared, &self.peers);
                    if batch.is_empty() {
                        return;
                    }
                    self.commit(&batch).await
                }
                Some(other) if other != self.peers.own() => self.send_on(&batch, other).await,
                Some(_) | None => Attempt::NotTaken,
            };
            match attempt {
                Attempt::Done(replies) => return answer(batch, replies),
                Attempt::Failed(error) => return fail(batch, &error),
                Attempt::NotTaken => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let hint = leader.and_then(|leader| self.shared.grpc_of(leader));
                return fail(batch, &ProposeError::NoLeader { hint });
            }
            // A change of leadership, or a moment, whichever comes first; the sender outlives us.
            let wait = if leader.is_some() { RETRY_WAIT } else { left };
            let _ = tokio::time::timeout(wait.min(left), self.leadership.changed()).await;
        }
    }

    /// Two coordinators that take each other for the leader must not play ball; and what a leader decided is nobody else's to
    /// carry out: one that was away decides that everybody has been silent.
    fn refuse_misplaced(&self, batch: &mut Vec<Proposal>, now: Leadership) {
        let elsewhere = !now.is_leader && now.leader.is_some_and(|leader| leader != self.peers.own());
        let misplaced = |proposal: &Proposal| match proposal.route {
            Route::Anywhere => false,
            Route::Forwarded => elsewhere,
            Route::InTerm(term) => !now.is_leader || now.term != term,
        };
        let (misplaced, kept): (Vec<_>, _) = std::mem::take(batch).into_iter().partition(misplaced);
        *batch = kept;
        if !misplaced.is_empty() {
            let hint = now.leader.and_then(|leader| self.shared.grpc_of(leader));
            fail(misplaced, &ProposeError::NoLeader { hint });
        }
    }

    async fn commit(&self, batch: &[Proposal]) -> Attempt {
        let began = Instant::now();
        let commands: Vec<Command> = batch.iter().flat_map(|proposal| proposal.commands.iter().cloned()).collect();
        let wire: Vec<store::Command> = batch.iter().flat_map(|proposal| proposal.wire.iter().cloned()).collect();
        let count = commands.len();
        let entry = Batch::from_parts(self.shared.stamp(), commands, wire);
        let written = tokio::time::timeout(OUTCOME_WAIT, self.raft.client_write(entry)).await;
        match written {
            Ok(Ok(response)) => {
                self.shared.counters.commit.record(began.elapsed());
                self.shared.counters.entries.add(1);
                self.shared.counters.commands.add(count as u64);
                Attempt::Done(response.data.0)
            }
            Ok(Err(error)) => refused(error),
            Err(_) => Attempt::Failed(ProposeError::OutcomeUnknown),
        }
    }

    async fn send_on(&self, batch: &[Proposal], leader: NodeId) -> Attempt {
        let Ok(channel) = self.peers.control(leader) else { return Attempt::NotTaken };
        let mut service = PeerServiceClient::new(channel)
            .max_encoding_message_size(4 * MESSAGE_BYTES_MAX)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let commands: Vec<store::Command> = batch.iter().flat_map(|proposal| proposal.wire.iter().cloned()).collect();
        self.shared.counters.forwarded.add(commands.len() as u64);
        let caller = Some(self.peers.caller(leader));
        // The lowest that will do: a leader of an older version takes what it understands.
        let format = batch.iter().map(|proposal| proposal.format).max().unwrap_or(1);
        let call = service.propose(peer::ProposeRequest { caller, format, commands });
        let answered = tokio::select! {
            answered = tokio::time::timeout(OUTCOME_WAIT, call) => answered,
            // One that hangs answers nothing, and everything that came meanwhile would wait behind it.
            () = self.superseded(leader) => return Attempt::Failed(ProposeError::OutcomeUnknown),
        };
        match answered {
            Ok(Ok(answer)) => {
                let replies =
                    answer.into_inner().replies.into_iter().map(reply_from_wire).collect::<Result<Vec<_>, _>>();
                // Committed, and not understood here: that is not known to whoever asked.
                replies.map_or(Attempt::Failed(ProposeError::OutcomeUnknown), Attempt::Done)
            }
            Ok(Err(status)) => {
                self.peers.heed(leader, &status);
                self.pending(leader, format, &status).unwrap_or_else(|| not_taken_or_unknown(&status))
            }
            Err(_) => Attempt::Failed(ProposeError::OutcomeUnknown),
        }
    }
}

impl Proposer {
    /// What the leader refuses because a member is too old for it, maybe itself.
    fn pending(&self, leader: NodeId, needed: u32, status: &Status) -> Option<Attempt> {
        let fact = |key| metadata(status, key);
        let (node, version, known) = match error_code(status) {
            Some(ErrorCode::UpgradePending) => {
                let node = fact(PENDING_NODE)?.parse().ok()?;
                (NodeId(node), fact(PENDING_VERSION)?, fact(PENDING_KNOWN)?.parse().ok()?)
            }
            Some(ErrorCode::VersionSkew) => {
                let known = self.peers.format_of(leader).unwrap_or(needed.saturating_sub(1));
                let version = self.shared.state().node(leader).map(|row| row.version.clone());
                (leader, version.unwrap_or_default(), known)
            }
            _ => return None,
        };
        Some(Attempt::Failed(ProposeError::UpgradePending { node, version, known, needed }))
    }

    /// Returns a moment after another node was seen to lead.
    async fn superseded(&self, leader: NodeId) {
        let mut leadership = self.leadership.clone();
        if leadership.wait_for(|now| now.leader.is_some_and(|other| other != leader)).await.is_err() {
            return std::future::pending().await;
        }
        tokio::time::sleep(SUPERSEDED_WAIT).await;
    }
}

fn refused(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> Attempt {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => Attempt::NotTaken,
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => Attempt::Failed(ProposeError::OutcomeUnknown),
        RaftError::APIError(other) => Attempt::Failed(ProposeError::Storage(other.to_string())),
        // The entry may be in the log of a majority although we stop.
        RaftError::Fatal(fatal) => {
            tracing::warn!(%fatal, "consensus ended under a proposal");
            Attempt::Failed(ProposeError::OutcomeUnknown)
        }
    }
}

fn not_taken_or_unknown(status: &Status) -> Attempt {
    match error_code(status) {
        Some(
            ErrorCode::NoLeader
            | ErrorCode::NotLeader
            | ErrorCode::ShuttingDown
            | ErrorCode::WrongCluster
            | ErrorCode::NodeRemoved
            | ErrorCode::IdentityInvalid
            | ErrorCode::RoleNotAllowed,
        ) => Attempt::NotTaken,
        Some(ErrorCode::VersionSkew | ErrorCode::InvalidField) => {
            Attempt::Failed(ProposeError::Storage(status.message().to_owned()))
        }
        _ if was_never_connected(status) => Attempt::NotTaken,
        _ => Attempt::Failed(ProposeError::OutcomeUnknown),
    }
}

/// Whether a call failed before there was a connection to send it on.
fn was_never_connected(status: &Status) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

fn answer(batch: Vec<Proposal>, replies: Vec<Reply>) {
    let mut replies = replies.into_iter();
    for proposal in batch {
        let mine: Vec<Reply> = replies.by_ref().take(proposal.commands.len()).collect();
        let whole = mine.len() == proposal.commands.len();
        // Whoever went away does not want to know.
        drop(proposal.reply.send(if whole { Ok(mine) } else { Err(ProposeError::OutcomeUnknown) }));
    }
}

fn fail(batch: Vec<Proposal>, error: &ProposeError) {
    for proposal in batch {
        drop(proposal.reply.send(Err(error.clone())));
    }
}

#[cfg(test)]
mod tests {
    use helix_common::status::status;

    use super::*;

    #[test]
    fn who_does_not_hear_a_node_that_was_removed_takes_nothing_of_it() {
        let answered = |code| not_taken_or_unknown(&status(code, "no"));
        assert!(matches!(answered(ErrorCode::NodeRemoved), Attempt::NotTaken));
        assert!(matches!(answered(ErrorCode::Internal), Attempt::Failed(ProposeError::OutcomeUnknown)));
    }
}
