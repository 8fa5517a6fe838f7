//! What is kept: logs of workers that are gone, copies of bytes that go bad, and what policy and pins say of the rest.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, wait_for};

fn set(cluster: &Cluster, values: &[&str]) {
    let said = cluster.helix(&[&["cluster", "policy", "set"], values].concat());
    assert_eq!(said.code, 0, "{}", said.stderr);
}

#[test]
fn the_log_of_a_lost_worker_is_sealed_and_outlives_whoever_had_it() {
    let cluster = Cluster::start(&Shape { agents: 1, capacity: 1, ..Shape::default() }).unwrap();
    set(&cluster, &["worker_lease_ms=2s", "seal_lost_after_ms=1s"]);
    let id = cluster.submit("echo first; echo second; sleep 1000");
    let log = |context: &std::path::Path| cluster.helix_with(context, &["logs", &id, "--attempt", "1"]).stdout;
    let context = cluster.context();
    wait_for("its lines", PATIENCE, || log(&context).contains("second").then_some(()));
    let live = |member: &Member| {
        let entries = std::fs::read_dir(member.data_dir.join("logs")).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(&id)).count()
    };
    let had = wait_for("the live log", PATIENCE, || cluster.all("coordinator").into_iter().find(|it| live(it) > 0));
    cluster.kill(&cluster.member("agent", "agent-1"));
    let words = "what followed line 2, if anything did, was lost with worker agent-1";
    wait_for("the log to be sealed", PATIENCE, || log(&context).contains(words).then_some(()));
    wait_for("the live log to be gone", PATIENCE, || (live(&had) == 0).then_some(()));
    // The loss of whoever had it is none of the log's.
    cluster.kill(&had);
    let other = cluster.all("coordinator").into_iter().find(|member| member.id != had.id).unwrap();
    let context = cluster.context_of(&other);
    let read = wait_for("the log from another", PATIENCE, || Some(log(&context)).filter(|log| log.contains(words)));
    let lines: Vec<_> = read.lines().collect();
    assert_eq!((lines.len(), lines[0].contains("first"), lines[1].contains("second")), (3, true, true), "{read}");
    assert_eq!(cluster.helix_with(&context, &["cancel", &id, "--no-wait"]).code, 0);
}

/// A blob's files on the coordinators that hold it.
fn files(cluster: &Cluster, sha256: &str) -> Vec<(Member, PathBuf)> {
    let place = |member: Member| {
        let path = member.data_dir.join("blobs").join("blobs").join(&sha256[..2]).join(sha256);
        (member, path)
    };
    cluster.all("coordinator").into_iter().map(place).filter(|(_, path)| path.exists()).collect()
}

fn flip(path: &std::path::Path) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 200_000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 200_000).unwrap();
}

#[test]
fn bytes_that_go_bad_are_replaced_and_those_nobody_has_are_told() {
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    set(&cluster, &["scrub_bytes=1GiB"]);
    let said = cluster.helix(&[
        "submit",
        "-o",
        "quiet",
        "--wait",
        "--output",
        "large",
        "--",
        "head -c 300000 /dev/urandom > large",
    ]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let id = said.stdout.trim();
    let sha256 = cluster.json(&["status", id])["artifacts"][0]["digest"].as_str().unwrap().to_owned();
    let held = files(&cluster, &sha256);
    assert_eq!(held.len(), 2);
    let (bad, path) = &held[0];
    let before = std::fs::read(path).unwrap();
    flip(path);
    // A pass begins with the process.
    cluster.kill(bad);
    cluster.start_again(bad);
    wait_for("the copy to be replaced", PATIENCE, || std::fs::read(path).is_ok_and(|now| now == before).then_some(()));
    assert!(bad.data_dir.join("blobs").join("damaged").join(&sha256).exists(), "it was set aside");
    for (member, path) in files(&cluster, &sha256) {
        flip(&path);
        cluster.kill(&member);
        cluster.start_again(&member);
    }
    let lost = |status: &serde_json::Value| {
        let blobs = &status["blobs"]["lost_sha256"];
        blobs.as_array().is_some_and(|some| some.iter().any(|one| one == sha256.as_str()))
    };
    let status = wait_for("the loss to be told", PATIENCE, || {
        Some(cluster.json(&["cluster", "status"])).filter(|status| lost(status))
    });
    assert!(status["warnings"].as_array().unwrap().iter().any(|warning| warning == "blobs_lost"), "{status}");
    let doctor = cluster.helix(&["doctor"]);
    assert!(doctor.code == 1 && doctor.stdout.contains(&sha256), "{}: {}", doctor.code, doctor.stdout);
    let out = cluster.root().join("got");
    let got = cluster.helix(&["artifacts", "get", id, "large", "-O", out.to_str().unwrap()]);
    assert!(got.code != 0 && !out.exists(), "wrong bytes are never served");
}

#[test]
fn policy_lets_go_of_logs_first_and_pins_keep_all() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let submit = |label: &str| {
        let said =
            cluster.helix(&["submit", "-o", "quiet", "--wait", "--no-output", "--label", label, "--", "echo hello"]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        said.stdout.trim().to_owned()
    };
    let (kept, pinned, gone) = (submit("kind=release"), submit("kind=nightly"), submit("kind=nightly"));
    assert_eq!(cluster.helix(&["pin", &pinned]).code, 0);
    set(&cluster, &["retain_logs_ms[kind=nightly]=0", "retain_artifacts_ms[succeeded,kind=nightly]=0"]);
    let logs = |id: &str| cluster.helix(&["logs", id]);
    wait_for("the log to go", PATIENCE, || (logs(&gone).code == 1).then_some(()));
    assert!(logs(&gone).stderr.contains("expired"), "{}", logs(&gone).stderr);
    wait_for("the artifacts to go", PATIENCE, || {
        cluster.helix(&["artifacts", "ls", &gone]).stderr.contains("expired").then_some(())
    });
    assert_eq!(cluster.state(&gone), "succeeded");
    for id in [&kept, &pinned] {
        assert!(logs(id).code == 0 && logs(id).stdout.contains("hello"), "{id}");
    }
    assert!(cluster.helix(&["list"]).stdout.contains("succeeded (pinned)"));
    assert_eq!(cluster.json(&["status", &pinned])["pinned"], true);
    let get = cluster.helix(&["cluster", "policy", "get", "-o", "quiet"]).stdout;
    assert!(get.contains("retain_logs_ms[kind=nightly]=0\n"), "{get}");
    set(&cluster, &["retain_logs_ms[kind=nightly]=default"]);
    assert!(!cluster.helix(&["cluster", "policy", "get"]).stdout.contains("retain_logs_ms[kind=nightly]"));
    let purged = cluster.json(&["purge", "--before", "0s"]);
    assert_eq!((&purged["purged"], &purged["pinned"]), (&2.into(), &1.into()), "{purged}");
    assert_eq!(cluster.helix(&["unpin", &pinned]).code, 0);
    assert_eq!(cluster.json(&["purge", "--before", "0s"])["purged"], 1);
}
