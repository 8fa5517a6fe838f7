//! The other coordinators: where they are, channels to them, and the check that each is who it was.
//!
//! A channel dials lazily and again by itself; its peer's certificate must name the expected node. Every consensus
//! message also carries cluster, node and epoch, and `Peers::admit` refuses whoever was met under another epoch; of two
//! processes under one epoch it hears one (`runs.rs`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use helix_common::channel::{Traffic, lazy};
use helix_common::identity::Role;
use helix_common::status::{metadata, status, with_metadata};
use helix_common::tls::{PeerInfo, TlsStore};
use helix_common::wall;
use helix_model::{ErrorCode, NodeId};
use helix_proto::{peer, raft};
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::Channel;

use self::runs::{Run, Runs};
use crate::node_dir::{NodeDir, NodeDirError};

mod runs;

/// The version of the messages among coordinators.
pub const WIRE_VERSION: u32 = 1;

/// The key under which a refusal names the node whose epoch changed.
const EPOCH_OF: &str = "epoch_of";

/// The key under which a refusal names the node that was removed.
const REMOVED: &str = "removed";

/// A node that spoke with us as with a member so long ago still counts as one that knows us.
const KNOWN_FOR: Duration = Duration::from_secs(10);

/// Between two complaints about who says that we were removed.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// Why there is no channel to a peer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// It is no member of the cluster.
    #[error("node {0} is no member")]
    Unknown(NodeId),
    /// Its address cannot be dialled.
    #[error("node {node}: {why}")]
    Address {
        /// Who.
        node: NodeId,
        /// Why.
        why: String,
    },
}

/// What a connection is for. Connections serialise what they carry, so nothing small waits behind something large.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Purpose {
    /// Votes, heartbeats.
    Heartbeat,
    /// Log entries.
    Append,
    /// Snapshots.
    Snapshot,
    /// Proposals, read indexes, liveness.
    Control,
    /// Blobs and logs.
    Bulk,
}

/// The other coordinators; clones share everything.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    dir: Arc<NodeDir>,
    tls: Arc<TlsStore>,
    addresses: RwLock<BTreeMap<NodeId, String>>,
    /// Nodes that were members, and are never again.
    removed: RwLock<BTreeSet<NodeId>>,
    // The address is part of the key: a node that moved gets a new channel.
    channels: Mutex<HashMap<(NodeId, Purpose), (String, Channel)>>,
    failure: watch::Sender<Option<String>>,
    /// The highest command format that this node knows.
    format: u32,
    /// What others say they know.
    formats: RwLock<BTreeMap<NodeId, u32>>,
    /// When others last spoke with this node as with a member.
    heard: Mutex<BTreeMap<NodeId, Instant>>,
    /// Who says that this node was removed, where a majority of the members knows it.
    denied: Mutex<BTreeMap<NodeId, Denied>>,
    /// Which process speaks as a node.
    runs: Runs,
}

/// A node that takes this one for removed.
struct Denied {
    /// Since when it has said so again and again.
    since: Instant,
    last: Instant,
    /// When people were last told.
    complained: Option<Instant>,
}

impl Peers {
    /// Peers as the directory's initial members, until membership is known. `format` is what is told to them.
    #[must_use]
    pub fn new(dir: Arc<NodeDir>, tls: Arc<TlsStore>, format: u32) -> Self {
        let members = dir.identity().members.iter().map(|(id, address)| (NodeId(*id), address.clone())).collect();
        let inner = Inner {
            dir,
            tls,
            addresses: RwLock::new(members),
            removed: RwLock::default(),
            channels: Mutex::new(HashMap::new()),
            failure: watch::Sender::new(None),
            format,
            formats: RwLock::default(),
            heard: Mutex::default(),
            denied: Mutex::default(),
            runs: Runs::new(Run::draw()),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Who this node is, and whom it trusts.
    pub(crate) fn tls(&self) -> &Arc<TlsStore> {
        &self.inner.tls
    }

    /// A channel for small calls to a node, which may be ourselves.
    ///
    /// # Errors
    /// [`PeerError`]; whether it answers is another question.
    pub fn control(&self, node: NodeId) -> Result<Channel, PeerError> {
        self.channel(node, Purpose::Control)
    }

    /// A channel for blobs and logs.
    ///
    /// # Errors
    /// As [`Self::control`].
    pub fn bulk(&self, node: NodeId) -> Result<Channel, PeerError> {
        self.channel(node, Purpose::Bulk)
    }

    /// HOST:PORT of a node's coordinators' port.
    #[must_use]
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.inner.addresses.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// All members, this node among them.
    #[must_use]
    pub fn ids(&self) -> BTreeSet<NodeId> {
        self.inner.addresses.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// This node.
    #[must_use]
    pub fn own(&self) -> NodeId {
        self.inner.dir.identity().id()
    }

    pub(crate) fn set_members(&self, members: BTreeMap<NodeId, String>) {
        let mut channels = self.inner.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|(node, _), (address, _)| members.get(node) == Some(address));
        self.inner.runs.keep(|node| members.contains_key(&node));
        *self.inner.addresses.write().unwrap_or_else(PoisonError::into_inner) = members;
    }

    pub(crate) fn set_removed(&self, removed: BTreeSet<NodeId>) {
        *self.inner.removed.write().unwrap_or_else(PoisonError::into_inner) = removed;
    }

    pub(crate) fn channel(&self, node: NodeId, purpose: Purpose) -> Result<Channel, PeerError> {
        let address = self.address(node).ok_or(PeerError::Unknown(node))?;
        self.channel_at(node, &address, purpose)
    }

    /// A channel to a node at an address that membership gave; it may not be among the members yet.
    pub(crate) fn channel_at(&self, node: NodeId, address: &str, purpose: Purpose) -> Result<Channel, PeerError> {
        let mut channels = self.inner.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, channel)) = channels.get(&(node, purpose))
            && known == address
        {
            return Ok(channel.clone());
        }
        let traffic = match purpose {
            Purpose::Heartbeat | Purpose::Control => Traffic::Control,
            Purpose::Append | Purpose::Snapshot | Purpose::Bulk => Traffic::Bulk,
        };
        let expect = self.inner.tls.expect_node(node);
        let channel = lazy(address, &self.inner.tls, expect, traffic)
            .map_err(|error| PeerError::Address { node, why: error.to_string() })?;
        channels.insert((node, purpose), (address.to_owned(), channel.clone()));
        Ok(channel)
    }

    /// Who we are, to `to`, in a consensus message.
    pub(crate) fn envelope(&self, to: NodeId) -> raft::Envelope {
        let identity = self.inner.dir.identity();
        raft::Envelope {
            version: WIRE_VERSION,
            cluster: identity.cluster.clone(),
            from: identity.node,
            from_epoch: identity.epoch,
            to: to.0,
            to_epoch: self.inner.dir.epoch_of(to).unwrap_or(0),
            clock_ms: wall::now_ms(),
            format: self.inner.format,
            from_run: self.inner.runs.own().to_wire(),
        }
    }

    /// The highest command format that this node knows.
    pub(crate) fn format(&self) -> u32 {
        self.inner.format
    }

    /// The highest command format that a node said it knows, in a message to this one.
    pub(crate) fn format_of(&self, node: NodeId) -> Option<u32> {
        self.inner.formats.read().unwrap_or_else(PoisonError::into_inner).get(&node).copied()
    }

    fn note_format(&self, node: NodeId, format: u32) {
        if format > 0 && self.format_of(node) != Some(format) {
            self.inner.formats.write().unwrap_or_else(PoisonError::into_inner).insert(node, format);
        }
    }

    /// The same for [`peer`] calls.
    #[must_use]
    pub fn caller(&self, to: NodeId) -> peer::Caller {
        let raft::Envelope { version, cluster, from, from_epoch, to, to_epoch, .. } = self.envelope(to);
        peer::Caller { version, cluster, from, from_epoch, to, to_epoch }
    }

    /// Checks who sent a consensus message: certificate, cluster, target and both epochs.
    // A status is what the caller is answered with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    pub(crate) fn admit(&self, info: &PeerInfo, envelope: Option<&raft::Envelope>) -> Result<NodeId, Status> {
        let Some(envelope) = envelope else {
            return Err(status(ErrorCode::IdentityInvalid, "the message does not say who sends it"));
        };
        if info.identity.role != Role::Coordinator || info.identity.node() != Some(NodeId(envelope.from)) {
            let message = format!("{} speaks as coordinator {}", info.identity, envelope.from);
            return Err(status(ErrorCode::RoleNotAllowed, message));
        }
        // First: one that was removed may know this node from before a recovery, under another epoch, and must not have it
        // doubt itself.
        self.expect_not_removed(envelope)?;
        self.check(envelope)
    }

    /// A former member that does not know it must not even be heard: it would stand for election.
    #[allow(clippy::result_large_err)]
    fn expect_not_removed(&self, envelope: &raft::Envelope) -> Result<(), Status> {
        let (own, from) = (self.inner.dir.identity(), NodeId(envelope.from));
        if envelope.cluster != own.cluster || envelope.to != own.node {
            return Ok(());
        }
        if self.inner.removed.read().unwrap_or_else(PoisonError::into_inner).contains(&from) {
            let message = format!("node {from} was removed from the cluster");
            return Err(with_metadata(ErrorCode::NodeRemoved, message, [(REMOVED, from.to_string())]));
        }
        Ok(())
    }

    /// The same for [`peer`] calls.
    ///
    /// # Errors
    /// The status to answer with.
    #[allow(clippy::result_large_err)]
    pub fn admit_caller(&self, info: &PeerInfo, caller: Option<peer::Caller>) -> Result<NodeId, Status> {
        let envelope = caller.map(|caller| {
            let peer::Caller { version, cluster, from, from_epoch, to, to_epoch } = caller;
            raft::Envelope { version, cluster, from, from_epoch, to, to_epoch, clock_ms: 0, format: 0, from_run: 0 }
        });
        self.admit(info, envelope.as_ref())
    }

    /// Checks an answer's envelope: the certificate was checked when the connection was made.
    #[allow(clippy::result_large_err)]
    pub(crate) fn check_answer(&self, node: NodeId, envelope: Option<&raft::Envelope>) -> Result<(), Status> {
        let Some(envelope) = envelope else {
            return Err(status(ErrorCode::IdentityInvalid, "the answer does not say who sends it"));
        };
        if envelope.from != node.0 {
            let message = format!("node {} answers for node {node}", envelope.from);
            return Err(status(ErrorCode::WrongCluster, message));
        }
        self.check(envelope).map(drop)
    }

    #[allow(clippy::result_large_err)]
    fn check(&self, envelope: &raft::Envelope) -> Result<NodeId, Status> {
        let own = self.inner.dir.identity();
        if envelope.version > WIRE_VERSION {
            let message = format!("message version {} and this node speaks {WIRE_VERSION}", envelope.version);
            return Err(status(ErrorCode::VersionSkew, message));
        }
        if envelope.cluster != own.cluster {
            let message = format!("cluster {:?}, and this is a node of {:?}", envelope.cluster, own.cluster);
            return Err(status(ErrorCode::WrongCluster, message));
        }
        if envelope.to != own.node {
            let message = format!("meant for node {}, and this is node {}", envelope.to, own.node);
            return Err(status(ErrorCode::WrongCluster, message));
        }
        if envelope.to_epoch != 0 && envelope.to_epoch != own.epoch {
            // The sender met another data directory under our id: ours was made later, or is a copy.
            self.fail_as_changed(envelope.from);
            let message = format!("node {} has epoch {:016x} now", own.node, own.epoch);
            return Err(with_metadata(ErrorCode::WrongCluster, message, [(EPOCH_OF, own.node.to_string())]));
        }
        let from = NodeId(envelope.from);
        match self.inner.dir.meet(from, envelope.from_epoch) {
            Ok(()) => {
                self.note_format(from, envelope.format);
                self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner).insert(from, Instant::now());
                Ok(from)
            }
            Err(error @ NodeDirError::EpochChanged { .. }) => {
                tracing::warn!(node = from.0, %error, "a node was refused");
                let facts = [(EPOCH_OF, from.to_string())];
                Err(with_metadata(ErrorCode::WrongCluster, error.to_string(), facts))
            }
            Err(error) => Err(status(ErrorCode::Internal, error.to_string())),
        }
    }

    /// Looks into a peer's refusal: when it says that our own epoch changed, that we were removed, or that we are a copy, this node must
    /// stop.
    pub(crate) fn heed(&self, from: NodeId, refusal: &Status) {
        let own = self.own().to_string();
        if helix_common::status::error_code(refusal) == Some(ErrorCode::NodeRemoved)
            && metadata(refusal, REMOVED).is_some_and(|node| node == own)
        {
            if self.is_known_without(from) {
                self.complain_of(from);
            } else {
                self.fail_as_removed();
            }
        }
        if helix_common::status::error_code(refusal) != Some(ErrorCode::WrongCluster) {
            return;
        }
        if metadata(refusal, EPOCH_OF).is_some_and(|node| node == own) {
            self.fail_as_changed(from.0);
        }
        self.heed_copy(refusal);
    }

    /// Whether a majority of the members, this node among them and `other` not, takes this node for a member: then whoever says
    /// otherwise was made a cluster of its own while it did not see the others.
    fn is_known_without(&self, other: NodeId) -> bool {
        let (own, members) = (self.own(), self.ids());
        let heard = self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = |node: &NodeId| heard.get(node).is_some_and(|at| at.elapsed() < KNOWN_FOR);
        let knows = members.iter().filter(|node| **node == own || (**node != other && fresh(node)));
        knows.count() > members.len() / 2
    }

    /// Says what is wrong with a node that goes on saying so, and not before: where this node is just being removed, the one that says it is right, and
    /// the others that took it for a member are soon no longer heard.
    fn complain_of(&self, other: NodeId) {
        let mut denied = self.inner.denied.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let denied = denied.entry(other).or_insert(Denied { since: now, last: now, complained: None });
        if denied.last.elapsed() >= KNOWN_FOR {
            denied.since = now;
        }
        denied.last = now;
        let long = denied.since.elapsed() >= 2 * KNOWN_FOR;
        if long && denied.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            denied.complained = Some(now);
            tracing::error!(
                code = ErrorCode::NodeRemoved.as_str(),
                node = other.0,
                "node {other} says that this node was removed, and a majority of the members knows better: node {other} was made a \
                 cluster of its own while this one served. Stop it, keep what only it has, wipe it, and `helix cluster remove` it here"
            );
        }
    }

    fn fail_as_changed(&self, by: u64) {
        let identity = self.inner.dir.identity();
        self.fail(format!(
            "node {by} knows node {} under another epoch than {:016x}: this data directory was made after the node had \
             joined, and may lack what it acknowledged. Wipe it, `init --join` it under a new id, and `helix cluster add` that",
            identity.node, identity.epoch
        ));
    }

    /// Notes that the cluster removed this node, and says that it cannot go on. Blocks for one small write.
    pub(crate) fn fail_as_removed(&self) {
        if let Err(error) = self.inner.dir.mark_removed() {
            tracing::error!(%error, "it cannot be noted that this node was removed; it is told again at its next start");
        }
        let identity = self.inner.dir.identity();
        self.fail(format!(
            "node {} was removed from cluster {}: its id is never used again, and its data directory can be removed",
            identity.node, identity.cluster
        ));
    }

    /// Says that this node cannot go on.
    pub(crate) fn fail(&self, why: String) {
        self.inner.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                tracing::error!(why, "this node cannot go on");
                *failure = Some(why);
            }
            first
        });
    }

    pub(crate) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.inner.failure.subscribe()
    }
}

/// What the leader's part answers to other coordinators that ask for the workers' liveness.
pub trait LivenessSource: Send + Sync + 'static {
    /// The snapshot; an error (`not_leader`) where this node does not lead.
    fn liveness(&self) -> futures::future::BoxFuture<'static, Result<peer::LivenessResponse, Status>>;
}
