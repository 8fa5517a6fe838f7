//! Several platforms are one build.

use serde_json::Value;

use crate::site::{Registry, Site, missing};

/// Restarts an agent so that it builds for another platform than its own.
pub(crate) fn turn(site: &Site, agent: &str, platform: &str) {
    let member = site.cluster.member("agent", agent);
    site.cluster.kill(&member);
    let mut again = member.clone();
    again.argv.extend(["--set".to_owned(), format!("platforms={platform}")]);
    site.cluster.start_again(&again);
    helix_tests::cluster::wait_for("the other platform", helix_tests::cluster::PATIENCE, || {
        let worker = site.cluster.json(&["workers", "show", agent]);
        (worker["platforms"] == Value::from(vec![platform])).then_some(())
    });
    site.wait_offer(agent, true);
}

/// Each platform is built where it is offered, and together they are one build with one digest.
#[test]
fn two_platforms_are_one_build() {
    if missing("two_platforms_are_one_build") {
        return;
    }
    let site = Site::start(2, &[]);
    turn(&site, "agent-2", "linux/arm64");
    let registry = Registry::start(site.dir.path());
    // Nothing is run, so nothing has to be emulated.
    let source = site.source("source", &[("Dockerfile", "FROM scratch\nCOPY busybox /bin/busybox\n")]);
    let source = source.to_str().unwrap();
    let platforms = ["--source", source, "--platform", "linux/amd64", "--platform", "linux/arm64"];
    let reference = format!("{}/team/app:1", registry.address);
    for push in [None, Some(&reference)] {
        let mut arguments = platforms.to_vec();
        if let Some(reference) = push {
            arguments.extend(["--push", reference.as_str()]);
        }
        let (code, status) = site.build(&arguments);
        let id = status["build_id"].as_str().unwrap();
        assert_eq!(code, 0, "{status} {}", site.log(id));
        let tasks = status["tasks"].as_array().unwrap();
        assert_eq!(tasks.len(), 2);
        let manifest: Value = serde_json::from_str(status["manifest"].as_str().unwrap()).unwrap();
        for (task, platform, worker) in [(&tasks[0], "linux/amd64", "agent-1"), (&tasks[1], "linux/arm64", "agent-2")] {
            assert_eq!(
                (task["platform"].as_str(), task["worker"].as_str()),
                (Some(platform), Some(worker)),
                "{status}"
            );
            let digest = task["digest"].as_str().unwrap();
            assert_eq!(manifest[platform], format!("sha256:{digest}"), "{status}");
            if push.is_some() {
                let tag = format!("1-{}", platform.replace('/', "-"));
                assert_eq!(registry.manifest("team/app", &tag).unwrap().0, digest);
            }
        }
        let bytes = status["manifest"].as_str().unwrap().as_bytes();
        let sum: String = <sha2::Sha256 as sha2::Digest>::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        let index = push.map(|_| registry.manifest("team/app", "1").unwrap().0);
        assert_eq!(status["digest"], index.unwrap_or(sum));
        site.assert_clean(id);
    }
    site.end();
}
