//! Work reaches workers: once, within capacity, and again elsewhere when a worker is gone.

use std::collections::BTreeSet;

use helix_core::command::SetPolicy;
use helix_core::record::Standing;
use helix_core::state::State;
use helix_core::{Command, Policy};
use helix_model::{BuildId, LogTime};
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::agent::{Detaching, Finished, Hello};
use helix_proto::convert::attempt_from_wire;

use super::agents::{Agent, hello, offered, succeeded, worker};
use super::world::{PATIENCE, World};
use crate::leader::Consensus;

fn is_assignment(command: &Command) -> bool {
    matches!(command, Command::AssignTask(_))
}

#[tokio::test]
async fn a_submitted_build_is_assigned_run_and_forgotten() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let Message::Assign(assign) = agent.next().await else { panic!("no assignment") };
    let key = attempt_from_wire(assign.id.clone()).unwrap();
    assert_eq!((key.build.clone(), key.attempt.0), (build.clone(), 1));
    assert_eq!(assign.spec.unwrap().repo_url, "https://h/p");
    assert_eq!((assign.created_at_ms, assign.previous.as_str()), (1_000_000, ""));
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
    world.until_finished(&build).await;
    assert_eq!(leader.metrics().sessions.get(), 1);
}

#[tokio::test]
async fn an_agent_knows_the_policy_in_force_before_it_is_given_a_build() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    for bytes in [5 << 20, 6 << 20, 7 << 20] {
        let policy = Policy { log_bytes_max: bytes, ..world.with(|state| state.policy().clone()) };
        world.apply(Command::SetPolicy(SetPolicy { policy, expected: None }));
        world.submit(&format!("b{bytes}"));
        let Message::Settings(settings) = agent.next().await else { panic!("a build under an older policy") };
        assert_eq!(settings.log_bytes_max, bytes);
        let key = agent.assigned().await;
        agent.finish(succeeded(&key)).await;
        assert_eq!(agent.forgotten().await, key);
    }
}

/// Takes what it is given, never more than its capacity, and succeeds at once.
async fn work(mut agent: Agent, capacity: usize, done: tokio::sync::mpsc::Sender<BuildId>) {
    let mut running = BTreeSet::new();
    while let Some(Ok(message)) = agent.hear().await {
        match message {
            Message::Assign(assign) => {
                let key = attempt_from_wire(assign.id).unwrap();
                assert_eq!(key.attempt.0, 1);
                assert!(running.insert(key.clone()), "{key} was assigned twice");
                // The report of one that ended may have freed its place before the forget arrives.
                assert!(running.len() <= 2 * capacity, "{} at once", running.len());
                agent.finish(succeeded(&key)).await;
            }
            Message::Forget(forget) => {
                let key = attempt_from_wire(forget.id).unwrap();
                assert!(running.remove(&key), "{key} was forgotten twice");
                if done.send(key.build).await.is_err() {
                    return;
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_thousand_builds_are_each_assigned_once_and_never_over_capacity() {
    let (world, leader) = World::leading();
    for number in 0..1_000 {
        world.submit(&format!("b{number}"));
    }
    let (done, mut finished) = tokio::sync::mpsc::channel(16);
    let mut agents = tokio::task::JoinSet::new();
    for name in ["v", "w"] {
        let agent = Agent::connect(&leader, hello(name, 8)).await;
        agents.spawn(work(agent, 8, done.clone()));
    }
    let mut builds = BTreeSet::new();
    while builds.len() < 1_000 {
        let build = tokio::time::timeout(super::world::PATIENCE, finished.recv()).await.unwrap().unwrap();
        assert!(builds.insert(build), "finished twice");
    }
    assert_eq!(world.done(is_assignment).len(), 1_000);
    // `apply` counts capacity: what it never had to refuse was never proposed.
    assert!(world.refused().is_empty(), "{:?}", world.refused().first());
    drop(finished);
    agents.shutdown().await;
}

#[tokio::test]
async fn a_clock_that_leaps_costs_nobody_a_lease() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    let mut away = Agent::connect(&leader, hello("v", 1)).await;
    away.say(Said::Detaching(Detaching {})).await;
    assert!(matches!(away.next().await, Message::DetachAck(_)));
    drop(away);
    // As when a leader that was restarted hears from the others what time it is. Who said by when it would be back has a lease, too.
    world.leap_ms(400_000);
    world.advance_ms(14_000);
    agent.beat().await;
    let heard = async {
        while leader.snapshot().await.unwrap().workers[&worker("w")].last_seen < world.now() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, heard).await.unwrap();
    assert_eq!(world.with(|state| standing(state, "v")), Some(Standing::Detached { until: LogTime(1_300_000) }));
    world.advance_ms(1_000);
    world.until("the detached worker is lost", |state| standing(state, "v") == Some(Standing::Lost)).await;
    assert_eq!(world.with(|state| standing(state, "w")), Some(Standing::Present));
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
    world.until_finished(&build).await;
}

fn standing(state: &State, name: &str) -> Option<Standing> {
    state.worker(&worker(name)).map(|worker| worker.standing)
}

#[tokio::test]
async fn a_lapsed_lease_reruns_the_attempt_elsewhere_and_the_report_of_the_lost_one_is_forgotten() {
    let (world, leader) = World::leading();
    let mut lost = Agent::connect(&leader, hello("v", 1)).await;
    let build = world.submit("b");
    let first = lost.assigned().await;
    let mut other = Agent::connect(&leader, hello("w", 1)).await;
    world.advance_ms(20_000);
    // The lease of both is over by the clock; this one speaks up before the loop looks.
    other.beat().await;
    world.until("the worker is lost", |state| state.load_of(&worker("v")) == 0).await;
    assert!(lost.ended().await.is_some(), "a session without heartbeats is closed");
    world.advance_ms(5_000);
    let second = other.assigned_while_beating().await;
    assert_eq!((second.build.clone(), second.attempt.0), (build, 2));
    let mut again = Agent::connect(&leader, hello("v", 1)).await;
    again.finish(succeeded(&first)).await;
    // Its log is wanted still, then nothing is.
    assert_eq!(again.forgotten().await, first);
    other.finish(succeeded(&second)).await;
    assert_eq!(other.forgotten().await, second);
}

#[tokio::test]
async fn a_late_heartbeat_stops_new_work_and_the_next_one_brings_it_back() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    world.advance_ms(5_000);
    let late = async {
        loop {
            let live = leader.snapshot().await.unwrap();
            if live.workers[&worker("w")].session == helix_core::SessionState::Late {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(super::world::PATIENCE, late).await.unwrap();
    world.submit("b");
    agent.beat().await;
    agent.assigned().await;
}

#[tokio::test]
async fn cancelled_attempts_are_stopped_and_their_proof_ends_the_build() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    world.cancel(&build);
    assert_eq!(agent.stopped().await, key);
    let stopped = Finished { outcome: "stopped".to_owned(), ..succeeded(&key) };
    agent.finish(stopped).await;
    assert_eq!(agent.forgotten().await, key);
    world.until_finished(&build).await;
}

#[tokio::test]
async fn a_worker_held_for_an_unproven_stop_gets_work_again_after_the_proof() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    drop(agent);
    world.cancel(&build);
    // The lease lapses, then the patience for a proof ends.
    for ms in [20_000, 61_000] {
        world.advance_ms(ms);
        world
            .until("something is due", |state| {
                let row = state.worker(&worker("w")).unwrap();
                if ms == 20_000 { row.standing == Standing::Lost } else { row.held.contains(&key) }
            })
            .await;
    }
    world.until_finished(&build).await;
    let attempts = vec![offered(&key, false)];
    let mut agent = Agent::connect(&leader, Hello { attempts, ..hello("w", 1) }).await;
    assert_eq!(agent.stopped().await, key);
    world.submit("c");
    agent.finish(Finished { outcome: "stopped".to_owned(), ..succeeded(&key) }).await;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match agent.next().await {
            Message::Forget(forget) => seen.push(attempt_from_wire(forget.id).unwrap().to_string()),
            Message::Assign(assign) => seen.push(attempt_from_wire(assign.id).unwrap().to_string()),
            other => panic!("{other:?}"),
        }
    }
    seen.sort();
    assert_eq!(seen, [key.to_string(), "c.0.1".to_owned()]);
}

#[tokio::test]
async fn a_rebooted_host_ends_what_it_ran_and_seals_what_it_printed() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    drop(agent);
    let attempts = vec![offered(&key, false)];
    let rebooted = Hello { instance: "data.boot2".to_owned(), attempts, ..hello("w", 1) };
    let mut agent = loop {
        let mut agent = Agent::dial(&leader, rebooted.clone()).await;
        match agent.next().await {
            Message::Welcome(_) => break agent,
            // The end of the first session may not have been noticed yet.
            Message::Refused(refused) => assert!(refused.retry),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(agent.stopped().await, key);
    agent.finish(Finished { outcome: "stopped".to_owned(), ..succeeded(&key) }).await;
    assert_eq!(agent.forgotten().await, key);
    assert!(world.open(&build).tasks[0].attempts[0].log.is_some());
    world.advance_ms(5_000);
    assert_eq!(agent.assigned_while_beating().await.attempt.0, 2);
}
