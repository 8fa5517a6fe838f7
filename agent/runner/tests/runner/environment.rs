//! What the command finds around it: nothing but what was ordered.

use helix_runner::Stream;

use crate::support::{Attempt, text, ways};

#[test]
fn only_three_descriptors_exist() {
    for with in ways() {
        let mut attempt = Attempt::new("").held(with).with(|order| {
            // `ls` opens the directory itself as 3.
            order.argv = ["ls", "-l", "/proc/self/fd"].map(Into::into).to_vec();
        });
        attempt = attempt.start();
        attempt.outcome();
        let lines = text(&attempt.records(), Stream::Stdout);
        let found: Vec<&str> =
            lines.iter().filter_map(|line| Some(line.split_once(" -> ")?.0.rsplit_once(' ')?.1)).collect();
        assert_eq!(found, ["0", "1", "2", "3"], "{lines:?}");
        assert!(lines.iter().any(|line| line.ends_with("0 -> /dev/null")), "{lines:?}");
    }
}

#[test]
fn what_the_runner_inherited_is_not_passed_on() {
    let attempt = Attempt::new("").with(|order| order.argv = ["ls", "/proc/self/fd"].map(Into::into).to_vec());
    attempt.write_order();
    let careless = std::process::Command::new("sh")
        .args(["-c", "exec 7< /etc/passwd 8> /dev/null; trap '' USR1; exec \"$0\" \"$1\""])
        .args([env!("CARGO_BIN_EXE_helix-runner").as_ref(), attempt.dir.root()])
        .status();
    assert!(careless.unwrap().success());
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["0", "1", "2", "3"]);
}

#[test]
fn the_environment_is_exactly_the_ordered_one() {
    let mut attempt = Attempt::new("").with(|order| {
        order.argv = vec!["/usr/bin/env".into()];
        order.environment = vec![("B".into(), "2 =\n3".into()), ("A".into(), "".into())];
    });
    attempt = attempt.start();
    attempt.outcome();
    assert_eq!(text(&attempt.records(), Stream::Stdout), ["B=2 =", "3", "A="]);
}

#[test]
fn session_signals_limits_and_rights_are_clean() {
    let script = "ulimit -c; ulimit -H -c; umask; pwd
        cut -d' ' -f5,6 /proc/$$/stat | sed \"s/$$/own/g\"
        exec cat /proc/self/status";
    let mut attempt = Attempt::new(script).start();
    attempt.outcome();
    let lines = text(&attempt.records(), Stream::Stdout);
    assert_eq!(lines[..5], ["0", "0", "0022", attempt.workdir.to_str().unwrap(), "own own"]);
    for (name, expected) in [("SigBlk", "0000000000000000"), ("SigIgn", "0000000000000000"), ("NoNewPrivs", "1")] {
        let value = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        assert_eq!(value, Some(expected), "{name}");
    }
}

#[test]
fn a_program_in_the_workdir_is_not_found_by_name() {
    let mut attempt = Attempt::new("").with(|order| {
        order.argv = vec!["mine".into()];
        order.environment = vec![("PATH".into(), ":/usr/bin:".into())];
    });
    std::fs::copy("/bin/true", attempt.workdir.join("mine")).unwrap();
    attempt = attempt.start();
    assert!(matches!(attempt.outcome().end, helix_runner::End::NotStarted { errno: 2, .. }));
}
