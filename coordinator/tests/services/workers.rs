//! Workers, totals, the cluster, and why a build waits.

use helix_common::status::{error_code, metadata};
use helix_model::ErrorCode;
use helix_proto::v1;
use tonic::Code;

use crate::node::{CLUSTER, One, shell};

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_listed_drained_undrained_and_removed() {
    let one = One::start().await;
    let mut operator = one.operator().await;
    one.worker("w", |offer| offer.capacity = 3).await;
    operator.submit(shell("b1")).await;
    one.assign("b1", "w").await;
    let workers = operator.workers.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    let worker = &workers[0];
    assert_eq!((worker.name.as_str(), worker.capacity, worker.load), ("w", 3, 1));
    assert_eq!((worker.healthy, worker.standing.as_str()), (false, "present"));
    assert_eq!(worker.attempts, ["b1.0.1"]);
    let totals = operator.workers.get_totals(v1::GetTotalsRequest {}).await.unwrap().into_inner();
    assert_eq!((totals.workers, totals.capacity, totals.load, totals.running), (1, 3, 1, 1));
    let drain = v1::DrainWorkerRequest { name: "w".to_owned(), deadline_ms: 3_600_000 };
    assert!(operator.workers.drain_worker(drain).await.unwrap().into_inner().draining);
    let undrain = v1::UndrainWorkerRequest { name: "w".to_owned() };
    assert!(!operator.workers.undrain_worker(undrain).await.unwrap().into_inner().draining);
    let remove = v1::RemoveWorkerRequest { name: "w".to_owned(), ..v1::RemoveWorkerRequest::default() };
    operator.workers.remove_worker(remove).await.unwrap();
    let gone = operator.workers.get_worker(v1::GetWorkerRequest { name: "w".to_owned() }).await.unwrap_err();
    assert_eq!((gone.code(), error_code(&gone)), (Code::NotFound, Some(ErrorCode::WorkerUnknown)));
    let bad = operator.workers.get_worker(v1::GetWorkerRequest { name: "W".to_owned() }).await.unwrap_err();
    assert_eq!(metadata(&bad, "field").as_deref(), Some("name"));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_build_is_explained() {
    let one = One::start().await;
    let mut client = one.client().await;
    one.worker("w", |_| {}).await;
    client.submit(shell("b1")).await;
    let asked = v1::ExplainBuildRequest { build_id: "b1".to_owned() };
    let explained = client.builds.explain_build(asked.clone()).await.unwrap().into_inner();
    assert_eq!(explained.status.unwrap().state, "queued");
    let verdict = &explained.tasks[0].verdicts[0];
    assert_eq!((verdict.worker.as_str(), verdict.fits), ("w", false));
    assert!(verdict.why.contains("silent"), "{}", verdict.why);
    let key = one.assign("b1", "w").await;
    one.finish(key, "w", 3).await;
    let explained = client.builds.explain_build(asked).await.unwrap().into_inner();
    assert!(explained.tasks[0].summary.contains("failed (exit); ran on w"), "{}", explained.tasks[0].summary);
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_tells_of_its_members() {
    let one = One::start().await;
    let mut client = one.client().await;
    // Members are looked at a few times a second.
    let status = loop {
        let asked = v1::GetClusterStatusRequest { stale: false };
        let status = client.cluster.get_cluster_status(asked).await.unwrap().into_inner();
        assert_eq!((status.cluster.as_str(), status.leader, status.node), (CLUSTER, 1, 1));
        if !status.members.is_empty() && !status.members[0].grpc.is_empty() {
            break status;
        }
        tokio::task::yield_now().await;
    };
    assert!(status.term > 0);
    assert_eq!(status.members.len(), 1);
    assert_eq!(status.members[0].role, "leader");
    one.node.stop().await;
}
