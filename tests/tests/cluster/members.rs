//! Coordinators that come and go while builds are submitted and run, and every step that is refused.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use helix_tests::cluster::{Cluster, Member, PATIENCE, Said, Shape, alive, wait_for};
use helix_tests::joining::{Joining, wait_to_be_added};
use serde_json::Value;

use crate::coordinators::holds;

pub(crate) fn join(cluster: &Cluster, id: u64) -> Joining {
    wait_to_be_added(cluster, id, &cluster.root().join("pki"), &["--join"]).unwrap()
}

/// A context that knows these coordinators.
pub(crate) fn context(cluster: &Cluster, name: &str, members: &[&Member]) -> PathBuf {
    let endpoints: Vec<&str> = members.iter().filter_map(|member| member.grpc.as_deref()).collect();
    let text = fs::read_to_string(cluster.context()).unwrap();
    let line = |line: &str| {
        if line.starts_with("endpoints") { format!("endpoints = {endpoints:?}") } else { line.to_owned() }
    };
    let path = cluster.root().join(format!("context-{name}.toml"));
    fs::write(&path, text.lines().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

pub(crate) fn expect_done(said: &Said) {
    assert_eq!(said.code, 0, "{} {}", said.stdout, said.stderr);
}

pub(crate) fn expect_refused(said: &Said, code: &str) {
    assert!(
        said.code != 0 && said.stderr.contains(&format!("helix: {code}: ")),
        "{code}: {} {}",
        said.code,
        said.stderr
    );
}

fn status(cluster: &Cluster, context: &Path) -> Option<Value> {
    let said = cluster.helix_with(context, &["cluster", "status", "-o", "json", "--connect-timeout", "5s"]);
    serde_json::from_str(&said.stdout).ok()
}

/// Ids of voters, and of members without a vote.
pub(crate) fn members(cluster: &Cluster, context: &Path) -> (Vec<u64>, Vec<u64>) {
    let status = wait_for("a status", PATIENCE, || status(cluster, context));
    let all = status["members"].as_array().unwrap().iter();
    let (voters, learners): (Vec<_>, Vec<_>) = all.partition(|member| member["role"] != "learner");
    let ids = |list: Vec<&Value>| list.iter().map(|member| member["id"].as_u64().unwrap()).collect();
    (ids(voters), ids(learners))
}

fn wait_gone(member: &Member) {
    let pid = member.pid.unwrap();
    wait_for("the removed node to end by itself", PATIENCE, || (!alive(pid)).then_some(()));
}

/// Between two submits of a client.
const PACE: Duration = Duration::from_millis(100);

/// One client that submits builds with artifacts, one after the other. What was acknowledged, and the longest time without.
fn client(
    cluster: &Cluster,
    context: &Path,
    name: usize,
    stop: &AtomicBool,
    count: &AtomicU32,
) -> (Vec<String>, Duration) {
    let began = Instant::now();
    let (mut acknowledged, mut gap, mut last) = (Vec::new(), Duration::ZERO, Instant::now());
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // Steady, not as much as goes: what is measured is whether it stops.
        std::thread::sleep(PACE.saturating_sub(last.elapsed()));
        let id = format!("load-{name}-{number}");
        let line = "echo \"$HELIX_BUILD_ID\" > \"$HELIX_OUTPUT\"; echo \"says $HELIX_BUILD_ID\"";
        let said = cluster.helix_with(context, &["submit", "-o", "quiet", "--id", &id, "--", line]);
        if said.code == 0 {
            gap = gap.max(last.elapsed());
            if last.elapsed() > Duration::from_secs(2) {
                eprintln!("client {name}: {:?} until {id} was acknowledged, at {:?}", last.elapsed(), began.elapsed());
            }
            last = Instant::now();
            acknowledged.push(id);
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    (acknowledged, gap.max(last.elapsed()))
}

/// Each acknowledged build has succeeded, and its artifact and log are what it made.
pub(crate) fn check_builds(cluster: &Cluster, context: &Path, ids: &[String]) {
    let all: Vec<&str> =
        ["wait", "--connect-timeout", "60s"].into_iter().chain(ids.iter().map(String::as_str)).collect();
    let said = cluster.helix_with(context, &all);
    assert_eq!(said.code, 0, "a build failed or is unknown: {}", said.stderr);
    std::thread::scope(|scope| {
        for share in ids.chunks(ids.len().div_ceil(4)) {
            scope.spawn(move || {
                for id in share {
                    let target = cluster.root().join(format!("fetched-{id}"));
                    let got = cluster.helix_with(context, &["artifacts", "get", id, "-O", target.to_str().unwrap()]);
                    assert_eq!(got.code, 0, "{id}: {}", got.stderr);
                    assert_eq!(fs::read_to_string(&target).unwrap().trim(), id);
                }
                for id in share.iter().step_by(10) {
                    let log = cluster.helix_with(context, &["logs", id]);
                    assert!(
                        log.code == 0 && log.stdout.contains(&format!("says {id}")),
                        "{id}: {} {}",
                        log.stdout,
                        log.stderr
                    );
                }
            });
        }
    });
}

/// A build that leaves these words and says none. Done when it has succeeded.
fn leave(cluster: &Cluster, context: &Path, words: &str) {
    let line = format!("printf %s {words} > \"$HELIX_OUTPUT\"");
    expect_done(&cluster.helix_with(context, &["submit", "--wait", "-o", "quiet", "--", &line]));
}

fn holders(everybody: &[&Member], words: &str) -> usize {
    everybody.iter().filter(|it| holds(&it.data_dir.join("blobs"), words, words.as_bytes())).count()
}

#[test]
fn from_one_to_three_to_five_and_back_under_load_nothing_is_lost() {
    let cluster = Cluster::start(&Shape { coordinators: 1, ..Shape::default() }).unwrap();
    let first = cluster.member("coordinator", "1");
    let joining: Vec<Joining> = (2..=5).map(|id| join(&cluster, id)).collect();
    let everybody: Vec<&Member> = std::iter::once(&first).chain(joining.iter().map(|it| &it.member)).collect();
    let all = context(&cluster, "all", &everybody);
    let (stop, count) = (AtomicBool::new(false), AtomicU32::new(0));
    // So that each step is taken under load.
    let wait_for_load = || {
        let before = count.load(Ordering::Relaxed);
        wait_for("more submits", PATIENCE, || (count.load(Ordering::Relaxed) >= before + 8).then_some(()));
    };
    let loads = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|name| {
                scope.spawn({
                    let (cluster, all, stop, count) = (&cluster, &all, &stop, &count);
                    move || client(cluster, all, name, stop, count)
                })
            })
            .collect();
        // A test that fails in here must not wait for clients that go on for ever.
        let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            leave(&cluster, &all, "left-with-one");
            for (count, it) in (2..).zip(&joining) {
                wait_for_load();
                let began = Instant::now();
                expect_done(&cluster.helix_with(&all, &["cluster", "add", &it.member.id, &it.peer]));
                eprintln!("added {count} in {:?}", began.elapsed());
                assert_eq!(members(&cluster, &all).0.len(), count);
            }
            // Five may lose two at once.
            leave(&cluster, &all, "left-with-five");
            assert!(holders(&everybody, "left-with-five") >= 3, "a success among five means three copies");
            wait_for("a third copy of what was there", PATIENCE, || {
                (holders(&everybody, "left-with-one") >= 3).then_some(())
            });
            // The one that everybody was configured with goes first; in the end a latecomer is alone.
            for (id, left) in [(1, 4), (2, 3), (4, 2), (5, 1)] {
                wait_for_load();
                let began = Instant::now();
                expect_done(&cluster.helix_with(&all, &["cluster", "remove", &id.to_string()]));
                eprintln!("removed {id} in {:?}", began.elapsed());
                assert_eq!(members(&cluster, &all).0.len(), left);
                wait_gone(everybody[id - 1]);
            }
        }));
        stop.store(true, Ordering::Relaxed);
        let loads: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        changed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        loads
    });
    let longest = loads.iter().map(|(_, gap)| *gap).max().unwrap();
    let acknowledged: Vec<String> = loads.into_iter().flat_map(|(ids, _)| ids).collect();
    eprintln!("{} builds; the longest time without an acknowledged submit: {longest:?}", acknowledged.len());
    assert!(acknowledged.len() >= 64, "too little load to prove anything: {}", acknowledged.len());
    let last = context(&cluster, "last", &[&joining[1].member]);
    assert_eq!(members(&cluster, &last), (vec![3], vec![]));
    check_builds(&cluster, &last, &acknowledged);
}

#[test]
fn every_unsafe_step_is_refused_and_says_what_to_do() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 0, ..Shape::default() }).unwrap();
    let helix = |arguments: &[&str]| cluster.helix(&[&["cluster"], arguments].concat());
    expect_refused(&helix(&["remove", "1"]), "last_member");
    expect_refused(&helix(&["transfer-leader"]), "last_member");
    expect_refused(&helix(&["remove", "7"]), "member_unknown");
    expect_refused(&helix(&["add", "0", "127.0.0.1:1"]), "invalid_field");
    expect_refused(&helix(&["add", "2", "nowhere"]), "invalid_field");
    expect_refused(&helix(&["add", "2", "127.0.0.1:1"]), "member_unreachable");
    expect_refused(&helix(&["add", "1", "127.0.0.1:1"]), "member_exists");

    // Another cluster's node, and one that began a cluster of its own.
    let other = cluster.root().join("other");
    let made = cluster.helix(&["pki", "init", "--cluster", "other", "--dir", other.to_str().unwrap()]);
    expect_done(&made);
    let stranger = wait_to_be_added(&cluster, 8, &other, &["--join"]).unwrap();
    expect_refused(&helix(&["add", "8", &stranger.peer]), "wrong_cluster");
    let alone = wait_to_be_added(&cluster, 9, &cluster.root().join("pki"), &["--members", "9=127.0.0.1:1"]).unwrap();
    expect_refused(&helix(&["add", "9", &alone.peer]), "wrong_cluster");

    let (second, third) = (join(&cluster, 2), join(&cluster, 3));
    expect_refused(&helix(&["add", "4", &second.peer]), "wrong_cluster");
    expect_done(&helix(&["add", "2", &second.peer]));
    expect_refused(&helix(&["add", "2", &second.peer]), "member_exists");
    expect_refused(&helix(&["add", "3", &second.peer]), "member_exists");
    expect_done(&helix(&["add", "3", &third.peer]));
    expect_done(&helix(&["transfer-leader", "2"]));
    assert_eq!(cluster.leader().id, "2");

    // Somebody who takes connections and says nothing keeps a change busy.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let mut waiting = spawn(&cluster, &["cluster", "add", "5", &address]);
    wait_for("the change to begin", PATIENCE, || {
        let status = status(&cluster, &cluster.context())?;
        (status["change"]["id"] == 5).then_some(())
    });
    expect_refused(&helix(&["remove", "3"]), "membership_busy");
    assert!(!waiting.wait().unwrap().success());

    let third = cluster.member("coordinator", "3");
    cluster.kill(&third);
    wait_for("the loss to be seen", PATIENCE, || {
        let status = status(&cluster, &cluster.context())?;
        let healthy = |member: &Value| member["id"] == 3 && member["healthy"] == false;
        status["members"].as_array()?.iter().any(healthy).then_some(())
    });
    expect_refused(&helix(&["remove", "2"]), "quorum_unsafe");
    expect_refused(&helix(&["transfer-leader", "3"]), "member_unreachable");
    // The dead one can go, and is told when it comes back.
    expect_done(&helix(&["remove", "3"]));
    expect_refused(&helix(&["remove", "3"]), "member_unknown");
    expect_refused(&helix(&["add", "3", "127.0.0.1:1"]), "node_id_used");
    cluster.start_again(&third);
    let (ended, log) = cluster.outcome(&third);
    assert!(!ended.success() && log.contains("was removed from cluster"), "{log}");
    cluster.start_again(&third);
    let (ended, log) = cluster.outcome(&third);
    assert!(!ended.success() && log.contains("its id is never used again"), "{log}");
    assert_ne!(cluster.leader().id, "3", "it leads nobody");
}

fn spawn(cluster: &Cluster, arguments: &[&str]) -> Child {
    cluster.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_node_with_the_last_copy_stays_until_it_is_given_up() {
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    expect_done(&cluster.helix(&["submit", "--wait", "--", "echo kept > \"$HELIX_OUTPUT\""]));
    let gone = cluster.all("coordinator").pop().unwrap();
    let others = cluster.all("coordinator").into_iter().filter(|member| member.id != gone.id).collect::<Vec<_>>();
    // Two lose their bytes while the third, which may have them, is away.
    cluster.kill(&gone);
    for member in &others {
        cluster.kill(member);
        fs::remove_dir_all(member.data_dir.join("blobs")).unwrap();
    }
    others.iter().for_each(|member| cluster.start_again(member));
    cluster.leader();
    let said = wait_for("a verdict", PATIENCE, || {
        let said = cluster.helix(&["cluster", "remove", &gone.id]);
        // A leader of a moment ago has not heard the other yet.
        (!said.stderr.contains("quorum_unsafe")).then_some(said)
    });
    expect_refused(&said, "last_copy");
    assert_eq!(members(&cluster, &cluster.context()).0.len(), 3, "nothing has changed");
    expect_done(&cluster.helix(&["cluster", "remove", &gone.id, "--lose-last-copies"]));
    assert_eq!(members(&cluster, &cluster.context()).0.len(), 2);
}

/// Passes connections on to a node; all but the first wait until it is opened.
struct Gate {
    address: String,
    open: Arc<AtomicBool>,
}

impl Gate {
    fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = Arc::new(AtomicBool::new(false));
        let (target, gate, count) = (target.to_owned(), Arc::clone(&open), AtomicU32::new(0));
        // Ends with the program: a connection may come at any time.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let first = count.fetch_add(1, Ordering::Relaxed) == 0;
                let (target, gate) = (target.clone(), Arc::clone(&gate));
                std::thread::spawn(move || {
                    while !first && !gate.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    if let Ok(server) = TcpStream::connect(&target) {
                        let (one, other) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                        std::thread::spawn(move || pass(one, other));
                        pass(server, client);
                    }
                });
            }
        });
        Self { address, open }
    }

    fn open(&self) {
        self.open.store(true, Ordering::Relaxed);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
}

fn wait_catching_up(cluster: &Cluster, id: u64) {
    wait_for("the node to be a learner", PATIENCE, || {
        let status = status(cluster, &cluster.context())?;
        (status["change"]["id"] == id && status["change"]["step"] == "catching_up").then_some(())
    });
}

#[test]
fn a_change_outlives_the_leader_and_the_joining_node() {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() }).unwrap();
    let before: Vec<String> = (0..5).map(|_| cluster.submit("true")).collect();
    let fourth = join(&cluster, 4);
    let gate = Gate::before(&fourth.peer);
    let mut adding = spawn(&cluster, &["cluster", "add", "4", &gate.address]);
    wait_catching_up(&cluster, 4);
    let leader = cluster.leader();
    cluster.kill(&leader);
    gate.open();
    assert!(adding.wait().unwrap().success(), "it goes on with the next leader");
    cluster.start_again(&leader);
    assert_eq!(members(&cluster, &cluster.context()), (vec![1, 2, 3, 4], vec![]));

    let fifth = join(&cluster, 5);
    let gate = Gate::before(&fifth.peer);
    let mut adding = spawn(&cluster, &["cluster", "add", "5", &gate.address]);
    wait_catching_up(&cluster, 5);
    cluster.kill(&fifth.member);
    assert!(!adding.wait().unwrap().success(), "it says that the node is gone");
    assert_eq!(members(&cluster, &cluster.context()), (vec![1, 2, 3, 4], vec![5]), "a learner weighs on nobody");
    gate.open();
    cluster.start_again(&fifth.member);
    wait_for("the node to be taken in", PATIENCE, || {
        (cluster.helix(&["cluster", "add", "5", &gate.address]).code == 0).then_some(())
    });
    assert_eq!(members(&cluster, &cluster.context()), (vec![1, 2, 3, 4, 5], vec![]));
    let last = cluster.context_of(&cluster.member("coordinator", "5"));
    for id in &before {
        assert_eq!(cluster.helix_with(&last, &["status", id]).code, 0, "{id}");
    }
}
