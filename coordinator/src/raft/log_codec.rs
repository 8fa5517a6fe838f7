//! What the write-ahead log stores: votes, log ids and entries, each as a length and one of our messages.
//!
//! raft-log puts a checksum around every record. A record that a newer program wrote is an error of kind `InvalidData`,
//! never `UnexpectedEof`, which raft-log takes for a record that a crash cut short.

use std::cmp::Ordering;
use std::io::{self, Read, Write};

use bytes::Bytes;
use helix_proto::raft;
use prost::Message;
use raft_log::codeq::{Decode, Encode};

use super::log_store::FlushDone;
use super::types::{LogId, Payload, Vote};
use super::wire::{
    decode_message, log_id, log_id_to_wire, payload, payload_bytes, payload_to_wire, vote, vote_to_wire,
};

/// A record longer than this was not written by us.
const RECORD_BYTES_MAX: usize = 64 << 20;

/// The types that raft-log is instantiated with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LogTypes;

impl raft_log::Types for LogTypes {
    type LogId = StoredLogId;
    type LogPayload = StoredPayload;
    type Vote = StoredVote;
    type Callback = FlushDone;
    type UserData = ();

    fn log_index(id: &StoredLogId) -> u64 {
        id.0.index()
    }

    fn payload_size(payload: &StoredPayload) -> u64 {
        u64::try_from(payload_bytes(&payload.0)).unwrap_or(u64::MAX)
    }
}

/// A log id in the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct StoredLogId(pub(super) LogId);

/// A vote in the log, ordered as Raft orders votes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct StoredVote(pub(super) Vote);

/// An entry in the log.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct StoredPayload(pub(super) Payload);

impl PartialOrd for StoredVote {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        let order = |vote: &Vote| (vote.leader_id().term, vote.leader_id().node_id, vote.is_committed());
        Some(order(&self.0).cmp(&order(&other.0)))
    }
}

fn write_record<W: Write>(mut to: W, message: &impl Message) -> io::Result<usize> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    to.write_all(&length.to_be_bytes())?;
    to.write_all(&bytes)?;
    Ok(4 + bytes.len())
}

pub(super) fn read_record<R: Read>(what: &'static str, mut from: R) -> io::Result<Bytes> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > RECORD_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{what} of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(bytes.into())
}

impl Encode for StoredLogId {
    fn encode<W: Write>(&self, to: W) -> io::Result<usize> {
        write_record(to, &log_id_to_wire(&self.0))
    }
}

impl Decode for StoredLogId {
    fn decode<R: Read>(from: R) -> io::Result<Self> {
        let wire: raft::LogId = decode_message("a log id", read_record("a log id", from)?)?;
        Ok(Self(log_id(wire)))
    }
}

impl Encode for StoredVote {
    fn encode<W: Write>(&self, to: W) -> io::Result<usize> {
        write_record(to, &vote_to_wire(&self.0))
    }
}

impl Decode for StoredVote {
    fn decode<R: Read>(from: R) -> io::Result<Self> {
        let wire: raft::Vote = decode_message("a vote", read_record("a vote", from)?)?;
        Ok(Self(vote(Some(wire))?))
    }
}

impl Encode for StoredPayload {
    fn encode<W: Write>(&self, to: W) -> io::Result<usize> {
        write_record(to, &payload_to_wire(&self.0))
    }
}

impl Decode for StoredPayload {
    fn decode<R: Read>(from: R) -> io::Result<Self> {
        let wire: raft::Entry = decode_message("a log entry", read_record("a log entry", from)?)?;
        Ok(Self(payload(wire)?))
    }
}
