//! Membership at the level of consensus: from one node to three and back, over real TLS, step by step.

use std::time::Duration;

use helix_core::command::RetireNode;
use helix_core::{Command, Reply};
use helix_model::NodeId;

use super::harness::{Cluster, PATIENCE, submit, until};
use crate::registry::MemberStep;

/// Takes a node that waits into the cluster.
async fn add(cluster: &Cluster, node: NodeId) {
    let leader = cluster.leader().await;
    let registry = cluster.registry(leader).clone();
    let address = cluster.addresses[&node].to_string();
    registry.change_member(MemberStep::Admit { node, address }).await.unwrap();
    until("the learner has the log", || {
        let status = registry.status();
        status.members.iter().any(|member| member.id == node && member.last_log_index >= status.last_log_index)
    })
    .await;
    registry.change_member(MemberStep::Promote(node)).await.unwrap();
    assert!(registry.voters().contains(&node));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_to_three_and_back_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::new(1).await;
    cluster.start_all().await;
    cluster.submit(NodeId(1), &submit("alone")).await;
    for node in [2, 3].map(NodeId) {
        cluster.join(node).await;
        assert!(cluster.registry(node).members().is_empty(), "it waits, and knows nobody");
        add(&cluster, node).await;
        cluster.submit(node, &submit(&format!("at-{node}"))).await;
    }
    // Whoever led first goes.
    let leader = cluster.leader().await;
    let next = [1, 2, 3].map(NodeId).into_iter().find(|node| *node != leader).unwrap();
    cluster.registry(leader).ask_to_lead(next).await.unwrap();
    let registry = cluster.registry(next).clone();
    until("another leads", || registry.leadership().borrow().is_leader).await;
    registry.change_member(MemberStep::Demote(leader)).await.unwrap();
    let retire = Command::RetireNode(RetireNode { node: leader });
    assert_eq!(registry.propose(retire).await.unwrap(), Reply::Done);
    registry.change_member(MemberStep::Drop(leader)).await.unwrap();
    assert_eq!((registry.voters().len(), registry.members().len()), (2, 2));
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
    let leader = cluster.leader().await;
    let registry = cluster.registry(leader).clone();
    registry.change_member(MemberStep::Demote(gone)).await.unwrap();
    registry.propose(Command::RetireNode(RetireNode { node: gone })).await.unwrap();
    registry.change_member(MemberStep::Drop(gone)).await.unwrap();
    let term = registry.status().term;
    // It believes to be a voter of three, hears no leader, and asks for votes.
    cluster.start(gone).await;
    let mut failure = cluster.registry(gone).failure();
    let why = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(why.as_ref().is_some_and(|why| why.contains("was removed")), "{why:?}");
    cluster.submit(leader, &submit("b")).await;
    assert_eq!(registry.status().term, term, "nobody was disturbed");
    cluster.stop_all().await;
    assert!(cluster.open(gone).unwrap_err().to_string().contains("removed it"));
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
    let began = std::time::Instant::now();
    cluster.stop(node, Duration::ZERO).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(adding.await.unwrap().is_err());
}
