//! The cluster's policy, read and changed key by key.

use std::collections::BTreeMap;

use helix_common::status::{error_code, metadata};
use helix_model::ErrorCode;
use helix_proto::v1;
use tonic::{Code, Status};

use crate::node::{Caller, One};

fn map(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

impl Caller {
    async fn set(&mut self, values: &[(&str, u64)], expected: &[(&str, u64)]) -> Result<v1::SetPolicyResponse, Status> {
        let request = v1::SetPolicyRequest { values: map(values), expected: map(expected), reset: vec![] };
        self.cluster.set_policy(request).await.map(tonic::Response::into_inner)
    }

    async fn policy(&mut self) -> BTreeMap<String, u64> {
        let answer = self.cluster.get_policy(v1::GetPolicyRequest { stale: false }).await.unwrap().into_inner();
        pairs(&answer.keys)
    }
}

fn pairs(keys: &[v1::PolicyKey]) -> BTreeMap<String, u64> {
    keys.iter().map(|key| (key.name.clone(), key.value)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_set_together_and_what_was_before_is_told() {
    let one = One::start().await;
    let (mut operator, mut client) = (one.operator().await, one.client().await);
    let first = client.policy().await;
    let set = operator.set(&[("queue_max", 5), ("log_bytes_max", 4 << 20)], &[]).await.unwrap();
    assert_eq!(pairs(&set.before), first);
    let wanted: BTreeMap<_, _> =
        first.clone().into_iter().chain(map(&[("queue_max", 5), ("log_bytes_max", 4 << 20)])).collect();
    assert_eq!((pairs(&set.after), client.policy().await), (wanted.clone(), wanted.clone()));
    assert_eq!(one.node.registry().policy().queue_max, 5);
    // Asked for again: it is so already, whatever was expected.
    let again = operator.set(&[("queue_max", 5)], &[("queue_max", first["queue_max"])]).await.unwrap();
    assert_eq!((pairs(&again.before), pairs(&again.after)), (wanted.clone(), wanted));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_not_allowed_changes_nothing() {
    let one = One::start().await;
    let (mut operator, mut client) = (one.operator().await, one.client().await);
    let before = client.policy().await;
    type Case<'a> = (&'a [(&'a str, u64)], &'a str, &'a str);
    let cases: &[Case<'_>] = &[
        (&[], "values", "no key"),
        (&[("copies", 1), ("queue_max", 0)], "queue_max", "from 1 to 10000000 is allowed"),
        (&[("copies", 1), ("worker_lease_ms", 299)], "worker_lease_ms", "(300ms to 3650d)"),
        (&[("log_bytes_max", u64::MAX)], "log_bytes_max", "(1 MiB to "),
        (&[("copies", 1), ("log_byte_max", 1)], "log_byte_max", "the nearest is log_bytes_max"),
        (&[("copies", 1), ("", 1)], "", "no key \"\""),
        (&[("retain_logs_ms[failed]", u64::MAX)], "retain_logs_ms", "(0s to 3650d)"),
        (&[("retain_logs_ms[running]", 1)], "retain_logs_ms[running]", "neither a state"),
        (&[("retain_log_ms[failed]", 1)], "retain_log_ms[failed]", "no key"),
    ];
    for (values, field, words) in cases {
        let refused = operator.set(values, &[]).await.unwrap_err();
        assert_eq!(error_code(&refused), Some(ErrorCode::InvalidField), "{values:?}");
        assert_eq!(metadata(&refused, "field").as_deref(), Some(*field), "{values:?}");
        assert!(refused.message().contains(words), "{values:?}: {}", refused.message());
    }
    let refused = operator.set(&[("copies", 1)], &[("queue_max", 1)]).await.unwrap_err();
    assert_eq!((refused.code(), error_code(&refused)), (Code::FailedPrecondition, Some(ErrorCode::PolicyChanged)));
    assert_eq!(metadata(&refused, "found"), Some(before["queue_max"].to_string()));
    assert_eq!(client.set(&[("copies", 1)], &[]).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(client.policy().await, before);
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_who_change_different_keys_at_once_both_get_their_wish() {
    let one = One::start().await;
    let (mut first, mut second) = (one.operator().await, one.operator().await);
    for round in 1..=20 {
        let (queue, retain) = ([("queue_max", round)], [("retain_builds", round)]);
        let both = tokio::join!(first.set(&queue, &[]), second.set(&retain, &[]));
        both.0.unwrap();
        both.1.unwrap();
        let policy = one.node.registry().policy();
        assert_eq!((policy.queue_max, policy.retain_builds), (round, round));
    }
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_of_retention_come_and_go_like_keys() {
    let one = One::start().await;
    let mut operator = one.operator().await;
    let first = operator.policy().await;
    let (bad, nightly) = ("retain_logs_ms[failed]", "retain_ms[succeeded,kind=nightly]");
    let set = operator.set(&[(bad, 5), (nightly, 7), ("retain_logs_ms", 3)], &[]).await.unwrap();
    let after = pairs(&set.after);
    assert_eq!((after[bad], after[nightly], after["retain_logs_ms"]), (5, 7, 3));
    assert_eq!(operator.set(&[("copies", 1)], &[(bad, 6)]).await.unwrap_err().code(), Code::FailedPrecondition);
    operator.set(&[(bad, 6)], &[(bad, 5)]).await.unwrap();
    let reset = |names: &[&str], values: &[(&str, u64)]| v1::SetPolicyRequest {
        values: map(values),
        expected: BTreeMap::new(),
        reset: names.iter().map(|name| (*name).to_owned()).collect(),
    };
    let refused = operator.cluster.set_policy(reset(&[bad], &[(bad, 1)])).await.unwrap_err();
    assert_eq!(metadata(&refused, "field").as_deref(), Some("reset"));
    operator.cluster.set_policy(reset(&[bad, nightly, "retain_logs_ms"], &[])).await.unwrap();
    // What is so already is no error.
    operator.cluster.set_policy(reset(&[bad], &[])).await.unwrap();
    assert_eq!(operator.policy().await, first);
    one.node.stop().await;
}
