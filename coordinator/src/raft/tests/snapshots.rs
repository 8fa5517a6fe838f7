//! Snapshots on their way to a node that is too far behind: over links that break or are slow, damaged, unwanted, and onto full disks.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use helix_common::ports;
use helix_common::status::error_code;
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_model::{ErrorCode, NodeId};
use helix_proto::raft::raft_service_client::RaftServiceClient;
use helix_proto::raft::snapshot_request::Part;
use helix_proto::raft::{self, SnapshotStep};
use tonic::Status;

use super::harness::{Cluster, PATIENCE, submit, submit_with, until};
use super::link::Link;
use crate::peers::Purpose;
use crate::raft::Transfer;
use crate::raft::snapshot::{self, SnapshotFile};
use crate::registry::Leadership;

/// Three nodes, of which one is stopped and lacks what is in no log any more, and one other runs, which has a snapshot for it.
async fn latecomer() -> (Cluster, NodeId, NodeId) {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let late = cluster.follower().await;
    cluster.submit(late, &submit("before")).await;
    cluster.stop(late, Duration::ZERO).await;
    let leader = cluster.leader().await;
    for round in 0..3 {
        for number in 0..30 {
            cluster.submit(leader, &submit_with(&format!("s{round}-{number}"), &"x".repeat(30_000))).await;
        }
        for registry in cluster.nodes.values().map(|node| &node.registry) {
            registry.snapshot().await.unwrap();
        }
    }
    // A leader keeps its log for whoever it is sending it to; the others do not.
    let other = *cluster.nodes.keys().find(|node| **node != leader).unwrap();
    let registry = cluster.registry(other).clone();
    until("the log is purged", || registry.status().purged_index > 20).await;
    drop(registry);
    cluster.stop(leader, Duration::ZERO).await;
    (cluster, other, late)
}

fn newest(cluster: &Cluster, node: NodeId) -> SnapshotFile {
    let files = snapshot::list(&cluster.path(node).join("snapshots")).unwrap();
    SnapshotFile::open(&files[0]).unwrap()
}

/// What lies beside whole snapshots.
fn left(cluster: &Cluster, node: NodeId) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cluster.path(node).join("snapshots")).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_none_or(|extension| extension != "snapshot")).collect()
}

async fn link_to(cluster: &mut Cluster, node: NodeId, breaks_after: u64, rest: Duration) -> Link {
    let behind = SocketAddr::from(([127, 0, 0, 1], ports::free(1).unwrap()));
    cluster.behind.insert(node, behind);
    Link::between(cluster.addresses[&node], behind, breaks_after, rest).await
}

async fn expect_caught_up(cluster: &Cluster, node: NodeId) {
    assert!(cluster.has(node, "before").await && cluster.has(node, "s2-29").await);
    assert_eq!(cluster.registry(node).counters().snapshots_installed.get(), 1, "it came by a snapshot");
    assert_eq!(left(cluster, node), Vec::<PathBuf>::new());
}

/// Sends a snapshot's file, as a leader does, and as it does not.
struct Caller<'a> {
    cluster: &'a Cluster,
    from: NodeId,
    to: NodeId,
    header: raft::SnapshotHeader,
    file: SnapshotFile,
}

impl<'a> Caller<'a> {
    fn new(cluster: &'a Cluster, from: NodeId, to: NodeId) -> Self {
        let file = newest(cluster, from);
        let meta = snapshot::verify(&file.path).unwrap();
        let file_crc32 = file.checksum().unwrap();
        let header =
            raft::SnapshotHeader { bytes: file.bytes(), file_crc32, ..crate::raft::snapshot::meta_to_wire(&meta) };
        Self { cluster, from, to, header, file }
    }

    fn leadership(&self) -> Leadership {
        *self.cluster.registry(self.to).leadership().borrow()
    }

    /// The term, once whoever receives knows its leader.
    async fn term(&self) -> u64 {
        until("it knows who leads", || self.leadership().leader.is_some()).await;
        self.leadership().term
    }

    fn header(&self, step: SnapshotStep) -> raft::SnapshotRequest {
        let leadership = self.leadership();
        let node = leadership.leader.unwrap_or(self.from).0;
        let header = raft::SnapshotHeader {
            envelope: Some(self.cluster.nodes[&self.from].peers.envelope(self.to)),
            vote: Some(raft::Vote { term: leadership.term, node, committed: true }),
            step: step.into(),
            ..self.header.clone()
        };
        raft::SnapshotRequest { part: Some(Part::Header(header)) }
    }

    fn chunk(&self, offset: u64, length: u64) -> raft::SnapshotRequest {
        let data = self.file.read_at(offset, usize::try_from(length).unwrap()).unwrap();
        let chunk = raft::SnapshotChunk { offset, crc32: crc32fast::hash(&data), data: data.into() };
        raft::SnapshotRequest { part: Some(Part::Chunk(chunk)) }
    }

    fn service(&self) -> RaftServiceClient<tonic::transport::Channel> {
        let address = self.cluster.addresses[&self.to].to_string();
        let peers = &self.cluster.nodes[&self.from].peers;
        let channel = peers.channel_at(self.to, &address, Purpose::Bulk).unwrap();
        RaftServiceClient::new(channel).max_encoding_message_size(4 * MESSAGE_BYTES_MAX)
    }

    async fn call(&self, step: SnapshotStep, range: std::ops::Range<u64>) -> Result<u64, Status> {
        loop {
            let term = self.term().await;
            let mut requests = vec![self.header(step)];
            for offset in range.clone().step_by(100_000) {
                requests.push(self.chunk(offset, 100_000.min(range.end - offset)));
            }
            let answer = self.service().install_snapshot(futures::stream::iter(requests)).await;
            // On a machine that stands still leaders change, and a leader of the past is told nothing else.
            if self.term().await == term {
                return answer.map(|answer| answer.into_inner().offset);
            }
        }
    }

    /// Where the receiver wants to go on.
    async fn asked(&self) -> u64 {
        self.call(SnapshotStep::Part, 0..0).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_whose_connections_break_goes_on_where_it_was() {
    let (mut cluster, leader, late) = latecomer().await;
    let bytes = newest(&cluster, leader).bytes();
    // No connection lives long enough to carry even half of it.
    let link = link_to(&mut cluster, late, bytes / 4, Duration::ZERO).await;
    cluster.start(late).await;
    expect_caught_up(&cluster, late).await;
    let (carried, broken) = (link.state.carried.load(Ordering::Relaxed), link.state.broken.load(Ordering::Relaxed));
    assert!(broken >= 3, "{broken} connections broke: too few to prove anything");
    assert!(carried < 2 * bytes, "{carried} bytes were carried for {bytes}");
    // Its answer may be lost, too: then it is not sent again.
    link.state.breaks_after.store(u64::MAX, Ordering::Relaxed);
    let caller = Caller::new(&cluster, leader, late);
    assert_eq!(caller.asked().await, bytes);
    assert_eq!(caller.call(SnapshotStep::Install, 0..0).await.unwrap(), bytes);
    expect_caught_up(&cluster, late).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_moves_takes_as_long_as_it_takes() {
    let (mut cluster, leader, late) = latecomer().await;
    let stalled_after = Duration::from_secs(1);
    let transfer = Transfer { stalled_after, ..Transfer::default() };
    let bytes = newest(&cluster, leader).bytes();
    cluster.transfers.insert(late, transfer);
    // The sender is told the limit at its start.
    cluster.transfers.insert(leader, transfer);
    cluster.stop(leader, Duration::ZERO).await;
    cluster.start(leader).await;
    let rest = Duration::from_millis(20);
    let link = link_to(&mut cluster, late, u64::MAX, rest).await;
    let least = rest * u32::try_from(bytes / (16 << 10)).unwrap();
    assert!(least > 3 * stalled_after, "{least:?} is too short to prove anything");
    cluster.start(late).await;
    expect_caught_up(&cluster, late).await;
    assert!(link.state.carried.load(Ordering::Relaxed) >= bytes);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_knows_no_parts_is_sent_the_whole() {
    let (mut cluster, _, late) = latecomer().await;
    cluster.transfers.insert(late, Transfer { takes_parts: false, ..Transfer::default() });
    cluster.start(late).await;
    expect_caught_up(&cluster, late).await;
    cluster.stop_all().await;
}

/// Three nodes of which none is late: what it is sent, it has. A leader's snapshot, and a follower that it can be sent to.
async fn settled(transfer: Transfer) -> (Cluster, NodeId, NodeId) {
    let mut cluster = Cluster::new(3).await;
    cluster.transfers = cluster.addresses.keys().map(|node| (*node, transfer)).collect();
    cluster.start_all().await;
    let (leader, follower) = (cluster.leader().await, cluster.follower().await);
    for number in 0..20 {
        cluster.submit(leader, &submit_with(&format!("b{number}"), &"x".repeat(30_000))).await;
    }
    cluster.registry(leader).snapshot().await.unwrap();
    assert!(cluster.has(follower, "b19").await);
    (cluster, leader, follower)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrived_is_gone_on_with_by_the_same_file_alone_and_only_undamaged() {
    let (mut cluster, leader, follower) = settled(Transfer::default()).await;
    let mut caller = Caller::new(&cluster, leader, follower);
    let (bytes, half) = (caller.file.bytes(), caller.file.bytes() / 2);
    assert_eq!(caller.asked().await, 0);
    assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    assert_eq!(caller.call(SnapshotStep::Part, 0..half).await.unwrap(), half);
    assert_eq!(caller.asked().await, half);
    let refused = caller.call(SnapshotStep::Part, half + 1..bytes).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::DigestMismatch), "{refused}");
    let refused = caller.call(SnapshotStep::Install, 0..0).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::DigestMismatch), "{refused}");
    assert_eq!(caller.asked().await, half);
    // A damaged beginning.
    let [partial] = &left(&cluster, follower)[..] else { panic!("one file") };
    let mut damaged = std::fs::read(partial).unwrap();
    damaged[1_000] ^= 1;
    std::fs::write(partial, damaged).unwrap();
    assert_eq!(caller.asked().await, 0);
    assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    // Another file of the same rows.
    assert_eq!(caller.call(SnapshotStep::Part, 0..half).await.unwrap(), half);
    caller.header.file_crc32 ^= 1;
    assert_eq!(caller.asked().await, 0);
    assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    caller.header.file_crc32 ^= 1;
    // It has all of this already.
    assert_eq!(caller.call(SnapshotStep::Part, 0..half).await.unwrap(), half);
    assert_eq!(caller.call(SnapshotStep::Part, half..bytes).await.unwrap(), bytes);
    assert_eq!(caller.call(SnapshotStep::Install, 0..0).await.unwrap(), bytes);
    assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    assert_eq!(cluster.registry(follower).counters().snapshots_installed.get(), 0);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_older_sender_sends_and_nobody_wants_leaves_nothing() {
    let (mut cluster, leader, follower) = settled(Transfer::default()).await;
    let mut caller = Caller::new(&cluster, leader, follower);
    caller.header.file_crc32 = 0;
    let bytes = caller.file.bytes();
    for _ in 0..2 {
        assert_eq!(caller.call(SnapshotStep::Whole, 0..bytes).await.unwrap(), bytes);
        assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    }
    let refused = caller.call(SnapshotStep::Whole, 0..bytes - 1).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::DigestMismatch), "{refused}");
    assert_eq!(left(&cluster, follower), Vec::<PathBuf>::new());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_stands_still_is_given_up_and_what_it_sent_goes_when_nobody_wants_it() {
    let transfer = Transfer { stalled_after: Duration::from_millis(300), ..Transfer::default() };
    let (mut cluster, leader, follower) = settled(transfer).await;
    let caller = Caller::new(&cluster, leader, follower);
    let sent = [caller.header(SnapshotStep::Part), caller.chunk(0, 100_000)];
    let requests = futures::StreamExt::chain(futures::stream::iter(sent), futures::stream::pending());
    let mut service = caller.service();
    let answer = tokio::time::timeout(PATIENCE, service.install_snapshot(requests)).await.expect("it is given up");
    assert_eq!(error_code(&answer.unwrap_err()), Some(ErrorCode::PeerUnreachable));
    until("it is gone", || left(&cluster, follower).is_empty()).await;
    cluster.stop_all().await;
}

static FREE: AtomicU64 = AtomicU64::new(0);
static ASKED: AtomicU64 = AtomicU64::new(0);

// It has the form of what asks the system.
#[allow(clippy::unnecessary_wraps)]
fn free_bytes(_: &Path) -> io::Result<u64> {
    ASKED.fetch_add(1, Ordering::Relaxed);
    Ok(FREE.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_a_snapshot_is_refused_before_it_is_sent_and_gets_through_once_there_is_room() {
    let (mut cluster, leader, late) = latecomer().await;
    FREE.store(newest(&cluster, leader).bytes() * 4, Ordering::Relaxed);
    cluster.transfers.insert(late, Transfer { free_bytes, ..Transfer::default() });
    cluster.start(late).await;
    until("it is tried again", || ASKED.load(Ordering::Relaxed) >= 2).await;
    assert_eq!(left(&cluster, late), Vec::<PathBuf>::new());
    let refused = Caller::new(&cluster, leader, late).call(SnapshotStep::Part, 0..0).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::DiskReserve), "{refused}");
    assert!(refused.message().contains("free bytes"), "{refused}");
    let registry = cluster.registry(late).clone();
    assert!(registry.failure().borrow().is_none(), "it stays");
    assert_eq!(registry.counters().snapshots_installed.get(), 0);
    drop(registry);
    FREE.store(u64::MAX, Ordering::Relaxed);
    expect_caught_up(&cluster, late).await;
    cluster.stop_all().await;
}
