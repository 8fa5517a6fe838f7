//! Coordinators that die, hang, lose their disks or come back empty, while builds are submitted and run.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helix_common::ports;
use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, signal, wait_for};
use helix_tests::skip::skip;
use rustix::process::Signal;
use serde_json::Value;

/// A build that leaves a mark, so that running twice shows.
fn marking(marks: &Path) -> String {
    format!("echo \"$HELIX_BUILD_ID $HELIX_ATTEMPT\" >> {}", marks.display())
}

/// Submits a batch of builds without outputs; gives their ids.
fn batch(cluster: &Cluster, count: usize, line: &str) -> Vec<String> {
    let spec = serde_json::json!({ "command": line, "no_output": true }).to_string();
    let mut command = cluster.command(&["submit", "--batch", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for _ in 0..count {
        writeln!(stdin, "{spec}").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let ids: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), count);
    ids
}

/// Every build by id, finished ones too.
fn all_states(cluster: &Cluster) -> std::collections::BTreeMap<String, String> {
    let said = cluster.helix(&["list", "--all", "--limit", "1000000", "-o", "jsonl"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let state = |line: &str| {
        let status: Value = serde_json::from_str(line).unwrap();
        (status["build_id"].as_str().unwrap().to_owned(), status["state"].as_str().unwrap().to_owned())
    };
    said.stdout.lines().map(state).collect()
}

fn wait_all_succeeded(cluster: &Cluster, ids: &[String]) {
    wait_for("every build to succeed", Duration::from_secs(300), || {
        let states = all_states(cluster);
        let of = |id: &String| states.get(id).map(String::as_str);
        let bad: Vec<_> = ids.iter().filter(|id| matches!(of(id), None | Some("failed" | "cancelled"))).collect();
        assert!(bad.is_empty(), "lost or failed: {bad:?}");
        ids.iter().all(|id| of(id) == Some("succeeded")).then_some(())
    });
}

#[test]
fn a_thousand_builds_run_once_each_while_the_leader_dies_twice() {
    let cluster = Cluster::start(&Shape { capacity: 8, ..Shape::default() }).unwrap();
    let marks = cluster.root().join("marks");
    let ids = batch(&cluster, 1000, &marking(&marks));
    for share in [200, 500] {
        let marked = || fs::read_to_string(&marks).map_or(0, |text| text.lines().count());
        wait_for("builds to run", PATIENCE, || (marked() >= share).then_some(()));
        let leader = cluster.leader();
        cluster.kill(&leader);
        let next = cluster.leader();
        assert_ne!(next.id, leader.id);
        cluster.start_again(&leader);
    }
    wait_all_succeeded(&cluster, &ids);
    let text = fs::read_to_string(&marks).unwrap();
    let mut ran: Vec<&str> = text.lines().collect();
    ran.sort_unstable();
    let distinct: BTreeSet<&str> = ran.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!((ran.len(), distinct.len()), (1000, 1000), "each build ran exactly once");
}

/// Submits one after another until told to stop; gives what was acknowledged.
fn submit_until(cluster: &Cluster, stop: &AtomicBool) -> Vec<String> {
    let mut acknowledged = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let said = cluster.helix(&["submit", "-o", "quiet", "--connect-timeout", "2s", "--no-output", "--", "true"]);
        if said.code == 0 {
            acknowledged.push(said.stdout.trim().to_owned());
        }
    }
    acknowledged
}

/// Kills all coordinators at once under load, does something to their data, starts them again.
fn massacre(mend: impl Fn(&[Member])) {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    let stop = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(|| submit_until(&cluster, &stop))).collect();
        wait_for("some builds", PATIENCE, || (all_states(&cluster).len() >= 20).then_some(()));
        let members = cluster.all("coordinator");
        members.iter().for_each(|member| signal(member.pid.unwrap(), Signal::KILL));
        members.iter().for_each(|member| cluster.kill(member));
        stop.store(true, Ordering::Relaxed);
        let acknowledged: Vec<String> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        mend(&members);
        members.iter().for_each(|member| cluster.start_again(member));
        acknowledged
    });
    assert!(acknowledged.len() >= 10, "too little load to prove anything: {}", acknowledged.len());
    cluster.leader();
    wait_all_succeeded(&cluster, &acknowledged);
}

#[test]
fn every_acknowledged_build_survives_the_death_of_all_coordinators() {
    massacre(|_| {});
}

#[test]
fn a_registry_that_was_deleted_everywhere_is_rebuilt() {
    massacre(|members| {
        for member in members {
            let registry = member.data_dir.join("registry");
            assert!(registry.is_dir(), "the registry is where operators are told it is");
            fs::remove_dir_all(registry).unwrap();
        }
    });
}

#[test]
fn a_wiped_node_is_refused_under_its_old_id() {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() }).unwrap();
    let leader = cluster.leader();
    let victim = cluster.all("coordinator").into_iter().find(|member| member.id != leader.id).unwrap();
    let members: Vec<String> = cluster_peers(&cluster);
    cluster.kill(&victim);
    fs::remove_dir_all(&victim.data_dir).unwrap();

    cluster.start_again(&victim);
    let (status, log) = cluster.outcome(&victim);
    assert!(!status.success() && log.contains("init") && log.contains("cluster add"), "{log}");

    let init = Command::new(&victim.argv[0])
        .args(["init", "--cluster", "dev", "--id", &victim.id, "--members", &members.join(","), "--data-dir"])
        .arg(&victim.data_dir)
        .output()
        .unwrap();
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
    cluster.start_again(&victim);
    let (status, log) = cluster.outcome(&victim);
    assert!(!status.success() && log.contains("epoch"), "{log}");
    assert_eq!(cluster.helix(&["list"]).code, 0, "the others go on");
}

#[test]
fn a_copied_node_ends_and_says_why_beside_the_original() {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() }).unwrap();
    let leader = cluster.leader();
    let original = cluster.all("coordinator").into_iter().find(|member| member.id != leader.id).unwrap();
    cluster.kill(&original);
    let data_dir = cluster.root().join("copied");
    let copied = Command::new("cp").arg("-a").arg(&original.data_dir).arg(&data_dir).status().unwrap();
    assert!(copied.success());
    cluster.start_again(&original);

    let port = ports::free(3).unwrap();
    let mut copy = Member { id: format!("{}-copy", original.id), ..original.clone() };
    copy.argv.extend(["--data-dir".to_owned(), data_dir.display().to_string()]);
    for (flag, port) in ["--listen-grpc", "--listen-peer", "--listen-http"].into_iter().zip(port..) {
        copy.argv.extend([flag.to_owned(), format!("127.0.0.1:{port}")]);
    }
    cluster.start_again(&copy);
    let (status, log) = cluster.outcome(&copy);
    assert!(!status.success() && log.contains("this data directory is a copy of one in use"), "{log}");

    // With another voter gone the original's vote is needed.
    let other = cluster.all("coordinator").into_iter().find(|it| it.id != leader.id && it.id != original.id).unwrap();
    cluster.kill(&other);
    let said = cluster.helix(&["submit", "--no-output", "--park", "--", "true"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let log = fs::read_to_string(cluster.root().join("logs").join(format!("coordinator-{}-again.log", original.id)));
    assert!(log.is_ok_and(|log| !log.contains("cannot go on")), "the original goes on");
}

fn cluster_peers(cluster: &Cluster) -> Vec<String> {
    let text = fs::read_to_string(cluster.root().join("cluster.json")).unwrap();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap();
    let coordinators = all.iter().filter(|member| member["role"] == "coordinator");
    coordinators
        .map(|member| format!("{}={}", member["id"].as_str().unwrap(), member["peer"].as_str().unwrap()))
        .collect()
}

/// Whether any file below holds these bytes, or any name has this text.
pub(crate) fn holds(directory: &Path, name: &str, bytes: &[u8]) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return holds(&path, name, bytes);
        }
        path.to_string_lossy().contains(name)
            || fs::read(&path).is_ok_and(|all| all.windows(bytes.len()).any(|window| window == bytes))
    })
}

#[test]
fn log_and_artifact_outlive_the_coordinator_that_took_them() {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    let marker = "a-line-that-nobody-else-says-4711";
    let said = cluster.helix(&[
        "submit",
        "--wait",
        "-o",
        "json",
        "--",
        &format!("echo {marker}; echo {marker} > \"$HELIX_OUTPUT\""),
    ]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let status: Value = serde_json::from_str(&said.stdout).unwrap();
    let digest = status["artifacts"][0]["digest"].as_str().unwrap().to_owned();
    let holders: Vec<Member> = cluster
        .all("coordinator")
        .into_iter()
        .filter(|member| holds(&member.data_dir.join("blobs"), &digest, marker.as_bytes()))
        .collect();
    assert!(holders.len() >= 2, "a success means two copies, found {}", holders.len());
    cluster.kill(&holders[0]);
    fs::remove_dir_all(&holders[0].data_dir).unwrap();
    let log = cluster.helix(&["logs", "last"]);
    assert!(log.code == 0 && log.stdout.contains(marker), "{} {}", log.stdout, log.stderr);
    let target = cluster.root().join("fetched");
    let got = cluster.helix(&["artifacts", "get", "last", "-O", target.to_str().unwrap()]);
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert_eq!(fs::read_to_string(target).unwrap().trim(), marker);
}

/// What one coordinator without the others cannot answer is no answer: a batch goes on when they are back, and whoever follows a
/// log here is told to look elsewhere.
#[test]
fn a_coordinator_that_is_left_alone_neither_refuses_a_batch_nor_keeps_a_follower() {
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    let build = cluster.submit("echo said; sleep 600");
    cluster.wait_state(&build, "running");
    let mut coordinators = cluster.all("coordinator");
    let alone = coordinators.remove(0);
    let context = cluster.context_of(&alone);
    let lines = |child: &mut Child| BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let start = |arguments: &[&str]| {
        let mut command = cluster.command_with(&context, arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut follower = start(&["logs", "-f", &build, "--connect-timeout", "3s"]);
    assert_eq!(lines(&mut follower).next().unwrap(), "said");
    let mut batch = start(&["submit", "--batch", "-", "--connect-timeout", "90s"]);
    let (mut specs, mut ids) = (batch.stdin.take().unwrap(), lines(&mut batch));
    writeln!(specs, r#"{{"id":"n0","command":"true","no_output":true}}"#).unwrap();
    assert_eq!(ids.next().unwrap(), "n0");

    for other in &coordinators {
        signal(other.pid.unwrap(), Signal::STOP);
    }
    for number in 1..=5 {
        writeln!(specs, r#"{{"id":"n{number}","command":"true","no_output":true}}"#).unwrap();
    }
    let ended = wait_for("the follower to look elsewhere", PATIENCE, || follower.try_wait().unwrap());
    assert_eq!(ended.code(), Some(125));
    // Meanwhile the lines were refused, too.
    assert_eq!(cluster.helix_with(&context, &["status", "n0", "--connect-timeout", "9s"]).code, 125);
    for other in &coordinators {
        signal(other.pid.unwrap(), Signal::CONT);
    }
    drop(specs);
    assert_eq!(ids.collect::<Vec<_>>(), ["n1", "n2", "n3", "n4", "n5"]);
    assert!(batch.wait().unwrap().success());
    assert_eq!(cluster.helix(&["cancel", &build]).code, 0);
}

#[test]
fn a_stopped_leader_never_serves_what_is_old() {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() }).unwrap();
    for round in 0..3 {
        let old = cluster.leader();
        let others: Vec<_> = cluster.all("coordinator").into_iter().filter(|member| member.id != old.id).collect();
        let before = cluster.submit("true");
        signal(old.pid.unwrap(), Signal::STOP);
        let context = cluster.context_of(&others[0]);
        let written = wait_for("a write through another coordinator", PATIENCE, || {
            let said = cluster.helix_with(&context, &["submit", "-o", "quiet", "--no-output", "--", "true"]);
            (said.code == 0).then(|| said.stdout.trim().to_owned())
        });
        assert_eq!(cluster.helix_with(&context, &["cancel", &before]).code, 0);
        for member in &others {
            let said = cluster.helix_with(&cluster.context_of(member), &["status", &written, "-o", "json"]);
            assert_eq!(said.code, 0, "round {round}: {}", said.stderr);
        }
        // Asked in the very moment it wakes up, the old leader must not answer from the past.
        let context = cluster.context_of(&old);
        let asked: Vec<_> = (0..4)
            .map(|number| {
                let id = if number % 2 == 0 { &written } else { &before };
                let mut command = cluster.command_with(&context, &["status", id, "-o", "json"]);
                (number, command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
            })
            .collect();
        signal(old.pid.unwrap(), Signal::CONT);
        for (number, child) in asked {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_ne!(output.status.code(), Some(123), "round {round}: an acknowledged build is unknown: {error}");
            if output.status.success() && number % 2 == 1 {
                assert!(text.contains("\"cancelled\""), "round {round}: an acknowledged cancel is unseen: {text}");
            }
        }
    }
}

/// Counts a process's syncs while something happens.
struct Tracer {
    child: std::process::Child,
    log: std::path::PathBuf,
}

impl Tracer {
    fn attach(cluster: &Cluster, member: &Member) -> Self {
        let log = cluster.root().join(format!("syncs-{}", member.id));
        let pid = member.pid.unwrap().to_string();
        let child = Command::new("strace")
            .args(["-f", "-qq", "-e", "trace=fdatasync,fsync", "-p", &pid, "-o"])
            .arg(&log)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the tracer to be attached", PATIENCE, || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
            let traced = |task: fs::DirEntry| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            };
            tasks.flatten().all(traced).then_some(())
        });
        Self { child, log }
    }

    fn count(mut self) -> usize {
        signal(i32::try_from(self.child.id()).unwrap(), Signal::INT);
        self.child.wait().unwrap();
        fs::read_to_string(&self.log).unwrap().lines().filter(|line| line.contains("sync(")).count()
    }
}

#[test]
fn a_hundred_serial_submits_are_a_hundred_syncs_on_a_majority() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("a_hundred_serial_submits_are_a_hundred_syncs_on_a_majority", "strace is not installed");
    }
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() }).unwrap();
    let leader = cluster.leader();
    let (mut leaders, mut followers) = (Vec::new(), Vec::new());
    for member in cluster.all("coordinator") {
        let tracer = Tracer::attach(&cluster, &member);
        if member.id == leader.id { leaders.push(tracer) } else { followers.push(tracer) }
    }
    let mut command = cluster.command(&["submit", "--batch", "-"]);
    for _ in 0..100 {
        // Each waits for the answer to the one before: nothing to share a sync with.
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"{\"command\":\"true\",\"no_output\":true}\n").unwrap();
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(cluster.leader().id, leader.id, "a change of leader makes the count void");
    let leader_syncs: usize = leaders.into_iter().map(Tracer::count).sum();
    let follower_syncs = followers.into_iter().map(Tracer::count).max().unwrap();
    assert!(leader_syncs >= 100 && follower_syncs >= 100, "leader {leader_syncs}, follower {follower_syncs}");
}
