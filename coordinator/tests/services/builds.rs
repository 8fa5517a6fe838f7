//! Submitting: what counts as the same build, what is refused, and how a batch is answered.

use helix_common::status::{error_code, metadata};
use helix_model::{ErrorCode, Resources};
use helix_proto::v1;
use tonic::Code;

use crate::node::{One, shell, shell_with};

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_submit_is_the_same_build_and_another_spec_is_refused() {
    let one = One::start().await;
    let mut client = one.client().await;
    let first = client.submit(shell("b1")).await;
    assert_eq!((first.build_id.as_str(), first.queued, first.existed), ("b1", true, false));
    let again = client.submit(shell("b1")).await;
    assert_eq!((again.build_id.as_str(), again.queued, again.existed), ("b1", true, true));
    let other = shell_with("b1", |details| details.priority = 1);
    let refused = client.builds.submit_build(other).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::AlreadyExists, Some(ErrorCode::IdTaken)));
    let status = client.status("b1").await;
    assert_eq!((status.state.as_str(), status.executor.as_str()), ("queued", "exec"));
    assert_eq!(status.submitted_by, "client/alice");
    assert!(status.created_at_ms > 1_600_000_000_000, "{}", status.created_at_ms);
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_the_original_needs_its_four_fields_only() {
    let one = One::start().await;
    let mut client = one.client().await;
    let request = v1::SubmitBuildRequest {
        repo_url: "https://example.com/p.git".to_owned(),
        r#ref: "main".to_owned(),
        dockerfile_path: "Dockerfile".to_owned(),
        build_args: [("A".to_owned(), "1".to_owned())].into(),
        ..v1::SubmitBuildRequest::default()
    };
    let (first, second) = (client.submit(request.clone()).await, client.submit(request).await);
    assert_ne!(first.build_id, second.build_id);
    assert_eq!(first.build_id.len(), 12);
    assert!(first.build_id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "{}", first.build_id);
    let status = client.status(&first.build_id).await;
    assert_eq!((status.executor.as_str(), status.started_at, status.completed_at), ("podman", 0, 0));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_field_is_named() {
    let one = One::start().await;
    let mut client = one.client().await;
    let repo = |url: &str| v1::SubmitBuildRequest { repo_url: url.to_owned(), ..v1::SubmitBuildRequest::default() };
    let pair = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
    let with = |change: fn(&mut v1::SpecDetails)| shell_with("", change);
    let cases = [
        (v1::SubmitBuildRequest::default(), "repo_url"),
        (repo("--upload-pack=x"), "repo_url"),
        (repo("ext::sh -c x"), "repo_url"),
        (repo("https://u:p@h/p"), "repo_url"),
        (v1::SubmitBuildRequest { r#ref: "-x".to_owned(), ..repo("https://h/p") }, "ref"),
        (v1::SubmitBuildRequest { dockerfile_path: "../x".to_owned(), ..repo("https://h/p") }, "dockerfile_path"),
        (v1::SubmitBuildRequest { build_args: pair("HELIX_X", "1"), ..repo("https://h/p") }, "build_args"),
        (v1::SubmitBuildRequest { build_id: "last".to_owned(), ..shell("") }, "build_id"),
        (v1::SubmitBuildRequest { build_id: "No".to_owned(), ..shell("") }, "build_id"),
        (with(|details| details.platforms = vec!["linux".to_owned()]), "platform"),
        (with(|details| details.executor = "docker".to_owned()), "executor"),
        (with(|details| details.on_worker_loss = "shrug".to_owned()), "on_worker_loss"),
        (with(|details| details.outputs = vec!["x".to_owned()]), "outputs"),
        (with(|details| details.env = [("LD_PRELOAD".to_owned(), "x".to_owned())].into()), "env"),
        (with(|details| details.labels = [(String::new(), String::new())].into()), "labels"),
        (with(|details| details.secrets = vec!["/x".to_owned()]), "secrets"),
        (with(|details| details.push = "-x".to_owned()), "push"),
        (with(|details| details.command = Some(v1::spec_details::Command::Shell(" ".to_owned()))), "command"),
        (with(|details| details.source = Some(v1::SourceBlob { sha256: vec![1].into(), size: 1 })), "digest"),
    ];
    for (request, field) in cases {
        let refused = client.builds.submit_build(request.clone()).await.expect_err(field);
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
        assert_eq!(error_code(&refused), Some(ErrorCode::InvalidField), "{field}");
        assert_eq!(metadata(&refused, "field").as_deref(), Some(field), "{request:?}");
    }
    let large = shell_with("", |details| details.env = [("A".to_owned(), "x".repeat(70_000))].into());
    let refused = client.builds.submit_build(large).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::InvalidArgument, Some(ErrorCode::SpecTooLarge)));
    let absent = shell_with("", |details| {
        details.source = Some(v1::SourceBlob { sha256: vec![1; 32].into(), size: 1 });
    });
    let refused = client.builds.submit_build(absent).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::NotFound, Some(ErrorCode::ArtifactUnknown)));
    let totals = one.node.registry().with_state(|state| state.totals());
    assert_eq!(totals.queued, 0, "a rejected submit leaves nothing behind");
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_worker_could_ever_run_is_refused_unless_parked() {
    let one = One::start().await;
    let mut client = one.client().await;
    one.worker("w", |offer| offer.labels = [("zone".to_owned(), "eu".to_owned())].into()).await;
    let gpu = |id: &str, park: bool| {
        shell_with(id, |details| {
            details.requires = [("gpu".to_owned(), "yes".to_owned())].into();
            details.park = park;
        })
    };
    let refused = client.builds.submit_build(gpu("g1", false)).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::FailedPrecondition, Some(ErrorCode::Unsatisfiable)));
    assert!(refused.message().contains("w lacks the label gpu"), "{}", refused.message());
    client.submit(gpu("g2", true)).await;
    let greedy = shell_with("g3", |details| details.memory_bytes = 6 << 30);
    let has = Resources { memory_bytes: 3 << 29, ..Resources::default() };
    one.worker("w", |offer| offer.resources = has).await;
    let refused = client.builds.submit_build(greedy).await.unwrap_err();
    assert_eq!(error_code(&refused), Some(ErrorCode::Unsatisfiable));
    let numbers = "w has 1.5 GiB memory, the build asks for 6 GiB";
    assert!(refused.message().contains(numbers), "{}", refused.message());
    // A build that was accepted stays the same build when its worker is gone.
    client.submit(shell("s1")).await;
    one.worker("w", |offer| offer.executors = [helix_model::Executor::Podman].into()).await;
    assert!(client.submit(shell("s1")).await.existed);
    assert!(client.builds.submit_build(shell("s2")).await.is_err());
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_answered_in_order_with_an_error_for_each_bad_line() {
    let one = One::start().await;
    let mut client = one.client().await;
    let requests: Vec<_> = (0..500)
        .map(|number| match number {
            7 => shell("Not-An-Id"),
            number => shell(&format!("b{number}")),
        })
        .collect();
    for round in [false, true] {
        let mut answers =
            client.builds.submit_builds(futures::stream::iter(requests.clone())).await.unwrap().into_inner();
        for number in 0..500u64 {
            let answer = answers.message().await.unwrap().unwrap();
            assert_eq!(answer.index, number);
            if number == 7 {
                let error = answer.error.unwrap();
                assert_eq!((error.reason.as_str(), error.field.as_str()), ("invalid_field", "build_id"));
                assert_eq!(error.code, i32::from(Code::InvalidArgument));
            } else {
                let response = answer.response.unwrap();
                assert_eq!((response.build_id, response.existed), (format!("b{number}"), round));
            }
        }
        assert!(answers.message().await.unwrap().is_none());
    }
    one.node.stop().await;
}
