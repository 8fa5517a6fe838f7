//! Images of several platforms: who is told what, also when an answer is lost or an image comes from a stale attempt.

use helix_core::Command;
use helix_model::{AttemptKey, BuildSpec, Executor, Platform};
use helix_proto::agent;
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::convert::{attempt_from_wire, attempt_to_wire};

use super::agents::{Agent, failed, hello, succeeded};
use super::world::{Fault, World};
use crate::leader::Leader;

fn is_image(command: &Command) -> bool {
    matches!(command, Command::RecordImage(_))
}

/// An agent that builds images for one platform.
async fn builder(leader: &Leader<World>, name: &str, platform: &str) -> Agent {
    let mut hello = hello(name, 1);
    let offer = hello.offer.as_mut().unwrap();
    (offer.platforms, offer.executors) = (vec![platform.to_owned()], vec!["podman".to_owned()]);
    Agent::connect(leader, hello).await
}

fn spec() -> BuildSpec {
    BuildSpec {
        executor: Some(Executor::Podman),
        push: "registry/app:1".to_owned(),
        platforms: ["linux/amd64", "linux/arm64"].map(|text| Platform::new(text).unwrap()).to_vec(),
        ..BuildSpec::default()
    }
}

fn image(byte: u8) -> agent::BuiltImage {
    let (sha256, id) = (vec![byte; 32].into(), vec![byte + 100; 32].into());
    agent::BuiltImage { sha256, size: 5, id, manifest_size: 0, media_type: "m".to_owned() }
}

fn pushed(key: &AttemptKey, byte: u8) -> Said {
    Said::ImagePushed(agent::ImagePushed { id: Some(attempt_to_wire(key)), image: Some(image(byte)) })
}

fn made(key: &AttemptKey, byte: u8) -> agent::Finished {
    agent::Finished { digest: vec![byte; 32].into(), size: 5, image: Some(image(byte)), ..succeeded(key) }
}

/// What an agent is told of images: platform and first byte of the digest.
async fn images(agent: &mut Agent, key: &AttemptKey) -> Vec<(String, u8)> {
    match agent.next().await {
        Message::Images(told) => {
            assert_eq!(attempt_from_wire(told.id).unwrap(), *key);
            told.images.into_iter().map(|image| (image.platform, image.sha256[0])).collect()
        }
        other => panic!("nothing of images but {other:?}"),
    }
}

#[tokio::test]
async fn the_last_image_is_told_of_all_once_the_others_have_succeeded() {
    let (world, leader) = World::leading();
    let mut first = builder(&leader, "v", "linux/amd64").await;
    let mut last = builder(&leader, "w", "linux/arm64").await;
    let build = world.submit_spec("b", spec());
    let (one, two) = (first.assigned().await, last.assigned().await);
    first.say(pushed(&one, 1)).await;
    assert_eq!(images(&mut first, &one).await, []);
    // It was committed, and nobody knows: the repeat is answered, once the first has succeeded.
    world.fail_next(is_image, Fault::Unanswered);
    last.say(pushed(&two, 2)).await;
    world.until("the second image", |state| state.attempt(&two).is_some_and(|it| it.image.is_some())).await;
    first.finish(made(&one, 1)).await;
    assert_eq!(first.forgotten().await, one);
    let all = [("linux/amd64".to_owned(), 1), ("linux/arm64".to_owned(), 2)];
    assert_eq!(images(&mut last, &two).await, all);
    last.say(pushed(&two, 2)).await;
    assert_eq!(images(&mut last, &two).await, all);
    last.finish(agent::Finished { index: vec![9; 32].into(), ..made(&two, 2) }).await;
    assert_eq!(last.forgotten().await, two);
    world.until_finished(&build).await;
}

/// A success without its index would leave the build without one: it counts as a fault of ours, and is tried again.
#[tokio::test]
async fn images_of_stale_attempts_and_successes_without_their_index_do_not_count() {
    let (world, leader) = World::leading();
    let mut first = builder(&leader, "v", "linux/amd64").await;
    let mut last = builder(&leader, "w", "linux/arm64").await;
    let build = world.submit_spec("b", spec());
    let (one, two) = (first.assigned().await, last.assigned().await);
    // Another's attempt, and one that never was.
    last.say(pushed(&one, 7)).await;
    assert_eq!(last.forgotten().await, one);
    let never = AttemptKey { attempt: helix_model::AttemptNumber(9), ..one.clone() };
    first.say(pushed(&never, 7)).await;
    assert_eq!(first.forgotten().await, never);
    assert!(world.open(&build).tasks.iter().all(|task| task.attempts.iter().all(|it| it.image.is_none())));
    first.say(pushed(&one, 1)).await;
    assert_eq!(images(&mut first, &one).await, []);
    first.finish(made(&one, 1)).await;
    assert_eq!(first.forgotten().await, one);
    last.say(pushed(&two, 2)).await;
    assert_eq!(images(&mut last, &two).await.len(), 2);
    last.finish(made(&two, 2)).await;
    assert_eq!(last.forgotten().await, two);
    let ended = world.open(&build).tasks[1].attempts[0].end.clone().unwrap();
    assert!(ended.reason.is_some() && ended.message.contains("without the index"), "{ended:?}");
    // An attempt that has failed has no image, whatever still arrives of it.
    last.say(pushed(&two, 2)).await;
    assert_eq!(last.forgotten().await, two);
    last.finish(failed(&two)).await;
    assert_eq!(last.forgotten().await, two);
}
