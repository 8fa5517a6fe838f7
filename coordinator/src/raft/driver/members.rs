//! Single steps of a change of the members, as openraft takes them.
//!
//! Whether a step is wise is not asked here. Invariant: an error says exactly what is known of its outcome.

use std::collections::BTreeSet;

use helix_model::NodeId;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};

use crate::raft::types::{Member, Raft, TypeConfig};
use crate::registry::{MemberStep, MembershipError};

type WriteError = RaftError<TypeConfig, ClientWriteError<TypeConfig>>;

fn refused(error: WriteError) -> MembershipError {
    match error {
        // Here the hint is a number: the task that owns consensus makes an endpoint of it.
        RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
            MembershipError::NotLeader { hint: to.leader_id.map(|leader| leader.to_string()) }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => MembershipError::OutcomeUnknown,
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
        )) => MembershipError::Busy,
        RaftError::APIError(error) => MembershipError::Refused(error.to_string()),
        RaftError::Fatal(_) => MembershipError::ShuttingDown,
    }
}

/// Carries out a step; returns when it is committed.
pub(super) async fn carry_out(raft: Raft, step: MemberStep) -> Result<(), MembershipError> {
    let one = |node: NodeId| BTreeSet::from([node.0]);
    match step {
        MemberStep::Admit { node, address } => {
            let member = Member { address };
            let known = raft.metrics().borrow_watched().membership_config.membership().get_node(&node.0).cloned();
            match known {
                Some(known) if known == member => return Ok(()),
                Some(known) => {
                    return Err(MembershipError::Refused(format!("node {node} is a member at {}", known.address)));
                }
                None => {}
            }
            raft.add_learner(node.0, member, false).await.map_err(refused)?;
        }
        MemberStep::Promote(node) => change(&raft, ChangeMembers::AddVoterIds(one(node))).await?,
        MemberStep::Demote(node) => change(&raft, ChangeMembers::RemoveVoters(one(node))).await?,
        MemberStep::Drop(node) => change(&raft, ChangeMembers::RemoveNodes(one(node))).await?,
    }
    Ok(())
}

/// Goes on to the second of two sets of voters, where both are in force.
pub(super) async fn complete(raft: Raft) -> Result<(), MembershipError> {
    change(&raft, ChangeMembers::AddVoterIds(BTreeSet::new())).await
}

async fn change(raft: &Raft, change: ChangeMembers<u64, Member>) -> Result<(), MembershipError> {
    // Voters that lose their vote stay members: whether they go is a step of its own.
    raft.change_membership(change, true).await.map(drop).map_err(refused)
}

/// Asks a voter to stand for election at once.
pub(super) async fn ask_to_lead(raft: Raft, to: NodeId) -> Result<(), MembershipError> {
    let leader = raft.metrics().borrow_watched().current_leader;
    if leader != Some(*raft.node_id()) {
        return Err(MembershipError::NotLeader { hint: leader.map(|leader| leader.to_string()) });
    }
    raft.trigger().transfer_leader(to.0).await.map_err(|_| MembershipError::ShuttingDown)
}
