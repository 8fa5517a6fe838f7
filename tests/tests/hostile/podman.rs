//! Podman builds: the attacks, on one cluster, beside a build that has something to lose; and a look for traces that knows of
//! containers, layers and their mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use helix_common::ports;
use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, signal, wait_for};
use helix_tests::skip::skip;
use rustix::process::{Signal, geteuid};

use crate::cases::Case;
use crate::dockerfiles::{self, BASE};
use crate::exec::{complaint, places, start_victim};
use crate::traces;

/// How long one build of the suite may take, with all the others beside it.
const SUITE_PATIENCE: Duration = Duration::from_secs(240);

/// Bytes of a log of the suite: far fewer than the largest would have.
const LOG_BYTES_MAX: usize = 4 << 20;

/// One test at a time: podman's commands are heavy, and these wait for moments.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster with one agent that builds images; `None` where this machine cannot.
struct Site {
    cluster: Cluster,
    agent: Member,
    source: tempfile::TempDir,
}

impl Site {
    fn start(test: &str, settings: &[&str]) -> Option<Self> {
        let there = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|said| said.status.success());
        if !geteuid().is_root() || !there("podman") || !Path::new("/bin/busybox").exists() {
            skip(test, "it needs root, podman and busybox-static");
            return None;
        }
        let own = ["podman.network=none", "podman.tls_verify=false", "isolation=none"];
        let settings = own.iter().chain(settings).map(|&setting| setting.to_owned()).collect();
        let shape = Shape { coordinators: 1, agents: 1, capacity: 4, settings };
        let cluster = Cluster::start(&shape).unwrap();
        wait_for("podman builds to be offered", PATIENCE, || {
            let worker = cluster.json(&["workers", "show", "agent-1"]);
            worker["executors"].to_string().contains("podman").then_some(())
        });
        let source = tempfile::Builder::new().prefix("helix-hostile-").tempdir().unwrap();
        dockerfiles::lay_out(source.path());
        let agent = cluster.member("agent", "agent-1");
        Some(Self { cluster, agent, source })
    }

    /// Submits a case; its Dockerfile becomes a file of the source that all have.
    fn submit(&self, case: &Case, text: &str) {
        let file = format!("of-{}", case.name);
        fs::write(self.source.path().join(&file), text).unwrap();
        let source = self.source.path().to_str().unwrap();
        let mut arguments =
            vec!["submit", "-o", "quiet", "--executor", "podman", "--no-output", "--id", case.name, "--source", source];
        if !case.flags.contains(&"-f") {
            arguments.extend(["-f", &file]);
        }
        arguments.extend(case.flags);
        let said = self.cluster.helix(&arguments);
        assert_eq!(said.code, 0, "{}: {}", case.name, said.stderr);
    }

    /// podman on the agent's store.
    fn podman(&self) -> Command {
        let data = self.agent.data_dir.join("podman");
        let mut command = Command::new("podman");
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", data.join("home"));
        command.env("CONTAINERS_CONF", data.join("containers.conf")).env("XDG_RUNTIME_DIR", data.join("runtime"));
        command.arg("--root").arg(data.join("storage")).arg("--runroot").arg(data.join("run"));
        command.arg("--tmpdir").arg(data.join("run/libpod")).stdin(Stdio::null());
        command
    }

    fn said(&self, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.podman().args(arguments).output().unwrap();
        assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8_lossy(&stdout).into_owned()
    }

    /// The container runtime that works here.
    fn runtime(&self) -> String {
        let worker = self.cluster.json(&["workers", "show", "agent-1"]);
        worker["podman"].as_str().unwrap().split(", ").nth(1).unwrap().to_owned()
    }

    /// Everything that is left of these builds.
    fn left(&self, builds: &[String]) -> Vec<String> {
        let mut found = traces::left_by_podman(&self.agent.data_dir, builds);
        let containers = self.said(&["ps", "--all", "--external", "--quiet"]);
        found.extend(containers.lines().map(|id| format!("container {id} that podman knows")));
        found
    }

    fn wait_clean(&self, builds: &[String]) {
        let mut last = Vec::new();
        for _ in 0..40 {
            last = self.left(builds);
            if last.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("left on the host: {last:#?}");
    }

    /// Throws the cache away; then the store has nothing left that nobody knows of.
    fn assert_nothing_but_the_cache(&self) {
        self.said(&["image", "prune", "--all", "--force"]);
        assert_eq!(self.said(&["images", "--all", "--quiet"]), "", "images that cannot be removed");
        let store = self.agent.data_dir.join("podman/storage");
        let layers = fs::read_dir(store.join("overlay")).into_iter().flatten().flatten();
        let layers: Vec<PathBuf> =
            layers.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.ends_with("l")).collect();
        assert_eq!(layers, Vec::<PathBuf>::new(), "layers that nobody knows of");
    }
}

/// What is wrong with how a case ended, its exit code and its words included.
fn complaint_of(site: &Site, case: &Case) -> Option<String> {
    if let Some(complaint) = complaint(&site.cluster, case) {
        return Some(complaint);
    }
    let status = site.cluster.json(&["status", case.name]);
    let expected = match case.ends {
        "succeeded" => 0,
        "exit" => i32::try_from(status["exit_code"].as_i64().unwrap_or(0)).unwrap(),
        "oom" => 137,
        "timeout" | "silence" => 124,
        "cancelled" => 122,
        "image_pull" | "internal" => 121,
        _ => 120,
    };
    let code = site.cluster.helix(&["wait", case.name]).code;
    if code != expected || (case.ends == "exit" && code == 0) {
        return Some(format!("{}: exit code {code}, not {expected}", case.name));
    }
    if ["endless-words-image", "line-of-100-megabytes-image"].contains(&case.name) {
        let log = site.cluster.helix(&["logs", case.name]).stdout;
        let bounded = log.len() < 2 * LOG_BYTES_MAX && log.contains("were dropped here") && log.contains("STEP 1/");
        if !bounded {
            return Some(format!("{}: a log of {} bytes", case.name, log.len()));
        }
    }
    let words = site.cluster.helix(&["status", case.name]).stdout;
    let told = case.ends == "succeeded" || words.contains(case.ends) || words.contains(&case.ends.replace('_', " "));
    (!told).then(|| format!("{}: status does not tell {:?}: {words}", case.name, case.ends))
}

fn assert_all(site: &Site, cases: &[Case]) {
    let complaints: Vec<String> = cases.iter().filter_map(|case| complaint_of(site, case)).collect();
    assert!(complaints.is_empty(), "{} of {}:\n{}", complaints.len(), cases.len(), complaints.join("\n"));
}

#[test]
fn hostile_podman_builds_end_as_they_must_and_leave_nothing() {
    let _alone = alone();
    let limits = ["limits.processes=100", "limits.open_files=1024"];
    let Some(site) = Site::start("hostile podman builds", &limits) else { return };
    let cases = dockerfiles::all();
    assert!(cases.len() >= 50, "{}", cases.len());
    let host_name = rustix::system::uname().nodename().to_owned();
    assert_eq!(site.cluster.helix(&["cluster", "policy", "set", &format!("log_bytes_max={LOG_BYTES_MAX}")]).code, 0);
    let victim = start_victim(&site.cluster);
    let places = places(&site.cluster, &victim);
    for case in &cases {
        site.submit(case, &places.fill(&case.script));
    }
    for case in &cases {
        wait_for(case.name, SUITE_PATIENCE, || {
            ["succeeded", "failed", "cancelled"].contains(&site.cluster.state(case.name).as_str()).then_some(())
        });
    }
    assert_all(&site, &cases);
    assert_eq!(rustix::system::uname().nodename(), host_name.as_c_str());
    fs::write(victim.join("go"), "").unwrap();
    assert_eq!(site.cluster.helix(&["wait", "victim"]).code, 0, "{}", site.cluster.helix(&["logs", "victim"]).stdout);
    let planted = fs::read_dir(&site.agent.data_dir).unwrap().flatten();
    let planted: Vec<PathBuf> =
        planted.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("planted")).collect();
    assert_eq!(planted, Vec::<PathBuf>::new(), "steps wrote on the host");
    // Whatever a Dockerfile says of itself, whose image it is we say.
    let log = site.cluster.helix(&["logs", "labels-image"]).stdout;
    let id = log.split("image id ").nth(1).unwrap().split(',').next().unwrap();
    let labels = site.said(&["image", "inspect", "--format", "{{.Labels}}", id]);
    for label in ["helix.build:labels-image", "helix.attempt:labels-image.0.1", "helix.cluster:dev"] {
        assert!(labels.contains(label), "{labels}");
    }
    let mut builds: Vec<String> = cases.iter().map(|case| case.name.to_owned()).collect();
    builds.push("victim".to_owned());
    builds.push(cancel_what_heeds_nothing(&site));
    for (name, id) in [
        ("onbuild-of-a-base", "../../../../../../../../../etc"),
        ("onbuild-above-caches", ".."),
        ("onbuild-runtimes-state", "../runtime"),
        ("onbuild-runtimes-real-state", "../../runtime"),
    ] {
        builds.push(refuse_instructions_of_a_base_image(&site, name, id));
    }
    refuse_tricks(&site);
    site.wait_clean(&builds);
    site.assert_nothing_but_the_cache();
}

/// A step that heeds no signal is cancelled all the same.
fn cancel_what_heeds_nothing(site: &Site) -> String {
    let script =
        format!("{BASE}RUN trap '' TERM INT HUP; echo be''gun; (setsid sleep 1000 &); while :; do sleep 1; done\n");
    let case = Case { name: "heeds-nothing", flags: &[], script, ends: "cancelled", says: "begun" };
    site.submit(&case, &case.script);
    wait_for("the step", PATIENCE, || {
        site.cluster.helix(&["logs", case.name]).stdout.lines().any(|line| line == "begun").then_some(())
    });
    assert_eq!(site.cluster.helix(&["cancel", case.name]).code, 0);
    let status = site.cluster.json(&["status", case.name]);
    assert_eq!((status["state"].as_str(), status["verified"].as_bool()), (Some("cancelled"), Some(true)), "{status}");
    assert_eq!(site.cluster.helix(&["wait", case.name]).code, 122);
    case.name.to_owned()
}

/// What would trick podman is refused at submit.
fn refuse_tricks(site: &Site) {
    let source = site.source.path().to_str().unwrap();
    for flags in [
        ["-f", "../x"],
        ["-f", "/etc/passwd"],
        ["-f", "a/../../x"],
        ["--target", "--privileged"],
        ["--target", "a\nb"],
        ["--build-arg", "-v=/:/host"],
        ["--build-arg", "A B=x"],
        ["--build-arg", "LD_PRELOAD=/x.so"],
        ["--build-arg", "=x"],
        ["--env", "HELIX_STEP_GUARD=own"],
        ["--push", "--all"],
        ["--platform", "linux/amd64,--privileged"],
    ] {
        let said = site.cluster.helix(&[
            "submit",
            "--executor",
            "podman",
            "--source",
            source,
            &format!("{}={}", flags[0], flags[1]),
        ]);
        assert_ne!(said.code, 0, "{flags:?}: {}", said.stdout);
    }
}

/// What a base image orders is in no Dockerfile that anybody reads beforehand.
fn refuse_instructions_of_a_base_image(site: &Site, name: &'static str, id: &str) -> String {
    let file = site.source.path().join("bringing");
    fs::write(&file, format!("{BASE}ONBUILD RUN --mount=type=cache,id={id},target=/m touch /m/refused\n")).unwrap();
    // In the store already, as if it had been pulled.
    let (file, source) = (file.to_str().unwrap(), site.source.path().to_str().unwrap());
    let runtime = site.runtime();
    let build = ["build", "--format=docker", "--network=none", "--tag=localhost/bringing", "--runtime", &runtime];
    site.said(&[&build[..], &["--file", file, source]].concat());
    let text = "FROM localhost/bringing\nRUN true\n".to_owned();
    let case = Case { name, flags: &[], script: text, ends: "policy", says: "of this host" };
    site.submit(&case, &case.script);
    site.cluster.helix(&["wait", case.name]);
    assert_all(site, std::slice::from_ref(&case));
    site.said(&["rmi", "localhost/bringing"]);
    case.name.to_owned()
}

/// Some of these are the infrastructure's fault, are tried again, and count against the worker; so they have a cluster of their own.
#[test]
fn podman_builds_beyond_their_share_end_for_that_reason() {
    let _alone = alone();
    let Some(site) = Site::start("podman builds beyond their share", &[]) else { return };
    let nobody = ports::free(1).unwrap();
    let mut cases = vec![
        Case {
            name: "fills-its-disk",
            flags: &["--disk", "40MiB"],
            script: format!(
                "{BASE}RUN i=0; while [ $i -lt 60 ]; do head -c 4000000 /dev/zero > /f$i; i=$((i+1)); sleep 0.1; done; \
                 exec sleep 1000\n"
            ),
            ends: "disk_full",
            says: "disk",
        },
        Case {
            name: "registry-of-nobody",
            flags: &[],
            script: format!("FROM 127.0.0.1:{nobody}/base:1\n"),
            ends: "image_pull",
            says: "base image",
        },
    ];
    let limits = site.cluster.json(&["workers", "show", "agent-1"]).to_string();
    if limits.contains("memory cgroup") {
        // The kernel kills what takes the memory; the step's shell could go on, and must not hide it.
        let script = format!("{BASE}RUN tail /dev/zero; echo killed: $?; exit 5\n");
        let (flags, ends): (&[&str], _) = (&["--memory", "128MiB"], "oom");
        cases.push(Case { name: "eats-memory", flags, script, ends, says: "memory" });
    } else {
        skip("podman builds beyond their share", "this host limits no memory");
    }
    for case in &cases {
        site.submit(case, &case.script);
    }
    for case in &cases {
        wait_for(case.name, SUITE_PATIENCE, || (site.cluster.state(case.name) == "failed").then_some(()));
    }
    assert_all(&site, &cases);
    // What a build asked for itself is the same elsewhere.
    let status = site.cluster.json(&["status", "fills-its-disk"]);
    assert_eq!(status["tasks"][0]["attempts"].as_array().map(Vec::len), Some(1), "{status}");
    site.wait_clean(&cases.iter().map(|case| case.name.to_owned()).collect::<Vec<_>>());
    site.assert_nothing_but_the_cache();
}

/// A build of our own in the agent's store, killed as it runs, leaves one of each kind.
#[test]
fn the_look_for_traces_of_podman_notices_each_kind() {
    let _alone = alone();
    let Some(site) = Site::start("the look for traces of podman", &[]) else { return };
    let builds = ["planted-image".to_owned()];
    site.wait_clean(&builds);
    let file = site.source.path().join("Dockerfile");
    fs::write(&file, format!("{BASE}RUN touch /begun; exec sleep 1000\n")).unwrap();
    let mut podman = Planted(
        site.podman()
            .args(["build", "--network=none", "--cgroup-parent=/helix-test-planted-image.0.1/build", "--runtime"])
            .arg(site.runtime())
            // Its own state would else stay where the runtime keeps it.
            .arg(format!("--runtime-flag=root={}", site.source.path().join("runtime").display()))
            .arg("--file")
            .arg(&file)
            .arg(site.source.path())
            .env("TMPDIR", site.source.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let kinds = ["process", "mount", "container", "control group"];
    let mut noticed = Vec::new();
    let has = |noticed: &[String], kind: &str| noticed.iter().any(|line| line.starts_with(kind));
    wait_for("the step", PATIENCE, || {
        noticed = traces::left_by_podman(&site.agent.data_dir, &builds);
        kinds.iter().all(|kind| has(&noticed, kind)).then_some(())
    });
    podman.0.kill().unwrap();
    podman.0.wait().unwrap();
    noticed = site.left(&builds);
    for kind in kinds {
        assert!(has(&noticed, kind), "{kind}: {noticed:?}");
    }
    assert!(noticed.iter().any(|line| line.contains("that podman knows")), "{noticed:?}");
    for pid in traces::in_groups_of(&builds) {
        signal(pid, Signal::KILL);
    }
    wait_for("the step's end", PATIENCE, || traces::in_groups_of(&builds).is_empty().then_some(()));
    let containers = site.said(&["ps", "--all", "--external", "--quiet"]);
    let mut remove = vec!["rm", "--force"];
    remove.extend(containers.lines());
    site.said(&remove);
    for line in site.left(&builds) {
        if let Some(group) = line.strip_prefix("control group ") {
            remove_groups(Path::new(group));
        }
    }
    let work = site.agent.data_dir.join("work/planted/planted-image.0.1");
    fs::create_dir_all(&work).unwrap();
    assert!(has(&site.left(&builds), "workdir"), "{:?}", site.left(&builds));
    fs::remove_dir_all(work.parent().unwrap()).unwrap();
    site.wait_clean(&builds);
}

/// Dies with the test.
struct Planted(Child);

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn remove_groups(at: &Path) {
    for entry in fs::read_dir(at).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_groups(&entry.path());
    }
    let _ = fs::remove_dir(at);
}
