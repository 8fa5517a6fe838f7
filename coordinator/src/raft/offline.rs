//! A registry without its cluster: read from a backup or from a node that will not run again as what it was, and given to
//! new members, as the data that a node starts from.
//!
//! What is given on is every row as it was, but for who the coordinators are: all former ones are retired for ever. The
//! new data begins with a snapshot and an empty log, so that it is the same on every new member. Invariant: what is read
//! is never changed, and what was made is durable when a function returns.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use helix_common::files::{Durability, sync_directory, write_atomic};
use helix_core::Row;
use helix_core::record::NodeRecord;
use helix_model::{BuildId, Digest, LogTime, NodeId};
use helix_proto::raft;
use openraft::storage::RaftLogStorage;

use super::log_store::{LogLimits, LogStore};
use super::rows::blobs_of;
use super::snapshot::{self, SnapshotWriter};
use super::state_machine::{StateMachine, applied_of};
use super::store::Store;
use super::types::{LogId, Member, Membership, SnapshotMeta, StoredMembership};
use super::wire::vote;
use super::writer::{RenewWhen, Writer};
use crate::codec::{CodecError, decode_row, encode_row};
use crate::registry::{Applied, Counters, Shared};

const CACHE_BYTES: u64 = 64 << 20;
/// Bytes of log entries that are read at once.
const READ_BYTES: usize = 1 << 20;

/// Who a registry is given to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewCluster {
    /// Whose data is made.
    pub node: NodeId,
    /// All members, this one among them, and where coordinators dial each.
    pub members: BTreeMap<NodeId, String>,
    /// The epoch under which a former member is the only new one; without it no member may ever have been one.
    pub kept_under: Option<u64>,
}

/// What was given on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Given {
    /// The last entry that is in it.
    pub applied: Applied,
    /// Its stamp.
    pub last_at: LogTime,
    /// Builds that have not ended.
    pub open: usize,
    /// Builds that have.
    pub finished: usize,
    /// Workers.
    pub workers: usize,
    /// Coordinators that are retired by it.
    pub retired: BTreeSet<NodeId>,
    /// Every blob that a build names, with one that does.
    pub blobs: BTreeMap<Digest, BuildId>,
}

/// Why a registry cannot be given on.
#[derive(Debug, thiserror::Error)]
pub enum GiveError {
    /// A new member was a former one.
    #[error(
        "node id {0} was used in the cluster that this registry is from, and ids are never used again: choose ids that are \
         greater than all of {1:?}"
    )]
    IdUsed(NodeId, BTreeSet<u64>),
    /// This program is too old.
    #[error("{0}")]
    Newer(CodecError),
    /// It is not what was written, or not enough of it is there.
    #[error("{0}")]
    Damaged(io::Error),
    /// The new data cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn unreadable(error: io::Error) -> GiveError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<CodecError>()) {
        Some(newer @ CodecError::Newer { .. }) => GiveError::Newer(newer.clone()),
        _ => GiveError::Damaged(error),
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> GiveError {
    let path = path.to_owned();
    move |source| GiveError::Io { path: path.clone(), source }
}

/// Makes log, registry and snapshot in the directory `into` from a snapshot's bytes, which `open` gives from their
/// beginning as often as asked. Blocks, and reads them twice.
///
/// # Errors
/// [`GiveError`]; what stands in `into` is then of no use.
pub async fn give<R: Read>(
    open: impl Fn() -> io::Result<R>,
    name: &Path,
    into: &Path,
    new: &NewCluster,
) -> Result<Given, GiveError> {
    let meta = snapshot::read_from(open().map_err(unreadable)?, name, |_| Ok(())).map_err(unreadable)?;
    let (file, mut given, last) = rewrite(open, name, into, new, &meta)?;
    let registry = into.join("registry");
    let store = Store::open(&registry, CACHE_BYTES).map_err(at(&registry))?;
    store.replace(&file).map_err(at(&registry))?;
    // As a start would: what contradicts itself is found now.
    let (state, _) = store.load().map_err(unreadable)?;
    store.sync().map_err(at(&registry))?;
    let totals = state.totals();
    given.workers = usize::try_from(totals.workers).unwrap_or(usize::MAX);
    begin_log(into, new.node, last).await.map_err(at(&into.join("log")))?;
    sync_directory(into).map_err(at(into))?;
    Ok(given)
}

/// The rows once more, under new members; in a snapshot file of the new node's.
fn rewrite<R: Read>(
    open: impl Fn() -> io::Result<R>,
    name: &Path,
    into: &Path,
    new: &NewCluster,
    meta: &SnapshotMeta,
) -> Result<(PathBuf, Given, LogId), GiveError> {
    let empty = || GiveError::Damaged(io::Error::new(io::ErrorKind::InvalidData, "there is no registry in it"));
    let last = meta.last_log_id.ok_or_else(empty)?;
    let snapshots = into.join("snapshots");
    let members = new.members.iter().map(|(id, address)| (id.0, Member { address: address.clone() }));
    let members: BTreeMap<u64, Member> = members.collect();
    let voters = vec![members.keys().copied().collect::<BTreeSet<u64>>()];
    let membership = Membership::new(voters, members).map_err(|error| at(into)(io::Error::other(error.to_string())))?;
    let new_meta =
        SnapshotMeta { last_log_id: meta.last_log_id, last_membership: StoredMembership::new(Some(last), membership) };
    let mut to = SnapshotWriter::create(&snapshots, &new_meta).map_err(at(&snapshots))?;
    let (mut counters, mut nodes) = (None, BTreeMap::new());
    let (mut blobs, mut open_builds, mut finished) = (BTreeMap::new(), 0, 0);
    let reading = open().map_err(unreadable)?;
    let read = snapshot::read_from(reading, name, |bytes| {
        let row = decode_row(&bytes)?;
        if let Some((build, digests)) = blobs_of(&row) {
            for digest in digests {
                blobs.entry(digest).or_insert_with(|| build.clone());
            }
        }
        match row {
            Row::Counters(it) => counters = Some(it),
            Row::Node(it) => drop(nodes.insert(it.id, it)),
            Row::Build(it) if it.state.is_terminal() => {
                finished += 1;
                to.row(&bytes)?;
            }
            Row::Build(_) => {
                open_builds += 1;
                to.row(&bytes)?;
            }
            Row::Policy(_) | Row::Worker(_) | Row::Addendum(..) | Row::Tombstone(_) => to.row(&bytes)?,
        }
        Ok(())
    });
    read.map_err(unreadable)?;
    let mut counters = counters.ok_or_else(empty)?;
    for id in meta.last_membership.membership().nodes().map(|(id, _)| NodeId(*id)) {
        nodes.entry(id).or_insert_with(|| unknown(id));
    }
    let retired = retire(&mut nodes, new, counters.last_at)?;
    counters.voters = new.members.keys().copied().collect();
    let last_at = counters.last_at;
    let rows = nodes.into_values().map(Row::Node).chain([Row::Counters(counters)]);
    rows.map(|row| encode_row(&row)).try_for_each(|row| to.row(&row)).map_err(at(&snapshots))?;
    let file = to.finish().map_err(at(&snapshots))?;
    let applied = applied_of(Some(&last));
    Ok((file, Given { applied, last_at, open: open_builds, finished, workers: 0, retired, blobs }, last))
}

/// A member that never made itself known.
fn unknown(id: NodeId) -> NodeRecord {
    NodeRecord { id, epoch: 0, grpc: String::new(), version: String::new(), format: 0, removed_at: None }
}

fn retire(
    nodes: &mut BTreeMap<NodeId, NodeRecord>,
    new: &NewCluster,
    now: LogTime,
) -> Result<BTreeSet<NodeId>, GiveError> {
    let used = nodes.keys().map(|id| id.0).collect::<BTreeSet<_>>();
    if let Some(id) = new.members.keys().find(|id| nodes.contains_key(id)) {
        let stays = new.kept_under.is_some() && nodes.get(id).is_some_and(|node| node.removed_at.is_none());
        if !stays {
            return Err(GiveError::IdUsed(*id, used));
        }
    }
    let mut retired = BTreeSet::new();
    for (id, node) in nodes {
        match new.kept_under {
            Some(epoch) if *id == new.node => node.epoch = epoch,
            Some(_) | None if node.removed_at.is_none() => {
                node.removed_at = Some(now);
                retired.insert(*id);
            }
            Some(_) | None => {}
        }
    }
    Ok(retired)
}

/// An empty log behind the snapshot. The vote is of a later term, so that the first leader's is greater than every term
/// that the registry was changed in (Raft, section 5.1).
async fn begin_log(into: &Path, node: NodeId, last: LogId) -> io::Result<()> {
    let path = into.join("log");
    let mut log = LogStore::open(&path, LogLimits::default(), Arc::default())?;
    let term = last.committed_leader_id().term.saturating_add(1);
    log.save_vote(&vote(Some(raft::Vote { term, node: node.0, committed: false }))?).await?;
    log.purge(last).await?;
    sync_directory(&path)?;
    write_atomic(&into.join("log.made"), b"", 0o600, Durability::Synced)
}

/// Everything that a node has of the registry.
#[derive(Debug)]
pub struct Gathered {
    /// A snapshot file of it.
    pub file: PathBuf,
    /// The last entry of its log.
    pub last: Applied,
    /// The last that the node knew to be committed.
    pub committed: Applied,
    /// The members by the last membership in its log, voters first told apart from the rest.
    pub members: BTreeMap<NodeId, String>,
    /// Those of them that vote.
    pub voters: BTreeSet<NodeId>,
}

/// Puts together, beneath `scratch`, what a node's log and its newest snapshot or store say: every entry of the log, whether it
/// is known to be committed or not. The node does not run. Blocks.
///
/// # Errors
/// When neither snapshot nor store reaches back to where the log begins, or something is damaged.
pub async fn gather(root: &Path, node: NodeId, scratch: &Path) -> Result<Gathered, GiveError> {
    let path = root.join("log");
    if !LogStore::is_in(&path) {
        let why = format!("{} held this node's log and is gone: recover another node", path.display());
        return Err(GiveError::Damaged(io::Error::new(io::ErrorKind::InvalidData, why)));
    }
    let mut log = LogStore::open(&path, LogLimits::default(), Arc::default()).map_err(unreadable)?;
    let (purged, last) = log.bounds();
    let committed = log.read_committed().await.map_err(unreadable)?;
    std::fs::create_dir_all(scratch).map_err(at(scratch))?;
    let (store, state, meta) = base(root, scratch, purged.as_ref())?;
    let counters = Arc::<Counters>::default();
    let shared = Arc::new(Shared::new(node, state, applied_of(meta.last_log_id.as_ref()), Arc::clone(&counters)));
    let writer = Writer::start(Arc::new(store), scratch.join("snapshots"), Vec::new(), counters, RenewWhen::NEVER)
        .map_err(at(scratch))?;
    let mut machine = StateMachine::new(shared, writer.clone(), None, meta.clone());
    let mut next = meta.last_log_id.map_or(0, |id| id.index() + 1);
    let end = last.map_or(0, |id| id.index() + 1);
    while next < end {
        let entries = log.read_entries(next, end, READ_BYTES).map_err(unreadable)?;
        if entries.is_empty() {
            return Err(GiveError::Damaged(io::Error::other(format!("the log lacks entry {next}"))));
        }
        for entry in entries {
            next = entry.log_id.index() + 1;
            machine.replay(entry).await.map_err(unreadable)?;
        }
    }
    let (meta, file) = writer.snapshot().await.map_err(at(scratch))?;
    writer.stop().await;
    let membership = meta.last_membership.membership();
    let members = membership.nodes().map(|(id, member)| (NodeId(*id), member.address.clone())).collect();
    let voters = membership.voter_ids().map(NodeId).collect();
    let last = applied_of(meta.last_log_id.as_ref());
    Ok(Gathered { file, last, committed: applied_of(committed.as_ref()), members, voters })
}

/// The newest snapshot that reaches back to the log's beginning, else a copy of the store, else nothing where the log is whole.
fn base(
    root: &Path,
    scratch: &Path,
    purged: Option<&LogId>,
) -> Result<(Store, helix_core::State, SnapshotMeta), GiveError> {
    let path = scratch.join("registry");
    for file in snapshot::list(&root.join("snapshots")).map_err(unreadable)? {
        let whole = match snapshot::verify(&file).map_err(unreadable) {
            Ok(meta) => meta.last_log_id.as_ref() >= purged,
            Err(newer @ GiveError::Newer(_)) => return Err(newer),
            Err(_) => false,
        };
        if whole {
            let store = Store::open(&path, CACHE_BYTES).map_err(at(&path))?;
            store.replace(&file).map_err(unreadable)?;
            let (state, meta) = store.load().map_err(unreadable)?;
            return Ok((store, state, meta));
        }
    }
    if purged.is_some() {
        copy_directory(&root.join("registry"), &path).map_err(at(&path))?;
    }
    let store = Store::open(&path, CACHE_BYTES).map_err(unreadable)?;
    let (state, meta) = store.load().map_err(unreadable)?;
    if meta.last_log_id.as_ref() < purged {
        let why = "neither a snapshot nor the registry reaches back to where the log begins";
        return Err(GiveError::Damaged(io::Error::new(io::ErrorKind::InvalidData, why)));
    }
    Ok((store, state, meta))
}

pub(super) fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
