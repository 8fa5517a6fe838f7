//! Starting runners through the forker.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use helix_runner::{AttemptDir, AttemptState, End, Forker, Growth, inspect};
use rustix::process::Signal;

use crate::support::{Attempt, Client, is_alive, kill, records, until, ways};

const PROGRAM: &str = env!("CARGO_BIN_EXE_helix-runner");

/// Reads until the runner closes its end.
fn ends(mut connection: UnixStream) {
    connection.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    connection.read_to_end(&mut Vec::new()).unwrap();
}

fn ended(dir: &AttemptDir) -> Option<helix_runner::Outcome> {
    match inspect(dir).unwrap() {
        AttemptState::Ended(outcome) => Some(outcome),
        AttemptState::RunnerDied => panic!("the runner died"),
        AttemptState::NotStarted | AttemptState::Running { .. } => None,
    }
}

#[test]
fn runners_outlive_the_forker() {
    let attempt = Attempt::new("echo ready; read x < gate; echo done");
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt.write_order();
    let mut forker = Forker::start(PROGRAM).unwrap();
    let (pid, _connection) = forker.start_runner(&attempt.dir).unwrap();
    attempt.says("ready");
    assert_eq!(inspect(&attempt.dir).unwrap(), AttemptState::Running { pid });
    drop(forker);
    assert!(is_alive(pid));
    std::fs::write(gate, "go\n").unwrap();
    assert_eq!(until("its end", || ended(&attempt.dir)).end, End::Exited(0));
    assert_eq!(records(&attempt.dir, Growth::Ended).len(), 2);
}

#[test]
fn who_comes_after_the_first_connection_finds_a_socket() {
    let attempt = Attempt::new("echo ready; exec sleep 1000");
    attempt.write_order();
    let mut forker = Forker::start(PROGRAM).unwrap();
    let (_, connection) = forker.start_runner(&attempt.dir).unwrap();
    let mut first = Client::new(connection);
    attempt.says("ready");
    first.status();
    assert!(!attempt.dir.control().exists(), "nobody needs it yet");
    drop(first);
    let mut second = attempt.connect();
    second.status();
    drop(second);
    // It stays: also for the one after that.
    attempt.connect().stop(helix_model::Reason::Cancelled, 0);
    assert_eq!(until("its end", || ended(&attempt.dir)).stopped, Some(helix_model::Reason::Cancelled));
}

#[test]
fn a_command_that_says_nothing_makes_no_log() {
    let attempt = Attempt::new("exit 3");
    attempt.write_order();
    let mut forker = Forker::start(PROGRAM).unwrap();
    let (_, connection) = forker.start_runner(&attempt.dir).unwrap();
    ends(connection);
    let outcome = until("its end", || ended(&attempt.dir));
    assert_eq!((outcome.end, outcome.log), (End::Exited(3), helix_runner::LogTotals::default()));
    let left: Vec<_> = std::fs::read_dir(attempt.dir.root()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["journal"]);
    assert_eq!(records(&attempt.dir, Growth::Ended), []);
}

#[test]
fn a_forker_that_died_is_replaced() {
    let mut forker = Forker::start(PROGRAM).unwrap();
    for round in 0..3 {
        let attempt = Attempt::new("exit 5");
        attempt.write_order();
        let (runner, connection) = forker.start_runner(&attempt.dir).unwrap();
        ends(connection);
        assert_eq!(until("its end", || ended(&attempt.dir)).end, End::Exited(5));
        until("its process to be gone", || (!is_alive(runner)).then_some(()));
        if round < 2 {
            let helper = forker.pid().unwrap();
            kill(helper, Signal::KILL);
            until("the forker's death", || (!is_alive(helper)).then_some(()));
        }
    }
}

#[test]
fn starts_are_cheap() {
    for with in ways() {
        let attempt = |_| Attempt::new("").held(with).with(|order| order.argv = vec!["true".into()]);
        let attempts: Vec<Attempt> = (0..200).map(attempt).collect();
        attempts.iter().for_each(Attempt::write_order);
        let mut forker = Forker::start(PROGRAM).unwrap();
        let begun = Instant::now();
        for attempt in &attempts {
            forker.start_runner(&attempt.dir).unwrap();
        }
        let asked = begun.elapsed();
        for attempt in &attempts {
            assert_eq!(until("its end", || ended(&attempt.dir)).end, End::Exited(0));
        }
        let done = begun.elapsed();
        eprintln!("{with:?}: 200 runners asked for in {asked:?}, done in {done:?}");
        // Ten times what it takes on two idle cores: it must catch an order of magnitude, not a busy neighbour.
        assert!(done.as_secs() < 5, "{done:?}");
    }
}
