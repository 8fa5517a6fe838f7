//! Reports of agents: once, twice, late, malformed, by the wrong one, and with too few copies.

use helix_common::status::error_code;
use helix_core::Command;
use helix_core::command::SetPolicy;
use helix_core::state::Known;
use helix_model::{AttemptKey, BuildState, ErrorCode};
use helix_proto::agent;
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::convert::attempt_to_wire;

use super::agents::{Agent, failed, hello, stored_log, succeeded, worker};
use super::world::{Fault, World};

fn is_finish(command: &Command) -> bool {
    matches!(command, Command::FinishAttempt(_))
}

fn sealed(key: &AttemptKey) -> Said {
    Said::LogSealed(agent::LogSealed { id: Some(attempt_to_wire(key)), log: Some(stored_log()) })
}

#[tokio::test]
async fn a_repeated_report_changes_nothing_and_is_answered_again() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    for _ in 0..3 {
        agent.finish(succeeded(&key)).await;
        assert_eq!(agent.forgotten().await, key);
    }
    world.until_finished(&build).await;
    assert_eq!(world.done(is_finish).len(), 1);
}

#[tokio::test]
async fn an_unknown_outcome_is_answered_by_nothing_and_the_repeat_counts() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    for (id, fault) in [("a", Fault::Lost), ("b", Fault::Unanswered), ("c", Fault::Mute)] {
        let build = world.submit(id);
        let key = agent.assigned().await;
        world.fail_next(is_finish, fault);
        agent.finish(succeeded(&key)).await;
        loop {
            // Repeats of what is under way are dropped, so one is not always enough.
            agent.finish(succeeded(&key)).await;
            let wait = std::time::Duration::from_millis(50);
            match tokio::time::timeout(wait, agent.hear()).await {
                Ok(Some(Ok(Message::Forget(_)))) => break,
                Ok(other) => panic!("{other:?}"),
                Err(_) => {}
            }
        }
        world.until_finished(&build).await;
        drain_forgets(&mut agent).await;
    }
    assert_eq!(world.done(is_finish).len(), 3);
}

async fn drain_forgets(agent: &mut Agent) {
    let wait = std::time::Duration::from_millis(100);
    while let Ok(heard) = tokio::time::timeout(wait, agent.hear()).await {
        assert!(matches!(heard, Some(Ok(Message::Forget(_)))), "{heard:?}");
    }
}

#[tokio::test]
async fn a_failure_is_forgotten_only_when_its_log_is_sealed() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    agent.finish(failed(&key)).await;
    world.until_finished(&build).await;
    agent.finish(failed(&key)).await;
    agent.say(sealed(&key)).await;
    assert_eq!(agent.forgotten().await, key);
    let seals = world.done(|command| matches!(command, Command::SealLog(_)));
    assert_eq!(seals.len(), 1);
}

#[tokio::test]
async fn a_report_in_anothers_name_or_for_what_it_never_had_is_stale() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("v", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    let mut liar = Agent::connect(&leader, hello("w", 1)).await;
    liar.finish(succeeded(&key)).await;
    assert_eq!(liar.forgotten().await, key);
    let later = AttemptKey { attempt: helix_model::AttemptNumber(9), ..key.clone() };
    agent.finish(succeeded(&later)).await;
    assert_eq!(agent.forgotten().await, later);
    assert_eq!(world.open(&build).state, BuildState::Running);
}

#[tokio::test]
async fn too_few_holders_ask_for_the_bytes_again() {
    let (world, leader) = World::leading();
    world.members(&[1, 2, 3]);
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    agent.finish(succeeded(&key)).await;
    assert!(matches!(agent.next().await, Message::StoreAgain(_)));
    assert_eq!(world.open(&build).state, BuildState::Running);
    let mut report = succeeded(&key);
    report.log.as_mut().unwrap().blob.as_mut().unwrap().holders = vec![1, 3];
    agent.finish(report).await;
    assert_eq!(agent.forgotten().await, key);
}

#[tokio::test]
async fn a_failures_log_that_too_few_hold_is_sealed_behind_it() {
    let (world, leader) = World::leading();
    world.members(&[1, 2, 3]);
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    let mut report = agent::Finished { log: Some(stored_log()), ..failed(&key) };
    agent.finish(report.clone()).await;
    assert!(matches!(agent.next().await, Message::StoreAgain(_)));
    world.until_finished(&build).await;
    report.log.as_mut().unwrap().blob.as_mut().unwrap().holders = vec![1, 3];
    agent.finish(report).await;
    assert_eq!(agent.forgotten().await, key);
    assert!(world.with(|state| !state.wants_log(&key, &worker("w"))));
}

#[tokio::test]
async fn a_report_that_cannot_be_read_ends_the_attempt_as_a_fault_of_ours() {
    let (world, leader) = World::leading();
    let mut policy = world.with(|state| state.policy().clone());
    policy.infra_retries = 0;
    world.apply(Command::SetPolicy(SetPolicy { policy, expected: None }));
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let nonsense = |key: &AttemptKey| agent::Finished { outcome: "odd".to_owned(), ..succeeded(key) };
    let contradiction = |key: &AttemptKey| agent::Finished { log: None, ..succeeded(key) };
    for (id, report) in [("a", &nonsense as &dyn Fn(&AttemptKey) -> agent::Finished), ("b", &contradiction)] {
        let build = world.submit(id);
        let key = agent.assigned().await;
        agent.finish(report(&key)).await;
        world.until_finished(&build).await;
        assert!(world.with(|state| match state.build(&build) {
            Some(Known::Finished(finished)) => finished.state == BuildState::Failed,
            _ => false,
        }));
    }
}

#[tokio::test]
async fn the_first_resolved_commit_counts() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    let resolved = |digit: &str| {
        Said::SourceResolved(agent::SourceResolved { id: Some(attempt_to_wire(&key)), commit: digit.repeat(40) })
    };
    for said in [resolved("a"), resolved("b")] {
        agent.say(said).await;
        match agent.next().await {
            Message::Commit(commit) => assert_eq!(commit.commit, "a".repeat(40)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(world.open(&build).commit.as_deref(), Some("a".repeat(40).as_str()));
}

#[tokio::test]
async fn nonsense_ends_the_session_with_a_status() {
    let (_world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    for _ in 0..20 {
        agent.say(Said::ProvenDead(agent::ProvenDead { id: None })).await;
    }
    assert_eq!(error_code(&agent.ended().await.unwrap()), Some(ErrorCode::InvalidField));
}

#[tokio::test]
async fn a_flood_ends_the_session_with_a_status() {
    let (_world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    for _ in 0..30_000 {
        agent.beat().await;
    }
    assert_eq!(error_code(&agent.ended().await.unwrap()), Some(ErrorCode::InvalidField));
}
