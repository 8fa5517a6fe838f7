//! openraft's state machine: applies entries to the state in memory and hands what they changed to the writer.
//!
//! Answers come from memory. Invariant: a reply is given after the change can be seen, and changes reach the writer
//! in the order of the log.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use helix_core::{Applied as Changes, Effect, State};
use helix_model::NodeId;
use openraft::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};

use super::snapshot::SnapshotFile;
use super::types::{Entry, LogId, Membership, Replies, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use super::writer::Writer;
use crate::peers::Peers;
use crate::registry::{Applied, Shared};

/// The registry, as openraft drives it.
pub(crate) struct StateMachine {
    shared: Arc<Shared>,
    writer: Writer,
    peers: Option<Peers>,
    meta: SnapshotMeta,
}

/// How far a log id says things are applied.
pub(super) fn applied_of(id: Option<&LogId>) -> Applied {
    id.map_or(Applied::default(), |id| Applied { term: id.committed_leader_id().term, index: id.index() })
}

pub(super) fn addresses(membership: &Membership) -> BTreeMap<NodeId, String> {
    membership.nodes().map(|(id, member)| (NodeId(*id), member.address.clone())).collect()
}

impl StateMachine {
    /// A state machine whose state is loaded up to `meta`.
    pub(crate) fn new(shared: Arc<Shared>, writer: Writer, peers: Option<Peers>, meta: SnapshotMeta) -> Self {
        let machine = Self { shared, writer, peers, meta };
        machine.publish_members();
        machine.publish_removed();
        machine
    }

    fn publish_removed(&self) {
        if let Some(peers) = &self.peers {
            let state = self.shared.state();
            peers.set_removed(state.nodes().filter(|node| node.removed_at.is_some()).map(|node| node.id).collect());
        }
    }

    fn publish_members(&self) {
        let members = addresses(self.meta.last_membership.membership());
        if members.is_empty() {
            return;
        }
        self.shared.set_members(members.clone());
        if let Some(peers) = &self.peers {
            peers.set_members(members);
        }
    }

    /// Applies an entry of a log that consensus does not drive.
    pub(super) async fn replay(&mut self, entry: Entry) -> io::Result<()> {
        self.apply_one((entry, None)).await
    }

    async fn apply_one(&mut self, (entry, responder): EntryResponder<TypeConfig>) -> io::Result<()> {
        self.writer.room().await?;
        self.meta.last_log_id = Some(entry.log_id);
        let (replies, effects) = match entry.payload {
            EntryPayload::Blank => self.change(|_, _| Replies::default()),
            EntryPayload::Normal(batch) => {
                let (at, commands) = (batch.at(), batch.take_commands()?);
                self.change(|state, changes| {
                    Replies(commands.iter().map(|command| state.apply(at, command, changes)).collect())
                })
            }
            EntryPayload::Membership(membership) => {
                self.meta.last_membership = StoredMembership::new(Some(entry.log_id), membership.clone());
                self.publish_members();
                let voters = membership.voter_ids().map(NodeId).collect();
                self.change(|state, changes| {
                    state.apply_membership(voters, changes);
                    Replies::default()
                })
            }
        };
        if effects.contains(&Effect::NodeChanged) {
            self.publish_removed();
        }
        self.shared.announce(applied_of(self.meta.last_log_id.as_ref()), effects);
        if let Some(responder) = responder {
            responder.send(replies);
        }
        Ok(())
    }

    /// Changes the state and hands the rows on, under one lock: a finished build leaves memory, so the writer has its
    /// record before anyone can see that.
    fn change(&self, change: impl FnOnce(&mut State, &mut Changes) -> Replies) -> (Replies, Vec<Effect>) {
        let mut changes = Changes::default();
        let mut state = self.shared.state_mut();
        let replies = change(&mut state, &mut changes);
        state.finish_entry(&mut changes);
        self.writer.push(changes.rows, self.meta.clone());
        (replies, changes.effects)
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.meta.last_log_id, self.meta.last_membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        while let Some(entry) = entries.next().await {
            self.apply_one(entry?).await?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { writer: self.writer.clone() }
    }

    async fn install_snapshot(&mut self, _: &SnapshotMeta, snapshot: SnapshotFile) -> Result<(), io::Error> {
        let meta = self.writer.install(snapshot.path.clone()).await?;
        let store = Arc::clone(self.writer.store());
        let loaded = tokio::task::spawn_blocking(move || store.load()).await.map_err(io::Error::other)?;
        let (state, _) = loaded?;
        *self.shared.state_mut() = state;
        self.meta = meta;
        self.publish_members();
        self.publish_removed();
        self.shared.announce_everything(applied_of(self.meta.last_log_id.as_ref()));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let Some((meta, path)) = self.writer.snapshots().into_iter().next() else { return Ok(None) };
        Ok(Some(Snapshot { meta, snapshot: SnapshotFile::open(&path)? }))
    }
}

/// Asks the writer for a snapshot.
pub(crate) struct SnapshotBuilder {
    writer: Writer,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (meta, path) = self.writer.snapshot().await?;
        Ok(Snapshot { meta, snapshot: SnapshotFile::open(&path)? })
    }
}
