//! How attempts end: codes, signals, limits, and commands that never start.

use helix_model::Reason;
use helix_runner::journal;
use helix_runner::{AttemptState, End, MemoryKill, Privileges, Stream, User, inspect};

use crate::skip::skip;
use crate::support::{Attempt, With, is_alive, kill, spawn, text, until, ways};

#[test]
fn codes_and_signals_come_through() {
    for code in [0, 1, 127, 255] {
        assert_eq!(Attempt::run(&format!("exit {code}")).0.end, End::Exited(code));
    }
    for signal in [1, 9, 15] {
        let (outcome, _) = Attempt::run(&format!("kill -{signal} $$"));
        assert_eq!((outcome.end, outcome.stopped), (End::Signaled(signal), None));
        assert_eq!(outcome.memory_kill, MemoryKill::NotSeen);
    }
}

#[test]
fn arguments_are_passed_as_they_are() {
    let mut attempt = Attempt::new("").with(|order| {
        order.argv = ["printf", "%s|", "", "a b", "$HOME", "*", "new\nline"].map(Into::into).to_vec();
    });
    attempt = attempt.start();
    assert_eq!(attempt.outcome().end, End::Exited(0));
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["|a b|$HOME|*|new", "line|"]);
}

#[test]
fn a_command_that_cannot_start_says_why() {
    let cases: [(&str, i32); 4] = [("no-such-program", 2), ("/no/such/program", 2), ("/", 13), ("/etc/passwd", 13)];
    for (program, expected) in cases {
        let mut attempt = Attempt::new("").with(|order| order.argv = vec![program.into()]).start();
        let outcome = attempt.outcome();
        let End::NotStarted { errno, error } = &outcome.end else { panic!("{program}: {outcome:?}") };
        assert_eq!(*errno, expected, "{error}");
        assert!(error.contains(program), "{error}");
        assert_eq!(text(&attempt.records(), Stream::System), std::slice::from_ref(error));
    }
    let mut nothing = Attempt::new("").with(|order| order.argv.clear()).start();
    assert!(matches!(nothing.outcome().end, End::NotStarted { .. }));
    let mut nowhere = Attempt::new("").with(|order| order.workdir = "/no/such/workdir".into()).start();
    let end = nowhere.outcome().end;
    assert!(matches!(&end, End::NotStarted { errno: 2, error } if error.contains("working directory")), "{end:?}");
}

#[test]
fn a_damaged_order_is_a_result_not_a_guess() {
    let attempt = Attempt::new("echo must not run");
    let mut bytes = attempt.order.encode();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    journal::append(&attempt.dir, journal::Kind::Order, &bytes).unwrap();
    spawn(&attempt.dir).wait().unwrap();
    let AttemptState::Ended(outcome) = inspect(&attempt.dir).unwrap() else { panic!("no result") };
    assert!(matches!(&outcome.end, End::NotStarted { error, .. } if error.contains("checksum")), "{outcome:?}");
    assert!(attempt.records().is_empty());
}

#[test]
fn the_wall_clock_limit_ends_it() {
    let mut attempt = Attempt::new("while :; do echo busy; sleep 0.01; done").with(|order| order.wall_ms = Some(200));
    attempt = attempt.start();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.stopped), (End::Signaled(9), Some(Reason::Timeout)));
    assert!(outcome.ended_at_ms - outcome.started_at_ms >= 200);
}

#[test]
fn the_silence_limit_ends_only_what_is_silent() {
    let script = "i=0; while [ $i -lt 12 ]; do echo $i; sleep 0.1; i=$((i+1)); done; exec sleep 1000";
    let mut attempt = Attempt::new(script).with(|order| (order.silence_ms, order.grace_ms) = (Some(900), 60_000));
    attempt = attempt.start();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.stopped), (End::Signaled(15), Some(Reason::Silence)));
    assert_eq!(outcome.log.last_seq, 12, "it was not silent before its last line");
}

#[test]
fn a_stop_asks_first_and_kills_after_the_grace() {
    for with in ways() {
        let polite = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
        let mut attempt = Attempt::new(polite).held(with).start();
        attempt.says("ready");
        attempt.connect().stop(Reason::Cancelled, 60_000);
        let outcome = attempt.outcome();
        assert_eq!((outcome.end, outcome.stopped), (End::Exited(7), Some(Reason::Cancelled)));
        assert_eq!(text(&attempt.records(), Stream::Stdout), ["ready", "bye"]);

        let deaf = "trap '' TERM; echo ready; while :; do sleep 0.01; done";
        let mut attempt = Attempt::new(deaf).held(with).start();
        attempt.says("ready");
        attempt.connect().stop(Reason::Cancelled, 50);
        let outcome = attempt.outcome();
        assert_eq!((outcome.end, outcome.stopped), (End::Signaled(9), Some(Reason::Cancelled)));
    }
}

#[test]
fn a_second_stop_only_hastens() {
    let mut attempt = Attempt::new("trap '' TERM; echo ready; while :; do sleep 0.01; done").start();
    attempt.says("ready");
    let mut client = attempt.connect();
    client.stop(Reason::Drained, 600_000);
    client.stop(Reason::Cancelled, 900_000);
    until("the stop", || (client.status().stopping == Some(Reason::Drained)).then_some(()));
    client.stop(Reason::Cancelled, 0);
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.stopped), (End::Signaled(9), Some(Reason::Drained)));
}

#[test]
fn a_stopped_process_dies_too() {
    for with in ways() {
        for grace_ms in [0, 60_000] {
            let mut attempt = Attempt::new("echo $$ > pid; kill -STOP $$; sleep 1000").held(with).start();
            let pid = attempt.pid("pid");
            let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
            until("it to stop", || state()?.contains(") T ").then_some(()));
            attempt.connect().stop(Reason::Cancelled, grace_ms);
            assert!(matches!(attempt.outcome().end, End::Signaled(_)));
            assert!(!is_alive(pid));
        }
    }
}

#[test]
fn sigterm_to_the_runner_ends_the_build_as_drained() {
    let mut attempt = Attempt::new("echo ready; exec sleep 1000").start();
    attempt.says("ready");
    kill(attempt.runner_pid(), rustix::process::Signal::TERM);
    assert_eq!(attempt.outcome().stopped, Some(Reason::Drained));
}

#[test]
fn the_command_runs_once_however_many_runners_come() {
    let mut attempt = Attempt::new("echo x >> runs; read x < gate").held(With::TreeOnly);
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt.write_order();
    let mut others: Vec<_> = (0..8).map(|_| spawn(&attempt.dir)).collect();
    attempt = attempt.start();
    let pid = until("one of them", || match inspect(&attempt.dir).unwrap() {
        AttemptState::Running { pid } => Some(pid),
        AttemptState::NotStarted => None,
        other => panic!("{other:?}"),
    });
    std::fs::write(&gate, "go\n").unwrap();
    until("the result", || matches!(inspect(&attempt.dir).unwrap(), AttemptState::Ended(_)).then_some(()));
    for other in &mut others {
        assert!(other.wait().unwrap().success());
    }
    attempt.runner_exits();
    assert!(!is_alive(pid));
    // Nor does one that comes after the end.
    assert!(spawn(&attempt.dir).wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(attempt.workdir.join("runs")).unwrap(), "x\n");
}

#[test]
fn another_user_is_taken_where_that_is_allowed() {
    if !rustix::process::geteuid().is_root() {
        return skip("another_user_is_taken_where_that_is_allowed", "it needs root");
    }
    let mut attempt = Attempt::new("id -u; id -g; id -G; cat attempt/journal").with(|order| {
        order.user = Some(User { uid: 65534, gid: 65533 });
        order.privileges = Privileges::MayGain;
        order.workdir = "/".into();
    });
    attempt = attempt.start();
    attempt.outcome();
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["65534", "65533", "65533"]);
}
