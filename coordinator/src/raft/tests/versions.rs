//! Nodes of different versions: nothing is put into the log that the oldest of them would stop at, and an upgrade of all, one
//! after the other, loses nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use helix_core::command::{RegisterNode, RetireNode, SetPolicy};
use helix_core::{Command, Policy, Reply};
use helix_model::NodeId;

use super::harness::{Cluster, PATIENCE, submit, until};
use crate::registry::{COMMAND_FORMAT, ProposeError, Registry};

const ALL: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

/// A command that older nodes do not know: a change of the policy that must find it as it was.
fn newer(registry: &Registry) -> Command {
    let before = registry.policy();
    let policy = Policy { queue_max: before.queue_max + 1, ..before.clone() };
    Command::SetPolicy(SetPolicy { policy, expected: Some(before) })
}

/// What becomes of it, once somebody leads and every node has made itself known.
async fn outcome(cluster: &Cluster, at: NodeId) -> Result<Reply, ProposeError> {
    let began = Instant::now();
    loop {
        let registry = cluster.registry(at);
        let outcome = registry.propose(newer(registry)).await;
        match outcome {
            Err(ProposeError::NoLeader { .. } | ProposeError::OutcomeUnknown) => {}
            // Of another proposal, whose outcome was unknown.
            Ok(Reply::Rejected(_)) => {}
            outcome => return outcome,
        }
        assert!(began.elapsed() < PATIENCE, "nobody takes it");
    }
}

fn expect_pending(outcome: &Result<Reply, ProposeError>, nodes: &[NodeId]) {
    let Err(error @ ProposeError::UpgradePending { node, version, known, needed }) = outcome else {
        panic!("it waits for {nodes:?}: {outcome:?}");
    };
    assert!(nodes.contains(node), "{error}");
    assert_eq!((version.as_str(), *known, *needed), ("0.0.9", 2, 3), "{error}");
    assert!(error.to_string().contains("0.0.9") && error.to_string().contains("upgrade it first"), "{error}");
}

async fn known(cluster: &Cluster) {
    let expected = |node: &NodeId| cluster.formats.get(node).copied().unwrap_or(COMMAND_FORMAT);
    until("every node has made itself known", || {
        cluster.nodes.values().all(|it| {
            let nodes = it.registry.nodes();
            ALL.iter().all(|id| nodes.iter().any(|row| row.id == *id && row.format == expected(id)))
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_upgrade_under_load_loses_nothing_and_new_commands_wait_for_its_end() {
    let mut cluster = Cluster::new(3).await;
    cluster.formats = ALL.into_iter().map(|node| (node, 2)).collect();
    cluster.start_all().await;
    known(&cluster).await;
    let acknowledged: Arc<Mutex<Vec<String>>> = Arc::default();
    for (round, node) in ALL.into_iter().enumerate() {
        // Submits through one that stays, while another leaves, in order, and comes back new.
        let other = ALL.into_iter().find(|other| *other != node).unwrap();
        let (registry, done) = (cluster.registry(other).clone(), Arc::new(AtomicBool::new(false)));
        let load = {
            let (acknowledged, done) = (Arc::clone(&acknowledged), Arc::clone(&done));
            tokio::spawn(async move {
                for number in 0.. {
                    if done.load(Ordering::Relaxed) && number >= 50 {
                        return;
                    }
                    let name = format!("r{round}-{number}");
                    if let Ok(Reply::Submitted) = registry.propose(submit(&name)).await {
                        acknowledged.lock().unwrap().push(name);
                    }
                }
            })
        };
        let pending = outcome(&cluster, other).await;
        expect_pending(&pending, &ALL[round..]);
        cluster.stop(node, Duration::from_secs(10)).await;
        cluster.formats.remove(&node);
        cluster.start(node).await;
        known(&cluster).await;
        done.store(true, Ordering::Relaxed);
        load.await.unwrap();
    }
    let before = cluster.registry(ALL[0]).policy().queue_max;
    for node in ALL {
        // Who has not applied the one before yet asks for the same once more.
        let outcome = outcome(&cluster, node).await;
        assert!(matches!(outcome, Ok(Reply::Done | Reply::Unchanged)), "all know it now: {outcome:?}");
    }
    assert!(cluster.registry(cluster.leader().await).policy().queue_max > before);
    let acknowledged = acknowledged.lock().unwrap().clone();
    assert!(acknowledged.len() >= 100, "too little load to prove anything: {}", acknowledged.len());
    for node in ALL {
        assert!(cluster.registry(node).failure().borrow().is_none(), "node {node} met what it does not know");
        for name in &acknowledged {
            assert!(cluster.has(node, name).await, "{name} on node {node}");
        }
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_older_node_is_enough_whoever_leads_and_even_while_it_is_away() {
    let mut cluster = Cluster::new(3).await;
    let old = NodeId(2);
    cluster.formats.insert(old, 2);
    cluster.start_all().await;
    known(&cluster).await;
    assert_eq!(cluster.registry(old).policy(), Policy::default(), "it would not understand the first policy of today");
    for node in ALL {
        expect_pending(&outcome(&cluster, node).await, &[old]);
        // Each leads once; the old one is no exception, and passes on what it does not know to nobody.
        let began = Instant::now();
        while cluster.leader().await != node {
            let _ = cluster.registry(cluster.leader().await).ask_to_lead(node).await;
            assert!(began.elapsed() < PATIENCE, "{node} does not lead");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for through in ALL {
            let pending = outcome(&cluster, through).await;
            assert!(matches!(pending, Err(ProposeError::UpgradePending { node, .. }) if node == old), "{pending:?}");
            cluster.submit(through, &submit(&format!("{node}-{through}"))).await;
        }
    }
    cluster.stop(old, Duration::from_secs(10)).await;
    let staying = NodeId(1);
    expect_pending(&outcome(&cluster, staying).await, &[old]);
    let leading = cluster.registry(cluster.leader().await).clone();
    until("the status says so", || leading.status().warnings.contains(&"upgrade_pending")).await;
    // What it says of itself is not enough: it must have been seen.
    cluster.start(old).await;
    cluster.submit(old, &submit("back")).await;
    assert!(cluster.registry(old).failure().borrow().is_none());
    for through in ALL {
        for node in ALL {
            assert!(cluster.has(node, &format!("{through}-{through}")).await);
        }
    }
    cluster.stop_all().await;
}

/// What the refusals are for: without them this is what happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_node_that_meets_a_newer_entry_stops_and_names_the_format() {
    let mut cluster = Cluster::new(3).await;
    cluster.start_all().await;
    known(&cluster).await;
    let old = cluster.follower().await;
    cluster.stop(old, Duration::ZERO).await;
    assert_eq!(outcome(&cluster, cluster.leader().await).await, Ok(Reply::Done));
    cluster.formats.insert(old, 2);
    cluster.start(old).await;
    let mut failure = cluster.registry(old).failure();
    let why = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(why.as_ref().is_some_and(|why| why.contains("format 5") && why.contains("start a newer")), "{why:?}");
    cluster.submit(cluster.leader().await, &submit("others-go-on")).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_ran_holds_nothing_up_and_who_was_retired_neither() {
    let mut cluster = Cluster::new(3).await;
    for node in &ALL[..2] {
        cluster.start(*node).await;
    }
    let leader = cluster.leader().await;
    until("both have made themselves known", || cluster.registry(leader).nodes().len() == 2).await;
    assert_eq!(outcome(&cluster, leader).await, Ok(Reply::Done));
    // One that is known, old, and no member.
    let former =
        RegisterNode { node: NodeId(9), epoch: 1, grpc: String::new(), version: "0.0.1".to_owned(), format: 1 };
    let registry = cluster.registry(leader);
    for command in [Command::RegisterNode(former), Command::RetireNode(RetireNode { node: NodeId(9) })] {
        let began = Instant::now();
        while !matches!(registry.propose(command.clone()).await, Ok(Reply::Done | Reply::Unchanged)) {
            assert!(began.elapsed() < PATIENCE, "nobody takes it");
        }
    }
    assert_eq!(outcome(&cluster, leader).await, Ok(Reply::Done));
    cluster.stop_all().await;
}
