//! The types that consensus is made of: what an entry carries, what applying it answers, what a member is.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

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
///
/// The commands are there until they are applied. The log's cache keeps entries for long and lets go of many at once; hundreds of
/// thousands of commands among them would hold up consensus, which waits for that.
#[derive(Clone)]
pub(crate) struct Batch(Arc<BatchParts>);

struct BatchParts {
    at: LogTime,
    count: usize,
    commands: Mutex<Option<Vec<Command>>>,
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
        Self::whole(at, commands, encoded)
    }

    /// Reads what [`Self::encoded`] gave.
    ///
    /// # Errors
    /// [`CodecError`].
    pub(crate) fn decode(encoded: Bytes) -> Result<Self, CodecError> {
        let (at, commands) = decode_batch(&encoded)?;
        Ok(Self::whole(at, commands, encoded))
    }

    fn whole(at: LogTime, commands: Vec<Command>, encoded: Bytes) -> Self {
        Self(Arc::new(BatchParts { at, count: commands.len(), commands: Mutex::new(Some(commands)), encoded }))
    }

    /// The leader's stamp.
    #[must_use]
    pub(crate) fn at(&self) -> LogTime {
        self.0.at
    }

    /// The commands, in order, out of this batch and its clones; a second time they are decoded.
    ///
    /// # Errors
    /// [`CodecError`], which it would have been before.
    pub(crate) fn take_commands(&self) -> Result<Vec<Command>, CodecError> {
        let taken = self.0.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.map_or_else(|| decode_batch(&self.0.encoded).map(|(_, commands)| commands), Ok)
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
        write!(f, "{} commands at {}, {} bytes", self.0.count, self.0.at, self.0.encoded.len())
    }
}

/// What applying an entry answered, one reply per command.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Replies(pub(crate) Vec<Reply>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::tests::harness::submit;

    #[test]
    fn commands_are_taken_once_and_read_from_then_on() {
        let commands: Vec<Command> = ["a", "b"].map(submit).into();
        let batch = Batch::new(LogTime(7), commands.clone());
        let (copy, decoded) = (batch.clone(), Batch::decode(batch.encoded().clone()).unwrap());
        assert_eq!(copy.take_commands().unwrap(), commands);
        assert!(batch.0.commands.lock().unwrap().is_none());
        assert_eq!(batch.take_commands().unwrap(), commands);
        assert!(batch == decoded && decoded.at() == LogTime(7));
        assert_eq!(decoded.take_commands().unwrap(), commands);
    }
}
