//! Who gets what, with real agents: asks that add up, refusals with numbers, attempts that break and go elsewhere.

use helix_tests::cluster::{Cluster, PATIENCE, Shape, wait_for};
use helix_tests::skip::skip;

fn two_agents() -> Cluster {
    let settings = vec!["resources.memory_bytes=1073741824".to_owned()];
    Cluster::start(&Shape { coordinators: 1, agents: 2, settings, ..Shape::default() }).unwrap()
}

#[test]
fn memory_adds_up_and_what_nobody_has_is_refused_with_numbers() {
    let cluster = two_agents();
    let finish = cluster.root().join("finish");
    let line = format!("while [ ! -e {} ]; do sleep 0.02; done", finish.display());
    let asking = |id: &str| ["submit", "--no-output", "--memory", "768MiB", "--id", id, "--", &line].map(str::to_owned);
    for id in ["a", "b", "c"] {
        let arguments = asking(id);
        let said = cluster.helix(&arguments.each_ref().map(String::as_str));
        assert_eq!(said.code, 0, "{}", said.stderr);
    }
    cluster.wait_state("a", "running");
    cluster.wait_state("b", "running");
    let why = cluster.helix(&["explain", "c"]).stdout;
    assert!(why.contains("has 256 MiB of 1 GiB memory left, the build asks for 768 MiB"), "{why}");
    let refused = cluster.helix(&["submit", "--no-output", "--memory", "2GiB", "--", "true"]);
    assert!(refused.code == 1 && refused.stderr.contains("has 1 GiB memory, the build asks for 2 GiB"), "{refused:?}");
    let parked = cluster.helix(&["submit", "--no-output", "--memory", "2GiB", "--park", "--", "true"]);
    assert_eq!(parked.code, 0, "{parked:?}");
    std::fs::write(&finish, "").unwrap();
    assert_eq!(cluster.helix(&["wait", "c"]).code, 0);
}

#[test]
fn an_attempt_that_breaks_goes_elsewhere_and_its_log_says_so() {
    let cluster = two_agents();
    // The first attempt kills its own runner: a fault that is not the build's, as far as anybody can tell.
    let line = "test $HELIX_ATTEMPT = 2 || { kill -9 $PPID; sleep 1000; }; echo second";
    let id = cluster.submit(line);
    assert_eq!(cluster.helix(&["wait", &id]).code, 0);
    let status = cluster.json(&["status", &id]);
    let attempts = status["tasks"][0]["attempts"].as_array().unwrap();
    assert_eq!((attempts.len(), &attempts[0]["reason"]), (2, &serde_json::json!("internal")));
    assert_ne!(attempts[0]["worker"], attempts[1]["worker"]);
    let log = cluster.helix(&["logs", &id]).stdout;
    let first = log.lines().next().unwrap_or_default();
    assert!(first.contains("the attempt before ended on") && first.contains("as internal"), "{log}");
    // Where the death was proven the worker is free at once; else it is held, and says so.
    let worker = attempts[0]["worker"].as_str().unwrap();
    let shown = cluster.json(&["workers", "show", worker]);
    assert_eq!(shown["held"], serde_json::json!(attempts[0]["verified"] == serde_json::json!(false)), "{shown}");
}

#[test]
fn a_worker_that_breaks_builds_is_quarantined_until_somebody_says_otherwise() {
    let settings = vec!["resources.memory_bytes=1073741824".to_owned()];
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, settings, ..Shape::default() }).unwrap();
    for _ in 0..3 {
        cluster.submit("kill -9 $PPID; sleep 1000");
    }
    let standing = || cluster.json(&["workers", "show", "agent-1"]);
    let kept_away = || {
        let shown = standing();
        let held = shown["held"] == true;
        (held || !shown["quarantined_until"].is_null()).then_some(held)
    };
    if wait_for("a quarantine", PATIENCE, kept_away) {
        return skip(
            "a_worker_that_breaks_builds",
            "without cgroup v2 no death is proven, and the worker is held first",
        );
    }
    let id = cluster.submit("true");
    let why = cluster.helix(&["explain", &id]).stdout;
    assert!(why.contains("is quarantined after failures of its own, until"), "{why}");
    assert_eq!(cluster.helix(&["workers", "undrain", "agent-1"]).code, 0);
    assert!(standing()["quarantined_until"].is_null());
}
