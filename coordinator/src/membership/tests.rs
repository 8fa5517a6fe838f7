//! Changes of the members whose other end does not do its part: a node that does not answer, a caller that does not read.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use helix_common::status::error_code;
use helix_model::{ErrorCode, NodeId};
use helix_proto::peer::member_service_server::MemberServiceServer;
use helix_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::service::Routes;

use super::{Asked, Membership};
use crate::raft::tests::harness::{Backstage, Cluster, PATIENCE, until};
use crate::registry::{MemberStatus, RaftStatus};
use crate::repair::tests::copies::{Member, Shelf, Shelves};

const NEW: NodeId = NodeId(2);
/// The end of the log.
const LAST: u64 = 1_000;

/// What the leader sees while its new member is at an entry, and answers its heartbeats or not.
fn seen(at: u64, healthy: bool) -> RaftStatus {
    let member = MemberStatus {
        id: NEW,
        address: String::new(),
        role: "learner",
        last_log_index: at,
        applied_index: at,
        healthy,
        heard: healthy,
    };
    RaftStatus { leader: Some(NodeId(1)), last_log_index: LAST, members: vec![member], ..RaftStatus::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_answers_no_heartbeat_but_says_who_it_is_still_catches_up() {
    let silence = Duration::from_millis(600);
    let mut cluster = Cluster::new(1).await;
    let shelves: Shelves = Arc::new(Mutex::new([(NEW, Shelf::default())].into()));
    let member = Member { node: NEW, shelves: Arc::clone(&shelves) };
    cluster.routes.insert(NEW, Routes::new(MemberServiceServer::new(member)));
    cluster.join(NEW).await;
    let address = cluster.addresses[&NEW].to_string();
    let Backstage { registry, status, .. } = Backstage::new();
    let membership = Membership::new(registry, cluster.peers(NodeId(1)));
    let (listener, mut told) = mpsc::channel::<Result<v1::MemberProgress, Status>>(16);
    let reading = tokio::spawn(async move { while told.recv().await.is_some() {} });
    let catch_up = || {
        let (membership, listener, address) = (membership.clone(), listener.clone(), address.clone());
        tokio::spawn(async move {
            let change = membership.inner.begin("add", NEW, Asked::Once, &listener).await?;
            change.catch_up(&address, silence).await
        })
    };
    status.send_replace(seen(0, false));
    let catching_up = catch_up();
    // By then it would have been given up.
    let asked = || shelves.lock().unwrap()[&NEW].introductions;
    until("it was asked often", || catching_up.is_finished() || asked() >= 10).await;
    assert!(!catching_up.is_finished(), "it was given up");
    status.send_replace(seen(LAST, true));
    catching_up.await.unwrap().unwrap();
    // One that does not even say that is gone.
    shelves.lock().unwrap().get_mut(&NEW).unwrap().silent = true;
    status.send_replace(seen(0, false));
    let refusal = catch_up().await.unwrap().unwrap_err();
    assert_eq!(error_code(&refusal), Some(ErrorCode::MemberUnreachable), "{refusal}");
    drop((membership, listener));
    reading.await.unwrap();
    cluster.stop_all().await;
}

#[tokio::test]
async fn whoever_asks_for_a_change_and_does_not_read_holds_up_no_other() {
    let cluster = Cluster::new(1).await;
    let membership = Membership::new(Backstage::new().registry, cluster.peers(NodeId(1)));
    let (listener, _unread) = mpsc::channel(1);
    listener.send(Ok(v1::MemberProgress::default())).await.unwrap();
    let adding = tokio::spawn({
        let membership = membership.clone();
        async move { membership.add(NEW, "127.0.0.1:1", Asked::Once, &listener).await }
    });
    until("it is under way", || membership.change().is_some()).await;
    let (other, _reads) = mpsc::channel(16);
    let again = membership.add(NEW, "127.0.0.1:1", Asked::Again, &other);
    let refusal = tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap_err();
    // Nothing is at that address.
    assert_eq!(error_code(&refusal), Some(ErrorCode::MemberUnreachable), "{refusal}");
    adding.await.unwrap().unwrap_err();
}
