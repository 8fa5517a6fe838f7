//! What the leader itself proposes may be lost, repeated or refused, its effects too; and agents may not read.

use helix_core::command::{AssignTask, LoseWorker};
use helix_core::record::Standing;
use helix_core::{Command, Reply};
use helix_proto::agent;
use helix_proto::agent::agent_message::Message as Said;

use super::agents::{Agent, INSTANCE, hello, offered, succeeded, worker};
use super::world::{Fault, World};

fn is_assignment(command: &Command) -> bool {
    matches!(command, Command::AssignTask(_))
}

#[tokio::test]
async fn assignments_of_unknown_fate_are_derived_again() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    for (id, fault) in [("a", Fault::Lost), ("b", Fault::Unanswered)] {
        world.fail_next(is_assignment, fault);
        world.submit(id);
        let key = agent.assigned().await;
        assert_eq!(key.attempt.0, 1);
        agent.finish(succeeded(&key)).await;
        assert_eq!(agent.forgotten().await, key);
    }
    assert_eq!(world.done(is_assignment).len(), 2);
}

#[tokio::test]
async fn lost_effects_are_made_up_for() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    world.fail_next(is_assignment, Fault::Mute);
    world.submit("b");
    world.until_running_on_quietly(&worker("w"), 1).await;
    // More at once than the channel of effects holds: the loop lags and derives everything again.
    world.overflow_effects();
    let key = agent.assigned().await;
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
}

#[tokio::test]
async fn another_term_begins_afresh_and_agents_keep_their_attempts() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 2)).await;
    let build = world.submit("a");
    let key = agent.assigned().await;
    world.follow(2, 2);
    agent.ended().await;
    // Somebody else leads and assigns meanwhile.
    let other = world.submit("b");
    let assign = AssignTask {
        key: helix_model::AttemptKey { build: other, ..key.clone() },
        worker: worker("w"),
        instance: helix_model::Instance::new(INSTANCE).unwrap(),
    };
    let missed = assign.key.clone();
    assert_eq!(world.apply(Command::AssignTask(assign)), Reply::Done);
    world.lead(3);
    let back = agent::Hello { attempts: vec![offered(&key, false)], ..hello("w", 2) };
    let mut agent = Agent::connect(&leader, back).await;
    assert_eq!(agent.assigned().await, missed);
    agent.finish(succeeded(&key)).await;
    assert_eq!(agent.forgotten().await, key);
    world.until_finished(&build).await;
}

#[tokio::test]
async fn a_loss_that_crossed_a_reconnect_sends_the_agent_back_to_register() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let instance = helix_model::Instance::new(INSTANCE).unwrap();
    world.apply(Command::LoseWorker(LoseWorker { worker: worker("w"), instance }));
    assert!(agent.ended().await.is_some());
    Agent::connect(&leader, hello("w", 1)).await;
    assert!(world.with(|state| state.worker(&worker("w")).unwrap().standing == Standing::Present));
}

#[tokio::test]
async fn an_agent_that_does_not_read_loses_its_session_and_is_reconciled_later() {
    let (world, leader) = World::leading();
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    let build = world.submit("b");
    let key = agent.assigned().await;
    let pin = Said::SourceResolved(agent::SourceResolved {
        id: Some(helix_proto::convert::attempt_to_wire(&key)),
        commit: "a".repeat(40),
    });
    // Each is answered, and none of the answers is read.
    let full = async {
        while leader.metrics().sessions.get() == 1 {
            agent.say(pin.clone()).await;
        }
    };
    tokio::time::timeout(super::world::PATIENCE, full).await.unwrap();
    agent.ended().await;
    let mut agent = Agent::connect(&leader, hello("w", 1)).await;
    assert_eq!(agent.assigned().await, key);
    assert_eq!(world.open(&build).tasks[0].attempts.len(), 1);
}
