//! Builds on their way: waiting, cancelling, retrying, purging, pinning, artifacts, logs.

use std::time::Duration;

use helix_common::identity::Role;
use helix_common::status::{error_code, metadata};
use helix_model::ErrorCode;
use helix_proto::v1;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::node::{One, shell};

fn cancel(id: &str) -> v1::CancelBuildRequest {
    v1::CancelBuildRequest { build_id: id.to_owned(), reason: "enough".to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_is_for_the_owner_and_operators_and_may_be_repeated() {
    let one = One::start().await;
    let (mut alice, mut operator) = (one.client().await, one.operator().await);
    let mut bob = one.caller(Role::Client, "bob").await;
    alice.submit(shell("b1")).await;
    alice.submit(shell("b2")).await;
    let refused = bob.builds.cancel_build(cancel("b1")).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::PermissionDenied, Some(ErrorCode::NotOwner)));
    for _ in 0..2 {
        assert!(alice.builds.cancel_build(cancel("b1")).await.unwrap().into_inner().cancelled);
    }
    let status = alice.status("b1").await;
    assert_eq!((status.state.as_str(), status.reason.as_str()), ("cancelled", "cancelled"));
    assert_eq!((status.cancel_requested, status.cancel_reason.as_str()), (true, "enough"));
    assert!(status.completed_at > 0);
    assert!(operator.builds.cancel_build(cancel("b2")).await.unwrap().into_inner().cancelled);
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_ended_cannot_be_cancelled_and_says_how_it_ended() {
    let one = One::start().await;
    let mut client = one.client().await;
    one.worker("w", |_| {}).await;
    one.ended(&mut client, "good", 0).await;
    one.ended(&mut client, "bad", 3).await;
    for (id, state) in [("good", "succeeded"), ("bad", "failed")] {
        let refused = client.builds.cancel_build(cancel(id)).await.unwrap_err();
        assert_eq!((refused.code(), error_code(&refused)), (Code::FailedPrecondition, Some(ErrorCode::WrongState)));
        assert_eq!(metadata(&refused, "from").as_deref(), Some(state));
        assert_eq!(metadata(&refused, "to").as_deref(), Some("cancelled"));
    }
    let bad = client.status("bad").await;
    assert_eq!((bad.state.as_str(), bad.reason.as_str(), bad.exit_code), ("failed", "exit", Some(3)));
    assert_eq!((bad.worker.as_str(), bad.attempt, bad.message.as_str()), ("w", 1, "exit code 3"));
    assert_eq!(bad.tasks[0].attempts.len(), 1);
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_with_the_build_or_with_the_time() {
    let one = One::start().await;
    let (mut client, mut other) = (one.client().await, one.client().await);
    client.submit(shell("b1")).await;
    let wait = |timeout_ms| v1::WaitBuildRequest { build_id: "b1".to_owned(), timeout_ms };
    assert_eq!(client.builds.wait_build(wait(1)).await.unwrap().into_inner().state, "queued");
    let waiting = tokio::spawn(async move { other.builds.wait_build(wait(60_000)).await.unwrap().into_inner() });
    client.builds.cancel_build(cancel("b1")).await.unwrap();
    let status = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
    assert_eq!(status.state, "cancelled");
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_is_a_new_build_of_the_same_spec() {
    let one = One::start().await;
    let mut client = one.client().await;
    client.submit(shell("b1")).await;
    let retry = |new: &str| v1::RetryBuildRequest { build_id: "b1".to_owned(), new_build_id: new.to_owned() };
    let refused = client.builds.retry_build(retry("")).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::WrongState));
    client.builds.cancel_build(cancel("b1")).await.unwrap();
    let made = client.builds.retry_build(retry("b2")).await.unwrap().into_inner();
    assert_eq!((made.build_id.as_str(), made.existed), ("b2", false));
    assert!(client.builds.retry_build(retry("b2")).await.unwrap().into_inner().existed);
    let status = client.status("b2").await;
    assert_eq!((status.state.as_str(), status.retry_of.as_str()), ("queued", "b1"));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purged_build_is_remembered_as_ended_and_a_pinned_one_stays() {
    let one = One::start().await;
    let (mut client, mut operator) = (one.client().await, one.operator().await);
    for id in ["b1", "b2", "b3"] {
        client.submit(shell(id)).await;
    }
    for id in ["b1", "b2"] {
        client.builds.cancel_build(cancel(id)).await.unwrap();
    }
    let pin = v1::PinBuildRequest { build_id: "b2".to_owned(), pinned: true };
    client.builds.pin_build(pin).await.unwrap();
    assert!(client.status("b2").await.pinned);
    let purge = |state: &str| v1::PurgeBuildsRequest { before_ms: i64::MAX, state: state.to_owned() };
    assert_eq!(operator.builds.purge_builds(purge("failed")).await.unwrap().into_inner().purged, 0);
    let purged = operator.builds.purge_builds(purge("")).await.unwrap().into_inner();
    assert_eq!((purged.purged, purged.pinned), (1, 1));
    // Pinning is for the owner and operators, and stands whatever policy says.
    let mut bob = one.caller(Role::Client, "bob").await;
    for pinned in [false, true] {
        let pin = v1::PinBuildRequest { build_id: "b2".to_owned(), pinned };
        assert_eq!(error_code(&bob.builds.pin_build(pin.clone()).await.unwrap_err()), Some(ErrorCode::NotOwner));
        operator.builds.pin_build(pin).await.unwrap();
    }
    let asked = v1::GetBuildStatusRequest { build_id: "b1".to_owned(), stale: false };
    let gone = client.builds.get_build_status(asked).await.unwrap_err();
    assert_eq!((gone.code(), error_code(&gone)), (Code::NotFound, Some(ErrorCode::BuildPurged)));
    let again = client.submit(shell("b1")).await;
    assert_eq!((again.existed, again.purged_state.as_str()), (true, "cancelled"));
    assert_eq!(client.status("b3").await.state, "queued");
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_kept_as_long_as_its_build_says_so() {
    let one = One::start().await;
    let (mut client, mut operator) = (one.client().await, one.operator().await);
    one.worker("w", |_| {}).await;
    one.ended(&mut client, "kept", 0).await;
    one.ended(&mut client, "bare", 3).await;
    client.builds.pin_build(v1::PinBuildRequest { build_id: "kept".to_owned(), pinned: true }).await.unwrap();
    let values = ["retain_logs_ms", "retain_artifacts_ms[failed]"].map(|key| (key.to_owned(), 0)).into();
    let set = v1::SetPolicyRequest { values, ..v1::SetPolicyRequest::default() };
    operator.cluster.set_policy(set).await.unwrap();
    let begun = std::time::Instant::now();
    loop {
        let status = client.status("bare").await;
        if status.logs_expired_at_ms > 0 && status.artifacts_expired_at_ms > 0 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let lines = v1::StreamBuildLogsRequest { build_id: "bare".to_owned(), ..v1::StreamBuildLogsRequest::default() };
    let chunks = v1::ReadLogRequest { build_id: "bare".to_owned(), ..v1::ReadLogRequest::default() };
    let artifacts = v1::GetArtifactsRequest { build_id: "bare".to_owned(), stale: false };
    for refused in [
        client.builds.stream_build_logs(lines).await.err().unwrap(),
        client.builds.read_log(chunks).await.err().unwrap(),
        client.builds.get_artifacts(artifacts).await.err().unwrap(),
    ] {
        assert_eq!((refused.code(), error_code(&refused)), (Code::FailedPrecondition, Some(ErrorCode::Expired)));
    }
    let status = client.status("kept").await;
    assert_eq!((status.logs_expired_at_ms, status.artifacts_expired_at_ms), (0, 0), "it is pinned");
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_are_registered_by_their_blobs() {
    let one = One::start().await;
    let mut client = one.client().await;
    client.submit(shell("b1")).await;
    let data = b"bytes".to_vec();
    let sha256: bytes::Bytes = Sha256::digest(&data).to_vec().into();
    let register = |name: &str, size| v1::RegisterArtifactRequest {
        build_id: "b1".to_owned(),
        name: name.to_owned(),
        sha256: sha256.clone(),
        size,
    };
    let refused = client.builds.register_artifact(register("x", 5)).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::NotFound, Some(ErrorCode::ArtifactUnknown)));
    let blobs = vec![v1::SmallBlob { sha256: sha256.clone(), data: data.into() }];
    client.blobs.put_small_blobs(v1::PutSmallBlobsRequest { blobs, copies: 1 }).await.unwrap();
    for (request, field) in [(register("../x", 5), "name"), (register("x", 6), "size")] {
        let refused = client.builds.register_artifact(request).await.unwrap_err();
        assert_eq!(metadata(&refused, "field").as_deref(), Some(field), "{refused}");
    }
    client.builds.register_artifact(register("bin/x", 5)).await.unwrap();
    let asked = v1::GetArtifactsRequest { build_id: "b1".to_owned(), stale: false };
    let artifacts = client.builds.get_artifacts(asked).await.unwrap().into_inner().artifacts;
    assert_eq!((artifacts[0].name.as_str(), artifacts[0].size, artifacts[0].registered), ("bin/x", 5, true));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_build_that_never_ran_ends_with_the_build() {
    let one = One::start().await;
    let (mut client, mut other) = (one.client().await, one.client().await);
    client.submit(shell("b1")).await;
    let asked = v1::StreamBuildLogsRequest { build_id: "b1".to_owned(), ..v1::StreamBuildLogsRequest::default() };
    let mut lines = other.builds.stream_build_logs(asked.clone()).await.unwrap().into_inner();
    let now = v1::StreamBuildLogsRequest { no_follow: true, ..asked };
    let mut there = client.builds.stream_build_logs(now).await.unwrap().into_inner();
    assert!(there.message().await.unwrap().is_none());
    client.builds.cancel_build(cancel("b1")).await.unwrap();
    let mut next = async || tokio::time::timeout(Duration::from_secs(20), lines.message()).await.unwrap().unwrap();
    let line = next().await.unwrap();
    assert_eq!((line.stream.as_str(), line.attempt, line.seq), ("system", 0, 1));
    assert!(line.line.contains("cancelled before it ran"), "{}", line.line);
    assert!(next().await.is_none());
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_is_sent_elsewhere_when_the_node_stops() {
    let one = One::start().await;
    let mut client = one.client().await;
    client.submit(shell("b1")).await;
    let asked = v1::StreamBuildLogsRequest { build_id: "b1".to_owned(), ..v1::StreamBuildLogsRequest::default() };
    let mut lines = client.builds.stream_build_logs(asked).await.unwrap().into_inner();
    let stopping = tokio::spawn(one.node.stop());
    let moved = tokio::time::timeout(Duration::from_secs(20), lines.message()).await.unwrap().unwrap_err();
    assert_eq!((moved.code(), error_code(&moved)), (Code::Unavailable, Some(ErrorCode::ShuttingDown)));
    tokio::time::timeout(Duration::from_secs(20), stopping).await.unwrap().unwrap();
}
