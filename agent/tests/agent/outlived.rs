//! Attempts that were assigned to an earlier life of the host and had not begun: the registry ended them with that life.

use helix_model::BuildSpec;
use helix_proto::agent::agent_message;

use super::World;
use super::cluster::line;

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_life_was_given_does_not_begin() {
    let mut world = World::new().await;
    let repository = world.dir().join("repository");
    std::fs::create_dir(&repository).unwrap();
    let script = "git init -q -b main && git -c user.name=t -c user.email=t@t commit -q --allow-empty -m one";
    let made = std::process::Command::new("sh").args(["-c", script]).current_dir(&repository).status().unwrap();
    assert!(made.success());
    let ran = world.dir().join("ran");
    let repo_url = format!("file://{}", repository.display());
    let spec = BuildSpec { repo_url, ..line(&format!("touch {}", ran.display())) };
    let id = world.cluster.assign("outlived", &spec).await;
    let resolved = |message: &agent_message::Message| matches!(message, agent_message::Message::SourceResolved(_));
    // Nothing runs before the commit comes back, which it never does.
    world.cluster.wait_for("its ref", |seen| seen.messages.iter().any(resolved).then_some(())).await;

    world.host.kill();
    // As after a boot: the agent is another instance.
    let instance = world.dir().join("data/instance");
    assert!(!std::fs::read_to_string(&instance).unwrap().is_empty());
    std::fs::write(&instance, "0123456789abcdef0123456789abcdef").unwrap();
    world.host.start();

    let finished = world.cluster.finished(&id).await;
    assert_eq!((&*finished.outcome, &*finished.reason), ("failed", "internal"), "{finished:?}");
    assert!(finished.message.contains("booted before it began"), "{finished:?}");
    assert!(!finished.unproven && !ran.exists());
}
