//! Membership at the level of consensus: from one node to three and back, over real TLS, step by step.

use std::time::{Duration, Instant};

use helix_common::status::with_metadata;
use helix_core::command::{RetireNode, SetPolicy};
use helix_core::{Command, Policy, Reply};
use helix_model::{ErrorCode, NodeId};

use super::crash::{copy_of, lay_out};
use super::harness::{Cluster, PATIENCE, submit, until};
use crate::registry::{MemberStep, MembershipError, ProposeError, RaftStatus, Registry};

/// Between two attempts at the same.
const RETRY: Duration = Duration::from_millis(100);

/// Has whoever leads take a step, again where it led no more: each can be repeated.
async fn step(cluster: &Cluster, step: MemberStep) {
    let began = Instant::now();
    loop {
        match cluster.registry(cluster.leader().await).change_member(step.clone()).await {
            Ok(()) => return,
            Err(MembershipError::NotLeader { .. } | MembershipError::Busy | MembershipError::OutcomeUnknown) => {}
            Err(other) => panic!("{step:?}: {other}"),
        }
        assert!(began.elapsed() < PATIENCE, "nobody takes {step:?}");
        tokio::time::sleep(RETRY).await;
    }
}

/// Takes a node that waits into the cluster.
async fn add(cluster: &Cluster, node: NodeId) {
    let address = cluster.addresses[&node].to_string();
    step(cluster, MemberStep::Admit { node, address }).await;
    // Only who leads knows.
    let has_the_log = |status: RaftStatus| {
        status
            .members
            .iter()
            .any(|it| it.id == node && it.last_log_index > 0 && it.last_log_index >= status.last_log_index)
    };
    let leads = |registry: &Registry| registry.leadership().borrow().is_leader;
    until("the learner has the log", || {
        cluster.nodes.values().any(|it| leads(&it.registry) && has_the_log(it.registry.status()))
    })
    .await;
    step(cluster, MemberStep::Promote(node)).await;
    until("it is a voter", || cluster.registry(node).voters().contains(&node)).await;
}

/// Takes a member out of the cluster.
async fn remove(cluster: &Cluster, node: NodeId) {
    step(cluster, MemberStep::Demote(node)).await;
    let began = Instant::now();
    loop {
        let retire = Command::RetireNode(RetireNode { node });
        match cluster.registry(cluster.leader().await).propose(retire).await {
            Ok(Reply::Done | Reply::Unchanged) => break,
            Ok(other) => panic!("{other:?}"),
            Err(ProposeError::NoLeader { .. } | ProposeError::OutcomeUnknown) => {}
            Err(other) => panic!("{other}"),
        }
        assert!(began.elapsed() < PATIENCE, "nobody retires {node}");
    }
    step(cluster, MemberStep::Drop(node)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_to_three_and_back_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::new(1).await;
    cluster.start_all().await;
    cluster.submit(NodeId(1), &submit("alone")).await;
    let first = cluster.registry(NodeId(1)).clone();
    until("it has made itself known", || !first.nodes().is_empty()).await;
    assert_eq!(first.policy(), Policy::of_new_clusters(), "a newborn cluster has its first policy");
    // One as older clusters have it.
    let older = SetPolicy { policy: Policy::default(), expected: None };
    assert_eq!(first.propose(Command::SetPolicy(older)).await, Ok(Reply::Done));
    for node in [2, 3].map(NodeId) {
        cluster.join(node).await;
        assert!(cluster.registry(node).members().is_empty(), "it waits, and knows nobody");
        add(&cluster, node).await;
        until("it has made itself known", || first.nodes().iter().any(|row| row.id == node)).await;
        assert_eq!(first.policy(), Policy::default(), "who joins gives a cluster no other policy");
        cluster.submit(node, &submit(&format!("at-{node}"))).await;
    }
    // Whoever led first goes.
    let gone = cluster.leader().await;
    let next = [1, 2, 3].map(NodeId).into_iter().find(|node| *node != gone).unwrap();
    let began = Instant::now();
    // Who is asked may be behind, or lead no more when it hears of it.
    while cluster.leader().await != next {
        let _ = cluster.registry(cluster.leader().await).ask_to_lead(next).await;
        assert!(began.elapsed() < PATIENCE, "{next} does not lead");
        tokio::time::sleep(RETRY).await;
    }
    remove(&cluster, gone).await;
    let registry = cluster.registry(next);
    until("it is no member", || (registry.voters().len(), registry.members().len()) == (2, 2)).await;
    cluster.submit(next, &submit("after")).await;
    for name in ["alone", "at-2", "at-3", "after"] {
        assert!(cluster.has(next, name).await, "{name}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_slept_through_its_removal_is_not_heard_and_stops() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    let gone = cluster.follower().await;
    cluster.submit(leader, &submit("a")).await;
    cluster.stop(gone, Duration::ZERO).await;
    remove(&cluster, gone).await;
    // It believes to be a voter of three, hears no leader, and asks for votes.
    cluster.start(gone).await;
    let sleeper = cluster.registry(gone).clone();
    let mut failure = sleeper.failure();
    let why = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(why.as_ref().is_some_and(|why| why.contains("was removed")), "{why:?}");
    assert_eq!(sleeper.counters().elections_won.get(), 0, "nobody voted for it");
    let other = cluster.nodes.keys().copied().find(|node| *node != gone).unwrap();
    cluster.submit(other, &submit("b")).await;
    assert_ne!(cluster.registry(other).status().leader, Some(gone));
    cluster.stop_all().await;
    assert!(cluster.open(gone).unwrap_err().to_string().contains("removed it"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_a_majority_knows_is_not_told_by_another_that_it_was_removed() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    cluster.submit(leader, &submit("a")).await;
    let strayed = cluster.follower().await;
    let others: Vec<NodeId> = cluster.nodes.keys().copied().filter(|node| *node != strayed).collect();
    // As one says it that was made a cluster of its own, on the wrong side of a partition.
    cluster.stop(strayed, Duration::ZERO).await;
    let removed = |node: NodeId| {
        with_metadata(ErrorCode::NodeRemoved, "was removed from the cluster", [("removed", node.to_string())])
    };
    for node in &others {
        cluster.nodes[node].peers.heed(strayed, &removed(*node));
        assert_eq!(*cluster.registry(*node).failure().borrow(), None);
    }
    cluster.submit(others[0], &submit("b")).await;
    // Alone with it, it believes it.
    cluster.stop(others[1], Duration::ZERO).await;
    let (peers, failure) = (cluster.nodes[&others[0]].peers.clone(), cluster.registry(others[0]).failure());
    until("it believes it", || {
        peers.heed(strayed, &removed(others[0]));
        failure.borrow().as_ref().is_some_and(|why| why.contains("was removed"))
    })
    .await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stops_although_a_new_member_never_answers() {
    let mut cluster = Cluster::new(1).await;
    cluster.start_all().await;
    let node = cluster.leader().await;
    let registry = cluster.registry(node).clone();
    let nobody = MemberStep::Admit { node: NodeId(2), address: "127.0.0.1:1".to_owned() };
    registry.change_member(nobody.clone()).await.unwrap();
    registry.change_member(nobody).await.unwrap();
    assert_eq!(registry.members().len(), 2);
    // A vote for it needs its own: it can never be committed.
    let watched = registry.clone();
    let adding = tokio::spawn(async move { registry.change_member(MemberStep::Promote(NodeId(2))).await });
    until("both sets of voters are in force", || watched.status().members.iter().all(|it| it.role != "learner")).await;
    tokio::time::timeout(PATIENCE, cluster.stop(node, Duration::ZERO)).await.expect("it ends");
    assert!(adding.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_catches_up_from_a_node_whose_store_outlived_the_end_of_its_log() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    for name in ["s0", "s1"] {
        cluster.submit(node, &submit(name)).await;
        cluster.registry(node).snapshot().await.unwrap();
    }
    cluster.submit(node, &submit("tail-0")).await;
    // What comes now is applied, and a crash comes before it is flushed.
    let path = cluster.path(node).join("log");
    let flushed = copy_of(&path);
    for name in ["tail-1", "tail-2"] {
        cluster.submit(node, &submit(name)).await;
    }
    cluster.stop_all().await;
    lay_out(&flushed, &path);
    cluster.start_all().await;
    let status = cluster.registry(node).status();
    assert!(status.snapshot_index >= status.purged_index, "what is in no log is in a snapshot: {status:?}");
    cluster.join(NodeId(2)).await;
    add(&cluster, NodeId(2)).await;
    for name in ["s0", "tail-2"] {
        assert!(cluster.has(NodeId(2), name).await, "{name}");
    }
    cluster.stop_all().await;
}
