//! The example configurations, the context and the units are valid, and fit each other.

use std::path::Path;
use std::process::{Command, Output};

use helix_common::identity::Role;
use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
use helix_tests::cluster::programs;

use crate::{read, root};

/// What a program says to a configuration; it must be content.
fn checked(program: &str, config: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    std::fs::write(&path, config).unwrap();
    let mut command = Command::new(programs().join(program));
    command.args(["config", "check", "--config"]).arg(&path);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HELIX_")) {
        command.env_remove(name);
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{program}: {}\n{config}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// A commented key of a line: the line without its `# `, and whether it is marked as an example.
fn commented(line: &str) -> Option<(&str, bool)> {
    let key = line.strip_prefix("# ")?;
    let (name, _) = key.split_once(" = ")?;
    name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_').then(|| (key, key.contains("# example")))
}

/// With the commented keys of a kind put into force.
fn in_force(text: &str, examples: bool) -> (String, usize) {
    let mut count = 0;
    let lines = text.lines().map(|line| match commented(line) {
        Some((key, example)) if example == examples => {
            count += 1;
            key
        }
        _ => line,
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    (text, count)
}

#[test]
fn configurations_are_valid_and_comments_show_the_defaults() {
    for (program, file) in [("helix-coordinator", "config/coordinator.toml"), ("helix-agent", "config/agent.toml")] {
        let text = read(file);
        let effective = checked(program, &text);
        let (defaults, count) = in_force(&text, false);
        assert!(count >= 3, "{file}: only {count} commented keys were found");
        let neutral =
            |text: &str| text.lines().filter(|line| !line.contains("runner_path")).collect::<Vec<_>>().join("\n");
        assert_eq!(neutral(&checked(program, &defaults)), neutral(&effective), "{file}: a comment shows no default");
        let (examples, count) = in_force(&text, true);
        assert!(count >= 3, "{file}: only {count} examples were found");
        checked(program, &examples);
    }
}

#[test]
fn the_context_is_one_that_helix_takes() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create("prod").unwrap();
    authority.save(directory.path()).unwrap();
    let issued = authority.issue(Role::Operator, "alice", &[], VALID_FOR_DEFAULT).unwrap();
    issued.save(directory.path(), "operator-alice").unwrap();
    let context = directory.path().join("context.toml");
    let run = |text: &str| {
        std::fs::write(&context, text).unwrap();
        let mut command = Command::new(programs().join("helix"));
        command.arg("--context").arg(&context).args(["cluster", "status", "--connect-timeout", "1s"]);
        command.output().unwrap()
    };
    // Nobody is there; that this is the only complaint shows that the file and what it names were taken.
    let nobody = read("config/context.toml").replace(".example.com", ".invalid");
    let output = run(&nobody);
    assert_eq!(output.status.code(), Some(125), "{}", String::from_utf8_lossy(&output.stderr));
    let output = run(&nobody.replace("operator-alice.pem", "operator-bob.pem"));
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The values of a unit's key.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

#[test]
fn units_start_what_the_runbook_installs() {
    let book = read("RUNBOOK.md");
    for (program, file) in [("helix-coordinator", "coordinator.toml"), ("helix-agent", "agent.toml")] {
        let unit = read(&format!("systemd/{program}.service"));
        for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let sound = (line.starts_with('[') && line.ends_with(']')) || line.contains('=');
            assert!(sound, "{program}: {line:?} is nothing that systemd reads");
        }
        let start = values(&unit, "ExecStart");
        assert_eq!(start, [format!("/usr/bin/{program} run --config /etc/helix/{file}")], "{program}");
        assert!(Path::new(&root()).join("deploy/config").join(file).is_file(), "an example of {file}");
        assert!(book.contains(&format!(":/etc/helix/{file}")), "the runbook installs {file}");
        assert!(book.contains(&format!("programs/{program}")), "the runbook installs {program}");
        assert_eq!(values(&unit, "ExecReload"), ["/bin/kill -HUP $MAINPID"], "{program}");
        assert_eq!(values(&unit, "User"), ["helix"], "{program}");
        let data = read(&format!("config/{file}"));
        assert!(data.contains("data_dir = \"/var/lib/helix/"), "{program} keeps its data in its StateDirectory");
        assert_eq!(values(&unit, "StateDirectory"), ["helix"], "{program}");
    }
}

#[test]
fn stopping_the_agent_ends_no_build() {
    let unit = read("systemd/helix-agent.service");
    for (key, value) in
        [("KillMode", "process"), ("Delegate", "yes"), ("OOMPolicy", "continue"), ("TimeoutStopSec", "infinity")]
    {
        assert_eq!(values(&unit, key), [value], "{key}");
    }
    // Nothing that would take a toolchain's ways from builds, which are this unit's processes.
    for key in ["ProtectSystem", "PrivateTmp", "NoNewPrivileges", "OOMScoreAdjust", "MemoryMax"] {
        assert!(values(&unit, key).is_empty(), "{key}");
    }
}
