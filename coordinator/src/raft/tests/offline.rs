//! A registry that leaves its cluster: everything of a node's log is in it, whatever of its files is left, and it begins a new one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use helix_model::NodeId;

use super::harness::{Cluster, submit, submit_with, wipe};
use crate::node_dir::{Begun, Filling, NodeIdentity, Replacing};
use crate::raft::offline::{Gathered, GiveError, Given, NewCluster, gather, give};

/// A node that ran, with two snapshots, a purged log, and a tail of entries behind them.
async fn stopped_node() -> (Cluster, Vec<String>) {
    let mut cluster = Cluster::new(1).await;
    cluster.start_all().await;
    let node = cluster.leader().await;
    let mut names = Vec::new();
    for round in 0..4 {
        for number in 0..20 {
            let name = format!("r{round}-{number}");
            cluster.submit(node, &submit_with(&name, &"x".repeat(5_000))).await;
            names.push(name);
        }
        if round < 3 {
            cluster.registry(node).snapshot().await.unwrap();
        }
    }
    assert!(cluster.registry(node).status().snapshot_index > 0);
    cluster.stop(node, Duration::ZERO).await;
    (cluster, names)
}

async fn gathered(cluster: &Cluster, scratch: &Path) -> Result<Gathered, GiveError> {
    gather(&cluster.path(NodeId(1)), NodeId(1), scratch).await
}

async fn given(from: &Path, into: &Path, new: &NewCluster) -> Result<Given, GiveError> {
    give(|| std::fs::File::open(from), from, into, new).await
}

fn alone(cluster: &Cluster, node: u64) -> NewCluster {
    let address = cluster.addresses[&NodeId(1)].to_string();
    NewCluster { node: NodeId(node), members: BTreeMap::from([(NodeId(node), address)]), kept_under: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_a_nodes_log_is_gathered_and_begins_a_new_cluster() {
    let (mut cluster, names) = stopped_node().await;
    let scratch = tempfile::tempdir().unwrap();
    let all = gathered(&cluster, scratch.path()).await.unwrap();
    assert_eq!(all.voters, BTreeSet::from([NodeId(1)]));
    assert!(all.committed.index <= all.last.index && all.last.index > 0);

    let used = given(&all.file, &scratch.path().join("used"), &alone(&cluster, 1)).await.unwrap_err();
    assert!(matches!(used, GiveError::IdUsed(NodeId(1), _)), "{used}");
    let old = cluster.path(NodeId(1));
    let new = alone(&cluster, 2);
    cluster.addresses.insert(NodeId(2), cluster.addresses[&NodeId(1)]);
    let filling = Filling::begin(&cluster.path(NodeId(2))).unwrap();
    let told = given(&all.file, filling.path(), &new).await.unwrap();
    assert_eq!((told.open, told.finished, told.applied), (names.len(), 0, all.last));
    assert_eq!(told.retired, BTreeSet::from([NodeId(1)]));
    let members = BTreeMap::from([(2, new.members[&NodeId(2)].clone())]);
    filling.finish(&NodeIdentity { cluster: "demo".to_owned(), node: 2, epoch: 5, members }).unwrap();
    cluster.start(NodeId(2)).await;
    for name in &names {
        assert!(cluster.has(NodeId(2), name).await, "{name}");
    }
    cluster.submit(NodeId(2), &submit("after")).await;
    let registry = cluster.registry(NodeId(2)).clone();
    assert_eq!(registry.voters(), BTreeSet::from([NodeId(2)]));
    assert!(registry.status().term > told.applied.term, "a later term than any before");
    let former = registry.nodes().into_iter().find(|node| node.id == NodeId(1)).unwrap();
    assert!(former.removed_at.is_some());
    // And from disk again; the old node was only read.
    cluster.stop_all().await;
    cluster.start(NodeId(2)).await;
    assert!(cluster.has(NodeId(2), "after").await);
    cluster.stop_all().await;
    assert!(old.join("registry").exists());
    cluster.start(NodeId(1)).await;
    assert!(cluster.has(NodeId(1), names.last().unwrap()).await);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_nodes_files_decides_what_can_be_gathered() {
    let (cluster, names) = stopped_node().await;
    let old = cluster.path(NodeId(1));
    // Without the store; then with the store alone.
    std::fs::rename(old.join("registry"), old.join("kept")).unwrap();
    let first = tempfile::tempdir().unwrap();
    let without_store = gathered(&cluster, first.path()).await.unwrap();
    std::fs::rename(old.join("kept"), old.join("registry")).unwrap();
    for entry in std::fs::read_dir(old.join("snapshots")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let second = tempfile::tempdir().unwrap();
    let without_snapshots = gathered(&cluster, second.path()).await.unwrap();
    assert_eq!(without_store.last, without_snapshots.last);
    for all in [&without_store, &without_snapshots] {
        let into = tempfile::tempdir().unwrap();
        let told = given(&all.file, into.path(), &alone(&cluster, 2)).await.unwrap();
        assert_eq!(told.open, names.len());
    }
    wipe(&old.join("registry"));
    let third = tempfile::tempdir().unwrap();
    assert!(gathered(&cluster, third.path()).await.is_err(), "neither reaches back to the log");
    wipe(&old.join("log"));
    let error = gathered(&cluster, third.path()).await.unwrap_err().to_string();
    assert!(error.contains("log") && error.contains("gone"), "{error}");
    assert!(!old.join("log").exists(), "nothing is made in its place");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_one_that_is_left_keeps_its_id_under_a_new_epoch() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    for number in 0..20 {
        cluster.submit(leader, &submit(&format!("b{number}"))).await;
    }
    cluster.stop_all().await;
    let (left, path) = (NodeId(2), cluster.path(NodeId(2)));
    let Begun::Anew(replacing) = Replacing::begin(&path).unwrap() else { panic!("nothing is to be completed") };
    let all = gather(&path, left, &replacing.scratch()).await.unwrap();
    let address = cluster.addresses[&left].to_string();
    let members = BTreeMap::from([(left, address.clone())]);
    let new = NewCluster { node: left, members, kept_under: Some(77) };
    let told = given(&all.file, &replacing.new_data(), &new).await.unwrap();
    assert_eq!(told.retired, BTreeSet::from([NodeId(1), NodeId(3)]));
    let identity =
        NodeIdentity { epoch: 77, members: BTreeMap::from([(2, address)]), ..replacing.dir().identity().clone() };
    replacing.finish(&identity).unwrap();
    cluster.start(left).await;
    for number in 0..20 {
        assert!(cluster.has(left, &format!("b{number}")).await, "{number}");
    }
    cluster.submit(left, &submit("after")).await;
    // The others come back as they were: each is told that it is retired, and the survivor does not doubt itself.
    for node in [NodeId(1), NodeId(3)] {
        cluster.start(node).await;
        let mut failure = cluster.registry(node).failure();
        let why = tokio::time::timeout(super::harness::PATIENCE, failure.wait_for(Option::is_some)).await;
        let why = why.unwrap().unwrap().clone().unwrap_or_default();
        assert!(why.contains("was removed"), "{why}");
        cluster.stop(node, Duration::ZERO).await;
    }
    assert!(cluster.registry(left).failure().borrow().is_none());
    cluster.submit(left, &submit("later")).await;
    cluster.stop_all().await;
}
