//! Three nodes over real TLS: nothing acknowledged is lost, whoever stops, lags, or forgets.

use std::time::{Duration, Instant};

use helix_model::NodeId;

use super::harness::{Cluster, PATIENCE, id, submit, submit_with, until, wipe};
use crate::registry::{Consistency, ProposeError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_takes_proposals_and_reads_what_is_acknowledged() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let follower = cluster.follower().await;
    let leader = cluster.leader().await;
    cluster.submit(follower, &submit("a")).await;
    cluster.submit(leader, &submit("b")).await;
    for node in [1, 2, 3].map(NodeId) {
        assert!(cluster.has(node, "a").await && cluster.has(node, "b").await, "node {node}");
    }
    let many: Vec<_> = (0..500).map(|number| submit_with(&format!("m{number}"), &"x".repeat(2_000))).collect();
    let replies = cluster.registry(follower).propose_all(many).await.unwrap();
    assert_eq!(replies.len(), 500);
    assert!(cluster.has(leader, "m499").await);
    let nodes = cluster.registry(follower).clone();
    until("every node has made itself known", || nodes.nodes().len() == 3).await;
    assert!(cluster.registry(leader).counters().entries.get() < 400, "commands share entries");
    let leading = cluster.registry(leader).clone();
    until("the status names all members", || leading.status().members.len() == 3).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_decided_is_taken_in_its_term_and_by_nobody_else() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let decided = |node: NodeId, term: u64, name: &str| {
        let (registry, command) = (cluster.registry(node).clone(), submit(name));
        async move { registry.propose_in_term(term, vec![command]).await }
    };
    let refused = |outcome| matches!(outcome, Err(ProposeError::NoLeader { .. }));
    // Elections that nobody asked for are borne: then another leader decides, in another term.
    let began = Instant::now();
    loop {
        let leader = cluster.leader().await;
        let leadership = *cluster.registry(leader).leadership().borrow();
        let (term, other) = (leadership.term, cluster.nodes.keys().copied().find(|node| *node != leader).unwrap());
        if leadership.is_leader {
            assert!(refused(decided(other, term, "a").await), "it was sent on");
            assert!(refused(decided(leader, term - 1, "b").await), "it is of an earlier term");
            match decided(leader, term, "c").await {
                Ok(replies) => break assert_eq!(replies.len(), 1),
                Err(ProposeError::NoLeader { .. } | ProposeError::OutcomeUnknown) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert!(began.elapsed() < PATIENCE, "no leader decides anything");
    }
    let witness = cluster.leader().await;
    assert!(cluster.has(witness, "c").await && !cluster.has(witness, "a").await && !cluster.has(witness, "b").await);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_comes_back_leads_in_a_new_term_and_not_before_it_has_applied_all() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    let mut before = 0;
    for round in 0..3 {
        cluster.submit(node, &submit(&format!("b{round}"))).await;
        let leadership = *cluster.registry(node).leadership().borrow();
        assert!(leadership.is_leader && leadership.term > before, "{leadership:?} after term {before}");
        before = leadership.term;
        cluster.stop(node, Duration::ZERO).await;
        // What it applied is behind its log.
        std::fs::remove_dir_all(cluster.path(node).join("registry")).unwrap();
        cluster.start(node).await;
        let (registry, last) = (cluster.registry(node).clone(), format!("b{round}"));
        until("it leads", || registry.leadership().borrow().is_leader).await;
        let known = registry.with_state(|state| state.build(&id(&last)).is_some());
        assert!(known, "it leads and does not know what it acknowledged");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_no_majority_answers_stands_down_and_leads_again_with_one() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    cluster.submit(NodeId(1), &submit("a")).await;
    let leader = cluster.leader().await;
    let others: Vec<NodeId> = cluster.nodes.keys().copied().filter(|node| *node != leader).collect();
    for node in &others {
        cluster.stop(*node, Duration::ZERO).await;
    }
    let alone = cluster.registry(leader).clone();
    until("it stands down", || {
        let now = *alone.leadership().borrow();
        now.leader.is_none() && !now.is_leader
    })
    .await;
    until("it says so", || {
        let status = alone.status();
        let own = status.members.iter().find(|member| member.id == leader).map(|member| member.role);
        status.leader.is_none() && status.warnings.contains(&"no_leader") && own == Some("candidate")
    })
    .await;
    cluster.start(others[0]).await;
    let back = cluster.registry(others[0]).clone();
    until("one of the two leads", || alone.leadership().borrow().is_leader || back.leadership().borrow().is_leader)
        .await;
    cluster.submit(leader, &submit("b")).await;
    assert!(cluster.has(others[0], "a").await && cluster.has(others[0], "b").await);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_command_is_lost_when_leaders_stop() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let leader = cluster.leader().await;
        let writer = cluster.follower().await;
        for number in 0..20 {
            let name = format!("r{round}-{number}");
            cluster.submit(writer, &submit(&name)).await;
            acknowledged.push(name);
        }
        // One time it hands over, the other times it is just gone.
        let deadline = if round == 1 { Duration::from_secs(10) } else { Duration::ZERO };
        cluster.stop(leader, deadline).await;
        let name = format!("r{round}-after");
        cluster.submit(writer, &submit(&name)).await;
        acknowledged.push(name);
        cluster.start(leader).await;
    }
    for node in [1, 2, 3].map(NodeId) {
        for name in &acknowledged {
            assert!(cluster.has(node, name).await, "{name} on node {node}");
        }
    }
    // All at once, and from disk.
    cluster.stop_all().await;
    cluster.start_all().await;
    for name in &acknowledged {
        assert!(cluster.has(NodeId(1), name).await, "{name} after all had stopped");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lags_behind_the_purged_log_gets_a_snapshot() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    let lagging = cluster.follower().await;
    cluster.submit(leader, &submit("before")).await;
    cluster.stop(lagging, Duration::ZERO).await;
    let leader = cluster.leader().await;
    for round in 0..3 {
        for number in 0..20 {
            cluster.submit(leader, &submit_with(&format!("s{round}-{number}"), &"x".repeat(20_000))).await;
        }
        for registry in cluster.nodes.values().map(|node| &node.registry) {
            registry.snapshot().await.unwrap();
        }
    }
    // A leader keeps its log for whoever it is sending it to; the others do not.
    let other = *cluster.nodes.keys().find(|node| **node != leader).unwrap();
    let registry = cluster.registry(other).clone();
    until("the log is purged", || registry.status().purged_index > 20).await;
    cluster.stop(leader, Duration::ZERO).await;
    cluster.start(lagging).await;
    let leader = other;
    assert!(cluster.has(lagging, "before").await);
    assert!(cluster.has(lagging, "s2-19").await);
    assert!(cluster.registry(lagging).counters().snapshots_installed.get() > 0, "it came by a snapshot");
    // What it got survives a restart.
    cluster.stop(lagging, Duration::ZERO).await;
    cluster.start(lagging).await;
    cluster.registry(lagging).barrier(Consistency::Stale).await.unwrap();
    assert!(cluster.has(lagging, "s0-0").await);
    let (one, other) = (cluster.registry(leader).clone(), cluster.registry(lagging).clone());
    until("both states are the same", || one.with_state(|a| other.with_state(|b| a == b))).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_is_refused_under_its_old_id_and_stops() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let victim = cluster.follower().await;
    cluster.submit(victim, &submit("a")).await;
    cluster.stop(victim, Duration::ZERO).await;
    wipe(&cluster.path(victim));
    cluster.init(victim);
    cluster.start(victim).await;
    let mut failure = cluster.registry(victim).failure();
    let why = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(why.clone().unwrap().contains("cluster add"), "{why:?}");
    let other = cluster.leader().await;
    assert_ne!(other, victim);
    cluster.submit(other, &submit("b")).await;
    assert!(cluster.registry(victim).build(&super::harness::id("b")).await.unwrap().is_none(), "it learns nothing");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_acknowledged_or_read() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    cluster.submit(leader, &submit("a")).await;
    for node in [1, 2, 3].map(NodeId).into_iter().filter(|node| *node != leader) {
        cluster.stop(node, Duration::ZERO).await;
    }
    let registry = cluster.registry(leader).clone();
    assert!(registry.barrier(Consistency::Linearizable).await.is_err());
    assert!(registry.propose(submit("b")).await.is_err());
    registry.barrier(Consistency::Stale).await.unwrap();
    cluster.stop_all().await;
}
