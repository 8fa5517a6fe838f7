//! Logs under moves, seals, losses and readers of every kind. Real files, real servers on loopback.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::StreamExt;
use helix_common::sealed_log::{LogRecord, LogStream, SealedLogWriter};
use helix_common::status::error_code;
use helix_core::record::{BlobRef, SealedLog};
use helix_model::{AttemptNumber, Digest, LogTime, NodeId, Reason, TaskIndex, WorkerName};
use helix_proto::convert::attempt_to_wire;
use helix_proto::peer::log_peer_service_server::{LogPeerService, LogPeerServiceServer};
use helix_proto::peer::{LogHeadRequest, LogHeadResponse};
use helix_proto::v1;
use helix_proto::v1::blob_service_server::BlobServiceServer;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::Server as TonicServer;

use super::live::LiveReader;
use super::*;
use crate::blobs::{Announce, Opened};
use crate::plane::EndFacts;
use crate::plane::recorded::{Ledger, Recorded, Server, listen, serve};
use crate::rpc::blob::BlobRpc;

mod sealing;

const DEADLINE: Duration = Duration::from_secs(120);

struct Node {
    root: TempDir,
    hub: LogHub,
    blobs: Arc<Blobs>,
    server: Option<Server>,
}

struct Cluster {
    ledger: Arc<Ledger>,
    nodes: Vec<Node>,
    stopping: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

fn cluster(size: u64) -> Cluster {
    let (ledger, stopping) = (Ledger::new(), CancellationToken::new());
    let mut nodes = Vec::new();
    for id in 1..=size {
        let listener = listen(id, &ledger);
        let root = tempfile::tempdir().unwrap();
        let plane = Recorded::new(id, &ledger);
        let Opened { blobs, .. } = Blobs::open(root.path(), plane.clone(), None).unwrap();
        let live = root.path().join("live");
        let hub = LogHub::open(&live, plane, Arc::clone(&blobs), stopping.clone()).unwrap();
        tokio::spawn(hub.clone().keep());
        let router = TonicServer::builder()
            .add_service(BlobServiceServer::new(BlobRpc::new(Arc::clone(&blobs))))
            .add_service(LogPeerServiceServer::new(hub.clone()));
        nodes.push(Node { root, hub, blobs, server: Some(serve(listener, router)) });
    }
    Cluster { ledger, nodes, stopping }
}

fn key() -> AttemptKey {
    AttemptKey { build: BuildId::new("b1").unwrap(), task: TaskIndex(0), attempt: AttemptNumber(1) }
}

fn worker() -> WorkerName {
    WorkerName::new("w1").unwrap()
}

fn running() -> AttemptFacts {
    AttemptFacts::Open { worker: worker(), end: None }
}

fn ended(reason: Reason) -> AttemptFacts {
    let agent_lives = reason != Reason::WorkerLost;
    let end = EndFacts { at: LogTime(5000), reason: Some(reason), agent_lives };
    AttemptFacts::Open { worker: worker(), end: Some(end) }
}

fn line(seq: u64) -> v1::LogRecord {
    let data = format!("line {seq} {}", "x".repeat(usize::try_from(seq % 50).unwrap()));
    v1::LogRecord { seq, time_ms: 1000, stream: v1::LogStream::Stdout.into(), data: data.into() }
}

fn message(seqs: std::ops::RangeInclusive<u64>, last: bool) -> PushLog {
    PushLog { id: Some(attempt_to_wire(&key())), records: seqs.map(line).collect(), last, cut: false }
}

/// An agent's stream to a node.
struct Pusher {
    tx: mpsc::Sender<Result<PushLog, Status>>,
    acks: ReceiverStream<Result<PushLogAck, Status>>,
}

impl Pusher {
    fn to(node: &Node) -> Self {
        let (tx, rx) = mpsc::channel(64);
        Self { tx, acks: node.hub.serve_push(ReceiverStream::new(rx), worker()) }
    }

    async fn send(&mut self, seqs: std::ops::RangeInclusive<u64>) {
        let last = *seqs.end();
        self.tx.send(Ok(message(seqs, false))).await.unwrap();
        while self.ack().await.unwrap() < last {}
    }

    async fn last(&mut self) {
        let last = PushLog { id: Some(attempt_to_wire(&key())), last: true, ..PushLog::default() };
        self.tx.send(Ok(last)).await.unwrap();
        self.ack().await.unwrap();
    }

    async fn ack(&mut self) -> Result<u64, Status> {
        self.whole_ack().await.map(|ack| ack.seq)
    }

    async fn whole_ack(&mut self) -> Result<PushLogAck, Status> {
        timeout(DEADLINE, self.acks.next()).await.unwrap().unwrap()
    }
}

fn query(from_seq: u64, tail: u64, follow: bool) -> LogQuery {
    LogQuery { key: key(), from_seq, tail, follow }
}

type Chunks = ReceiverStream<Result<v1::LogChunk, Status>>;

async fn rest(mut chunks: Chunks) -> Vec<v1::LogRecord> {
    let mut out = Vec::new();
    while let Some(chunk) = timeout(DEADLINE, chunks.next()).await.unwrap() {
        out.extend(chunk.unwrap().records);
    }
    out
}

/// Reads until so many lines came.
async fn some(chunks: &mut Chunks, count: usize) -> Vec<v1::LogRecord> {
    let mut out = Vec::new();
    while out.len() < count {
        out.extend(timeout(DEADLINE, chunks.next()).await.unwrap().unwrap().unwrap().records);
    }
    out
}

async fn read(node: &Node, query: LogQuery) -> Vec<v1::LogRecord> {
    rest(node.hub.read(query).await.unwrap()).await
}

fn lines(seqs: std::ops::RangeInclusive<u64>) -> Vec<v1::LogRecord> {
    seqs.map(line).collect()
}

/// Stores the sealed log of lines up to `last` on a node, and lets the registry know.
async fn seal(cluster: &Cluster, node: usize, last: u64) {
    let mut writer = SealedLogWriter::new(Vec::new()).unwrap();
    for record in lines(1..=last) {
        let record =
            LogRecord { seq: record.seq, time_ms: record.time_ms, stream: LogStream::Stdout, data: record.data };
        writer.push(&record).unwrap();
    }
    let (bytes, _) = writer.finish().unwrap();
    let (digest, size) = (Digest(Sha256::digest(&bytes).into()), bytes.len() as u64);
    let announce = Announce { digest, size, offset: 0, copies: 1 };
    let chunks = futures::stream::iter([Ok(Bytes::from(bytes))]);
    cluster.nodes[node].blobs.put(announce, chunks).await.unwrap();
    let holders = BTreeSet::from([NodeId(node as u64 + 1)]);
    let log = SealedLog { blob: BlobRef { digest, size, holders }, lines: last };
    cluster.ledger.set(&key(), AttemptFacts::Sealed { log });
}

#[tokio::test]
async fn pushed_lines_are_read_from_any_coordinator_and_any_number() {
    let cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    pusher.send(1..=1).await;
    pusher.send(2..=5000).await;
    pusher.send(4990..=5010).await;
    for node in &cluster.nodes {
        assert_eq!(read(node, query(0, 0, false)).await, lines(1..=5010));
        for from in [1, 2, 3, 4999, 5010] {
            assert_eq!(read(node, query(from, 0, false)).await, lines(from..=5010), "from {from}");
        }
        assert_eq!(read(node, query(5011, 0, false)).await, []);
        assert_eq!(read(node, query(0, 3, false)).await, lines(5008..=5010));
        assert_eq!(read(node, query(0, 9999, false)).await, lines(1..=5010));
    }
    let other = LogQuery { key: AttemptKey { attempt: AttemptNumber(2), ..key() }, ..query(0, 0, true) };
    let unknown = cluster.nodes[0].hub.read(other).await.unwrap_err();
    assert_eq!(error_code(&unknown), Some(ErrorCode::LogUnknown));
}

#[tokio::test]
async fn holes_strangers_and_nonsense_are_refused_and_what_nobody_needs_is_acknowledged() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(node);
    pusher.send(1..=10).await;
    pusher.tx.send(Ok(message(12..=13, false))).await.unwrap();
    let hole = pusher.whole_ack().await.unwrap();
    assert!(hole.again && hole.refused.is_empty() && hole.seq == 10, "{hole:?}");
    // It begins anew, on the same stream.
    pusher.send(1..=13).await;
    // Another attempt on the stream is not bothered by what happens to this one.
    let other = AttemptKey { task: TaskIndex(1), ..key() };
    cluster.ledger.set(&other, running());
    let long = v1::LogRecord { data: vec![b'x'; 64 * 1024 + 1].into(), ..line(14) };
    let message_long = PushLog { records: vec![long], ..message(14..=14, false) };
    pusher.tx.send(Ok(message_long)).await.unwrap();
    for _ in 0..2 {
        let refused = pusher.whole_ack().await.unwrap();
        assert!(refused.refused.contains("too long") && !refused.again, "{refused:?}");
        // Nor is what follows taken.
        pusher.tx.send(Ok(message(14..=14, false))).await.unwrap();
    }
    pusher.whole_ack().await.unwrap();
    let others = PushLog { id: Some(attempt_to_wire(&other)), ..message(1..=3, false) };
    pusher.tx.send(Ok(others)).await.unwrap();
    assert_eq!(pusher.ack().await.unwrap(), 3);
    assert_eq!(read(node, query(0, 0, false)).await, lines(1..=13));

    cluster.ledger.set(&key(), AttemptFacts::Open { worker: WorkerName::new("w2").unwrap(), end: None });
    let mut stranger = Pusher::to(node);
    stranger.tx.send(Ok(message(14..=15, false))).await.unwrap();
    assert!(stranger.whole_ack().await.unwrap().refused.contains("is not w1's"));
    cluster.ledger.purge(&key().build);
    let mut late = Pusher::to(node);
    late.tx.send(Ok(message(14..=15, false))).await.unwrap();
    assert_eq!(late.ack().await.unwrap(), 15);
    cluster.ledger.reachable.store(false, std::sync::atomic::Ordering::SeqCst);
    let mut unsure = Pusher::to(node);
    unsure.tx.send(Ok(message(14..=15, false))).await.unwrap();
    assert_eq!(error_code(&unsure.ack().await.unwrap_err()), Some(ErrorCode::NoLeader));
}

#[tokio::test]
async fn a_log_that_is_sealed_just_when_its_first_lines_come_is_not_begun() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    *cluster.ledger.after_look.lock().unwrap() = Some(AttemptFacts::Expired);
    let mut pusher = Pusher::to(node);
    pusher.tx.send(Ok(message(1..=3, false))).await.unwrap();
    assert_eq!(pusher.ack().await.unwrap(), 3, "what nobody needs is acknowledged");
    assert_eq!(node.hub.live_totals().0, 0);
    assert_eq!(std::fs::read_dir(node.root.path().join("live")).unwrap().count(), 0);
}

#[tokio::test]
async fn followers_get_every_line_once_across_the_seal() {
    let cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    let mut followers = Vec::new();
    for node in &cluster.nodes {
        for (from, tail) in [(0, 0), (150, 0)] {
            followers.push((from.max(1), tokio::spawn(rest(node.hub.read(query(from, tail, true)).await.unwrap()))));
        }
    }
    let mut pusher = Pusher::to(&cluster.nodes[1]);
    for start in (1..=900).step_by(100) {
        pusher.send(start..=start + 99).await;
    }
    // Sealed in mid-follow, with lines that no follower saw live.
    seal(&cluster, 2, 1000).await;
    for (from, follower) in followers {
        assert_eq!(follower.await.unwrap(), lines(from..=1000));
    }
    for node in &cluster.nodes {
        assert_eq!(read(node, query(0, 2, true)).await, lines(999..=1000));
        assert_eq!(read(node, query(990, 5, false)).await, lines(996..=1000));
        let deadline = Instant::now() + DEADLINE;
        while std::fs::read_dir(node.root.path().join("live")).unwrap().count() > 0 {
            assert!(Instant::now() < deadline, "the live log stays");
            tokio::task::yield_now().await;
        }
    }
    // Lines that come behind the seal are acknowledged and dropped.
    pusher.send(901..=1000).await;
    let mut again = Pusher::to(&cluster.nodes[0]);
    again.send(1..=100).await;
    assert_eq!(cluster.nodes[0].hub.live_totals().0, 0);
}

#[tokio::test]
async fn a_follower_ends_when_the_attempt_has_ended_and_all_was_delivered() {
    let cluster = cluster(2);
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    pusher.send(1..=10).await;
    let mut followers = Vec::new();
    for node in &cluster.nodes {
        followers.push(tokio::spawn(rest(node.hub.read(query(0, 0, true)).await.unwrap())));
    }
    // The end is committed before the last lines are here.
    cluster.ledger.set(&key(), ended(Reason::Exit));
    pusher.send(11..=20).await;
    pusher.last().await;
    for follower in followers {
        assert_eq!(follower.await.unwrap(), lines(1..=20));
    }
}

#[tokio::test]
async fn followers_stay_with_a_pusher_that_moves() {
    let mut cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    let mut first = Pusher::to(&cluster.nodes[0]);
    first.send(1..=100).await;
    let mut follower = cluster.nodes[2].hub.read(query(0, 0, true)).await.unwrap();
    assert_eq!(some(&mut follower, 100).await, lines(1..=100));
    // To another coordinator, where it begins at line 1; the first one is gone.
    drop(first);
    cluster.nodes[0].server = None;
    let mut second = Pusher::to(&cluster.nodes[1]);
    second.send(1..=150).await;
    assert_eq!(some(&mut follower, 50).await, lines(101..=150));
    // And to the one where the follower is.
    drop(second);
    let mut third = Pusher::to(&cluster.nodes[2]);
    third.send(1..=200).await;
    assert_eq!(some(&mut follower, 50).await, lines(151..=200));
    third.last().await;
    cluster.ledger.set(&key(), ended(Reason::Exit));
    assert_eq!(rest(follower).await, []);
}

#[tokio::test]
async fn many_followers_and_a_slow_one_read_the_same() {
    let cluster = cluster(2);
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    pusher.send(1..=10).await;
    let mut slow = cluster.nodes[0].hub.read(query(0, 0, true)).await.unwrap();
    let mut followers = Vec::new();
    // More than may keep a stream to the other node open.
    for at in 0..400 {
        let node = &cluster.nodes[usize::from(at < 300)];
        followers.push(tokio::spawn(rest(node.hub.read(query(0, 0, true)).await.unwrap())));
    }
    for start in (11..=4010).step_by(500) {
        pusher.send(start..=start + 499).await;
    }
    pusher.last().await;
    cluster.ledger.set(&key(), ended(Reason::Exit));
    for follower in followers {
        let read = follower.await.unwrap();
        assert_eq!((read.len(), read.last()), (4010, Some(&line(4010))));
    }
    // The slow one held nothing up, and what waits for it waits on the disk.
    assert_eq!(some(&mut slow, 1).await[0], line(1));
    let others = rest(slow).await;
    assert_eq!(others.last(), Some(&line(4010)));
}

#[tokio::test]
async fn a_lost_log_ends_with_a_word_on_what_is_missing() {
    let mut cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    pusher.send(1..=7).await;
    let follower = cluster.nodes[1].hub.read(query(0, 0, true)).await.unwrap();
    drop(pusher);
    cluster.nodes[2].server = None;
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    let expect = |read: Vec<v1::LogRecord>| {
        assert_eq!(read[..7], lines(1..=7));
        assert_eq!((read.len(), read[7].seq, read[7].stream()), (8, 8, v1::LogStream::System));
        let text = String::from_utf8_lossy(&read[7].data).into_owned();
        assert!(text.contains("line 7 was lost") && text.contains("do not answer: 3"), "{text}");
    };
    expect(rest(follower).await);
    expect(read(&cluster.nodes[0], query(0, 0, false)).await);
}

#[tokio::test]
async fn live_logs_survive_a_restart_up_to_where_they_are_damaged() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(node);
    for seq in 1..=20 {
        pusher.send(seq..=seq).await;
    }
    let path = node.root.path().join("live").join(format!("{}.log", key()));
    let whole = std::fs::read(&path).unwrap();
    let other = tempfile::tempdir().unwrap();
    let copy = other.path().join(format!("{}.log", key()));
    let recovered = || {
        let logs = LiveLogs::open(other.path()).unwrap();
        let mut reader = LiveReader::new(logs.get(&key()).unwrap(), 1);
        let read = reader.read().unwrap();
        assert_eq!(read, lines(1..=20)[..read.len()]);
        read.len()
    };
    for cut in 0..whole.len() {
        std::fs::write(&copy, &whole[..cut]).unwrap();
        let read = recovered();
        assert!(read < 20, "cut at {cut}");
        // And goes on from there.
        let logs = LiveLogs::open(other.path()).unwrap();
        let log = logs.get(&key()).unwrap();
        assert_eq!(log.append(&lines(1..=20), u64::MAX).unwrap(), 20);
        assert_eq!(recovered(), 20, "cut at {cut}");
    }
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&copy, &bytes).unwrap();
        assert!(recovered() < 20, "byte {at}");
    }
}

#[tokio::test]
async fn logs_that_nobody_needs_are_swept() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(node);
    pusher.send(1..=10).await;
    node.hub.sweep().await;
    assert_eq!(node.hub.live_totals().0, 1);
    // Purged while this node did not listen.
    cluster.ledger.attempts.lock().unwrap().clear();
    cluster.ledger.reachable.store(false, std::sync::atomic::Ordering::SeqCst);
    node.hub.sweep().await;
    assert_eq!(node.hub.live_totals().0, 1, "in doubt it stays");
    cluster.ledger.reachable.store(true, std::sync::atomic::Ordering::SeqCst);
    node.hub.sweep().await;
    assert_eq!(node.hub.live_totals().0, 0);
    assert_eq!(std::fs::read_dir(node.root.path().join("live")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_sweep_that_cannot_be_made_at_the_start_is_made_soon() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    Pusher::to(node).send(1..=10).await;
    // It starts again, purged of the attempt, and nobody leads yet.
    cluster.ledger.attempts.lock().unwrap().clear();
    cluster.ledger.reachable.store(false, std::sync::atomic::Ordering::SeqCst);
    let plane = Recorded::new(1, &cluster.ledger);
    let stopping = cluster.stopping.clone();
    let hub = LogHub::open(&node.root.path().join("live"), plane, Arc::clone(&node.blobs), stopping).unwrap();
    tokio::spawn(hub.clone().keep());
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(hub.live_totals().0, 1, "in doubt it stays");
    cluster.ledger.reachable.store(true, std::sync::atomic::Ordering::SeqCst);
    let deadline = Instant::now() + DEADLINE;
    while hub.live_totals().0 > 0 {
        assert!(Instant::now() < deadline, "it is swept with the next look at the earliest");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_line_reaches_its_reader_soon() {
    let cluster = cluster(2);
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    pusher.send(1..=1).await;
    for node in &cluster.nodes {
        let mut follower = node.hub.read(query(2, 0, true)).await.unwrap();
        let mut fastest = DEADLINE;
        let from = read(node, query(0, 1, false)).await[0].seq + 1;
        for seq in from..from + 20 {
            let before = Instant::now();
            pusher.send(seq..=seq).await;
            while some(&mut follower, 1).await.last() != Some(&line(seq)) {}
            fastest = fastest.min(before.elapsed());
        }
        assert!(fastest < Duration::from_millis(20), "{fastest:?}");
    }
}

#[tokio::test]
async fn who_waits_for_a_log_hears_of_its_begin_elsewhere() {
    let cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    let ask = |wait_ms| {
        let hub = cluster.nodes[0].hub.clone();
        let request = LogHeadRequest { id: Some(attempt_to_wire(&key())), wait_ms };
        async move { hub.log_head(tonic::Request::new(request)).await.unwrap().into_inner() }
    };
    assert_eq!(ask(0).await, LogHeadResponse::default());
    assert_eq!(ask(1).await, LogHeadResponse::default(), "nobody pushes it within the time");
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    let (head, ()) = tokio::join!(ask(60_000), pusher.send(1..=1));
    assert!(head.pushing, "{head:?}");
    assert!(ask(60_000).await.pushing, "it is being pushed already");
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn a_long_log_and_a_reader_that_sleeps_take_little_memory() {
    const BATCHES: u64 = 800;
    const LINES: u64 = 4;
    let cluster = cluster(2);
    cluster.ledger.set(&key(), running());
    let before = resident_bytes();
    let mut pusher = Pusher::to(&cluster.nodes[0]);
    let asleep = [cluster.nodes[0].hub.clone(), cluster.nodes[1].hub.clone()];
    let asleep = [asleep[0].read(query(0, 0, true)).await.unwrap(), asleep[1].read(query(0, 0, true)).await.unwrap()];
    let data = Bytes::from(vec![b'x'; 60 * 1024]);
    for batch in 0..BATCHES {
        let first = batch * LINES + 1;
        let records = (first..first + LINES).map(|seq| v1::LogRecord { seq, data: data.clone(), ..line(1) });
        let message = PushLog { id: Some(attempt_to_wire(&key())), records: records.collect(), ..PushLog::default() };
        pusher.tx.send(Ok(message)).await.unwrap();
        while pusher.ack().await.unwrap() < first + LINES - 1 {}
    }
    pusher.last().await;
    cluster.ledger.set(&key(), ended(Reason::Exit));
    for mut chunks in asleep {
        let mut next = 1;
        while let Some(chunk) = timeout(DEADLINE, chunks.next()).await.unwrap() {
            for record in chunk.unwrap().records {
                assert_eq!((record.seq, record.data.len()), (next, 60 * 1024));
                next += 1;
            }
        }
        assert_eq!(next, BATCHES * LINES + 1);
    }
    // Other tests of this process take memory too: the bound is generous, and below the log's 196 MB.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 120 << 20, "{grown} bytes");
}
