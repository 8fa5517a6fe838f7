//! The policy of a cluster, from the command line of its operator.

use helix_tests::cluster::{Cluster, Shape};

#[test]
fn policy_is_shown_changed_and_seen_through_every_coordinator() {
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    let shown = cluster.helix(&["cluster", "policy", "get"]);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    for words in ["worker_lease_ms", "15s", "log_bytes_max", "4 GiB", "quarantine_after"] {
        assert!(shown.stdout.contains(words), "{words}: {}", shown.stdout);
    }
    let set = ["cluster", "policy", "set", "log_bytes_max=8MiB", "quarantine_ms=90s", "infra_retries=1"];
    let said = cluster.helix(&set);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(said.stdout.contains("log_bytes_max: 8 MiB, before 4 GiB"), "{}", said.stdout);
    for member in cluster.all("coordinator") {
        let context = cluster.context_of(&member);
        let get = |keys: &[&str]| {
            cluster.helix_with(&context, &[&["cluster", "policy", "get", "-o", "quiet"], keys].concat())
        };
        assert_eq!(get(&["log_bytes_max", "infra_retries"]).stdout, "log_bytes_max=8388608\ninfra_retries=1\n");
        assert!(get(&["nonsense"]).stderr.contains("nonsense"));
    }
    let policy = cluster.json(&["cluster", "policy", "get"]);
    assert_eq!((policy["quarantine_ms"].as_u64(), policy["copies"].as_u64()), (Some(90_000), Some(0)));

    for (arguments, code, words) in [
        (&["infra_retries=2", "queue_max=0"][..], 1, "invalid_field: queue_max is 0: from 1 to"),
        (&["infra_retries=2", "queue_maximum=3"], 1, "the nearest is queue_max"),
        (&["infra_retries=2", "quarantine_ms=soon"], 2, "quarantine_ms"),
        (&["infra_retries=2", "--expect", "infra_retries=7"], 1, "policy_changed: infra_retries is 1"),
        (&["infra_retries"], 2, "KEY=VALUE"),
    ] {
        let said = cluster.helix(&[&["cluster", "policy", "set"], arguments].concat());
        assert!(said.code == code && said.stderr.contains(words), "{arguments:?}: {} {}", said.code, said.stderr);
    }
    assert_eq!(cluster.json(&["cluster", "policy", "get"]), policy, "a refusal changed something");
    let said = cluster.json(&["cluster", "policy", "set", "infra_retries=2", "--expect", "infra_retries=1"]);
    assert_eq!(
        (&said["set"]["infra_retries"]["before"], &said["set"]["infra_retries"]["after"]),
        (&1.into(), &2.into())
    );
    // What is in force outlives the leader.
    cluster.kill(&cluster.leader());
    assert_eq!(cluster.json(&["cluster", "policy", "get"])["log_bytes_max"], 8 << 20);
}
