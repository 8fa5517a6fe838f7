//! The types that consensus is made of: what an entry carries, what applying it answers, what a member is.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use helix_core::{Command, Reply};
use helix_model::LogTime;
use helix_proto::store;

use super::snapshot::SnapshotFile;
#[cfg(test)]
use crate::codec::command_to_wire;
use crate::codec::{CodecError, decode_batch, encode_batch};

openraft::declare_raft_types!(
    /// What openraft is instantiated with.
    pub(crate) TypeConfig:
        D = Batch,
        R = Replies,
        NodeId = u64,
        Node = Member,
);

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type Payload = openraft::type_config::alias::PayloadOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>;
pub(crate) type Raft = openraft::Raft<TypeConfig, super::state_machine::StateMachine>;

/// A coordinator as membership knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Member {
    /// HOST:PORT of its coordinators' port.
    pub(crate) address: String,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

/// Commands that share a log entry, with the bytes they are stored and sent as: encoded once, decoded once.
#[derive(Clone)]
pub(crate) struct Batch(Arc<BatchParts>);

struct BatchParts {
    at: LogTime,
    commands: Vec<Command>,
    encoded: Bytes,
}

impl Batch {
    /// Stamps and encodes commands.
    #[cfg(test)]
    pub(crate) fn new(at: LogTime, commands: Vec<Command>) -> Self {
        let wire = commands.iter().map(command_to_wire).collect();
        Self::from_parts(at, commands, wire)
    }

    /// Stamps commands whose durable form is made already.
    pub(crate) fn from_parts(at: LogTime, commands: Vec<Command>, wire: Vec<store::Command>) -> Self {
        let encoded = encode_batch(at, wire).into();
        Self(Arc::new(BatchParts { at, commands, encoded }))
    }

    /// Reads what [`Self::encoded`] gave.
    ///
    /// # Errors
    /// [`CodecError`].
    pub(crate) fn decode(encoded: Bytes) -> Result<Self, CodecError> {
        let (at, commands) = decode_batch(&encoded)?;
        Ok(Self(Arc::new(BatchParts { at, commands, encoded })))
    }

    /// The leader's stamp.
    #[must_use]
    pub(crate) fn at(&self) -> LogTime {
        self.0.at
    }

    /// The commands, in order.
    #[must_use]
    pub(crate) fn commands(&self) -> &[Command] {
        &self.0.commands
    }

    /// The durable form.
    #[must_use]
    pub(crate) fn encoded(&self) -> &Bytes {
        &self.0.encoded
    }
}

impl PartialEq for Batch {
    fn eq(&self, other: &Self) -> bool {
        self.0.encoded == other.0.encoded
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands at {}, {} bytes", self.0.commands.len(), self.0.at, self.0.encoded.len())
    }
}

/// What applying an entry answered, one reply per command.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Replies(pub(crate) Vec<Reply>);
