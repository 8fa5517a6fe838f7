//! Processes that want to outlive their attempt, and runners that die before theirs.

use std::time::Duration;

use helix_model::Reason;
use helix_runner::journal::{self, Kind};
use helix_runner::{AttemptState, End, Stream, Sweep, inspect, sweep};

use crate::support::{Attempt, With, is_alive, kill, text, until, ways};

/// Leaves the command's session, environment and parents behind and hears no SIGTERM.
const DAEMON: &str = "(env -i /usr/bin/setsid /bin/sh -c \
    'trap \"\" TERM HUP; (echo $$ > daemon; cd /; while :; do /bin/sleep 1000; done) > /dev/null 2>&1 < /dev/null &' &)";

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the daemon is one.
fn daemon(attempt: &Attempt) -> u32 {
    let leader = attempt.pid("daemon");
    // The number in the file is the shell's that forked it; the daemon is that session's member that lives on.
    until("the daemon", || {
        let all = helix_runner::processes::Process::all().unwrap();
        let member =
            all.iter().find(|process| process.session == leader && process.id.pid != leader && !process.zombie)?;
        (!is_alive(leader)).then_some(member.id.pid)
    })
}

#[test]
fn a_daemon_dies_with_a_stop() {
    for with in ways() {
        for grace_ms in [0, 50] {
            let mut attempt = Attempt::new(&format!("{DAEMON}; exec sleep 1000")).held(with).start();
            let pid = daemon(&attempt);
            attempt.connect().stop(Reason::Cancelled, grace_ms);
            assert_eq!(attempt.outcome().stopped, Some(Reason::Cancelled));
            assert!(!is_alive(pid), "{with:?} {grace_ms}");
        }
    }
}

#[test]
fn a_daemon_dies_after_the_command() {
    for with in ways() {
        let mut attempt = Attempt::new(&format!("{DAEMON}; while [ ! -e daemon ]; do sleep 0.01; done; exit 3"))
            .held(with)
            .with(|order| order.leftover_ms = 20)
            .start();
        let outcome = attempt.outcome();
        assert_eq!((outcome.end.clone(), outcome.stopped), (End::Exited(3), None));
        assert!(outcome.leftovers_killed > 0);
        assert!(text(&attempt.records(), Stream::System)[0].contains("left behind"));
        assert!(!is_alive(attempt.pid("daemon")), "{with:?}");
    }
}

#[test]
fn the_cgroup_is_removed_with_what_was_made_in_it() {
    if ways().len() == 1 {
        return;
    }
    let mut attempt = Attempt::new("echo ready; read x < gate").held(With::Cgroup);
    let gate = attempt.workdir.join("gate");
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    attempt = attempt.start();
    attempt.says("ready");
    let group = attempt.order.cgroup.clone().unwrap();
    let inside = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    assert_eq!(inside.lines().count(), 1, "the command and not the runner: {inside}");
    std::fs::create_dir_all(group.join("a/b")).unwrap();
    std::fs::write(gate, "go\n").unwrap();
    attempt.outcome();
    assert!(!group.exists());
}

/// Many at once, each of which forks when its children die.
const WIDE_STORM: &str = "i=0; while [ $i -lt 60 ]; do (trap '' TERM; while :; do sleep 1000 & wait; done) & \
    i=$((i+1)); done; echo ready; wait";
/// One that is never where it was: each forks the next and exits.
const HOPPING_STORM: &str = "echo 'sh ./hop & exit' > hop; sh ./hop; echo ready; exec sleep 1000";

#[test]
fn fork_storms_end() {
    for with in ways() {
        for storm in [WIDE_STORM, HOPPING_STORM] {
            let mut attempt = Attempt::new(storm).held(with).with(|order| {
                order.environment.push(("TEST_STORM".into(), std::process::id().to_string().into()));
            });
            attempt = attempt.start();
            attempt.says("ready");
            attempt.connect().stop(Reason::Cancelled, 0);
            assert_eq!(attempt.outcome().stopped, Some(Reason::Cancelled));
            let left: Vec<u32> = helix_runner::processes::Process::all()
                .unwrap()
                .iter()
                .map(|process| process.id.pid)
                .filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == attempt.workdir))
                .collect();
            assert!(left.is_empty(), "{with:?}: {left:?}");
        }
    }
}

#[test]
fn a_zombie_storm_is_no_obstacle() {
    // A parent that never waits: all its children stay zombies until it dies.
    let script = "i=0; while [ $i -lt 300 ]; do true & i=$((i+1)); done; echo ready; exec sleep 1000";
    let mut attempt = Attempt::new(script).start();
    attempt.says("ready");
    attempt.connect().stop(Reason::Cancelled, 0);
    assert_eq!(attempt.outcome().end, End::Signaled(9));
}

#[test]
fn a_runner_that_was_killed_is_noticed_and_swept_up_after() {
    for with in ways() {
        let mut attempt =
            Attempt::new(&format!("echo $$ > pid; {DAEMON}; sleep 1000 & echo $! > child; wait")).held(with);
        let variables = [("HELIX_BUILD_ID", "sweep"), ("HELIX_ATTEMPT", "1")];
        attempt.order.environment.extend(variables.map(|(name, value)| (name.into(), value.into())));
        attempt = attempt.start();
        let (command, child, daemon) = (attempt.pid("pid"), attempt.pid("child"), daemon(&attempt));
        assert_eq!(inspect(&attempt.dir).unwrap(), AttemptState::Running { pid: attempt.runner_pid() });
        let refused = sweep(&attempt.dir, PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
        attempt.kill_runner();
        assert_eq!(inspect(&attempt.dir).unwrap(), AttemptState::RunnerDied);
        until("the command to die with its runner", || (!is_alive(command)).then_some(()));
        assert!(is_alive(child) && is_alive(daemon), "or there is nothing to sweep");
        let swept = sweep(&attempt.dir, PATIENCE).unwrap();
        assert!(!is_alive(child));
        match with {
            With::Cgroup => {
                assert!(matches!(swept, Sweep::Proven { .. }), "{swept:?}");
                assert!(!is_alive(daemon));
                assert!(!attempt.order.cgroup.clone().unwrap().exists());
            }
            With::TreeOnly => {
                // What hid its session, environment and directory is not recognised, and it is not pretended.
                assert!(matches!(swept, Sweep::Unproven { killed } if killed > 0), "{swept:?}");
                kill(daemon, rustix::process::Signal::KILL);
            }
        }
        // Twice is harmless.
        sweep(&attempt.dir, PATIENCE).unwrap();
    }
}

#[test]
fn before_the_start_there_is_nothing() {
    let attempt = Attempt::new("true");
    attempt.write_order();
    assert_eq!(inspect(&attempt.dir).unwrap(), AttemptState::NotStarted);
    assert_eq!(sweep(&attempt.dir, PATIENCE).unwrap(), Sweep::Unproven { killed: 0 });
}

#[test]
fn what_a_power_cut_damaged_is_cleared_up_all_the_same() {
    let mut attempt = Attempt::new("exec sleep 1000").start();
    attempt.connect();
    attempt.kill_runner();
    // Records that were lengthened on disk, and bytes that never reached it.
    journal::append(&attempt.dir, Kind::Order, b"").unwrap();
    journal::append(&attempt.dir, Kind::Runner, b"1 1 an-earlier-boot").unwrap();
    journal::append(&attempt.dir, Kind::Result, &[0; 64]).unwrap();
    let mut bytes = std::fs::read(attempt.dir.journal()).unwrap();
    bytes.extend([0; 4096]);
    std::fs::write(attempt.dir.journal(), bytes).unwrap();
    assert_eq!(inspect(&attempt.dir).unwrap(), AttemptState::RunnerDied);
    assert_eq!(sweep(&attempt.dir, PATIENCE).unwrap(), Sweep::Proven { killed: 0 });
}

#[test]
fn a_runner_whose_directory_was_removed_ends_its_build() {
    let mut attempt = Attempt::new("echo $$ > pid; exec sleep 1000").start();
    let pid = attempt.pid("pid");
    std::fs::remove_dir_all(attempt.dir.root()).unwrap();
    attempt.runner_exits();
    assert!(!is_alive(pid));
}
