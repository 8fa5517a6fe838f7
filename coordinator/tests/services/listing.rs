//! Lists, short ids, and `last`.

use helix_common::identity::Role;
use helix_common::status::{error_code, metadata};
use helix_model::ErrorCode;
use helix_proto::v1;
use tonic::Code;

use crate::node::{Caller, One, shell, shell_with};

async fn list(client: &mut Caller, request: v1::ListBuildsRequest) -> Vec<String> {
    let mut found = client.builds.list_builds(request).await.unwrap().into_inner();
    let mut ids = Vec::new();
    while let Some(status) = found.message().await.unwrap() {
        ids.push(status.build_id);
    }
    ids
}

async fn resolve(client: &mut Caller, text: &str) -> Result<String, tonic::Status> {
    let request = v1::ResolveBuildRequest { text: text.to_owned(), stale: false };
    client.builds.resolve_build(request).await.map(|found| found.into_inner().build_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_unfinished_first_and_newest_first() {
    let one = One::start().await;
    let mut alice = one.client().await;
    let mut bob = one.caller(Role::Client, "bob").await;
    one.worker("w", |_| {}).await;
    one.ended(&mut alice, "old", 0).await;
    one.ended(&mut alice, "new", 3).await;
    let labelled = shell_with("q1", |details| details.labels = [("team".to_owned(), "red".to_owned())].into());
    alice.submit(labelled).await;
    bob.submit(v1::SubmitBuildRequest { repo_url: "https://h/p".to_owned(), ..shell("q2") }).await;
    let all = v1::ListBuildsRequest::default;
    assert_eq!(list(&mut alice, all()).await, ["q2", "q1", "new", "old"]);
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { limit: 3, ..all() }).await, ["q2", "q1", "new"]);
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { mine: true, ..all() }).await, ["q1", "new", "old"]);
    let failed = vec!["failed".to_owned()];
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { states: failed, ..all() }).await, ["new"]);
    let both = vec!["queued".to_owned(), "succeeded".to_owned()];
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { states: both, ..all() }).await, ["q2", "q1", "old"]);
    let repo = "https://h/p".to_owned();
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { repo_url: repo, ..all() }).await, ["q2"]);
    let labels = [("team".to_owned(), "red".to_owned())].into();
    assert_eq!(list(&mut alice, v1::ListBuildsRequest { labels, stale: true, ..all() }).await, ["q1"]);
    let bad = v1::ListBuildsRequest { states: vec!["done".to_owned()], ..all() };
    let refused = alice.builds.list_builds(bad).await.unwrap_err();
    assert_eq!(metadata(&refused, "field").as_deref(), Some("state"));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_an_exact_id_and_last_stand_for_a_build() {
    let one = One::start().await;
    let mut alice = one.client().await;
    let mut bob = one.caller(Role::Client, "bob").await;
    for id in ["abc", "abcd", "abx"] {
        alice.submit(shell(id)).await;
    }
    assert_eq!(resolve(&mut bob, "abc").await.unwrap(), "abc", "exact wins");
    assert_eq!(resolve(&mut bob, "abcd").await.unwrap(), "abcd");
    assert_eq!(resolve(&mut bob, "abx").await.unwrap(), "abx");
    let refused = resolve(&mut bob, "ab").await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::InvalidArgument, Some(ErrorCode::BuildAmbiguous)));
    assert_eq!(metadata(&refused, "candidates").as_deref(), Some("abc, abcd, abx"));
    let refused = resolve(&mut bob, "zz").await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::NotFound, Some(ErrorCode::BuildUnknown)));
    for bad in ["", "A", "a/b"] {
        let refused = resolve(&mut bob, bad).await.unwrap_err();
        assert_eq!(metadata(&refused, "field").as_deref(), Some("build_id"), "{bad}");
    }
    assert_eq!(resolve(&mut alice, "last").await.unwrap(), "abx");
    assert_eq!(error_code(&resolve(&mut bob, "last").await.unwrap_err()), Some(ErrorCode::BuildUnknown));
    bob.submit(shell("bobs")).await;
    assert_eq!(resolve(&mut bob, "last").await.unwrap(), "bobs");
    assert_eq!(resolve(&mut alice, "last").await.unwrap(), "abx");
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_comes_whole() {
    let one = One::start().await;
    let mut client = one.client().await;
    let requests: Vec<_> = (0..300).map(|number| shell(&format!("b{number:03}"))).collect();
    let mut answers = client.builds.submit_builds(futures::stream::iter(requests)).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    let whole = list(&mut client, v1::ListBuildsRequest { all: true, ..v1::ListBuildsRequest::default() }).await;
    let distinct: std::collections::BTreeSet<_> = whole.iter().collect();
    assert_eq!((whole.len(), distinct.len()), (300, 300));
    assert_eq!(list(&mut client, v1::ListBuildsRequest::default()).await.len(), 100);
    one.node.stop().await;
}
