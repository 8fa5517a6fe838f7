//! openraft's values to and from our messages, for the wire, the log and snapshots.
//!
//! Invariant: what openraft's own types look like when serialised is never stored nor sent.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use bytes::Bytes;
use helix_proto::raft;
use openraft::EntryPayload;

use super::types::{Batch, Entry, LeaderId, LogId, Member, Membership, Payload, StoredMembership, Vote};
use crate::codec::CodecError;

/// The highest form of log entries this program understands.
pub(super) const ENTRY_VERSION: u32 = 1;

pub(super) fn malformed(what: &'static str, why: impl Into<String>) -> CodecError {
    CodecError::Malformed { what, why: why.into() }
}

pub(super) fn log_id_to_wire(id: &LogId) -> raft::LogId {
    raft::LogId { term: id.committed_leader_id().term, node: id.committed_leader_id().node_id, index: id.index() }
}

pub(super) fn log_id(wire: raft::LogId) -> LogId {
    LogId::new(LeaderId { term: wire.term, node_id: wire.node }, wire.index)
}

pub(super) fn vote_to_wire(vote: &Vote) -> raft::Vote {
    raft::Vote { term: vote.leader_id().term, node: vote.leader_id().node_id, committed: vote.is_committed() }
}

pub(super) fn vote(wire: Option<raft::Vote>) -> Result<Vote, CodecError> {
    let wire = wire.ok_or_else(|| malformed("vote", "it is missing"))?;
    Ok(if wire.committed { Vote::new_committed(wire.term, wire.node) } else { Vote::new(wire.term, wire.node) })
}

pub(super) fn membership_to_wire(membership: &Membership) -> raft::Membership {
    let sets = membership.get_joint_config().iter();
    raft::Membership {
        sets: sets.map(|set| raft::VoterSet { ids: set.iter().copied().collect() }).collect(),
        members: membership
            .nodes()
            .map(|(id, member)| raft::Member { id: *id, address: member.address.clone() })
            .collect(),
    }
}

pub(super) fn membership(wire: raft::Membership) -> Result<Membership, CodecError> {
    let sets: Vec<BTreeSet<u64>> = wire.sets.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    let members: BTreeMap<u64, Member> =
        wire.members.into_iter().map(|member| (member.id, Member { address: member.address })).collect();
    if sets.iter().any(BTreeSet::is_empty) {
        return Err(malformed("membership", "an empty set of voters"));
    }
    if sets.iter().flatten().any(|voter| !members.contains_key(voter)) {
        return Err(malformed("membership", "a voter that is no member"));
    }
    Membership::new(sets, members).map_err(|error| malformed("membership", error.to_string()))
}

pub(super) fn stored_membership_to_wire(stored: &StoredMembership) -> raft::StoredMembership {
    raft::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_wire),
        membership: Some(membership_to_wire(stored.membership())),
    }
}

pub(super) fn stored_membership(wire: Option<raft::StoredMembership>) -> Result<StoredMembership, CodecError> {
    let Some(wire) = wire else { return Ok(StoredMembership::default()) };
    let id = wire.log_id.map(log_id);
    let membership = membership(wire.membership.unwrap_or_default())?;
    Ok(StoredMembership::new(id, membership))
}

/// An entry's payload as the log stores it.
pub(super) fn payload_to_wire(payload: &Payload) -> raft::Entry {
    let payload = match payload {
        EntryPayload::Blank => raft::entry::Payload::Blank(raft::Blank {}),
        EntryPayload::Normal(batch) => raft::entry::Payload::Batch(batch.encoded().clone()),
        EntryPayload::Membership(it) => raft::entry::Payload::Membership(membership_to_wire(it)),
    };
    raft::Entry { version: ENTRY_VERSION, log_id: None, payload: Some(payload) }
}

pub(super) fn payload(wire: raft::Entry) -> Result<Payload, CodecError> {
    let newer = |needed| CodecError::Newer { what: "a log entry", needed, known: ENTRY_VERSION };
    if wire.version > ENTRY_VERSION {
        return Err(newer(wire.version));
    }
    Ok(match wire.payload.ok_or_else(|| newer(ENTRY_VERSION + 1))? {
        raft::entry::Payload::Blank(raft::Blank {}) => EntryPayload::Blank,
        raft::entry::Payload::Batch(encoded) => EntryPayload::Normal(Batch::decode(encoded)?),
        raft::entry::Payload::Membership(it) => EntryPayload::Membership(membership(it)?),
    })
}

pub(super) fn entry_to_wire(entry: &Entry) -> raft::Entry {
    raft::Entry { log_id: Some(log_id_to_wire(&entry.log_id)), ..payload_to_wire(&entry.payload) }
}

pub(super) fn entry(mut wire: raft::Entry) -> Result<Entry, CodecError> {
    let id = wire.log_id.take().ok_or_else(|| malformed("log entry", "it has no id"))?;
    Ok(Entry { log_id: log_id(id), payload: payload(wire)? })
}

/// About how many bytes an entry takes on the wire and in the log.
pub(super) fn payload_bytes(payload: &Payload) -> usize {
    match payload {
        EntryPayload::Blank => 16,
        EntryPayload::Normal(batch) => batch.encoded().len() + 16,
        EntryPayload::Membership(it) => it.nodes().map(|(_, member)| member.address.len() + 32).sum::<usize>() + 32,
    }
}

pub(super) fn decode_message<M: prost::Message + Default>(what: &'static str, bytes: Bytes) -> io::Result<M> {
    M::decode(bytes).map_err(|error| malformed(what, error.to_string()).into())
}
