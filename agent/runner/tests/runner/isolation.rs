//! What an isolated command sees and may do, and that its end is proven whoever dies first.

use std::path::Path;
use std::time::Duration;

use helix_model::Reason;
use helix_runner::isolation::{Entry, Network, Tool};
use helix_runner::{End, Outcome, Record, Stream, Sweep, sweep};

use crate::skip::skip;
use crate::support::{Attempt, is_alive, text};

const PATIENCE: Duration = Duration::from_secs(30);

/// The tools that this machine has; none where namespaces are forbidden.
pub fn tools() -> Vec<Tool> {
    let mut tools = vec![Tool::Namespaces];
    for path in ["/usr/bin/bwrap", "/usr/local/bin/bwrap"] {
        if Path::new(path).exists() {
            tools.push(Tool::Bubblewrap(path.into()));
        }
    }
    tools.retain(|tool| {
        let (outcome, records) = run(tool, Network::Host, "true");
        let works = outcome.end == End::Exited(0);
        if !works {
            skip("a part of isolation", format!("{tool:?} does not work here: {outcome:?} {records:?}"));
        }
        works
    });
    tools
}

fn run(tool: &Tool, network: Network, script: &str) -> (Outcome, Vec<Record>) {
    let mut attempt = Attempt::new(script).isolated(tool.clone(), network).start();
    (attempt.outcome(), attempt.records())
}

/// The lines that a script prints.
fn said(tool: &Tool, network: Network, script: &str) -> Vec<String> {
    let (outcome, records) = run(tool, network, script);
    assert_eq!(outcome.end, End::Exited(0), "{tool:?} {script:?}: {records:?}");
    text(&records, Stream::Stdout)
}

#[test]
fn sees_what_it_is_given_and_nothing_else() {
    for tool in tools() {
        let ask = |script: &str| said(&tool, Network::Host, script).join(" ");
        assert_eq!(ask("ls -d /root /home /work /opt /sys /boot /etc/shadow 2> /dev/null || true"), "", "{tool:?}");
        assert_eq!(
            ask("ls -I core /dev"),
            "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero",
            "{tool:?}"
        );
        assert_eq!(ask("ls -A /run /var/lib | grep -v : | tr -d '\n'"), "", "{tool:?}");
        // Itself and the init; bubblewrap has one, too.
        assert_eq!(ask("set -- /proc/[0-9]*; echo $#"), "2", "{tool:?}");
        assert_eq!(ask("echo $(ls /proc/self/fd)"), "0 1 2 3", "{tool:?}: the last one is the directory itself");
        assert_eq!(ask("id -u; id -g; id -G; id -un; hostname"), "1000 1000 1000 build localhost", "{tool:?}");
        let powers = ask("grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t'");
        let none = "0000000000000000";
        assert_eq!(
            powers,
            format!("CapInh:{none} CapPrm:{none} CapEff:{none} CapBnd:{none} CapAmb:{none} NoNewPrivs:1 Seccomp:2"),
            "{tool:?}"
        );
        assert_eq!(ask("cat /proc/self/uid_map | tr -s ' ' | cut -d ' ' -f 2,4"), "1000 1", "{tool:?}");
    }
}

#[test]
fn writes_to_its_own_and_nowhere_else() {
    for tool in tools() {
        let script = "echo made > made; for at in / /usr /etc /dev /run /var/lib /proc/sys/kernel; do \
            (echo x > $at/helix-test) 2> /dev/null && echo $at; done; echo shm > /dev/shm/x && cat /dev/shm/x; \
            echo gone > /dev/null; mount -o remount,rw / 2> /dev/null && echo mounted; \
            mkdir m; mount -t tmpfs none m 2> /dev/null && echo mounted; unshare -Ur true 2> /dev/null && echo unshared; \
            mknod d c 1 3 2> /dev/null && echo device; hostname x 2> /dev/null && echo named; true";
        let mut attempt = Attempt::new(script).isolated(tool.clone(), Network::None).start();
        assert_eq!(attempt.outcome().end, End::Exited(0));
        assert_eq!(text(&attempt.records(), Stream::Stdout), ["shm"], "{tool:?}");
        assert_eq!(std::fs::read_to_string(attempt.workdir.join("made")).unwrap(), "made\n");
        assert!(!Path::new("/usr/helix-test").exists() && !Path::new("/etc/helix-test").exists());
    }
}

#[test]
fn without_a_network_there_is_a_loopback_alone() {
    for tool in tools() {
        let lines = said(&tool, Network::None, "tail -n +3 /proc/net/dev | cut -d : -f 1; cat /proc/net/route");
        assert_eq!(lines.iter().filter(|line| line.trim() == "lo").count(), 1, "{tool:?}: {lines:?}");
        assert!(lines.len() <= 2, "{tool:?}: {lines:?}");
    }
}

#[test]
fn ends_are_told_as_they_are() {
    for tool in tools() {
        assert_eq!(run(&tool, Network::Host, "exit 7").0.end, End::Exited(7), "{tool:?}");
        let killed = run(&tool, Network::Host, "kill -9 $$").0.end;
        // bwrap says how its child ended as shells do.
        let expected = if tool == Tool::Namespaces { End::Signaled(9) } else { End::Exited(137) };
        assert_eq!(killed, expected, "{tool:?}");
    }
}

#[test]
fn what_cannot_be_set_up_is_said() {
    let missing = Entry::own("/nothing/here", "/here");
    let mut attempt = Attempt::new("true").isolated(Tool::Namespaces, Network::Host).with(|order| {
        order.isolation.as_mut().unwrap().view.push(missing);
    });
    attempt = attempt.start();
    let End::NotStarted { errno, error } = attempt.outcome().end else { panic!() };
    assert_eq!(
        (errno, error.as_str()),
        (libc::ENOENT, "cannot show /nothing/here: No such file or directory (os error 2)")
    );
    let mut attempt = Attempt::new("true").isolated(Tool::Namespaces, Network::Host);
    attempt.order.argv[0] = "no-such-program".into();
    attempt = attempt.start();
    let End::NotStarted { errno, error } = attempt.outcome().end else { panic!() };
    assert!(errno == libc::ENOENT && error.starts_with("cannot start no-such-program"), "{error}");
}

/// Leaves everything behind that a process can leave behind.
const DAEMON: &str = "(env -i /usr/bin/setsid /bin/sh -c 'trap \"\" TERM HUP; cd /; echo ready; \
    while :; do /bin/sleep 1000; done' &)";

/// Processes in the attempt's workdir or with its user; the runner and what is outside do not count.
fn left(attempt: &Attempt) -> Vec<u32> {
    let all = helix_runner::processes::Process::descendants(attempt.runner_pid()).unwrap();
    all.iter().map(|process| process.id.pid).filter(|pid| is_alive(*pid)).collect()
}

#[test]
fn a_stop_ends_daemons_and_the_namespace() {
    for tool in tools() {
        for grace_ms in [0, 50] {
            let mut attempt =
                Attempt::new(&format!("{DAEMON}; exec sleep 1000")).isolated(tool.clone(), Network::Host).start();
            attempt.says("ready");
            let inside = left(&attempt);
            assert!(inside.len() >= 3, "{inside:?}");
            attempt.connect().stop(Reason::Cancelled, grace_ms);
            let outcome = attempt.outcome();
            assert_eq!(outcome.stopped, Some(Reason::Cancelled), "{tool:?}");
            assert!(inside.iter().all(|pid| !is_alive(*pid)), "{tool:?}");
        }
    }
}

#[test]
fn a_daemon_dies_after_the_command() {
    let script = format!("{DAEMON} & while [ ! -e go ]; do sleep 0.01; done; exit 3");
    let mut attempt =
        Attempt::new(&script).isolated(Tool::Namespaces, Network::Host).with(|order| order.leftover_ms = 20).start();
    attempt.says("ready");
    std::fs::write(attempt.workdir.join("go"), "").unwrap();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end.clone(), outcome.stopped), (End::Exited(3), None));
    assert!(outcome.leftovers_killed > 0);
}

#[test]
fn killing_everything_kills_oneself() {
    for tool in tools() {
        let script = "trap '' TERM; kill -9 -1; kill -9 1; kill -STOP 1; sleep 0.05; echo still; exit 4";
        let mut attempt = Attempt::new(&format!("sh -c \"{script}\" & wait; exec sleep 1000"));
        attempt = attempt.isolated(tool.clone(), Network::Host).start();
        // What `kill -1` spares is the killer itself; the shell around it is gone, which is the command's end.
        let outcome = attempt.outcome();
        let expected = if tool == Tool::Namespaces { End::Signaled(9) } else { End::Exited(137) };
        assert_eq!(outcome.end, expected, "{tool:?}: {:?}", attempt.records());
    }
}

#[test]
fn the_init_dies_with_its_runner_and_that_is_proof() {
    // Without a cgroup: the namespace alone.
    let mut attempt = Attempt::new(&format!("{DAEMON}; exec sleep 1000")).isolated(Tool::Namespaces, Network::Host);
    attempt = attempt.start();
    attempt.says("ready");
    let inside = left(&attempt);
    assert!(inside.len() >= 3, "{inside:?}");
    attempt.kill_runner();
    let swept = sweep(&attempt.dir, PATIENCE).unwrap();
    assert!(matches!(swept, Sweep::Proven { .. }), "{swept:?}");
    assert!(inside.iter().all(|pid| !is_alive(*pid)));
    sweep(&attempt.dir, PATIENCE).unwrap();
}

#[test]
fn fork_storms_end_with_their_namespace() {
    let script = "echo 'sh ./hop & exit' > hop; sh ./hop; \
        i=0; while [ $i -lt 60 ]; do (trap '' TERM; while :; do sleep 1000 & wait; done) & i=$((i+1)); done; \
        echo ready; exec sleep 1000";
    let mut attempt = Attempt::new(script).isolated(Tool::Namespaces, Network::Host).start();
    attempt.says("ready");
    attempt.connect().stop(Reason::Cancelled, 0);
    assert_eq!(attempt.outcome().stopped, Some(Reason::Cancelled));
    let workdir = attempt.workdir.clone();
    let left = || {
        let all = helix_runner::processes::Process::all().unwrap();
        let here = |pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == workdir);
        all.iter().filter(|process| !process.zombie && here(process.id.pid)).count()
    };
    assert_eq!(left(), 0);
}
