//! A node's directory that was copied: the copy is refused and stops, and nobody else is.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_common::ports;
use helix_common::status::with_metadata;
use helix_core::State;
use helix_model::{ErrorCode, NodeId};
use openraft::RaftNetworkFactory;
use openraft::network::{NetVote, RPCOption};
use openraft::raft::VoteRequest;

use super::harness::{Cluster, Node, PATIENCE, submit, until};
use crate::node_dir::init;
use crate::raft::network::Network;
use crate::raft::offline::copy_directory;
use crate::raft::transfer::Transfer;
use crate::raft::types::{Member, Vote};
use crate::registry::{Applied, Shared};

fn free() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], ports::free(1).unwrap()))
}

/// Stops a node and copies what it had.
async fn stop_and_copy(cluster: &mut Cluster, node: NodeId) -> PathBuf {
    cluster.stop(node, Duration::ZERO).await;
    let copy = cluster.root.path().join(format!("copy-of-{node}"));
    copy_directory(&cluster.path(node), &copy).unwrap();
    copy
}

/// Waits until a node cannot go on, and answers why.
async fn failed(node: &Node) -> String {
    let mut failure = node.registry.failure();
    let why = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await.expect("it fails").unwrap();
    why.clone().unwrap()
}

/// Waits until all the others know this very process of a node.
async fn known(cluster: &Cluster, node: NodeId) {
    let run = cluster.nodes[&node].peers.own_run();
    let others = || cluster.nodes.iter().filter(|(id, _)| **id != node);
    until("its process is known", || others().all(|(_, other)| other.peers.run_of(node) == Some(run))).await;
}

fn expect_unharmed(cluster: &Cluster) {
    for node in cluster.nodes.values() {
        assert_eq!(*node.registry.failure().borrow(), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_beside_the_original_is_refused_and_stops() {
    for what in ["a follower", "the leader"] {
        let mut cluster = Cluster::new(3).await;
        cluster.start_all().await;
        let leader = cluster.leader().await;
        cluster.submit(leader, &submit("before")).await;
        let node = if what == "the leader" { leader } else { cluster.follower().await };
        let copied = stop_and_copy(&mut cluster, node).await;
        cluster.start(node).await;
        // Its vote is needed from now on.
        let away = cluster.nodes.keys().copied().find(|other| *other != node && *other != leader).unwrap();
        cluster.stop(away, Duration::ZERO).await;
        let address = free();
        let copy = cluster.start_in(&copied, node, address).await;
        let why = failed(&copy).await;
        assert!(
            why.contains(&cluster.addresses[&node].to_string()) && why.contains("is a copy of one in use"),
            "{why}"
        );
        assert_eq!(copy.registry.counters().elections_won.get(), 0, "nobody voted for the copy of {what}");
        cluster.submit(node, &submit("after")).await;
        assert!(cluster.has(node, "before").await);
        expect_unharmed(&cluster);
        copy.end(Duration::ZERO).await;
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_starts_again_is_another_process_and_is_heard() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let node = cluster.follower().await;
    for turn in 0..3 {
        let before = cluster.nodes[&node].peers.clone();
        before.identify(NodeId(9)).unwrap();
        cluster.stop(node, Duration::ZERO).await;
        assert!(before.identify(NodeId(9)).is_err(), "its directory may be another process's");
        cluster.start(node).await;
        // Only who is sent to asks: it leads.
        while cluster.leader().await != node {
            let _ = cluster.registry(cluster.leader().await).ask_to_lead(node).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cluster.submit(node, &submit(&format!("turn-{turn}"))).await;
        known(&cluster, node).await;
        expect_unharmed(&cluster);
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_dialled_is_believed() {
    let mut cluster = Cluster::new(3).await;
    // It dials the others, and nobody is where they dial it: it can only lead.
    let node = NodeId(3);
    cluster.behind.insert(node, free());
    for node in [NodeId(1), node] {
        cluster.start(node).await;
    }
    until("it leads", || cluster.registry(node).leadership().borrow().is_leader).await;
    cluster.submit(node, &submit("a")).await;
    assert_eq!(cluster.nodes[&NodeId(1)].peers.run_of(node), None);
    expect_unharmed(&cluster);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_address_says_nothing_is_believed() {
    let mut cluster = Cluster::new(3).await;
    let node = NodeId(3);
    cluster.behind.insert(node, free());
    // Connections are made there, and that is all.
    let _silent = std::net::TcpListener::bind(cluster.addresses[&node]).unwrap();
    for node in [NodeId(1), node] {
        cluster.start(node).await;
    }
    until("it leads", || cluster.registry(node).leadership().borrow().is_leader).await;
    cluster.submit(node, &submit("a")).await;
    expect_unharmed(&cluster);
    cluster.stop_all().await;
}

/// What a node votes that is dialled at an address.
async fn voted(from: &Node, to: NodeId, address: SocketAddr) -> Result<(), String> {
    let shared = Shared::new(from.registry.node(), State::default(), Applied::default(), Arc::default());
    let mut network = Network::new(from.peers.clone(), Arc::new(shared), Transfer::default());
    let mut client = network.new_heartbeat_client(to.0, &Member { address: address.to_string() }).await;
    let request = VoteRequest::new(Vote::new(1, from.registry.node().0), None);
    let answer = client.pre_vote(request, RPCOption::new(PATIENCE)).await;
    answer.map(drop).map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_only_answers_is_not_heard() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    let node = cluster.follower().await;
    let copied = stop_and_copy(&mut cluster, node).await;
    cluster.start(node).await;
    let asking = cluster.nodes.keys().copied().find(|other| *other != node && *other != leader).unwrap();
    let elsewhere = free();
    let copy = cluster.start_in(&copied, node, elsewhere).await;
    let asking = &cluster.nodes[&asking];
    // A connection may lead there, whatever a name means by now.
    assert_eq!(voted(asking, node, cluster.addresses[&node]).await, Ok(()));
    let why = voted(asking, node, elsewhere).await.unwrap_err();
    assert!(why.contains("another process of node"), "{why}");
    expect_unharmed(&cluster);
    copy.end(Duration::ZERO).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_made_anew_beside_one_that_serves_stops_nobody() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    cluster.submit(node, &submit("a")).await;
    let made = cluster.root.path().join("made-anew");
    let members = BTreeMap::from([(node, cluster.addresses[&node].to_string())]);
    init(&made, "demo", node, &members).unwrap();
    let made = cluster.start_in(&made, node, free()).await;
    made.peers.expect_alone().await;
    cluster.submit(node, &submit("b")).await;
    expect_unharmed(&cluster);
    made.end(Duration::ZERO).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_was_believed_is_refused_when_the_original_is_back() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let node = cluster.follower().await;
    cluster.submit(node, &submit("before")).await;
    // What only the others have would keep the copy from leading.
    until("all have made themselves known", || cluster.registry(node).nodes().len() == 3).await;
    let copied = stop_and_copy(&mut cluster, node).await;
    let away = cluster.follower().await;
    cluster.stop(away, Duration::ZERO).await;
    // Nobody is at the node's address. The other one follows it, for lack of another.
    let copy = cluster.start_in(&copied, node, free()).await;
    until("it leads", || copy.registry.leadership().borrow().is_leader).await;
    cluster.start(node).await;
    let why = failed(&copy).await;
    assert!(why.contains("is a copy of one in use"), "{why}");
    copy.end(Duration::ZERO).await;
    cluster.start(away).await;
    cluster.submit(node, &submit("after")).await;
    assert!(cluster.has(node, "before").await);
    expect_unharmed(&cluster);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_at_the_nodes_address_has_its_place_and_the_other_stops() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let node = cluster.follower().await;
    let copied = stop_and_copy(&mut cluster, node).await;
    let at_the_address = cluster.start_in(&copied, node, cluster.addresses[&node]).await;
    let moved_aside = cluster.start_in(&cluster.path(node), node, free()).await;
    let why = failed(&moved_aside).await;
    assert!(why.contains("is a copy of one in use"), "{why}");
    assert_eq!(*at_the_address.registry.failure().borrow(), None);
    moved_aside.end(Duration::ZERO).await;
    cluster.nodes.insert(node, at_the_address);
    cluster.submit(node, &submit("a")).await;
    expect_unharmed(&cluster);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_cluster_of_one_finds_the_original_at_its_address() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    cluster.submit(node, &submit("a")).await;
    let copied = stop_and_copy(&mut cluster, node).await;
    let copy = cluster.start_in(&copied, node, free()).await;
    copy.peers.expect_alone().await;
    assert_eq!(*copy.registry.failure().borrow(), None, "nobody is there");
    cluster.start(node).await;
    let original = cluster.nodes[&node].peers.clone();
    let failure = copy.registry.failure();
    let began = std::time::Instant::now();
    while failure.borrow().is_none() {
        copy.peers.expect_alone().await;
        original.expect_alone().await;
        assert!(began.elapsed() < PATIENCE, "it does not find the original");
    }
    assert!(failure.borrow().as_ref().is_some_and(|why| why.contains("is a copy of one in use")));
    expect_unharmed(&cluster);
    copy.end(Duration::ZERO).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_process_that_is_refused_stops_and_an_older_program_is_heard() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let (node, other) = (NodeId(1), NodeId(2));
    let peers = cluster.nodes[&node].peers.clone();
    peers.expect_one_run(other, 0).await.unwrap();
    // Late, of the process that was there before.
    let refused = peers.expect_one_run(other, 7).await.unwrap_err();
    assert_eq!(helix_common::status::error_code(&refused), Some(ErrorCode::WrongCluster));
    cluster.nodes[&other].peers.heed(node, &refused);
    expect_unharmed(&cluster);
    let run = cluster.nodes[&other].peers.own_run().to_string();
    let facts = [("copy_of", other.to_string()), ("run", run), ("address", "there:1".to_owned())];
    let refused = with_metadata(ErrorCode::WrongCluster, "another answers", facts);
    cluster.nodes[&NodeId(3)].peers.heed(node, &refused);
    expect_unharmed(&cluster);
    cluster.nodes[&other].peers.heed(node, &refused);
    assert!(failed(&cluster.nodes[&other]).await.contains("there:1"));
    cluster.stop_all().await;
}
