//! Precedence, and every kind of mistake by name.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::*;

#[derive(Deserialize, Serialize, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
struct Sample {
    name: String,
    #[serde(default)]
    capacity: u32,
    #[serde(default, with = "values::duration")]
    lease: Duration,
    #[serde(default, with = "values::size_option", skip_serializing_if = "Option::is_none")]
    reserve: Option<u64>,
    #[serde(default)]
    coordinators: Vec<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    exec: Exec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    podman: Option<Podman>,
}

#[derive(Deserialize, Serialize, PartialEq, Debug, Default)]
#[serde(deny_unknown_fields, default)]
struct Exec {
    shell: String,
    allow_job_commands: bool,
}

#[derive(Deserialize, Serialize, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
struct Podman {
    store: String,
}

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn try_load(file: &str, env: Pairs, flags: Pairs) -> Result<Sample, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    std::fs::write(&path, file).unwrap();
    let mut overrides = Table::new();
    for (key, value) in flags {
        set::<Sample>(&mut overrides, key, value)?;
    }
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load_from(Some(&path), "HELIX", env, overrides)
}

#[test]
fn flags_win_over_environment_over_file_over_default() {
    let file = "name = 'file'\ncapacity = 1\nlease = '15s'\n[exec]\nshell = 'bash'\n";
    let env = [("HELIX_NAME", "env"), ("HELIX_CAPACITY", "2"), ("HELIX_EXEC_ALLOW_JOB_COMMANDS", "true")];
    let flags = [("capacity", "3"), ("labels.zone", "eu"), ("reserve", "1GiB"), ("podman.store", "/s")];
    let loaded = try_load(file, &env, &flags).unwrap();
    assert_eq!((loaded.name.as_str(), loaded.capacity), ("env", 3));
    assert_eq!(loaded.lease, Duration::from_secs(15));
    assert_eq!(loaded.reserve, Some(1 << 30));
    assert_eq!((loaded.exec.shell.as_str(), loaded.exec.allow_job_commands), ("bash", true));
    assert_eq!(loaded.labels["zone"], "eu");
    assert_eq!(loaded.podman.unwrap().store, "/s");
    assert_eq!(loaded.coordinators, Vec::<String>::new());
}

#[test]
fn lists_and_maps_come_from_text() {
    for text in ["https://a:1, https://b:2", "['https://a:1', 'https://b:2']"] {
        let loaded = try_load("name = 'n'", &[("HELIX_COORDINATORS", text)], &[]).unwrap();
        assert_eq!(loaded.coordinators, ["https://a:1", "https://b:2"]);
    }
    let loaded = try_load("name = 'n'", &[("HELIX_LABELS", "{ a = 'b' }")], &[]).unwrap();
    assert_eq!(loaded.labels["a"], "b");
    // A name of digits stays text.
    assert_eq!(try_load("", &[("HELIX_NAME", "7")], &[]).unwrap().name, "7");
}

#[test]
fn mistakes_are_named_with_the_nearest_key() {
    let cases: &[(&str, Pairs, Pairs, &str)] = &[
        ("name = 'n'\ncapcity = 1", &[], &[], "unknown key `capcity`"),
        ("name = 'n'\ncapcity = 1", &[], &[], "did you mean `capacity`?"),
        ("name = 'n'\n[exec]\nshel = 'x'", &[], &[], "unknown key `exec.shel`"),
        ("name = 'n'\nshell = 'x'", &[], &[], "did you mean `exec.shell`?"),
        ("name = 'n'\n[podman]\nstor = 'x'", &[], &[], "did you mean `podman.store`?"),
        ("name = 'n'\nqqqqqq = 1", &[], &[], "known: capacity, coordinators"),
        ("name = 'n'", &[], &[("exec.sell", "x")], "did you mean `exec.shell`?"),
        ("name = 'n'", &[("HELIX_EXECSHELL", "x")], &[], "did you mean `HELIX_EXEC_SHELL`?"),
        ("name = 'n'", &[("HELIX_CAPACITY", "many")], &[], "`capacity` in the environment (HELIX_CAPACITY)"),
        ("name = 'n'\nlease = '15'", &[], &[], "is not a duration"),
        ("name = 'n'\nreserve = '1 GB'", &[], &[], "is not a size"),
        ("name = 'n'\ncapacity = -1", &[], &[], "capacity"),
        ("capacity = 1", &[], &[], "missing field `name`"),
        ("name = ", &[], &[], "is not TOML"),
    ];
    for (file, env, flags, expected) in cases {
        let message = try_load(file, env, flags).unwrap_err().to_string();
        assert!(message.contains(expected), "{file:?}: {message}");
    }
    let missing = load_from::<Sample>(Some(Path::new("/does/not/exist")), "HELIX", [], Table::new()).unwrap_err();
    assert!(missing.to_string().contains("cannot read /does/not/exist"));
}

#[test]
fn foreign_variables_are_left_alone() {
    let env = [("HELIX_BUILD_ID", "b"), ("HELIX_LOG", "debug"), ("HELIX", "x"), ("PATH", "/bin")];
    assert!(try_load("name = 'n'", &env, &[]).is_ok());
}

#[test]
fn the_effective_values_read_back() {
    let loaded = try_load("name = 'n'\nlease = '90s'\nreserve = '64KiB'", &[], &[]).unwrap();
    let text = effective(&loaded).unwrap();
    assert!(text.contains("lease = \"1m30s\"") && text.contains("reserve = \"64KiB\""), "{text}");
    assert_eq!(try_load(&text, &[], &[]).unwrap(), loaded);
}
