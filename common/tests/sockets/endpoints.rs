//! A client with several endpoints: dead ones, hanging ones, leaders named and wrongly named.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use helix_common::accept::Limits;
use helix_common::endpoints::{CallError, Endpoints, Verdict};
use helix_common::identity::Role;
use helix_common::status::{not_leader, status};
use helix_model::ErrorCode;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::cluster::{Cluster, PATIENCE, Running, check, start};

async fn server(cluster: &Cluster, node: &str) -> Running {
    start(cluster.store(Role::Coordinator, node), Limits::default()).await
}

fn endpoints(cluster: &Cluster, list: &[String]) -> Endpoints {
    Endpoints::new(list, cluster.store(Role::Client, "c")).unwrap()
}

/// An address where nobody listens.
async fn dead() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("https://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn dead_endpoints_are_passed_over() {
    let cluster = Cluster::new();
    let alive = server(&cluster, "1").await;
    let endpoints = endpoints(&cluster, &[dead().await, dead().await, alive.url()]);
    let began = Instant::now();
    endpoints.call(PATIENCE, check).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    assert_eq!(endpoints.current(), alive.url(), "the good one is kept");
}

#[tokio::test]
async fn an_endpoint_that_hangs_is_given_up() {
    let cluster = Cluster::new();
    // The kernel accepts; nobody answers.
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let alive = server(&cluster, "1").await;
    let list = [format!("https://{}", hanging.local_addr().unwrap()), alive.url()];
    for _ in 0..4 {
        let endpoints = endpoints(&cluster, &list).with_attempt_timeout(Duration::from_millis(200));
        endpoints.call(PATIENCE, check).await.unwrap();
    }
}

#[tokio::test]
async fn what_somebody_said_is_told_rather_than_that_others_hung() {
    let cluster = Cluster::new();
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let speaking = server(&cluster, "1").await;
    speaking.answer.set(Some(status(ErrorCode::NoLeader, "nobody leads")));
    let list = [speaking.url(), format!("https://{}", hanging.local_addr().unwrap())];
    let endpoints = endpoints(&cluster, &list).with_attempt_timeout(Duration::from_millis(200));
    let error = endpoints.call(Duration::from_secs(1), check).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoLeader), "{error}");
}

#[tokio::test]
async fn one_full_disk_sends_the_client_elsewhere_and_full_disks_everywhere_are_an_answer() {
    let cluster = Cluster::new();
    let (one, two) = (server(&cluster, "1").await, server(&cluster, "2").await);
    let list = [one.url(), two.url()];
    one.answer.set(Some(status(ErrorCode::DiskReserve, "full")));
    for _ in 0..4 {
        endpoints(&cluster, &list).call(PATIENCE, check).await.unwrap();
    }
    two.answer.set(Some(status(ErrorCode::DiskReserve, "full")));
    let error = endpoints(&cluster, &list).call(PATIENCE, check).await.unwrap_err();
    assert!(matches!(error, CallError::Answered(_)), "{error}");
    assert_eq!(error.code(), Some(ErrorCode::DiskReserve));
}

#[tokio::test]
async fn leader_hints_are_followed_even_off_the_list() {
    let cluster = Cluster::new();
    let (follower, leader) = (server(&cluster, "1").await, server(&cluster, "2").await);
    follower.answer.set(Some(not_leader(Some(&leader.url()))));
    let endpoints = endpoints(&cluster, &[follower.url()]);
    let began = Instant::now();
    endpoints.call(PATIENCE, check).await.unwrap();
    assert_eq!(endpoints.current(), leader.url());
    assert!(began.elapsed() < Duration::from_secs(2));

    // The leader goes; the former follower has its place.
    leader.answer.set(Some(status(ErrorCode::ShuttingDown, "bye")));
    follower.answer.set(None);
    endpoints.call(PATIENCE, check).await.unwrap();
    assert_eq!(endpoints.current(), follower.url());
}

#[tokio::test]
async fn nodes_that_name_each_other_do_not_make_a_client_spin() {
    let cluster = Cluster::new();
    let (one, two) = (server(&cluster, "1").await, server(&cluster, "2").await);
    one.answer.set(Some(not_leader(Some(&two.url()))));
    two.answer.set(Some(not_leader(Some(&one.url()))));
    let endpoints = endpoints(&cluster, &[one.url(), two.url()]);
    let calls = AtomicU32::new(0);
    let deadline = Duration::from_secs(2);
    let error = endpoints
        .call(deadline, |channel| {
            calls.fetch_add(1, Ordering::Relaxed);
            check(channel)
        })
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::NoAnswer { .. }) && error.code() == Some(ErrorCode::NotLeader), "{error}");
    assert!(calls.load(Ordering::Relaxed) < 200, "{} calls", calls.load(Ordering::Relaxed));
}

#[tokio::test]
async fn a_hint_that_is_no_endpoint_is_as_good_as_none() {
    let cluster = Cluster::new();
    let (one, two) = (server(&cluster, "1").await, server(&cluster, "2").await);
    one.answer.set(Some(not_leader(Some("ftp://nowhere"))));
    endpoints(&cluster, &[one.url(), two.url()]).call(PATIENCE, check).await.unwrap();
}

#[tokio::test]
async fn final_answers_are_not_repeated() {
    let cluster = Cluster::new();
    let only = server(&cluster, "1").await;
    let endpoints = endpoints(&cluster, &[only.url()]);
    for code in [ErrorCode::BuildUnknown, ErrorCode::QueueFull, ErrorCode::InvalidField, ErrorCode::Internal] {
        only.answer.set(Some(status(code, "no")));
        let calls = AtomicU32::new(0);
        let result = endpoints.call(PATIENCE, |channel| {
            calls.fetch_add(1, Ordering::Relaxed);
            check(channel)
        });
        let error = result.await.unwrap_err();
        assert!(matches!(&error, CallError::Answered(_)) && error.code() == Some(code), "{error}");
        assert_eq!(calls.load(Ordering::Relaxed), 1, "{code}");
    }
}

#[tokio::test]
async fn passing_troubles_are_waited_out() {
    let cluster = Cluster::new();
    let only = server(&cluster, "1").await;
    for trouble in [
        not_leader(None),
        status(ErrorCode::ShuttingDown, "bye"),
        status(ErrorCode::OutcomeUnknown, "who knows"),
        Status::unavailable("a proxy says so"),
    ] {
        only.answer.set(Some(trouble));
        let calls = Arc::new(AtomicU32::new(0));
        let answer = only.answer.clone();
        let endpoints = endpoints(&cluster, &[only.url()]);
        let result = endpoints.call(PATIENCE, |channel| {
            if calls.fetch_add(1, Ordering::Relaxed) == 2 {
                answer.set(None);
            }
            check(channel)
        });
        result.await.unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 3);
    }
}

#[tokio::test]
async fn the_deadline_holds_when_nobody_answers() {
    let cluster = Cluster::new();
    let endpoints = endpoints(&cluster, &[dead().await, dead().await]);
    let began = Instant::now();
    let error = endpoints.call(Duration::from_millis(700), check).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    assert_eq!(error.status().code(), Code::Unavailable);
    assert!(error.to_string().contains(&endpoints.list()[0]), "{error}");
}

#[tokio::test]
async fn streams_with_a_loop_of_their_own_move_on_once() {
    let cluster = Cluster::new();
    let endpoints = endpoints(&cluster, &["https://a:1".to_owned(), "https://b:2".to_owned()]);
    let first = endpoints.current();
    let gone = Status::unavailable("gone");
    assert_eq!(endpoints.observe(&first, &gone), Verdict::Elsewhere(None));
    let second = endpoints.current();
    assert_ne!(first, second);
    // A second stream that sees the same failure later does not undo the move.
    endpoints.observe(&first, &gone);
    assert_eq!(endpoints.current(), second);
    assert_eq!(endpoints.observe(&second, &Status::not_found("x")), Verdict::Final);
}

#[tokio::test]
async fn endpoints_learnt_from_the_cluster_are_asked_when_those_configured_are_gone() {
    let cluster = Cluster::new();
    let newcomer = server(&cluster, "4").await;
    let endpoints = endpoints(&cluster, &[dead().await, dead().await]);
    endpoints.learn(["no endpoint".to_owned(), newcomer.url(), newcomer.url()]);
    endpoints.call(PATIENCE, check).await.unwrap();
    assert_eq!(endpoints.current(), newcomer.url());
    // What is asked goes on being asked, also when nobody names it any more.
    endpoints.learn([]);
    assert_eq!(endpoints.current(), newcomer.url());
    endpoints.call(PATIENCE, check).await.unwrap();
}
