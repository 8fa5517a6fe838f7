//! Images that are built, and builds that cannot be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::site::{BASE, Site, missing};

/// podman on a store of its own, as somebody who fetched an image would use it.
fn elsewhere(dir: &Path, arguments: &[&str]) -> String {
    let conf = dir.join("containers.conf");
    let limits = "default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]";
    let text = format!(
        "[containers]\n{limits}\n[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n"
    );
    fs::write(&conf, text).unwrap();
    let mut command = Command::new("podman");
    command.env("CONTAINERS_CONF", conf).arg("--root").arg(dir.join("root")).arg("--runroot").arg(dir.join("run"));
    let said = command.arg("--tmpdir").arg(dir.join("tmp")).args(arguments).output().unwrap();
    assert!(said.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

/// From a repository by ref to an archive that another podman loads and runs.
#[test]
fn an_image_is_built_from_a_repository_and_fetched_and_run() {
    if missing("an_image_is_built_from_a_repository_and_fetched_and_run") {
        return;
    }
    let site = Site::start(1, &[]);
    let text = format!(
        "{BASE}FROM base\nARG WHO=nobody\nRUN echo \"built by $WHO\" > /who; echo told $WHO\nCMD [\"cat\", \"/who\"]\n"
    );
    let url = site.repository("repository", &[("Containerfile.test", &text)]);
    let arguments = ["--repo", &url, "--ref", "main", "-f", "Containerfile.test", "--build-arg", "WHO=helix"];
    let (code, status) = site.build(&arguments);
    let id = status["build_id"].as_str().unwrap();
    let log = site.log(id);
    assert_eq!((code, status["state"].as_str()), (0, Some("succeeded")), "{status} {log}");
    assert!(log.contains("told helix") && log.contains("image id"), "{log}");
    assert_eq!(status["executor"], "podman");
    assert_eq!(status["image_tag"], format!("helix-build/{id}:main"));
    let digest = status["digest"].as_str().unwrap();
    assert!(log.contains(digest) && status["size"].as_u64().unwrap() > 1_000_000, "{status} {log}");
    assert_eq!(status["exit_code"], 0);

    // The same bytes again: the archive of an image is the image's alone.
    let archive = site.dir.path().join("image.tar");
    let said = site.cluster.helix(&["artifacts", "get", id, "image.tar", "-O", archive.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let store = site.dir.path().join("elsewhere");
    fs::create_dir(&store).unwrap();
    let loaded = elsewhere(&store, &["load", "--quiet", "--input", archive.to_str().unwrap()]);
    let name = loaded.trim().rsplit(' ').next().unwrap();
    assert!(name.contains(&format!("helix-build/{id}:main")), "{loaded}");
    let inspected = elsewhere(&store, &["image", "inspect", "--format", "{{.Digest}} {{.Labels}}", name]);
    assert!(inspected.contains(digest), "{inspected}");
    for label in ["helix.cluster:dev".to_owned(), format!("helix.build:{id}"), format!("helix.attempt:{id}.0.1")] {
        assert!(inspected.contains(&label), "{inspected}");
    }
    let said = elsewhere(&store, &["run", "--rm", "--network", "none", name]);
    assert_eq!(said.trim(), "built by helix");
    for mount in [store.join("root/overlay"), store.join("root")] {
        let _ = Command::new("umount").arg(mount).stderr(std::process::Stdio::null()).status();
    }

    // The layers of the first build serve the second.
    let (code, status) = site.build(&arguments);
    let log = site.log(status["build_id"].as_str().unwrap());
    assert!(code == 0 && log.contains("Using cache"), "{log}");
    site.assert_clean(id);
    let worker = site.cluster.json(&["workers", "show", status["worker"].as_str().unwrap()]);
    assert!(worker["podman"].as_str().unwrap().starts_with("podman "), "{worker}");
    site.end();
}

/// Whoever cannot be built is told why, with the right reason, and leaves a clean host.
#[test]
fn what_cannot_be_built_says_why() {
    if missing("what_cannot_be_built_says_why") {
        return;
    }
    let site = Site::start(1, &[]);
    let files = [
        ("good", &*format!("{BASE}RUN true\n")),
        ("exit", &*format!("{BASE}RUN exit 7\n")),
        ("lost", &*format!("{BASE}RUN /no/such/program\n")),
        ("copy", "FROM scratch\nCOPY nothing /\n"),
        ("leak", "FROM scratch\nCOPY passwd /leaked\n"),
        ("climb", "FROM scratch\nCOPY up/etc/passwd /leaked\n"),
        ("bogus", "FROM scratch\nBOGUS\n"),
        ("empty", ""),
        ("network", "FROM scratch\nRUN --network=host id\n"),
        ("x.in", "FROM scratch\n"),
        ("pull", "FROM localhost:1/nothing:1\n"),
    ];
    let source = site.source("source", &files);
    symlink("/etc/passwd", source.join("passwd")).unwrap();
    symlink("/etc/passwd", source.join("linked")).unwrap();
    symlink("../../../..", source.join("up")).unwrap();
    let source = source.to_str().unwrap();
    // Of a link out of the source podman names the step; why, it says or not, as its two processes happen to end.
    let cases: &[(&[&str], i32, &str, &str)] = &[
        (&["-f", "exit"], 7, "exit", "exit status 7"),
        (&["-f", "lost"], 127, "exit", "/no/such/program"),
        (&["-f", "missing"], 120, "source", "does not exist"),
        (&["-f", "linked"], 120, "source", "leads out of it"),
        (&["-f", "up/etc/passwd"], 120, "source", "leads out of it"),
        (&[], 120, "source", "no Containerfile and no Dockerfile"),
        (&["-f", "copy"], 120, "source", "/nothing"),
        (&["-f", "leak"], 120, "source", "COPY passwd /leaked"),
        (&["-f", "climb"], 120, "source", "COPY up/etc/passwd /leaked"),
        (&["-f", "bogus"], 120, "source", "BOGUS"),
        (&["-f", "empty"], 120, "source", "no contents"),
        (&["-f", "x.in"], 120, "source", "preprocessed"),
        (&["-f", "good", "--target", "nothing"], 120, "source", "nothing"),
        (&["-f", "network"], 120, "policy", "podman.network"),
    ];
    for (arguments, code, reason, told) in cases {
        let mut all = vec!["--source", source];
        all.extend_from_slice(arguments);
        let (ended, status) = site.build(&all);
        let id = status["build_id"].as_str().unwrap();
        let log = site.log(id);
        assert_eq!((ended, status["reason"].as_str()), (*code, Some(*reason)), "{arguments:?}: {status} {log}");
        assert!(log.lines().last().is_some_and(|line| line.contains(told)), "{arguments:?}: {log}");
        assert!(!log.contains("root:x:0:0"), "{arguments:?}: {log}");
        site.assert_clean(id);
    }
    // A base image that cannot be had is no fault of the build's: it is tried again, as often as policy says.
    let (code, status) = site.build(&["--source", source, "-f", "pull"]);
    assert_eq!((code, status["reason"].as_str()), (121, Some("image_pull")), "{status}");
    let refused = site.cluster.helix(&["submit", "--executor", "podman", "--source", source, "-f", "../x"]);
    assert!(refused.code == 1 && refused.stderr.contains("dockerfile_path"), "{}", refused.stderr);
    site.end();
}

/// A host on which podman cannot work says so, and gets no podman build.
#[test]
fn a_host_where_podman_cannot_work_says_so_and_gets_none() {
    if missing("a_host_where_podman_cannot_work_says_so_and_gets_none") {
        return;
    }
    let site = Site::start(2, &[]);
    let broken = site.cluster.member("agent", "agent-2");
    site.cluster.kill(&broken);
    let mut again = broken.clone();
    again.argv.extend(["--set".to_owned(), "podman.runtime=/no/such/runtime".to_owned()]);
    site.cluster.start_again(&again);
    let worker = site.wait_offer("agent-2", false);
    let why = worker["podman"].as_str().unwrap();
    assert!(why.starts_with("does not work: ") && why.contains("/no/such/runtime"), "{why}");
    assert!(site.cluster.helix(&["workers", "show", "agent-2"]).stdout.contains("/no/such/runtime"));
    let source = site.source("source", &[("Dockerfile", &format!("{BASE}RUN sleep 1\n"))]);
    let ids: Vec<String> = (0..3).map(|_| site.submit(&["--source", source.to_str().unwrap()])).collect();
    for id in &ids {
        site.cluster.wait_state(id, "succeeded");
        assert_eq!(site.cluster.json(&["status", id])["worker"], "agent-1");
    }
    let explained = site.cluster.helix(&["explain", &ids[0]]);
    assert_eq!(explained.code, 0, "{}", explained.stderr);
    site.end();
}
