//! Secrets of podman builds, end to end: from the agent's configuration into one step, and nowhere else.

use std::fs;

use crate::site::{BASE, Site, missing};

const VALUE: &str = "hunter2 and more";
const ENCODED: &str = "aHVudGVyMiBhbmQgbW9yZ";

/// Everything in a file or a directory tree, read as bytes, that holds the value.
fn holding(root: &std::path::Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            holding(&path, found);
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap_or_default();
            if bytes.windows(VALUE.len()).any(|window| window == VALUE.as_bytes()) {
                found.push(path.display().to_string());
            }
        }
    }
}

#[test]
fn a_secret_is_in_its_step_and_in_no_log_argument_layer_or_history() {
    if missing("a_secret_is_in_its_step_and_in_no_log_argument_layer_or_history") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    fs::write(&file, format!("{VALUE}\n")).unwrap();
    let secret = |pattern: &str| format!("{{ file = {:?}, repositories = [{pattern:?}] }}", file.display().to_string());
    let site = Site::start(
        1,
        &[
            &format!("secrets.token={}", secret("*")),
            &format!("secrets.other={}", secret("https://example.com/only/*")),
        ],
    );
    let text = format!(
        "{BASE}RUN --mount=type=secret,id=token wc -c < /run/secrets/token; cat /run/secrets/token; base64 /run/secrets/token; \
         ls -l /run/secrets/token; env\n\
         RUN --mount=type=secret,id=token cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo\n\
         RUN ls /run/secrets 2> /dev/null | grep token && echo STI''LL; true\n"
    );
    // Another step: what a step with the secret made may be a cached layer.
    let bare = format!("{BASE}RUN --mount=type=secret,id=token wc -c /run/secrets/token\n");
    let url = site.repository("repository", &[("Dockerfile", &text), ("bare", &bare)]);
    let build = ["--repo", &url, "--ref", "main"];
    let (code, status) = site.build(&[&build[..], &["--secret", "id=token"]].concat());
    let id = status["build_id"].as_str().unwrap();
    let log = site.log(id);
    assert_eq!(code, 0, "{status} {log}");
    // The step had all of it, the log has none of it.
    let length = (VALUE.len() + 1).to_string();
    assert!(log.lines().any(|line| line.trim() == length) && log.matches("***").count() >= 2, "{log}");
    for hidden in [VALUE, ENCODED, "hunter2", "STILL"] {
        assert!(!log.contains(hidden), "{hidden}: {log}");
    }
    // In no layer, no history, no note of podman's, and in nothing that the agent or a coordinator keeps.
    let mut found = Vec::new();
    holding(site.cluster.root(), &mut found);
    assert_eq!(found, Vec::<String>::new());
    let image = log.split("image id ").nth(1).unwrap().split(',').next().unwrap();
    let agent = site.cluster.member("agent", "agent-1");
    let history = site.podman(&agent, &["history", "--no-trunc", "--format", "{{.CreatedBy}}", image]);
    let history = String::from_utf8_lossy(&history.stdout).into_owned();
    assert!(history.contains("/run/secrets/token") && !history.contains("hunter2"), "{history}");
    site.assert_clean(id);
    let left = fs::read_dir("/dev/shm").unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.path().join(format!("{id}.0.1"))).filter(|path| path.exists()).collect();
    assert_eq!(left, Vec::<std::path::PathBuf>::new());

    // One that the step does not ask for is not there; one that the repository may not have ends the build.
    let (code, status) = site.build(&[&build[..], &["-f", "bare"]].concat());
    let log = site.log(status["build_id"].as_str().unwrap());
    assert!(code != 0 && !log.contains("***"), "{status} {log}");
    let (code, status) = site.build(&[&build[..], &["--secret", "id=other"]].concat());
    assert_eq!((code, status["reason"].as_str()), (120, Some("policy")), "{status}");
    site.end();
}
