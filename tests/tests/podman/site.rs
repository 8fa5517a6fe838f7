//! A cluster that builds images, a repository to build, a registry to push to, and podman to look at it all.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use helix_common::ports;
use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, wait_for};
use helix_tests::skip::skip;
use serde_json::Value;

/// A base for images: everything that busybox can do.
pub(crate) const BASE: &str =
    "FROM scratch AS base\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

/// Why no image can be built here; such a test is skipped, visibly.
pub(crate) fn missing(test: &str) -> bool {
    let there = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|said| said.status.success());
    let why = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !there("podman") {
        "there is no podman"
    } else if !Path::new("/bin/busybox").exists() {
        "there is no /bin/busybox (busybox-static)"
    } else if !there("docker-registry") {
        "there is no docker-registry"
    } else {
        return false;
    };
    skip(test, why);
    true
}

/// A cluster whose agents build images.
pub(crate) struct Site {
    pub(crate) cluster: Cluster,
    /// For whatever a test needs.
    pub(crate) dir: tempfile::TempDir,
}

impl Site {
    pub(crate) fn start(agents: u16, settings: &[&str]) -> Self {
        let mut all = vec!["podman.network=none".to_owned(), "podman.tls_verify=false".to_owned()];
        all.extend(settings.iter().map(|setting| (*setting).to_owned()));
        let shape = Shape { coordinators: 1, agents, settings: all, ..Shape::default() };
        let cluster = Cluster::start(&shape).unwrap();
        let site = Self { cluster, dir: tempfile::Builder::new().prefix("helix-podman-").tempdir().unwrap() };
        for agent in site.cluster.all("agent") {
            site.wait_offer(&agent.id, true);
        }
        site
    }

    /// Waits until a worker offers podman builds, or no longer does.
    pub(crate) fn wait_offer(&self, worker: &str, offered: bool) -> Value {
        wait_for(&format!("{worker} to offer podman: {offered}"), PATIENCE, || {
            let worker = self.cluster.json(&["workers", "show", worker]);
            let executors = worker["executors"].as_array().cloned().unwrap_or_default();
            (executors.contains(&Value::from("podman")) == offered).then_some(worker)
        })
    }

    /// A directory with busybox and these files in it.
    pub(crate) fn source(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::copy("/bin/busybox", path.join("busybox")).unwrap();
        for (name, text) in files {
            fs::write(path.join(name), text).unwrap();
        }
        path
    }

    /// A repository with these files in it; gives its URL.
    pub(crate) fn repository(&self, name: &str, files: &[(&str, &str)]) -> String {
        let path = self.source(name, files);
        let git = |arguments: &[&str]| {
            let mut command = Command::new("git");
            command.arg("-C").arg(&path).args(["-c", "user.name=t", "-c", "user.email=t@example.com"]);
            assert!(command.args(arguments).stdout(Stdio::null()).status().unwrap().success(), "git {arguments:?}");
        };
        git(&["init", "--quiet", "--initial-branch=main"]);
        git(&["add", "--all"]);
        git(&["commit", "--quiet", "--message=all"]);
        format!("file://{}", path.display())
    }

    /// Submits, waits and gives the exit code and the status.
    pub(crate) fn build(&self, arguments: &[&str]) -> (i32, Value) {
        let mut all = vec!["submit", "--executor", "podman", "--wait", "-o", "json"];
        all.extend_from_slice(arguments);
        let said = self.cluster.helix(&all);
        let status = serde_json::from_str(&said.stdout);
        (said.code, status.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {} {}", said.stdout, said.stderr)))
    }

    /// Submits and gives the id.
    pub(crate) fn submit(&self, arguments: &[&str]) -> String {
        let mut all = vec!["submit", "--executor", "podman", "-o", "quiet"];
        all.extend_from_slice(arguments);
        let said = self.cluster.helix(&all);
        assert_eq!(said.code, 0, "{arguments:?}: {}", said.stderr);
        said.stdout.trim().to_owned()
    }

    pub(crate) fn log(&self, id: &str) -> String {
        self.cluster.helix(&["logs", id]).stdout
    }

    /// Waits until a build's log has a line with this in it.
    pub(crate) fn wait_log(&self, id: &str, words: &str) {
        wait_for(&format!("{words:?} in the log of {id}"), PATIENCE, || self.log(id).contains(words).then_some(()));
    }

    /// podman on an agent's store.
    pub(crate) fn podman(&self, agent: &Member, arguments: &[&str]) -> Output {
        let data = agent.data_dir.join("podman");
        let run = data.join("run");
        let mut command = Command::new("podman");
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", data.join("home"));
        command.env("CONTAINERS_CONF", data.join("containers.conf")).env("XDG_RUNTIME_DIR", data.join("runtime"));
        command.arg("--root").arg(data.join("storage")).arg("--runroot").arg(&run);
        command.arg("--tmpdir").arg(run.join("libpod")).args(arguments).output().unwrap()
    }

    /// The build containers in an agent's store.
    pub(crate) fn containers(&self, agent: &Member) -> String {
        let said = self.podman(agent, &["ps", "--all", "--external", "--quiet"]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// Nothing of any build is left: no build container, no mount of one, no process, no cgroup.
    pub(crate) fn assert_clean(&self, id: &str) {
        for agent in self.cluster.all("agent") {
            assert_eq!(self.containers(&agent), "", "build containers in the store of {}", agent.id);
            let storage = agent.data_dir.join("podman/storage");
            let below = |mount: &PathBuf| mount.starts_with(&storage) && mount.parent() != Some(&storage);
            let mounts: Vec<PathBuf> = mounts().into_iter().filter(below).collect();
            assert_eq!(mounts, Vec::<PathBuf>::new());
        }
        let group = format!("helix-{id}.");
        let mut left = Vec::new();
        let mut pending = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(dir) = pending.pop() {
            let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
            for path in entries.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()) {
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&group)) {
                    left.push(path.clone());
                }
                pending.push(path);
            }
        }
        assert_eq!(left, Vec::<PathBuf>::new(), "cgroups of {id}");
    }

    /// Ends the cluster; then nothing may be mounted in its directory.
    pub(crate) fn end(mut self) {
        self.cluster.stop().unwrap();
        let root = self.cluster.root().to_owned();
        let left: Vec<PathBuf> = mounts().into_iter().filter(|mount| mount.starts_with(&root)).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "mounts after the end");
    }
}

fn mounts() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
}

/// The live processes whose command line is this.
pub(crate) fn running(line: &str) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let said = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&said).trim_end_matches('\0').replace('\0', " ") == line
    })
    .collect()
}

/// Debian's registry on a port of its own.
pub(crate) struct Registry {
    process: Child,
    pub(crate) address: String,
}

impl Registry {
    pub(crate) fn start(dir: &Path) -> Self {
        let port = ports::free(1).unwrap();
        Self::start_at(dir, port)
    }

    pub(crate) fn start_at(dir: &Path, port: u16) -> Self {
        Self::start_with(dir, port, "")
    }

    /// One that asks who it is, and knows these users.
    pub(crate) fn start_with_passwords(dir: &Path, port: u16, passwords: &str) -> Self {
        let file = dir.join("passwords");
        fs::write(&file, passwords).unwrap();
        Self::start_with(dir, port, &format!("auth:\n  htpasswd: {{realm: test, path: {}}}\n", file.display()))
    }

    fn start_with(dir: &Path, port: u16, more: &str) -> Self {
        let address = format!("127.0.0.1:{port}");
        let data = dir.join("registry");
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: {address}\n{more}",
            data.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(dir.join("registry.log")).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let registry = Self { process: command.spawn().unwrap(), address };
        wait_for("the registry", PATIENCE, || TcpStream::connect(&registry.address).is_ok().then_some(()));
        registry
    }

    /// The digest and the text of a manifest, as the registry has them.
    pub(crate) fn manifest(&self, name: &str, tag: &str) -> Option<(String, String)> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
        write!(
            stream,
            "GET /v2/{name}/manifests/{tag} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let digest = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("docker-content-digest").then(|| value.trim_start_matches("sha256:").to_owned())
        })?;
        head.starts_with("HTTP/1.1 200").then(|| (digest, body.to_owned()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
