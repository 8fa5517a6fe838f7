//! Starting, tending and stopping consensus on one node.
//!
//! Order at start: the log, then the store (rebuilt where it cannot be trusted), then the state in memory, then
//! openraft, which replays what the store lacks; then the tasks that queue in front of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_common::tls::TlsStore;
use openraft::{Config, SnapshotPolicy};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::log_store::{LogLimits, LogStore};
use super::network::Network;
use super::proposer::Proposer;
use super::reader::Reader;
use super::server::{Incoming, PeerHandler, RaftHandler};
use super::state_machine::{StateMachine, applied_of};
use super::status::Watcher;
use super::timing::{FSYNC_MOST, Timing, slowest_fsync};
use super::transfer::Transfer;
use super::types::{Member, Raft};
use super::writer::{RenewWhen, Writer};
use crate::node_dir::NodeDir;
use crate::peers::Peers;
use crate::registry::{
    COMMAND_FORMAT, Counters, Leadership, Lookup, NAMED_BLOBS_MAX, Ports, RaftStatus, Registry, Shared, StoreError,
};

mod control;
mod introduce;
mod members;
pub(in crate::raft) mod open;

use control::Controller;
use introduce::introduce;
use open::Opened;

/// What may be chosen about consensus on one node.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where clients and agents dial this node: `https://HOST:PORT`.
    pub grpc: String,
    /// This program's version.
    pub version: String,
    /// The clockwork; `None` measures the disk and chooses.
    pub timing: Option<Timing>,
    /// A snapshot is written when the log grew by so many bytes since the last.
    pub snapshot_log_bytes: u64,
    /// Bytes in one file of the log.
    pub log_chunk_bytes: usize,
    /// Memory for the store's cache.
    pub store_cache_bytes: u64,
    /// When the store's file is written anew.
    pub store_renewal: RenewWhen,
    /// How snapshots are sent and received: as they are, except in tests.
    #[doc(hidden)]
    pub transfer: Transfer,
    /// The highest command format that this node takes and proposes: the program's, except in tests of mixed versions.
    #[doc(hidden)]
    pub command_format: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            grpc: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timing: None,
            snapshot_log_bytes: 128 << 20,
            log_chunk_bytes: 64 << 20,
            store_cache_bytes: 48 << 20,
            store_renewal: RenewWhen { from_bytes: 64 << 20, times: 2, rests: 3 },
            transfer: Transfer::default(),
            command_format: COMMAND_FORMAT,
        }
    }
}

/// Why consensus cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log was there and is not.
    #[error(
        "{0} held this node's log and is gone: the node may have acknowledged what was in it; remove it and add the host \
         under a new id with `helix cluster add`"
    )]
    LogLost(PathBuf),
    /// Neither the store nor a snapshot reaches back to where the log begins.
    #[error(
        "the registry cannot be rebuilt: the log begins behind entry {purged}, and no store or snapshot reaches that far; \
         remove the node and add the host under a new id with `helix cluster add`"
    )]
    RegistryLost {
        /// The last entry removed from the log.
        purged: u64,
    },
    /// A file cannot be used.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// openraft refused.
    #[error("consensus: {0}")]
    Raft(String),
}

/// A node's consensus, running.
pub struct Started {
    /// The handle for everybody.
    pub registry: Registry,
    /// Channels to the others.
    pub peers: Peers,
    /// To be put on the coordinators' port.
    pub raft: RaftHandler,
    /// To be put on the coordinators' port.
    pub peer: PeerHandler,
    /// Ends after [`Registry::transfer_leadership_and_stop`].
    pub task: JoinHandle<()>,
}

/// Starts consensus on the node in `dir`. Serve [`Started::raft`] and [`Started::peer`] at once: others wait for them.
///
/// # Errors
/// [`StartError`].
pub async fn start(dir: Arc<NodeDir>, tls: Arc<TlsStore>, options: Options) -> Result<Started, StartError> {
    let counters = Arc::new(Counters::default());
    let opened = {
        let (dir, options, counters) = (Arc::clone(&dir), options.clone(), Arc::clone(&counters));
        let opened = tokio::task::spawn_blocking(move || open::open(&dir, &options, &counters)).await;
        opened.map_err(|error| StartError::Raft(error.to_string()))??
    };
    let Opened { log, store, state, meta, snapshots, snapshots_path, timing } = opened;
    let identity = dir.identity().clone();
    let peers = Peers::new(Arc::clone(&dir), tls, options.command_format);
    let applied = applied_of(meta.last_log_id.as_ref());
    let shared = Arc::new(Shared::new(identity.id(), state, applied, counters));
    let io = |source| StartError::Io { path: snapshots_path.clone(), source };
    let counters = Arc::clone(&shared.counters);
    let writer = Writer::start(Arc::new(store), snapshots_path.clone(), snapshots, counters, options.store_renewal)
        .map_err(io)?;
    let machine = StateMachine::new(Arc::clone(&shared), writer.clone(), Some(peers.clone()), meta);
    let network = Network::new(peers.clone(), Arc::clone(&shared), options.transfer);
    let config = Arc::new(config(&identity.cluster, timing)?);
    let raft = Raft::new(identity.node, config, network, log, machine).await;
    let raft = raft.map_err(|error| StartError::Raft(error.to_string()))?;
    initialize(&raft, &identity.members).await?;
    Ok(assemble(Parts { raft, shared, peers, writer, dir, options, timing }))
}

struct Parts {
    raft: Raft,
    shared: Arc<Shared>,
    peers: Peers,
    writer: Writer,
    dir: Arc<NodeDir>,
    options: Options,
    timing: Timing,
}

fn assemble(parts: Parts) -> Started {
    let Parts { raft, shared, peers, writer, dir, options, timing } = parts;
    let stop = CancellationToken::new();
    let (proposals, proposal_queue) = mpsc::channel(16_384);
    let (barriers, barrier_queue) = mpsc::channel(65_536);
    let (lookups, lookup_queue) = mpsc::channel(1_024);
    let (control, control_queue) = mpsc::channel(16);
    let leadership = watch::Sender::new(Leadership::default());
    let leadership_seen = leadership.subscribe();
    let status = watch::Sender::new(RaftStatus::default());
    let names = writer.clone();
    let registry = Registry::new(Ports {
        identity: dir.identity().clone(),
        shared: Arc::clone(&shared),
        proposals,
        barriers,
        lookups,
        control,
        names_blob: Box::new(move |digest| names.names_blob(digest)),
        leadership: leadership_seen.clone(),
        status: status.subscribe(),
        failure: peers.failure(),
    });
    let mut tasks = JoinSet::new();
    let common = || (raft.clone(), Arc::clone(&shared), peers.clone(), stop.clone());
    let (r, s, p, token) = common();
    tasks.spawn(Watcher { raft: r, shared: s, peers: p, leadership, status, timing, stop: token }.run());
    let (r, s, p, token) = common();
    let seen = leadership_seen.clone();
    tasks.spawn(Proposer { raft: r, shared: s, peers: p, leadership: seen, queue: proposal_queue, stop: token }.run());
    let (r, s, p, token) = common();
    let seen = leadership_seen.clone();
    tasks.spawn(Reader { raft: r, shared: s, peers: p, leadership: seen, queue: barrier_queue, stop: token }.run());
    tasks.spawn(look_up(lookup_queue, writer.clone(), stop.clone()));
    tasks.spawn(introduce(registry.clone(), options.clone(), stop.clone()));
    tasks.spawn(end_with(writer.clone(), peers.clone(), stop.clone()));
    let incoming = Arc::new(Incoming::new(writer.snapshots_directory().to_owned(), options.transfer));
    let raft_handler =
        RaftHandler::new(raft.clone(), peers.clone(), Arc::clone(&shared), Arc::clone(&incoming), stop.clone());
    let peer = PeerHandler::new(registry.clone(), raft.clone(), peers.clone());
    let controller = Controller {
        raft,
        shared,
        writer,
        incoming,
        leadership: leadership_seen,
        queue: control_queue,
        tasks,
        stop,
        snapshot_log_bytes: options.snapshot_log_bytes,
        dir,
    };
    let task = tokio::spawn(controller.run());
    Started { registry, peers, raft: raft_handler, peer, task }
}

/// A node whose store fails ends at once, and not with the next entry, which may be long in coming.
async fn end_with(writer: Writer, peers: Peers, stop: CancellationToken) {
    tokio::select! {
        why = writer.failed() => peers.fail(why),
        () = stop.cancelled() => {}
    }
}

fn config(cluster: &str, timing: Timing) -> Result<Config, StartError> {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let config = Config {
        // A leader that comes back does not know what of its log was acknowledged: in its old term it would at once act on, and
        // answer reads from, what it has applied. Elected anew, it has applied all of it before it leads.
        enable_leader_restore: Some(false),
        cluster_name: cluster.to_owned(),
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election_min),
        election_timeout_max: ms(timing.election_max),
        // Entries hold many commands each; we count bytes instead, and purge behind the older of two snapshots.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: 1_000_000,
        max_payload_entries: 64,
        enable_pre_vote: Some(true),
        ..Config::default()
    };
    config.validate().map_err(|error| StartError::Raft(error.to_string()))
}

/// Every initial member does this with the same members; the first election settles the rest.
async fn initialize(raft: &Raft, members: &BTreeMap<u64, String>) -> Result<(), StartError> {
    let broken = |error: &dyn std::fmt::Display| StartError::Raft(error.to_string());
    if members.is_empty() || raft.is_initialized().await.map_err(|error| broken(&error))? {
        return Ok(());
    }
    let members: BTreeMap<u64, Member> =
        members.iter().map(|(id, address)| (*id, Member { address: address.clone() })).collect();
    match raft.initialize(members).await {
        Ok(()) => Ok(()),
        // A peer was faster.
        Err(error) if error.api_error().is_some() => {
            tracing::debug!(%error, "initialized already");
            Ok(())
        }
        Err(error) => Err(broken(&error)),
    }
}

/// Reads records, off the async threads.
async fn look_up(mut queue: mpsc::Receiver<Lookup>, writer: Writer, stop: CancellationToken) {
    loop {
        let lookup = tokio::select! {
            () = stop.cancelled() => return,
            lookup = queue.recv() => lookup,
        };
        let writer = writer.clone();
        let broken = |error: JoinError| StoreError(error.to_string());
        // Whoever went away does not want to know.
        match lookup {
            None => return,
            Some(Lookup::Records { ids, reply }) => {
                let read = tokio::task::spawn_blocking(move || {
                    let mut records = Vec::with_capacity(ids.len());
                    for id in &ids {
                        records.extend(writer.record(id)?);
                    }
                    Ok(records)
                });
                drop(reply.send(read.await.unwrap_or_else(|error| Err(broken(error)))));
            }
            Some(Lookup::NamedBlobs { after, reply }) => {
                let read = tokio::task::spawn_blocking(move || writer.named_blobs(after, NAMED_BLOBS_MAX));
                drop(reply.send(read.await.unwrap_or_else(|error| Err(broken(error)))));
            }
        }
    }
}

fn voters(raft: &Raft) -> BTreeSet<u64> {
    raft.voter_ids().collect()
}

#[cfg(test)]
pub(super) fn open_for_test(dir: &NodeDir) -> Result<(), StartError> {
    open::open(dir, &Options::default(), &Arc::default()).map(drop)
}
