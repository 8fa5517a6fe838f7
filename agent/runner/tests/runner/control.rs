//! The control socket: agents that come, go, stammer and shout; and the build, which is not let in.

use std::io::{Read as _, Write as _};

use helix_model::Reason;
use helix_runner::control::{self, CONNECTIONS_MAX, Event, Request};
use helix_runner::{AttemptDir, Outcome};

use crate::support::{Attempt, Client, spawn, until};

fn sleeping() -> Attempt {
    let attempt = Attempt::new("echo ready; exec sleep 1000").start();
    attempt.says("ready");
    attempt
}

#[test]
fn an_agent_that_returns_finds_everything() {
    let mut attempt = sleeping();
    for _ in 0..50 {
        let mut client = attempt.connect();
        client.send(Request::Watch);
        let status = client.status();
        assert_eq!((status.log.last_seq, status.stopping), (1, None));
        assert!(status.command_pid > 0);
    }
    let mut client = attempt.connect();
    client.stop(Reason::Cancelled, 0);
    assert_eq!(client.event(), Some(Event::Stopping { reason: Reason::Cancelled }));
    assert_eq!(client.event(), None);
    // Closed means: the result is there.
    assert_eq!(Outcome::read(&attempt.dir).unwrap().unwrap().stopped, Some(Reason::Cancelled));
    attempt.outcome();
}

#[test]
fn garbage_and_half_messages_hurt_nobody() {
    let mut attempt = sleeping();
    let mut steady = attempt.connect();
    let half = &Request::Stop { reason: Reason::Cancelled, grace_ms: 0 }.encode()[..9];
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0; 64], half, b"\x01\0\0\0\x77"] {
        let mut client = attempt.connect();
        // It may be cut off while still shouting.
        let _ = client.stream.write_all(garbage);
        assert_eq!(steady.status().stopping, None, "{garbage:?}");
        if garbage != half {
            let mut rest = Vec::new();
            let cut_off = client.stream.read_to_end(&mut rest);
            assert!(cut_off.is_ok() || cut_off.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
            assert!(rest.is_empty());
        }
    }
    // A message in pieces is a message.
    for byte in (Request::Stop { reason: Reason::Drained, grace_ms: 0 }).encode() {
        steady.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(attempt.outcome().stopped, Some(Reason::Drained));
}

#[test]
fn connections_are_bounded_and_places_come_free() {
    let mut attempt = sleeping();
    let mut held: Vec<Client> = (0..CONNECTIONS_MAX).map(|_| attempt.connect()).collect();
    for client in &mut held {
        client.status();
    }
    let mut one_too_many = attempt.connect();
    assert_eq!(one_too_many.event(), None);
    held.clear();
    until("a free place", || {
        let mut client = attempt.connect();
        // It may be refused once more, while the closed ones are still counted.
        client.stream.write_all(&Request::Status.encode()).ok()?;
        client.event()
    });
    attempt.connect().stop(Reason::Cancelled, 0);
    attempt.outcome();
}

#[test]
fn a_watcher_that_does_not_read_holds_nothing_up() {
    let script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done";
    let mut attempt = Attempt::new(script).start();
    let mut deaf = attempt.connect();
    deaf.send(Request::Watch);
    let mut pest = attempt.connect();
    pest.stream.set_write_timeout(Some(std::time::Duration::from_millis(1))).unwrap();
    // Asks until the runner does not take more.
    for _ in 0..100_000 {
        if pest.stream.write_all(&Request::Status.encode()).is_err() {
            break;
        }
    }
    assert_eq!(attempt.outcome().log.last_seq, 20_000);
    let mut newest = None;
    while let Some(event) = deaf.event() {
        let Event::Grew { last_seq } = event else { panic!("{event:?}") };
        assert!(newest < Some(last_seq));
        newest = Some(last_seq);
    }
}

#[test]
fn a_long_path_is_no_obstacle() {
    let attempt = Attempt::new("exec sleep 1000");
    let mut root = attempt.workdir.clone();
    for _ in 0..4 {
        root.push("d".repeat(100));
    }
    std::fs::create_dir_all(&root).unwrap();
    let dir = AttemptDir::new(root);
    attempt.order.write(&dir).unwrap();
    let mut runner = spawn(&dir);
    let mut client = Client::new(until("the socket", || control::connect(&dir).ok()));
    client.stop(Reason::Cancelled, 0);
    runner.wait().unwrap();
    assert_eq!(Outcome::read(&dir).unwrap().unwrap().stopped, Some(Reason::Cancelled));
}

#[test]
fn the_build_itself_is_not_let_in() {
    // The test binary is the client, run as the build: see `be_a_client_inside`.
    let own = std::env::current_exe().unwrap();
    let mut attempt = Attempt::new("").with(|order| {
        order.argv =
            [own.as_os_str(), "control::be_a_client_inside".as_ref(), "--exact".as_ref()].map(Into::into).to_vec();
        order.argv.push("--nocapture".into());
    });
    let root = attempt.dir.root().as_os_str().to_owned();
    attempt.order.environment.push((INSIDE.into(), root));
    attempt = attempt.start();
    let outcome = attempt.outcome();
    let said = attempt.records();
    assert!(said.iter().any(|line| line.bytes.ends_with(b"refused inside")), "{said:?}");
    assert_eq!(outcome.stopped, None);
}

const INSIDE: &str = "TEST_ATTEMPT_DIR";

#[test]
fn be_a_client_inside() {
    let Some(root) = std::env::var_os(INSIDE) else { return };
    let mut client = Client::new(control::connect(&AttemptDir::new(root)).unwrap());
    let _ = client.stream.write_all(&Request::Stop { reason: Reason::Cancelled, grace_ms: 0 }.encode());
    if client.event().is_none() {
        // Not a line of its own: the test harness may have begun one.
        eprintln!("refused inside");
    }
}
