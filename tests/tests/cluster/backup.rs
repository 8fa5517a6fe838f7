//! Backups under load become new clusters; the one node that is left becomes one; and nothing that is not whole becomes anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helix_tests::cluster::{Cluster, Member, PATIENCE, Said, Shape, programs, wait_for};
use helix_tests::joining::{Prepared, prepare, start};

use crate::members::{check_builds, context, expect_done, join, members};

/// Runs `helix-coordinator`.
fn coordinator(arguments: &[&str]) -> Said {
    let output = Command::new(programs().join("helix-coordinator")).args(arguments).output().unwrap();
    Said {
        code: output.status.code().unwrap_or(255),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn expect_code(said: &Said, code: &str) {
    let expected = format!("helix-coordinator: {code}: ");
    assert!(said.code != 0 && said.stderr.contains(&expected), "{code}: {} {} {}", said.code, said.stdout, said.stderr);
}

/// Submits that go on until they are told to stop, and what of them was acknowledged by now.
struct Load<'a> {
    cluster: &'a Cluster,
    stop: AtomicBool,
    acknowledged: Mutex<Vec<String>>,
}

impl<'a> Load<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        Self { cluster, stop: AtomicBool::new(false), acknowledged: Mutex::default() }
    }

    fn client(&self, context: &Path, name: &str) {
        for number in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
            let id = format!("{name}-{number}");
            let line = "echo \"$HELIX_BUILD_ID\" > \"$HELIX_OUTPUT\"; echo \"says $HELIX_BUILD_ID\"";
            let arguments = ["submit", "-o", "quiet", "--connect-timeout", "5s", "--id", &id, "--", line];
            if self.cluster.helix_with(context, &arguments).code == 0 {
                self.acknowledged.lock().unwrap().push(id);
            }
        }
    }

    fn so_far(&self) -> Vec<String> {
        self.acknowledged.lock().unwrap().clone()
    }

    fn wait_for(&self, more: usize) {
        let before = self.so_far().len();
        wait_for("more submits", PATIENCE, || (self.so_far().len() >= before + more).then_some(()));
    }

    /// Does something while two clients submit.
    fn during<R>(&self, context: &Path, name: &str, work: impl FnOnce() -> R) -> R {
        self.stop.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            for client in ["a", "b"] {
                scope.spawn(move || self.client(context, &format!("{name}-{client}")));
            }
            // A test that fails in here must not wait for clients that go on for ever.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            self.stop.store(true, Ordering::Relaxed);
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Starts an agent again, on other coordinators.
fn move_agent(cluster: &Cluster, agent: &Member, to: &[&Member]) {
    let mut moved = agent.clone();
    for endpoint in to.iter().filter_map(|member| member.grpc.clone()) {
        moved.argv.extend(["--coordinator".to_owned(), endpoint]);
    }
    cluster.start_again(&moved);
}

fn restore(file: &Path, name: &str, made: &Prepared, members: &str, more: &[&str]) -> Said {
    let (file, data_dir) = (file.to_str().unwrap(), made.member.data_dir.to_str().unwrap());
    let fixed = ["restore", "--snapshot", file, "--cluster", name, "--id", &made.member.id, "--members", members];
    coordinator(&[&fixed, &["--data-dir", data_dir][..], more].concat())
}

fn cluster_name(cluster: &Cluster) -> String {
    let text = fs::read_to_string(cluster.context()).unwrap();
    let line = text.lines().find(|line| line.starts_with("cluster")).unwrap();
    line.split(['"', '\'']).nth(1).unwrap().to_owned()
}

#[test]
fn a_backup_under_load_becomes_a_new_cluster_with_all_that_was_acknowledged() {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    let root = cluster.root().to_owned();
    let name = cluster_name(&cluster);
    let go = root.join("go");
    let line =
        format!("echo begun; while [ ! -e {} ]; do sleep 0.05; done; echo long > \"$HELIX_OUTPUT\"", go.display());
    expect_done(&cluster.helix(&["submit", "--id", "long", "--", &line]));
    cluster.wait_state("long", "running");
    let (file, blobs) = (root.join("backup"), root.join("blobs"));
    let save =
        ["cluster", "snapshot", "save", file.to_str().unwrap(), "--blobs", blobs.to_str().unwrap(), "-o", "json"];
    let load = Load::new(&cluster);
    let everywhere = cluster.context();
    let (before, saved) = load.during(&everywhere, "old", || {
        load.wait_for(20);
        // So that some have ended, with logs and artifacts.
        let first = load.so_far()[0].clone();
        expect_done(&cluster.helix(&["wait", &first]));
        let before = load.so_far();
        let said = cluster.helix(&save);
        expect_done(&said);
        load.wait_for(4);
        (before, serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap())
    });
    assert!(before.len() >= 20 && load.so_far().len() > before.len(), "too little load to prove anything");
    assert!(saved["blobs"].as_u64().unwrap() >= 2 && saved["blobs"] == saved["fetched"], "{saved}");
    refusals(&cluster, &file, &name);
    // What cannot be written here is not missing there.
    let blocked = root.join("blocked");
    fs::create_dir(&blocked).unwrap();
    (0..=255).for_each(|first| fs::write(blocked.join(format!("{first:02x}")), "").unwrap());
    let other = root.join("other");
    let said = ["cluster", "snapshot", "save", other.to_str().unwrap(), "--blobs", blocked.to_str().unwrap()];
    let said = cluster.helix(&said);
    assert!(said.code != 0 && said.stderr.contains("cannot write blobs into"), "{}", said.stderr);

    // All of the old cluster's nodes are gone; its agents are still there.
    let agents = cluster.all("agent");
    cluster.all("coordinator").iter().for_each(|member| cluster.kill(member));
    agents.iter().for_each(|agent| cluster.kill(agent));
    let made: Vec<Prepared> = (4..=6).map(|id| prepare(&cluster, id, &root.join("pki")).unwrap()).collect();
    let list: Vec<String> = made.iter().map(|it| format!("{}={}", it.member.id, it.peer)).collect();
    let list = list.join(",");
    for it in &made {
        let said = restore(&file, &name, it, &list, &["--blobs", blobs.to_str().unwrap()]);
        expect_done(&said);
        assert!(!said.stdout.contains("missing"), "{}", said.stdout);
    }
    let nodes: Vec<Member> = made.iter().map(|it| start(&cluster, it).member).collect();
    let nodes: Vec<&Member> = nodes.iter().collect();
    let all = context(&cluster, "restored", &nodes);
    agents.iter().for_each(|agent| move_agent(&cluster, agent, &nodes));
    assert_eq!(members(&cluster, &all), (vec![4, 5, 6], vec![]));
    for id in &before {
        let said = cluster.helix_with(&all, &["status", id]);
        assert_eq!(said.code, 0, "{id} was acknowledged before the backup: {}", said.stderr);
    }
    // The one that ran all the while is still the same attempt.
    fs::write(&go, "").unwrap();
    check_builds(&cluster, &all, &before);
    expect_done(&cluster.helix_with(&all, &["wait", "long", "--connect-timeout", "60s"]));
    let status = cluster.helix_with(&all, &["status", "long", "-o", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["attempt"], 1, "{status}");
    let after = load.so_far().len();
    load.during(&all, "new", || load.wait_for(6));
    check_builds(&cluster, &all, &load.so_far()[after..]);
    // A backup of what was restored is one again.
    let again = root.join("again");
    expect_done(&cluster.helix_with(&all, &["cluster", "snapshot", "save", again.to_str().unwrap()]));
}

/// Nothing but a whole backup of this cluster makes a node, and what is refused leaves nothing.
fn refusals(cluster: &Cluster, file: &Path, name: &str) {
    let root = cluster.root();
    let made = prepare(cluster, 9, &root.join("pki")).unwrap();
    let members = format!("9={}", made.peer);
    let whole = fs::read(file).unwrap();
    let bad = root.join("bad");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let mut newer = whole.clone();
    newer[11] += 1;
    let cases: [(&[u8], &str); 6] = [
        (&whole[..whole.len() - 1], "snapshot_invalid"),
        (&whole[..whole.len() / 2], "snapshot_invalid"),
        (&flipped, "snapshot_invalid"),
        (&newer, "version_skew"),
        (b"#!/bin/sh\n", "snapshot_invalid"),
        (b"", "snapshot_invalid"),
    ];
    for (bytes, code) in cases {
        fs::write(&bad, bytes).unwrap();
        expect_code(&restore(&bad, name, &made, &members, &[]), code);
        assert!(!made.member.data_dir.exists(), "{code} left something");
    }
    expect_code(&restore(file, "another", &made, &members, &[]), "wrong_cluster");
    let old = Prepared { member: Member { id: "2".to_owned(), ..made.member.clone() }, ..made.clone() };
    expect_code(&restore(file, name, &old, &format!("2={}", made.peer), &[]), "node_id_used");
    assert!(!made.member.data_dir.exists());
    let taken = cluster.member("coordinator", "1");
    let taken = Prepared { member: Member { data_dir: taken.data_dir, ..made.member.clone() }, ..made.clone() };
    let said = restore(file, name, &taken, &members, &[]);
    assert!(said.code != 0 && said.stderr.contains("in use by another process"), "{}", said.stderr);
    let letter = root.join("taken");
    fs::create_dir(&letter).unwrap();
    fs::write(letter.join("letter"), "x").unwrap();
    let taken = Prepared { member: Member { data_dir: letter.clone(), ..made.member.clone() }, ..made.clone() };
    let said = restore(file, name, &taken, &members, &[]);
    assert!(said.code != 0 && said.stderr.contains("is not empty"), "{}", said.stderr);
    assert_eq!(fs::read_to_string(letter.join("letter")).unwrap(), "x");
    // Through the face that operators know; without its blobs it says what it lacks.
    let data_dir = made.member.data_dir.to_str().unwrap();
    let fixed = ["cluster", "snapshot", "restore", file.to_str().unwrap(), "--cluster", "drill", "--rename"];
    let rest = ["--id", "9", "--members", &members, "--data-dir", data_dir];
    let said = cluster.helix(&[&fixed[..], &rest].concat());
    expect_done(&said);
    assert!(said.stdout.contains("are missing") && said.stdout.contains("cluster drill"), "{}", said.stdout);
    let list = fs::read_to_string(made.member.data_dir.join("missing-blobs.txt")).unwrap();
    assert!(list.lines().count() >= 2 && list.lines().all(|line| line.split(' ').count() == 2), "{list}");
    fs::remove_dir_all(&made.member.data_dir).unwrap();
}

fn recover(node: &Member, more: &[&str]) -> Said {
    coordinator(&[&["recover", "--data-dir", node.data_dir.to_str().unwrap()], more].concat())
}

#[test]
fn the_one_node_that_is_left_of_three_goes_on_with_all_that_it_has() {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    let root = cluster.root().to_owned();
    let go = root.join("go");
    let line = format!("while [ ! -e {} ]; do sleep 0.05; done; echo long > \"$HELIX_OUTPUT\"", go.display());
    expect_done(&cluster.helix(&["submit", "--id", "long", "--", &line]));
    cluster.wait_state("long", "running");
    let load = Load::new(&cluster);
    let nodes = cluster.all("coordinator");
    let (left, lost) = nodes.split_last().unwrap();
    load.during(&cluster.context(), "old", || {
        load.wait_for(20);
        // In mid-load, and for good. What is acknowledged while all three are there, the third may lack for a moment.
        lost.iter().for_each(|node| cluster.kill(node));
        load.wait_for(0);
    });
    let acknowledged = load.so_far();
    assert!(acknowledged.len() >= 20, "too little load to prove anything");
    let running = recover(left, &["--lost", "1,2"]);
    assert!(running.code != 0 && running.stderr.contains("in use by another process"), "{}", running.stderr);
    cluster.kill(left);

    let asked = recover(left, &[]);
    expect_code(&asked, "quorum_may_live");
    assert!(asked.stderr.contains("log ends at entry") && asked.stderr.contains("--lost 1,2"), "{}", asked.stderr);
    expect_code(&recover(left, &["--lost", "1"]), "quorum_may_live");
    // One of them is not lost after all; the node is as it was.
    cluster.start_again(&lost[0]);
    let peer = peer_of(&lost[0]);
    wait_for("the node to listen", PATIENCE, || std::net::TcpStream::connect(&peer).ok());
    let alive = recover(left, &["--lost", "1,2"]);
    expect_code(&alive, "quorum_may_live");
    assert!(alive.stderr.contains("something answers where node 1 was"), "{}", alive.stderr);
    cluster.kill(&cluster.member("coordinator", &lost[0].id));
    let ids: Vec<PathBuf> = lost.iter().map(|node| root.join(format!("lost-{}", node.id))).collect();
    lost.iter().zip(&ids).for_each(|(node, aside)| fs::rename(&node.data_dir, aside).unwrap());

    let said = recover(left, &["--lost", "1,2"]);
    expect_done(&said);
    assert!(said.stdout.contains("kept: everything up to entry"), "{}", said.stdout);
    assert!(said.stdout.contains("Nodes 1, 2 are retired for ever"), "{}", said.stdout);
    cluster.start_again(left);
    let alone = context(&cluster, "alone", &[left]);
    assert_eq!(members(&cluster, &alone), (vec![3], vec![]));
    // Acknowledged means on a majority, which may have been the other two: the survivor says up to where it has everything.
    let (there, gone): (Vec<String>, Vec<String>) =
        acknowledged.iter().cloned().partition(|id| cluster.helix_with(&alone, &["status", id]).code == 0);
    assert!(gone.len() <= 4, "more than what was under way is gone: {gone:?}");
    assert!(gone.iter().all(|id| acknowledged[acknowledged.len() - 8..].contains(id)), "not the last: {gone:?}");

    // One of the lost comes back from somewhere: it is told, and does nothing.
    fs::rename(&ids[0], &lost[0].data_dir).unwrap();
    fs::rename(&ids[1], &lost[1].data_dir).unwrap();
    cluster.start_again(&lost[0]);
    let (ended, log) = cluster.outcome(&lost[0]);
    assert!(!ended.success() && log.contains("was removed from cluster"), "{log}");
    assert_eq!(members(&cluster, &alone), (vec![3], vec![]), "and the survivor serves on");

    let (fourth, fifth) = (join(&cluster, 4), join(&cluster, 5));
    for it in [&fourth, &fifth] {
        expect_done(&cluster.helix_with(&alone, &["cluster", "add", &it.member.id, &it.peer]));
    }
    let all = context(&cluster, "grown", &[left, &fourth.member, &fifth.member]);
    assert_eq!(members(&cluster, &all), (vec![3, 4, 5], vec![]));
    fs::write(&go, "").unwrap();
    assert!(there.len() >= 16, "{there:?}");
    // Two copies were on any two of three: what the lost ones alone held is listed, and nothing else is missing.
    let list = fs::read_to_string(left.data_dir.join("missing-blobs.txt")).unwrap_or_default();
    let lacks = |id: &String| list.lines().any(|line| line.split(' ').nth(1) == Some(id));
    let (without, whole): (Vec<String>, Vec<String>) = there.iter().cloned().partition(lacks);
    assert!(whole.len() >= 4, "too few to prove anything: {whole:?}");
    check_builds(&cluster, &all, &whole);
    for id in &without {
        expect_done(&cluster.helix_with(&all, &["wait", id, "--connect-timeout", "60s"]));
    }
    expect_done(&cluster.helix_with(&all, &["wait", "long", "--connect-timeout", "60s"]));
    load.during(&all, "new", || load.wait_for(6));
    let new = load.so_far()[acknowledged.len()..].to_vec();
    check_builds(&cluster, &all, &new);
    // The survivor may go now.
    cluster.kill(&cluster.member("coordinator", &left.id));
    let others = context(&cluster, "others", &[&fourth.member, &fifth.member]);
    for id in &there {
        let said = cluster.helix_with(&others, &["status", id, "--connect-timeout", "60s"]);
        assert!(said.code == 0, "{id}: {}", said.stderr);
    }
}

/// HOST:PORT of a coordinator's port for coordinators, from its configuration.
fn peer_of(node: &Member) -> String {
    let config = fs::read_to_string(node.argv.last().unwrap()).unwrap();
    let line = config.lines().find(|line| line.starts_with("peer")).unwrap();
    line.split('"').nth(1).unwrap().to_owned()
}
