//! Names that stand for nothing: every RPC says NOT_FOUND with its stable word, or names the malformed field.

use helix_common::status::{error_code, metadata};
use helix_model::ErrorCode;
use helix_proto::v1;
use tonic::{Code, Status};

use crate::node::{Caller, One, shell};

/// Calls every RPC that takes a build's id.
async fn all(client: &mut Caller, operator: &mut Caller, id: &str) -> Vec<(&'static str, Status)> {
    let build_id = id.to_owned();
    let mut refusals = Vec::new();
    macro_rules! call {
        ($caller:ident, $method:ident, $request:expr) => {
            refusals.push((stringify!($method), $caller.builds.$method($request).await.map(drop).unwrap_err()));
        };
    }
    call!(client, get_build_status, v1::GetBuildStatusRequest { build_id: build_id.clone(), stale: false });
    call!(client, wait_build, v1::WaitBuildRequest { build_id: build_id.clone(), timeout_ms: 1 });
    call!(client, cancel_build, v1::CancelBuildRequest { build_id: build_id.clone(), reason: String::new() });
    call!(operator, cancel_build, v1::CancelBuildRequest { build_id: build_id.clone(), reason: String::new() });
    call!(client, retry_build, v1::RetryBuildRequest { build_id: build_id.clone(), new_build_id: String::new() });
    call!(client, explain_build, v1::ExplainBuildRequest { build_id: build_id.clone() });
    call!(client, get_artifacts, v1::GetArtifactsRequest { build_id: build_id.clone(), stale: false });
    call!(client, pin_build, v1::PinBuildRequest { build_id: build_id.clone(), pinned: true });
    let logs = v1::StreamBuildLogsRequest { build_id: build_id.clone(), ..v1::StreamBuildLogsRequest::default() };
    call!(client, stream_build_logs, logs);
    call!(client, read_log, v1::ReadLogRequest { build_id, ..v1::ReadLogRequest::default() });
    refusals
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_and_malformed_ids_are_refused_everywhere() {
    let one = One::start().await;
    let (mut client, mut operator) = (one.client().await, one.operator().await);
    for (method, refused) in all(&mut client, &mut operator, "nobody").await {
        assert_eq!((refused.code(), error_code(&refused)), (Code::NotFound, Some(ErrorCode::BuildUnknown)), "{method}");
    }
    for (method, refused) in all(&mut client, &mut operator, "../x").await {
        assert_eq!(refused.code(), Code::InvalidArgument, "{method}");
        assert_eq!(metadata(&refused, "field").as_deref(), Some("build_id"), "{method}");
    }
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_of_tasks_and_attempts_that_do_not_exist_are_refused() {
    let one = One::start().await;
    let mut client = one.client().await;
    client.submit(shell("b1")).await;
    let base = v1::StreamBuildLogsRequest { build_id: "b1".to_owned(), ..v1::StreamBuildLogsRequest::default() };
    let task = v1::StreamBuildLogsRequest { task: "linux/s390x".to_owned(), ..base.clone() };
    let refused = client.builds.stream_build_logs(task).await.unwrap_err();
    assert_eq!(metadata(&refused, "field").as_deref(), Some("task"));
    let attempt = v1::StreamBuildLogsRequest { attempt: 4, no_follow: true, ..base.clone() };
    let refused = client.builds.stream_build_logs(attempt).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::NotFound, Some(ErrorCode::LogUnknown)));
    let both = v1::StreamBuildLogsRequest { attempt: 4, all_attempts: true, ..base };
    let refused = client.builds.stream_build_logs(both).await.unwrap_err();
    assert_eq!(metadata(&refused, "field").as_deref(), Some("attempt"));
    let chunks = v1::ReadLogRequest { build_id: "b1".to_owned(), task: 1, ..v1::ReadLogRequest::default() };
    let refused = client.builds.read_log(chunks).await.unwrap_err();
    assert_eq!(metadata(&refused, "field").as_deref(), Some("task"));
    one.node.stop().await;
}

/// A podman build makes an image: outputs that it could not make are refused, also where the executor follows from the rest.
#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_a_podman_build_cannot_make_are_refused() {
    let one = One::start().await;
    let mut client = one.client().await;
    let image = |details: v1::SpecDetails| v1::SubmitBuildRequest {
        repo_url: "https://example.com/p.git".to_owned(),
        dockerfile_path: "Dockerfile".to_owned(),
        details: Some(v1::SpecDetails { park: true, ..details }),
        ..v1::SubmitBuildRequest::default()
    };
    let (podman, outputs) = ("podman".to_owned(), vec!["target/app".to_owned()]);
    for (field, details) in [
        (
            "outputs",
            v1::SpecDetails { executor: podman.clone(), outputs: outputs.clone(), ..v1::SpecDetails::default() },
        ),
        ("outputs", v1::SpecDetails { outputs, ..v1::SpecDetails::default() }),
        ("no_output", v1::SpecDetails { no_output: true, push: "r:5000/x:1".to_owned(), ..v1::SpecDetails::default() }),
    ] {
        let refused = client.builds.submit_build(image(details)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert_eq!(metadata(&refused, "field").as_deref(), Some(field), "{refused:?}");
    }
    for details in [
        v1::SpecDetails { executor: podman, no_output: true, ..v1::SpecDetails::default() },
        v1::SpecDetails::default(),
    ] {
        client.submit(image(details)).await;
    }
    one.node.stop().await;
}
