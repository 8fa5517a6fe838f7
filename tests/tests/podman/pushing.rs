//! Images that go to a registry, and registries that do not take them.

use helix_common::ports;
use helix_tests::cluster::{PATIENCE, wait_for};

use crate::site::{BASE, Registry, Site, missing};

#[test]
fn a_pushed_image_has_the_digest_that_is_reported() {
    if missing("a_pushed_image_has_the_digest_that_is_reported") {
        return;
    }
    let site = Site::start(1, &["podman.push_limit_s=8"]);
    let registry = Registry::start(site.dir.path());
    let source = site.source("source", &[("Dockerfile", &format!("{BASE}RUN echo hi > /hi\n"))]);
    let source = source.to_str().unwrap();
    let (code, status) = site.build(&["--source", source, "--push", &format!("{}/team/app:1", registry.address)]);
    let log = site.log(status["build_id"].as_str().unwrap());
    assert_eq!(code, 0, "{status} {log}");
    let (digest, _) = registry.manifest("team/app", "1").unwrap();
    assert_eq!(status["digest"], digest, "{log}");
    assert_eq!(status["artifacts"].as_array().map(Vec::len), Some(0), "it is at the registry: {status}");

    // A registry that refuses: the push alone is tried again, and the command's own code stays.
    let nobody = ports::free(1).unwrap();
    let (code, status) = site.build(&["--source", source, "--push", &format!("127.0.0.1:{nobody}/team/app:1")]);
    let id = status["build_id"].as_str().unwrap();
    let log = site.log(id);
    assert_eq!((code, status["reason"].as_str()), (120, Some("push")), "{status} {log}");
    assert_eq!(status["exit_code"], 0);
    assert_eq!(log.matches("trying again").count().min(1), 1, "{log}");
    assert!(log.lines().last().unwrap().contains("cannot be pushed"), "{log}");
    // A reference is never a path on the build host.
    let file = site.dir.path().join("written");
    let (code, _) = site.build(&["--source", source, "--push", &format!("oci-archive:{}", file.display())]);
    assert_eq!(code, 120);
    assert!(!file.exists());
    site.assert_clean(id);
    site.end();
}

/// The registry is away when the build ends, the agent is killed while it tries, and comes back; then the registry does, too.
#[test]
fn an_agent_that_is_killed_while_it_pushes_pushes_again() {
    if missing("an_agent_that_is_killed_while_it_pushes_pushes_again") {
        return;
    }
    let site = Site::start(1, &[]);
    let port = ports::free(1).unwrap();
    let source = site.source("source", &[("Dockerfile", &format!("{BASE}RUN echo built once\n"))]);
    let reference = format!("127.0.0.1:{port}/team/app:2");
    let id = site.submit(&["--source", source.to_str().unwrap(), "--push", &reference]);
    site.wait_log(&id, "pushing failed");
    let agent = site.cluster.member("agent", "agent-1");
    site.cluster.kill(&agent);
    wait_for("podman to have died with its agent", PATIENCE, || {
        let storage = agent.data_dir.join("podman/storage").display().to_string();
        site.cluster.processes().iter().all(|(_, line)| !line.contains(&storage)).then_some(())
    });
    let registry = Registry::start_at(site.dir.path(), port);
    site.cluster.start_again(&agent);
    site.cluster.wait_state(&id, "succeeded");
    let status = site.cluster.json(&["status", &id]);
    assert_eq!(status["attempt"], 1, "{status}");
    assert_eq!(status["digest"], registry.manifest("team/app", "2").unwrap().0);
    assert_eq!(site.log(&id).matches("built once").count(), 2, "the step's own line and podman's word on it");

    // A stop in the middle of a push ends the push.
    drop(registry);
    let id = site.submit(&["--source", source.to_str().unwrap(), "--push", &reference]);
    site.wait_log(&id, "pushing failed");
    assert_eq!(site.cluster.helix(&["cancel", &id]).code, 0);
    assert_eq!(site.cluster.state(&id), "cancelled");
    site.assert_clean(&id);
    site.end();
}
