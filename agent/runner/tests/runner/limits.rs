//! Limits of cgroups, of processes and of the disk, and what they leave behind: nothing.

use helix_model::{Reason, Room};
use helix_runner::cgroup::{Controller, Enforcement, Host, Wanted};
use helix_runner::limits::{DiskLimit, Limits};
use helix_runner::{End, MemoryKill, Order, Stream, Sweep, sweep};

use crate::skip::skip;
use crate::support::{Attempt, With, is_alive, text, until};

const WANTED: Wanted = Wanted { cpu_milli: None, memory_bytes: None, processes: None };

/// The attempt, limited; `None` where this machine has no cgroup for it, which CI does not accept.
fn limited(script: &str, test: &str, needed: Controller, wanted: Wanted) -> Option<Attempt> {
    let host = Host::find();
    if !matches!(host.enforcement(needed), Enforcement::Cgroup1 | Enforcement::Cgroup2) {
        skip(test, format!("no writable cgroup for {needed:?}"));
        return None;
    }
    Some(Attempt::new(script).held(With::Cgroup).with(|order| {
        let name = order.cgroup.as_ref().and_then(|path| path.file_name()).unwrap().to_str().unwrap().to_owned();
        order.limits = host.limits(&name, &wanted);
    }))
}

fn nothing_is_left(attempt: &Attempt) {
    for path in attempt.order.limits.groups.iter().map(|group| &group.path).chain(&attempt.order.cgroup) {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

#[test]
fn a_fork_bomb_ends_at_its_limit_and_leaves_nothing() {
    let script = "bomb() { bomb & bomb & wait; }; bomb 2> errors & sleep 1000";
    let wanted = Wanted { processes: Some(100), ..WANTED };
    let Some(attempt) = limited(script, "a_fork_bomb", Controller::Pids, wanted) else { return };
    let mut attempt = attempt.start();
    let group = attempt.order.limits.groups[0].path.clone();
    let refused = || {
        let events = std::fs::read_to_string(group.join("pids.events")).ok()?;
        events.lines().find_map(|line| line.strip_prefix("max "))?.parse().ok().filter(|count: &u64| *count > 0)
    };
    until("a fork to be refused", refused);
    let current = std::fs::read_to_string(group.join("pids.current")).unwrap();
    assert!(current.trim().parse::<u64>().unwrap() <= 100, "{current}");
    attempt.connect().stop(Reason::Cancelled, 0);
    assert_eq!(attempt.outcome().stopped, Some(Reason::Cancelled));
    nothing_is_left(&attempt);
}

#[test]
fn a_command_that_takes_too_much_memory_is_told_from_one_that_fails() {
    let wanted = Wanted { memory_bytes: Some(64 << 20), ..WANTED };
    // dd's buffer is touched in full.
    let script = "dd if=/dev/zero of=/dev/null bs=512M count=1";
    let Some(attempt) = limited(script, "too_much_memory", Controller::Memory, wanted) else { return };
    let mut attempt = attempt.start();
    let outcome = attempt.outcome();
    assert_ne!(outcome.end, End::Exited(0));
    assert_eq!((outcome.memory_kill, outcome.stopped), (MemoryKill::Counted, None));
    nothing_is_left(&attempt);
    let mut small =
        limited("dd if=/dev/zero of=/dev/null bs=8M count=1; exit 3", "", Controller::Memory, wanted).unwrap().start();
    let outcome = small.outcome();
    assert_eq!((outcome.end, outcome.memory_kill), (End::Exited(3), MemoryKill::NotSeen));
    nothing_is_left(&small);
}

#[test]
fn a_share_of_a_processor_is_kept_to() {
    let wanted = Wanted { cpu_milli: Some(100), ..WANTED };
    let script = "while :; do :; done";
    let Some(attempt) = limited(script, "a_share_of_a_processor", Controller::Cpu, wanted) else { return };
    let mut attempt = attempt.start();
    let group = attempt.order.limits.groups[0].path.clone();
    until("it to be held back", || {
        let stat = std::fs::read_to_string(group.join("cpu.stat")).ok()?;
        stat.lines().find_map(|line| line.strip_prefix("nr_throttled "))?.parse::<u64>().ok().filter(|times| *times > 2)
    });
    attempt.connect().stop(Reason::Cancelled, 0);
    attempt.outcome();
    nothing_is_left(&attempt);
}

#[test]
fn a_limit_that_cannot_be_set_keeps_the_command_from_running() {
    let mut attempt = Attempt::new("echo ran").held(With::Cgroup).with(|order| {
        let group = helix_runner::limits::Group {
            path: "/sys/fs/cgroup/no-such-tree/x".into(),
            settings: vec![("pids.max".to_owned(), "5".to_owned())],
        };
        order.limits = Limits { groups: vec![group], ..Limits::default() };
    });
    attempt = attempt.start();
    let outcome = attempt.outcome();
    assert!(matches!(&outcome.end, End::NotStarted { error, .. } if error.contains("cannot limit it")), "{outcome:?}");
    assert!(attempt.records().is_empty());
    nothing_is_left(&attempt);
}

#[test]
fn a_sweep_takes_the_limits_along() {
    let wanted = Wanted { processes: Some(50), memory_bytes: Some(1 << 30), cpu_milli: Some(500) };
    let script = "(env -i setsid sh -c 'echo $$ > daemon; cd /; sleep 1000 > /dev/null 2>&1' &); echo $$ > pid; wait; sleep 1000";
    let Some(attempt) = limited(script, "a_sweep", Controller::Pids, wanted) else { return };
    let mut attempt = attempt.start();
    let (daemon, command) = (attempt.pid("daemon"), attempt.pid("pid"));
    // What the group says is enough where there is no cgroup that can be killed at once.
    attempt.kill_runner();
    until("the command to die with its runner", || (!is_alive(command)).then_some(()));
    let held = attempt.order.cgroup.take().unwrap();
    attempt.write_order();
    let swept = sweep(&attempt.dir, std::time::Duration::from_secs(30)).unwrap();
    assert!(matches!(swept, Sweep::Proven { killed } if killed > 0), "{swept:?}");
    assert!(!is_alive(daemon));
    nothing_is_left(&attempt);
    until("its other cgroup to be empty", || std::fs::remove_dir(&held).ok());
}

#[test]
fn what_nobody_owns_is_put_away() {
    let wanted = Wanted { processes: Some(50), ..WANTED };
    let Some(attempt) = limited("echo $$ > pid; exec sleep 1000", "put_away", Controller::Pids, wanted) else { return };
    let mut attempt = attempt.start();
    let pid = attempt.pid("pid");
    let name = attempt.order.cgroup.as_ref().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(Host::find().remove_stale(&name, |_| true), (vec![], true));
    assert!(is_alive(pid));
    until("all of it to be gone", || Host::find().remove_stale(&name, |_| false).1.then_some(()));
    assert!(!is_alive(pid));
    attempt.outcome();
    nothing_is_left(&attempt);
}

fn watched(script: &str, bytes: u64, files: u64) -> Attempt {
    Attempt::new(script).with(|order| {
        order.limits.disk = Some(DiskLimit { root: order.workdir.clone(), bytes, files, room: Room::Own, wall: None });
    })
}

#[test]
fn a_build_that_fills_its_disk_is_stopped_for_that() {
    let small_files = "i=0; while :; do head -c 65536 /dev/zero > f$i; i=$((i+1)); done";
    let many_files = "i=0; while :; do : > f$i; i=$((i+1)); done";
    for (script, bytes, files) in [(small_files, 4 << 20, u64::MAX), (many_files, u64::MAX, 300)] {
        let mut attempt = watched(script, bytes, files).start();
        let outcome = attempt.outcome();
        assert_eq!((outcome.end, outcome.stopped), (End::Signaled(9), Some(Reason::DiskFull)));
        assert_eq!(outcome.room, Room::Own);
        assert!(text(&attempt.records(), Stream::System)[0].starts_with("the build "));
    }
    let mut within = watched("head -c 1000000 /dev/zero > f; sleep 1; exit 3", 4 << 20, 300).start();
    let outcome = within.outcome();
    assert_eq!((outcome.end, outcome.stopped), (End::Exited(3), None));
}

#[test]
fn what_was_left_of_the_hosts_disk_is_no_limit_of_the_builds_own() {
    let script = "i=0; while :; do head -c 65536 /dev/zero > f$i; i=$((i+1)); done";
    let left = |order: &mut Order| order.limits.disk.as_mut().unwrap().room = Room::Host;
    let outcome = watched(script, 4 << 20, u64::MAX).with(left).start().outcome();
    assert_eq!((outcome.stopped, outcome.room), (Some(Reason::DiskFull), Room::Host));
}

#[test]
fn one_large_file_meets_its_limit_by_itself() {
    let mut attempt = watched("head -c 100000000 /dev/zero > f; exit 3", 1 << 20, u64::MAX).with(|order| {
        order.limits.file_bytes = Some(1 << 20);
        order.limits.open_files = Some(123);
    });
    attempt = attempt.start();
    let outcome = attempt.outcome();
    assert_eq!((outcome.end, outcome.stopped), (End::Exited(3), Some(Reason::DiskFull)));
    assert_eq!(std::fs::metadata(attempt.workdir.join("f")).unwrap().len(), 1 << 20);
    let mut attempt = Attempt::new("ulimit -n; ulimit -c").with(|order| order.limits.open_files = Some(123)).start();
    attempt.outcome();
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["123", "0"]);
}
