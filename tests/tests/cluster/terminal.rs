//! What a person at a terminal has of `helix`, and a script behind a pipe that closes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use helix_tests::cluster::{Cluster, PATIENCE, Shape, alive, signal, wait_for};
use rustix::process::Signal;

fn small() -> Cluster {
    Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap()
}

/// A command on a terminal of its own, that of `script`; what it draws comes into a file.
struct OnTerminal {
    child: Child,
    keys: ChildStdin,
    drawn: std::path::PathBuf,
}

impl OnTerminal {
    fn start(cluster: &Cluster, arguments: &[&str]) -> Self {
        let drawn = cluster.root().join("drawn");
        let helix = cluster.command(arguments);
        let words = std::iter::once(helix.get_program()).chain(helix.get_args()).map(|word| {
            let word = word.to_str().unwrap();
            assert!(!word.contains('\''), "{word}");
            format!("'{word}'")
        });
        let words = words.collect::<Vec<_>>();
        let line =
            format!("stty rows 30 cols 120; {}; echo \"ended\" $? $(stty -a | grep -c ' icanon')", words.join(" "));
        let mut child = Command::new("script")
            .args(["--quiet", "--flush", "--command", &line])
            .arg(&drawn)
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let keys = child.stdin.take().unwrap();
        Self { child, keys, drawn }
    }

    fn wait_for(&self, what: &str) -> String {
        wait_for(what, PATIENCE, || {
            let drawn = String::from_utf8_lossy(&fs::read(&self.drawn).unwrap_or_default()).into_owned();
            drawn.contains(what).then_some(drawn)
        })
    }
}

#[test]
fn top_shows_coordinators_workers_and_builds_and_gives_the_terminal_back() {
    let cluster = small();
    let gate = cluster.root().join("gate");
    let build = cluster.submit(&format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display()));
    cluster.wait_state(&build, "running");
    let worker = &cluster.all("agent")[0].id;

    let shown = cluster.helix(&["top"]);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    assert!(shown.stdout.contains(&build) && shown.stdout.contains(worker.as_str()), "{}", shown.stdout);
    assert!(!shown.stdout.contains('\u{1b}'), "{}", shown.stdout);
    let twice = cluster.helix(&["top", "-n", "2", "--interval", "100ms", "-o", "jsonl"]).stdout;
    assert_eq!(twice.lines().count(), 2, "{twice}");
    for line in twice.lines() {
        let look: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(look["builds"][0]["build_id"], build.as_str(), "{look}");
        assert_eq!((&look["cluster"]["running"], &look["workers"][0]["load"]), (&1.into(), &1.into()), "{look}");
    }
    assert_eq!(cluster.helix(&["top", "--interval", "1ms"]).code, 2);

    for key in [&b"q"[..], b"\x03"] {
        let mut top = OnTerminal::start(&cluster, &["top", "--interval", "100ms"]);
        let drawn = top.wait_for(&build);
        assert!(drawn.contains("\u{1b}[?1049h"), "{drawn:?}");
        // It is drawn again, as things are then.
        let next = cluster.submit("sleep 600");
        top.wait_for(&next);
        top.keys.write_all(key).unwrap();
        let drawn = top.wait_for("ended ");
        wait_for("the terminal to end", PATIENCE, || top.child.try_wait().unwrap());
        assert!(drawn.contains("ended 0 1"), "its end, and whether lines are edited again: {drawn:?}");
        assert!(drawn.rfind("\u{1b}[?1049l") > drawn.rfind("\u{1b}[?1049h"), "{drawn:?}");
        assert_eq!(cluster.helix(&["cancel", &next]).code, 0);
    }
    fs::write(gate, "").unwrap();
}

#[test]
fn a_reader_that_has_enough_does_not_change_what_a_build_ended_with() {
    let cluster = small();
    let gate = cluster.root().join("gate");
    let line = format!("echo one; while [ ! -e {} ]; do sleep 0.05; done; echo two; exit 3", gate.display());
    let mut child = cluster
        .command(&["submit", "--no-output", "--follow", "--", &line])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(first, "one\n");
    // Neither is anybody left to talk to.
    drop(child.stderr.take());
    fs::write(gate, "").unwrap();
    let ended = wait_for("the follower to end", PATIENCE, || child.try_wait().unwrap());
    assert_eq!(ended.code(), Some(3));
}

#[test]
fn ctrl_c_detaches_then_cancels_then_does_not_wait() {
    let cluster = small();
    let agent = cluster.all("agent").remove(0);
    let mut child = cluster
        .command(&["submit", "--id", "b", "--no-output", "--wait", "--", "sleep 600"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(said.next().unwrap(), "build b");
    cluster.wait_state("b", "running");
    // So that nobody can see it dead.
    signal(agent.pid.unwrap(), Signal::STOP);
    for words in ["detached; build b goes on", "cancelling build b", "helix status b"] {
        signal(pid, Signal::INT);
        let line = said.next().unwrap();
        assert!(line.contains(words), "{line}");
    }
    let ended = wait_for("the client to end", PATIENCE, || child.try_wait().unwrap());
    assert_eq!(ended.code(), Some(130));
    signal(agent.pid.unwrap(), Signal::CONT);
    cluster.wait_state("b", "cancelled");
    assert!(alive(agent.pid.unwrap()));
}
