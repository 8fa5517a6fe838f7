//! Logs that no agent seals: who seals them when, with which last line, and what becomes of an agent that comes back.

use std::sync::atomic::Ordering::SeqCst;

use super::*;

/// When the attempt ended, and when a log of a lost worker is due.
const ENDED: u64 = 5_000;
const DUE: u64 = ENDED + 120_000;

fn at(cluster: &Cluster, now: u64) {
    cluster.ledger.now.store(now, SeqCst);
}

/// Pushes lines up to `last` to a node, and goes.
async fn push(node: &Node, last: u64) {
    let mut pusher = Pusher::to(node);
    pusher.send(1..=last).await;
    gone(node, pusher).await;
}

async fn gone(node: &Node, pusher: Pusher) {
    drop(pusher);
    let mut head = node.hub.inner.live.get(&key()).unwrap().head();
    timeout(DEADLINE, head.wait_for(|head| head.pushers == 0)).await.unwrap().unwrap();
}

fn words(record: &v1::LogRecord) -> String {
    assert_eq!(record.stream(), v1::LogStream::System);
    String::from_utf8(record.data.to_vec()).unwrap()
}

fn sealed(cluster: &Cluster) -> SealedLog {
    match cluster.ledger.attempts.lock().unwrap().get(&key()) {
        Some(AttemptFacts::Sealed { log }) => log.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn who_has_the_most_seals_it_after_a_while_and_says_where_lines_may_be_missing() {
    let mut cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    push(&cluster.nodes[1], 30).await;
    // Long enough for a file of its own, and for several blocks.
    push(&cluster.nodes[0], 40_000).await;
    at(&cluster, u64::MAX);
    assert_eq!(cluster.nodes[0].hub.seal_left().await, 0, "it runs");
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    at(&cluster, DUE - 1);
    assert_eq!(cluster.nodes[0].hub.seal_left().await, 0, "its worker may come back");
    at(&cluster, DUE);
    assert_eq!(cluster.nodes[1].hub.seal_left().await, 0, "another has more");
    assert_eq!(cluster.nodes[2].hub.seal_left().await, 0, "it has nothing");
    assert_eq!(cluster.nodes[0].hub.seal_left().await, 1);
    let log = sealed(&cluster);
    assert_eq!((log.blob.holders.len(), log.lines), (2, 40_001));
    let live = cluster.nodes[0].root.path().join("live");
    assert!(std::fs::read_dir(live).unwrap().all(|entry| entry.unwrap().path().extension().unwrap() != "sealing"));
    // The one that had it goes; its log does not.
    cluster.nodes[0].server = None;
    let reader = cluster.nodes.iter().rev().find(|node| node.server.is_some()).unwrap();
    let mut read = read(reader, query(0, 0, true)).await;
    let last = read.pop().unwrap();
    assert!(read == lines(1..=40_000));
    assert_eq!(last.seq, 40_001);
    assert_eq!(words(&last), "what followed line 40000, if anything did, was lost with worker w1");
}

#[tokio::test]
async fn late_lines_are_taken_until_the_log_is_sealed_and_dropped_afterwards() {
    let cluster = cluster(2);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    push(node, 10).await;
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    at(&cluster, DUE);
    let mut back = Pusher::to(node);
    back.send(1..=15).await;
    assert_eq!(node.hub.seal_left().await, 0, "its agent is back, and seals it itself");
    gone(node, back).await;
    // Or is elsewhere.
    let mut moved = Pusher::to(&cluster.nodes[1]);
    moved.send(1..=5).await;
    assert_eq!(node.hub.seal_left().await, 0);
    gone(&cluster.nodes[1], moved).await;
    assert_eq!(node.hub.seal_left().await, 1);
    assert_eq!(sealed(&cluster).lines, 16);
    assert_eq!(read(node, query(15, 0, false)).await[0], line(15));
    let mut late = Pusher::to(node);
    late.send(1..=20).await;
    assert_eq!(read(node, query(16, 0, false)).await.len(), 1, "what it brings now is dropped");
    assert_eq!(node.hub.seal_left().await, 0);
}

#[tokio::test]
async fn nothing_is_said_to_be_missing_of_a_whole_log_and_all_of_an_empty_one() {
    for (whole, last_words) in [(true, None), (false, Some("the log of this attempt was lost with worker w1"))] {
        let cluster = cluster(1);
        let node = &cluster.nodes[0];
        cluster.ledger.set(&key(), running());
        let mut pusher = Pusher::to(node);
        if whole {
            pusher.send(1..=7).await;
            pusher.last().await;
        } else {
            let nothing = PushLog { id: Some(attempt_to_wire(&key())), ..PushLog::default() };
            pusher.tx.send(Ok(nothing)).await.unwrap();
            pusher.ack().await.unwrap();
        }
        gone(node, pusher).await;
        cluster.ledger.set(&key(), ended(Reason::WorkerLost));
        at(&cluster, DUE);
        assert_eq!(node.hub.seal_left().await, 1);
        let read = read(node, query(0, 0, true)).await;
        match last_words {
            None => assert_eq!(read, lines(1..=7)),
            Some(text) => assert_eq!((read.len(), words(&read[0]).as_str()), (1, text)),
        }
    }
}

#[tokio::test]
async fn an_agent_that_is_there_stores_its_log_itself_however_long_that_takes() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    push(node, 3).await;
    cluster.ledger.set(&key(), ended(Reason::Exit));
    at(&cluster, 100 * DUE);
    assert_eq!(node.hub.seal_left().await, 0);
    let AttemptFacts::Open { worker, end: Some(end) } = ended(Reason::Exit) else { panic!() };
    let end = EndFacts { agent_lives: false, ..end };
    cluster.ledger.set(&key(), AttemptFacts::Open { worker, end: Some(end) });
    // While the registry does not answer, nothing is lost by trying.
    cluster.ledger.reachable.store(false, SeqCst);
    assert_eq!(node.hub.seal_left().await, 0);
    cluster.ledger.reachable.store(true, SeqCst);
    assert_eq!(node.hub.seal_left().await, 0, "it is not tried again at once");
    node.hub.forget_pauses();
    assert_eq!(node.hub.seal_left().await, 1);
    let last = read(node, query(4, 0, false)).await;
    assert_eq!(words(&last[0]), "what followed line 3, if anything did, was never brought by worker w1");
}

#[tokio::test]
async fn a_coordinator_that_is_away_may_have_more() {
    let mut cluster = cluster(3);
    cluster.ledger.set(&key(), running());
    push(&cluster.nodes[2], 30).await;
    push(&cluster.nodes[0], 20).await;
    cluster.nodes[2].server = None;
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    at(&cluster, DUE + 599_999);
    assert_eq!(cluster.nodes[0].hub.seal_left().await, 0, "it may be back");
    at(&cluster, DUE + 600_000);
    assert_eq!(cluster.nodes[0].hub.seal_left().await, 1);
    let last = read(&cluster.nodes[1], query(21, 0, false)).await;
    let text = "what followed line 20, if anything did, was lost with worker w1; coordinators that did not answer and may \
                have had more: 3";
    assert_eq!(words(&last[0]), text);
}

#[tokio::test]
async fn a_log_that_is_damaged_is_sealed_up_to_there() {
    let cluster = cluster(1);
    let node = &cluster.nodes[0];
    cluster.ledger.set(&key(), running());
    let mut pusher = Pusher::to(node);
    pusher.send(1..=10).await;
    let path = node.root.path().join("live").join(format!("{}.log", key()));
    let first = std::fs::metadata(&path).unwrap().len();
    pusher.send(11..=20).await;
    gone(node, pusher).await;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[usize::try_from(first).unwrap() + 40] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    at(&cluster, DUE);
    assert_eq!(node.hub.seal_left().await, 1);
    let mut read = read(node, query(0, 0, true)).await;
    let last = read.pop().unwrap();
    assert_eq!(read, lines(1..=10));
    assert!(
        words(&last).starts_with("what followed line 10 was damaged on the only coordinator that had it"),
        "{last:?}"
    );
}

#[tokio::test]
async fn a_log_that_is_damaged_where_another_coordinator_has_more_is_sealed_there() {
    let cluster = cluster(2);
    cluster.ledger.set(&key(), running());
    let node = &cluster.nodes[0];
    let mut pusher = Pusher::to(node);
    pusher.send(1..=10).await;
    let path = node.root.path().join("live").join(format!("{}.log", key()));
    let first = std::fs::metadata(&path).unwrap().len();
    pusher.send(11..=40).await;
    gone(node, pusher).await;
    push(&cluster.nodes[1], 30).await;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[usize::try_from(first).unwrap() + 40] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    cluster.ledger.set(&key(), ended(Reason::WorkerLost));
    at(&cluster, DUE);
    assert_eq!(cluster.nodes[1].hub.seal_left().await, 0, "the other one has more, as far as is known");
    assert_eq!(node.hub.seal_left().await, 0, "it has not");
    node.hub.forget_pauses();
    assert_eq!(node.hub.seal_left().await, 0);
    assert_eq!(cluster.nodes[1].hub.seal_left().await, 1);
    let mut read = read(node, query(0, 0, true)).await;
    assert_eq!(words(&read.pop().unwrap()), "what followed line 30, if anything did, was lost with worker w1");
    assert_eq!(read, lines(1..=30));
}
