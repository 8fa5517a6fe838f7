//! Podman builds of an agent that is not root.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;

use helix_tests::cluster::{PATIENCE, programs, wait_for};
use helix_tests::skip::skip;

use crate::site::{BASE, Site, missing};

/// A user that no host has, and the users that are its to give.
const USER: u32 = 64_123;
const NAME: &str = "helix-test-rootless";

/// Starts what follows as that user, who is known in a mount namespace of its own alone: nothing on the host is changed.
const AS_USER: &str = "for file in passwd group subuid subgid; do mount --bind \"$0/$file\" /etc/$file || exit 9; done; \
                       exec setpriv --reuid 64123 --regid 64123 --clear-groups \"$@\"";

/// The files that make a user known.
fn write_user(dir: &Path) {
    let with = |name: &str, line: String| {
        let text = fs::read_to_string(Path::new("/etc").join(name)).unwrap_or_default();
        fs::write(dir.join(name), format!("{}\n{line}\n", text.trim_end())).unwrap();
    };
    with("passwd", format!("{NAME}:x:{USER}:{USER}::{}:/bin/sh", dir.display()));
    with("group", format!("{NAME}:x:{USER}:"));
    for name in ["subuid", "subgid"] {
        with(name, format!("{NAME}:1879048192:65536"));
    }
}

fn own(path: &Path) {
    chown(path, Some(USER), Some(USER)).unwrap();
}

#[test]
fn an_agent_that_is_not_root_builds_images() {
    let test = "an_agent_that_is_not_root_builds_images";
    if missing(test) {
        return;
    }
    if !Command::new("newuidmap").output().is_ok_and(|said| !said.stderr.is_empty()) {
        return skip(test, "there is no newuidmap (uidmap)");
    }
    let site = Site::start(1, &[]);
    let agent = site.cluster.member("agent", "agent-1");
    site.cluster.kill(&agent);
    let dir = tempfile::Builder::new().prefix("helix-rootless-").tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    write_user(dir.path());
    for path in [dir.path(), &data] {
        own(path);
    }
    // What the agent reads is its own from now on.
    for path in [site.cluster.root().to_owned(), site.cluster.root().join("pki"), site.cluster.root().join("config")] {
        if path.exists() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    for entry in fs::read_dir(site.cluster.root().join("pki")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("agent-agent-1") {
            own(&entry.path());
        }
    }
    let mut rootless = agent.clone();
    let before = ["unshare", "--mount", "--propagation", "private", "sh", "-c", AS_USER, dir.path().to_str().unwrap()];
    rootless.argv = before.iter().map(|&word| word.to_owned()).chain(agent.argv.iter().cloned()).collect();
    // What was compiled may lie where this user cannot look.
    let runner = dir.path().join("helix-runner");
    fs::copy(programs().join("helix-runner"), &runner).unwrap();
    for setting in [format!("data_dir={}", data.display()), format!("runner_path={}", runner.display())] {
        rootless.argv.extend(["--set".to_owned(), setting]);
    }
    site.cluster.start_again(&rootless);
    let pid = site.cluster.member("agent", "agent-1").pid.unwrap();
    wait_for("an agent that is not root", PATIENCE, || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let user = status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.to_owned();
        (user == USER.to_string()).then_some(())
    });
    let worker = wait_for("its podman", PATIENCE, || {
        let worker = site.cluster.json(&["workers", "show", "agent-1"]);
        let said = worker["podman"].as_str().unwrap_or_default().to_owned();
        // The first agent's word lasts until this one has been heard.
        (data.join("podman/trial").exists() && (said.starts_with("podman ") || said.starts_with("does not")))
            .then_some(said)
    });
    assert!(worker.starts_with("podman "), "{worker}");
    let text = format!("{BASE}RUN id -u; touch /made; cat /proc/self/uid_map\nRUN ls -l /made\n");
    let source = site.source("source", &[("Dockerfile", &text)]);
    let (code, status) = site.build(&["--source", source.to_str().unwrap()]);
    let id = status["build_id"].as_str().unwrap();
    let log = site.log(id);
    assert_eq!(code, 0, "{status} {log}");
    // Root inside is this user outside.
    let map: Vec<&str> = log.lines().filter(|line| line.split_whitespace().nth(1) == Some("64123")).collect();
    assert!(!map.is_empty(), "{log}");
    assert!(status["size"].as_u64().unwrap() > 1_000_000, "{status}");
    let archive = site.dir.path().join("image.tar");
    let got = site.cluster.helix(&["artifacts", "get", id, "image.tar", "-O", archive.to_str().unwrap()]);
    assert_eq!(got.code, 0, "{}", got.stderr);

    // A step that fails, and one that is stopped, leave nothing either.
    let source = site.source("failing", &[("Dockerfile", &format!("{BASE}RUN exit 7\n"))]);
    let (code, status) = site.build(&["--source", source.to_str().unwrap()]);
    assert_eq!((code, status["reason"].as_str()), (7, Some("exit")), "{status}");
    let source = site.source("sleeping", &[("Dockerfile", &format!("{BASE}RUN echo be''gun; sleep 1000\n"))]);
    let id = site.submit(&["--source", source.to_str().unwrap()]);
    wait_for("the step", PATIENCE, || site.log(&id).lines().any(|line| line == "begun").then_some(()));
    assert_eq!(site.cluster.helix(&["cancel", &id]).code, 0);
    assert_eq!(site.cluster.state(&id), "cancelled");
    let containers = fs::read_dir(data.join("podman/storage")).unwrap().flatten();
    let containers: Vec<_> = containers
        .filter(|entry| entry.file_name().to_string_lossy().ends_with("-containers"))
        .flat_map(|kind| fs::read_dir(kind.path()).unwrap().flatten().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(containers, Vec::<std::path::PathBuf>::new());
    let left = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        use std::os::unix::fs::MetadataExt as _;
        let owner = entry.metadata().ok()?.uid();
        let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        ((owner == USER || owner >= 0x7000_0000) && line.contains("sleep")).then_some(line)
    });
    assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new());
}
