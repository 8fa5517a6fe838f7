//! Builds that are stopped, and agents that die in the middle.

use std::fs;

use helix_tests::cluster::{PATIENCE, wait_for};

use crate::site::{BASE, Site, missing, running};

/// So many seconds, as nobody else on this host sleeps.
fn seconds(count: u32) -> String {
    format!("{count}.{:07}", std::process::id())
}

/// The processes that sleep for so many seconds.
fn asleep(count: u32) -> Vec<i32> {
    running(&format!("sleep {}", seconds(count)))
}

/// Starts a build that sleeps for so long, and waits until it does.
fn sleeping(site: &Site, count: u32, arguments: &[&str]) -> String {
    let seconds = &seconds(count);
    let source = site.source(seconds, &[("Dockerfile", &format!("{BASE}RUN sleep {seconds}\nRUN echo slept well\n"))]);
    let mut all = vec!["--source", source.to_str().unwrap()];
    all.extend_from_slice(arguments);
    let id = site.submit(&all);
    wait_for("the step to run", PATIENCE, || (!asleep(count).is_empty()).then_some(()));
    id
}

/// The runner that a process descends from.
fn runner_of(pid: i32) -> i32 {
    let mut at = pid;
    while !fs::read_to_string(format!("/proc/{at}/comm")).unwrap().starts_with("helix-runner") {
        let stat = fs::read_to_string(format!("/proc/{at}/stat")).unwrap();
        at = stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    }
    at
}

/// However a build is ended, no process, container, mount or cgroup of it is left; its neighbour goes on.
#[test]
fn a_build_that_is_stopped_leaves_nothing() {
    if missing("a_build_that_is_stopped_leaves_nothing") {
        return;
    }
    let site = Site::start(1, &[]);
    let cancelled = sleeping(&site, 100_001, &[]);
    let neighbour = sleeping(&site, 12, &[]);
    let said = site.cluster.helix(&["cancel", &cancelled]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let status = site.cluster.json(&["status", &cancelled]);
    assert_eq!((status["state"].as_str(), status["verified"].as_bool()), (Some("cancelled"), Some(true)), "{status}");
    assert_eq!(asleep(100_001), Vec::<i32>::new());
    assert_ne!(asleep(12), Vec::<i32>::new(), "the neighbour");
    site.cluster.wait_state(&neighbour, "succeeded");
    site.assert_clean(&cancelled);
    site.assert_clean(&neighbour);

    let late = sleeping(&site, 100_002, &["--timeout", "8s"]);
    site.cluster.wait_state(&late, "failed");
    assert_eq!(site.cluster.json(&["status", &late])["reason"], "timeout");
    assert_eq!(asleep(100_002), Vec::<i32>::new());
    site.assert_clean(&late);

    // As when podman is killed between the making of a container and its notes on whose it is.
    let unnoted = sleeping(&site, 100_004, &[]);
    let containers = site.cluster.member("agent", "agent-1").data_dir.join("podman/storage/overlay-containers");
    let notes = fs::read_dir(containers).unwrap().map(|entry| entry.unwrap().path().join("userdata/buildah.json"));
    assert_ne!(notes.filter(|notes| fs::remove_file(notes).is_ok()).count(), 0);
    assert_eq!(site.cluster.helix(&["cancel", &unnoted]).code, 0);
    site.assert_clean(&unnoted);
    site.end();
}

/// An agent that is killed finds its build again. One whose runner is killed as well finds what it left.
#[test]
fn an_agent_that_is_killed_goes_on_with_its_build() {
    if missing("an_agent_that_is_killed_goes_on_with_its_build") {
        return;
    }
    let site = Site::start(1, &[]);
    let agent = site.cluster.member("agent", "agent-1");
    let kept = sleeping(&site, 7, &[]);
    site.cluster.kill(&agent);
    site.cluster.start_again(&agent);
    site.cluster.wait_state(&kept, "succeeded");
    let status = site.cluster.json(&["status", &kept]);
    assert_eq!(status["attempt"], 1, "{status}");
    assert!(site.log(&kept).contains("slept well"));
    site.assert_clean(&kept);

    let lost = sleeping(&site, 100_003, &[]);
    site.cluster.kill(&site.cluster.member("agent", "agent-1"));
    helix_tests::cluster::signal(runner_of(asleep(100_003)[0]), rustix::process::Signal::KILL);
    site.cluster.start_again(&agent);
    // What the runner left is dead and removed before the attempt is reported and tried again.
    wait_for("the second attempt", PATIENCE, || {
        (site.cluster.json(&["status", &lost])["attempt"].as_u64()? > 1).then_some(())
    });
    let containers = || site.containers(&agent).lines().count();
    assert_eq!(site.cluster.helix(&["cancel", &lost]).code, 0);
    assert_eq!(asleep(100_003), Vec::<i32>::new());
    assert_eq!(containers(), 0);
    site.assert_clean(&lost);
    site.end();
}
