//! Rules of the project that a compiler does not check: who may depend on whom, what files look like.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use helix_failpoint::Point;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Each crate, and the crates of ours that it may see. Whoever is not listed may be seen by nobody.
const MAY_SEE: &[(&str, &[&str])] = &[
    ("helix-model", &[]),
    ("helix-core", &["helix-model"]),
    ("helix-agent-core", &["helix-model"]),
    ("helix-failpoint", &[]),
    // openraft's, in the place of the original.
    ("base2histogram", &[]),
    ("helix-runner", &["helix-model", "helix-failpoint"]),
    ("helix-proto", &["helix-model"]),
    ("helix-common", &["helix-model", "helix-failpoint"]),
    ("helix-coordinator", &["helix-model", "helix-failpoint", "helix-common", "helix-proto", "helix-core"]),
    (
        "helix-agent",
        &["helix-model", "helix-failpoint", "helix-common", "helix-proto", "helix-agent-core", "helix-runner"],
    ),
    ("helix-cli", &["helix-model", "helix-common", "helix-proto"]),
    ("helix-sim", &["helix-model", "helix-core", "helix-agent-core"]),
];

/// Crates that decide and do nothing else, and those that everybody carries: no library is visible from there.
const PURE: &[&str] = &["helix-model", "helix-failpoint", "base2histogram", "helix-core", "helix-agent-core"];

#[test]
fn dependencies_point_the_right_way() {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["metadata", "--no-deps", "--format-version", "1", "--locked"])
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rules: BTreeMap<&str, &[&str]> = MAY_SEE.iter().copied().collect();
    let mut checked = 0;
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let normal =
            package["dependencies"].as_array().unwrap().iter().filter(|dependency| dependency["kind"].is_null());
        let seen: BTreeSet<&str> = normal.map(|dependency| dependency["name"].as_str().unwrap()).collect();
        let of_tests = ["helix-tests", "helix-sim"].iter().find(|tests| seen.contains(**tests));
        assert_eq!(of_tests, None, "{name} depends on the tests");
        let Some(allowed) = rules.get(name) else {
            assert_eq!(name, "helix-tests", "a crate without a rule: add it to MAY_SEE");
            continue;
        };
        checked += 1;
        let ours: Vec<&&str> = seen.iter().filter(|seen| seen.starts_with("helix-")).collect();
        assert!(ours.iter().all(|seen| allowed.contains(seen)), "{name} sees {ours:?}, may see {allowed:?}");
        if PURE.contains(&name) {
            assert_eq!(seen.len(), ours.len(), "{name} is pure and sees {seen:?}");
        }
    }
    assert_eq!(checked, MAY_SEE.len(), "a crate of the rules is gone");
}

/// Every Rust file of the tree.
fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                rust_files(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn files_say_what_they_are_and_are_called_after_it() {
    let mut files = Vec::new();
    rust_files(&root(), &mut files);
    assert!(files.len() > 50, "the tree was found");
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! ") && text.len() > 20, "{} does not say what is in it", path.display());
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let banned = ["mod", "utils", "util", "helpers", "manager", "misc"];
        assert!(!banned.contains(&stem.as_str()), "{}: name the file after what is in it", path.display());
    }
}

/// The points that programs pass by calls that begin so.
fn passed(text: &str, call: &str) -> BTreeSet<String> {
    let name = |rest: &str| rest.chars().take_while(char::is_ascii_alphanumeric).collect::<String>();
    text.split(call).skip(1).map(name).collect()
}

#[test]
fn every_failpoint_is_passed_as_its_table_says() {
    let mut files = Vec::new();
    for part in ["common/src", "coordinator/src", "agent/src", "agent/runner/src"] {
        rust_files(&root().join(part), &mut files);
    }
    let text: String = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let (mut hit, mut pass) = (passed(&text, "failpoint::hit(Point::"), passed(&text, "failpoint::pass(Point::"));
    // A record of a journal has one before it and one behind it.
    for pair in text.split("=> (Point::").skip(1) {
        let pair = pair.split_once(')').unwrap().0;
        let (before, behind) = pair.split_once(", Point::").unwrap();
        hit.insert(before.to_owned());
        pass.insert(behind.to_owned());
    }
    let (fail, other): (Vec<_>, Vec<_>) = Point::all().partition(|point| point.may_fail());
    let names = |points: Vec<Point>| points.iter().map(|point| format!("{point:?}")).collect::<BTreeSet<_>>();
    assert_eq!(hit, names(fail));
    assert_eq!(pass, names(other));
}

#[test]
fn a_release_has_no_failpoints() {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    assert!(manifest["profile"]["release"].get("debug-assertions").is_none(), "releases have debug assertions");
    let directory = tempfile::tempdir().unwrap();
    let names_the_variable = |assertions: &str| {
        let object = directory.path().join(format!("{assertions}.o"));
        let status = Command::new(Path::new(env!("CARGO")).with_file_name("rustc"))
            .args(["--edition=2024", "--crate-type=lib", "--crate-name=helix_failpoint", "--emit=obj", "-O"])
            .args(["-C", &format!("debug-assertions={assertions}"), "-o"])
            .arg(&object)
            .arg(root().join("common/failpoint/src/lib.rs"))
            .status()
            .unwrap();
        assert!(status.success());
        let variable = b"HELIX_FAILPOINTS";
        fs::read(object).unwrap().windows(variable.len()).any(|bytes| bytes == variable)
    };
    assert!(names_the_variable("on"), "the check sees nothing");
    assert!(!names_the_variable("off"), "a release would read the variable");
}

#[test]
fn the_tls_provider_is_one() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for banned in ["aws-lc-rs", "openssl-sys", "native-tls"] {
        assert!(!lock.contains(&format!("name = \"{banned}\"")), "{banned} is in the tree");
    }
}
