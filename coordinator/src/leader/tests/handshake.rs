//! Who may have a session, what it is told at its start, and how it ends.

use helix_common::status::error_code;
use helix_core::Command;
use helix_core::command::RemoveWorker;
use helix_core::record::{DrainedBy, Standing};
use helix_model::ErrorCode;
use helix_proto::agent;
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;

use super::agents::{Agent, hello, offered, succeeded, worker};
use super::world::{Fault, World};

fn is_registration(command: &Command) -> bool {
    matches!(command, Command::RegisterWorker(_))
}

#[tokio::test]
async fn malformed_introductions_are_refused_for_good() {
    let (_world, leader) = World::leading();
    let offer = || hello("w", 1).offer.unwrap();
    for (hello, reason) in [
        (agent::Hello { protocol: 99, ..hello("w", 1) }, "version_skew"),
        (agent::Hello { protocol: helix_proto::AGENT_PROTOCOL - 1, ..hello("w", 1) }, "version_skew"),
        (agent::Hello { name: "v".to_owned(), ..hello("w", 1) }, "not_owner"),
        (agent::Hello { instance: "A B".to_owned(), ..hello("w", 1) }, "invalid_field"),
        (hello("w", 0), "invalid_field"),
        (hello("w", 251), "invalid_field"),
        (agent::Hello { offer: None, ..hello("w", 1) }, "invalid_field"),
        (agent::Hello { attempts: vec![agent::OfferedAttempt::default()], ..hello("w", 1) }, "invalid_field"),
        (
            agent::Hello { offer: Some(agent::Offer { platforms: vec!["?".to_owned()], ..offer() }), ..hello("w", 1) },
            "invalid_field",
        ),
        (
            agent::Hello { offer: Some(agent::Offer { executors: Vec::new(), ..offer() }), ..hello("w", 1) },
            "invalid_field",
        ),
    ] {
        let mut agent = Agent::silent(&leader, "w");
        agent.say(Said::Hello(hello)).await;
        let refused = agent.refused().await;
        assert_eq!((refused.reason.as_str(), refused.retry), (reason, false), "{}", refused.message);
        assert!(agent.ended().await.is_none());
    }
    let mut agent = Agent::silent(&leader, "w");
    agent.beat().await;
    assert_eq!(error_code(&agent.ended().await.unwrap()), Some(ErrorCode::InvalidField));
}

#[tokio::test]
async fn a_second_live_instance_is_refused_and_a_reconnect_is_not() {
    let (world, leader) = World::leading();
    let mut first = Agent::connect(&leader, hello("w", 1)).await;
    let other = agent::Hello { instance: "other.boot2".to_owned(), ..hello("w", 1) };
    let refused = Agent::dial(&leader, other.clone()).await.refused().await;
    assert_eq!((refused.reason.as_str(), refused.retry), ("worker_name_taken", true));
    let mut second = Agent::connect(&leader, hello("w", 1)).await;
    assert!(first.ended().await.is_some(), "the older session of the same life ends");
    world.submit("b");
    second.assigned().await;
    assert_eq!(world.done(is_registration).len(), 1, "an unchanged worker is not registered again");
    drop(second);
    // Once the first is gone, the name is free.
    loop {
        let mut third = Agent::dial(&leader, other.clone()).await;
        match third.next().await {
            Message::Welcome(_) => break,
            Message::Refused(refused) => assert!(refused.retry),
            other => panic!("{other:?}"),
        }
    }
    world.until("the attempt of the earlier life has ended", |state| state.load_of(&worker("w")) == 0).await;
}

#[tokio::test]
async fn after_a_fail_over_the_life_that_runs_attempts_comes_first() {
    let (world, leader) = World::leading();
    let mut first = Agent::connect(&leader, hello("w", 1)).await;
    world.submit("b");
    let key = first.assigned().await;
    world.lead(2);
    first.ended().await;
    let double = agent::Hello { instance: "other.boot2".to_owned(), ..hello("w", 1) };
    assert_eq!(Agent::dial(&leader, double.clone()).await.refused().await.reason, "worker_name_taken");
    let back = agent::Hello { attempts: vec![offered(&key, false)], ..hello("w", 1) };
    let mut first = Agent::connect(&leader, back).await;
    assert_eq!(Agent::dial(&leader, double).await.refused().await.reason, "worker_name_taken");
    first.finish(succeeded(&key)).await;
    assert_eq!(first.forgotten().await, key);
}

#[tokio::test]
async fn reconciliation_resends_what_is_missing_and_nothing_else() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 3)).await;
    let builds = ["a", "b", "c"].map(|id| world.submit(id));
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(agent.assigned().await);
    }
    keys.sort();
    drop(agent);
    world.cancel(&builds[2]);
    // It has the first, lost the second, and has one that nobody knows.
    let unknown: helix_model::AttemptKey = "zz.0.1".parse().unwrap();
    let attempts = vec![offered(&keys[0], false), offered(&unknown, false)];
    let mut agent = Agent::connect(&leader, agent::Hello { attempts, ..hello("w", 3) }).await;
    assert_eq!(agent.forgotten().await, unknown);
    assert_eq!(agent.assigned().await, keys[1]);
    assert_eq!(agent.stopped().await, keys[2]);
    // It never had what is to stop: that is its proof.
    let id = Some(helix_proto::convert::attempt_to_wire(&keys[2]));
    agent.say(Said::ProvenDead(agent::ProvenDead { id })).await;
    world.until_finished(&builds[2]).await;
}

#[tokio::test]
async fn a_leader_that_no_majority_confirms_tells_nobody_what_to_forget() {
    let (world, leader) = World::leading();
    drop(Agent::connect(&leader, hello("w", 1)).await);
    // Another leader has given it this meanwhile.
    let back = agent::Hello { attempts: vec![offered(&"new.0.1".parse().unwrap(), true)], ..hello("w", 1) };
    world.confirm(false);
    let mut agent = Agent::dial(&leader, back.clone()).await;
    let ending = agent.hear().await.unwrap().expect_err("it was welcomed, and told what to forget");
    assert_eq!(error_code(&ending), Some(ErrorCode::NoLeader));
    world.confirm(true);
    let mut agent = Agent::connect(&leader, back).await;
    assert_eq!(agent.forgotten().await.to_string(), "new.0.1");
}

#[tokio::test]
async fn a_spool_larger_than_the_queue_is_reconciled_as_it_is_read() {
    let (_world, leader) = World::leading();
    let attempts: Vec<_> = (0..2_000).map(|n| offered(&format!("old{n}.0.1").parse().unwrap(), true)).collect();
    let mut agent = Agent::connect(&leader, agent::Hello { attempts, ..hello("w", 1) }).await;
    let mut forgotten = std::collections::BTreeSet::new();
    while forgotten.len() < 2_000 {
        match agent.next_while_beating().await {
            Message::Forget(forget) => {
                forgotten.insert(helix_proto::convert::attempt_from_wire(forget.id).unwrap());
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_stop_does_not_overtake_an_assignment_that_waits_for_the_agent_to_read() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    drop(agent);
    let attempts: Vec<_> = (0..2_000).map(|n| offered(&format!("old{n}.0.1").parse().unwrap(), true)).collect();
    let mut agent = Agent::connect(&leader, agent::Hello { attempts, ..hello("w", 1) }).await;
    world.cancel(&build);
    let mut said = Vec::new();
    while said.len() < 2 {
        match agent.next_while_beating().await {
            Message::Forget(_) => {}
            Message::Assign(assign) => said.push(("assign", assign.id)),
            Message::Stop(stop) => said.push(("stop", stop.id)),
            other => panic!("{other:?}"),
        }
    }
    let id = Some(helix_proto::convert::attempt_to_wire(&key));
    assert_eq!(said, [("assign", id.clone()), ("stop", id)]);
}

#[tokio::test]
async fn where_nobody_leads_sessions_are_sent_away() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    world.follow(2, 2);
    assert!(matches!(agent.next().await, Message::Moved(_)));
    assert!(agent.ended().await.is_none());
    let inbound = futures::stream::pending();
    let refused = leader.session(worker("w"), inbound).err().unwrap();
    assert_eq!(error_code(&refused), Some(ErrorCode::NoLeader));
    assert!(leader.snapshot().await.is_none());
    // Leading again begins afresh: nobody is known until they speak.
    world.lead(3);
    let agent = Agent::connect(&leader, hello("w", 1)).await;
    assert_eq!(leader.snapshot().await.unwrap().workers.len(), 1);
    drop(agent);
}

#[tokio::test]
async fn an_agents_own_drain_ends_with_it_and_a_removed_worker_introduces_itself_again() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    agent.say(Said::Leaving(agent::Leaving {})).await;
    let drained = |state: &helix_core::state::State| {
        let drain = state.worker(&worker("w")).and_then(|row| row.drain);
        drain.is_some_and(|drain| drain.by == DrainedBy::Agent)
    };
    world.until("it is drained", drained).await;
    drop(agent);
    let leaving = agent::Hello { leaving: true, ..hello("w", 1) };
    let agent = Agent::connect(&leader, leaving).await;
    assert!(world.with(drained), "the same agent is still leaving");
    drop(agent);
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    assert!(!world.with(drained), "its successor is not");
    world.apply(Command::RemoveWorker(RemoveWorker { worker: worker("w") }));
    assert!(agent.ended().await.is_some());
    Agent::connect(&leader, hello("w", 1)).await;
}

#[tokio::test]
async fn a_detached_worker_is_counted_on_and_welcome_again() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    world.submit("b");
    let key = agent.assigned().await;
    agent.say(Said::Detaching(agent::Detaching {})).await;
    assert!(matches!(agent.next().await, Message::DetachAck(_)));
    drop(agent);
    world.advance_ms(60_000);
    let back = agent::Hello { attempts: vec![offered(&key, false)], version: "2".to_owned(), ..hello("w", 1) };
    let mut agent = Agent::connect(&leader, back).await;
    assert!(world.with(|state| state.worker(&worker("w")).unwrap().standing == Standing::Present));
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
}

#[tokio::test]
async fn a_registration_of_unknown_fate_ends_the_session_and_the_next_one_finds_out() {
    let (world, leader) = World::leading();
    world.fail_next(is_registration, Fault::Unanswered);
    let mut agent = Agent::dial(&leader, hello("w", 1)).await;
    assert_eq!(error_code(&agent.ended().await.unwrap()), Some(ErrorCode::OutcomeUnknown));
    Agent::connect(&leader, hello("w", 1)).await;
    assert_eq!(world.done(is_registration).len(), 1);
}
