//! Registries that want to know who asks, and registries that keep layers for others.

use std::fs;
use std::path::Path;

use helix_common::ports;

use crate::site::{BASE, Registry, Site, missing};

/// The user `builder` with the password `open sesame`, as bcrypt has it.
const PASSWORDS: &str = "builder:$2b$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n";

/// As `podman login --authfile` writes it; `None` for nothing at all.
fn write_credentials(file: &Path, address: &str, base64: Option<&str>) {
    let entry = base64.map(|base64| format!("{address:?}: {{\"auth\": {base64:?}}}")).unwrap_or_default();
    fs::write(file, format!("{{\"auths\": {{{entry}}}}}")).unwrap();
}

/// Right, wrong and missing credentials, for pushing and for pulling. They are read anew each time, and never shown.
#[test]
fn the_agents_credentials_are_for_registries_that_ask_for_them() {
    if missing("the_agents_credentials_are_for_registries_that_ask_for_them") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (port, file) = (ports::free(1).unwrap(), dir.path().join("auth.json"));
    let address = format!("127.0.0.1:{port}");
    let (right, wrong) = ("YnVpbGRlcjpvcGVuIHNlc2FtZQ==", "YnVpbGRlcjp3cm9uZyBwYXNzd29yZA==");
    write_credentials(&file, &address, Some(right));
    let site = Site::start(1, &["podman.push_limit_s=4", &format!("podman.auth_file={}", file.display())]);
    let _registry = Registry::start_with_passwords(dir.path(), port, PASSWORDS);
    let reference = format!("{address}/team/app:1");
    let files = [
        ("push", &*format!("{BASE}RUN echo base > /base\n")),
        ("pull", &*format!("FROM {reference}\nRUN cat /base\n")),
    ];
    let source = site.source("source", &files);
    let source = source.to_str().unwrap();
    let push = ["--source", source, "-f", "push", "--push", &reference];
    let pull = ["--source", source, "-f", "pull", "--no-output"];
    for credentials in [Some(right), Some(wrong), None] {
        write_credentials(&file, &address, credentials);
        let ended = [site.build(&push), site.build(&pull)];
        for ((code, status), (reason, failed)) in ended.iter().zip([("push", 120), ("image_pull", 121)]) {
            let id = status["build_id"].as_str().unwrap();
            let log = site.log(id);
            for secret in ["sesame", right, "wrong password", wrong] {
                assert!(!log.contains(secret), "{log}");
            }
            if credentials == Some(right) {
                assert_eq!(*code, 0, "{status} {log}");
                continue;
            }
            assert_eq!((*code, status["reason"].as_str()), (failed, Some(reason)), "{status} {log}");
            let last = log.lines().last().unwrap();
            assert!(["unauthorized", "authentication required"].iter().any(|words| last.contains(words)), "{last}");
            let explained = site.cluster.helix(&["explain", id]).stdout;
            assert!(explained.contains(reason) || explained.contains(&reason.replace('_', " ")), "{explained}");
            site.assert_clean(id);
        }
        // What was pulled would else be here the next time.
        let agent = site.cluster.member("agent", "agent-1");
        let removed = site.podman(&agent, &["image", "prune", "--all", "--force"]);
        assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    }
    site.end();
}

/// Layers are used again where the agent's owner allows it: from its own store, and from a registry that another agent filled.
#[test]
fn layers_are_kept_where_and_as_long_as_the_owner_says() {
    if missing("layers_are_kept_where_and_as_long_as_the_owner_says") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path());
    let cache = format!("{}/cache", registry.address);
    let site = Site::start(2, &[&format!("podman.cache_to={cache}"), &format!("podman.cache_from={cache}")]);
    let source = site.source("source", &[("Dockerfile", &format!("{BASE}RUN echo built on purpose > /x\n"))]);
    let on = |worker: &str| {
        let other = if worker == "agent-1" { "agent-2" } else { "agent-1" };
        assert_eq!(site.cluster.helix(&["workers", "drain", other]).code, 0);
        let (code, status) = site.build(&["--source", source.to_str().unwrap(), "--no-output"]);
        assert_eq!(site.cluster.helix(&["workers", "undrain", other]).code, 0);
        let log = site.log(status["build_id"].as_str().unwrap());
        assert_eq!((code, status["worker"].as_str()), (0, Some(worker)), "{status} {log}");
        log
    };
    let first = on("agent-1");
    assert!(!first.contains("Using cache") && first.contains("Pushing cache"), "{first}");
    let second = on("agent-2");
    assert!(second.contains("Cache pulled from remote") && second.contains("Using cache"), "{second}");

    // Without the registry the agent's own layers serve; where its owner wants none, nothing does.
    drop(registry);
    let agent = site.cluster.member("agent", "agent-1");
    let mut again = agent.clone();
    for setting in ["podman.cache_to=", "podman.cache_from="] {
        again.argv.extend(["--set".to_owned(), setting.to_owned()]);
    }
    for (setting, used) in [("podman.layers=true", true), ("podman.layers=false", false)] {
        site.cluster.kill(&site.cluster.member("agent", "agent-1"));
        again.argv.extend(["--set".to_owned(), setting.to_owned()]);
        site.cluster.start_again(&again);
        let words = setting.trim_start_matches("podman.");
        helix_tests::cluster::wait_for("the agent with other settings", helix_tests::cluster::PATIENCE, || {
            let worker = site.cluster.json(&["workers", "show", "agent-1"]);
            let pid = site.cluster.member("agent", "agent-1").pid;
            let offers = worker["executors"].to_string().contains("podman") && worker["healthy"] == true;
            (offers && pid.is_some_and(helix_tests::cluster::alive)).then_some(())
        });
        let log = on("agent-1");
        assert_eq!(log.contains("Using cache"), used, "{words}: {log}");
        assert!(!log.contains("remote"), "{words}: {log}");
    }
    site.end();
}
