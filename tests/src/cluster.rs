//! A real cluster for tests, demos and benchmarks: `helix dev` as a child, and the means to break it.
//!
//! Everything goes through the programs' own faces: the command line, the files that `helix dev` writes, signals.
//! Dropping a cluster ends it, and fails the test when any process of it is left.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use helix_common::ports;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;

/// Patience with conditions that must come true; far beyond what they take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Coordinators.
    pub coordinators: u16,
    /// Agents.
    pub agents: u16,
    /// Concurrent builds of an agent.
    pub capacity: u32,
    /// `KEY=VALUE` of every agent's configuration, or `coordinator.KEY=VALUE` of every coordinator's.
    pub settings: Vec<String>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { coordinators: 3, agents: 2, capacity: 4, settings: Vec::new() }
    }
}

/// A process of the cluster, as `cluster.json` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Member {
    /// `coordinator` or `agent`.
    pub role: String,
    /// Node id or name.
    pub id: String,
    /// Process id at the time of reading.
    pub pid: Option<i32>,
    /// What alone starts it again.
    pub argv: Vec<String>,
    /// Where clients dial it.
    pub grpc: Option<String>,
    /// Its data.
    pub data_dir: PathBuf,
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Exit code; 255 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A running cluster.
pub struct Cluster {
    dev: Child,
    root: PathBuf,
    keep: Option<tempfile::TempDir>,
    /// Processes started again by [`Cluster::start_again`]: role, id, child.
    again: Mutex<Vec<(String, String, Child)>>,
    /// Members that `helix dev` knows nothing of.
    adopted: Mutex<Vec<Member>>,
    /// What its processes have in their environment beside what this one has.
    environment: Vec<(String, String)>,
}

/// Where the programs are; builds them first, once in a process, so that tests never run old ones.
///
/// # Panics
/// When they cannot be built.
pub fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(directory) = std::env::var_os("HELIX_BIN_DIR") {
            return PathBuf::from(directory);
        }
        let own = std::env::current_exe().expect("the path of this program");
        let mut directory = own.parent().expect("a program is in a directory");
        if directory.ends_with("deps") {
            directory = directory.parent().expect("deps is in a directory");
        }
        let mut build = Command::new(env!("CARGO"));
        // What cargo tells tests about their own package would make build scripts of libraries run again.
        for (name, _) in std::env::vars_os() {
            let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
            if name.to_str().is_some_and(|name| told.iter().any(|prefix| name.starts_with(prefix))) {
                build.env_remove(name);
            }
        }
        build.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--workspace", "--bins"]);
        if directory.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the programs do not build");
        directory.to_owned()
    })
}

/// Waits until `look` finds something.
///
/// # Panics
/// When it has not within `patience`.
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} for: {what}");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process is alive, and not a zombie.
#[must_use]
pub fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// The most memory a process ever had resident, in KiB.
#[must_use]
pub fn peak_resident_kib(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

impl Cluster {
    /// Starts a cluster in a temporary directory.
    ///
    /// # Errors
    /// When it does not become ready; says what it said.
    pub fn start(shape: &Shape) -> anyhow::Result<Self> {
        Self::start_with(shape, &[])
    }

    /// As [`Self::start`]; its processes, those started again too, have these variables.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(shape: &Shape, environment: &[(&str, String)]) -> anyhow::Result<Self> {
        let keep = tempfile::Builder::new().prefix("helix-test-").tempdir()?;
        let root = keep.path().canonicalize()?;
        let mut cluster = Self::launch(&root, shape, environment)?;
        cluster.keep = Some(keep);
        Ok(cluster)
    }

    /// Starts a cluster in a directory, which may hold an earlier one's data.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_in(root: &Path, shape: &Shape) -> anyhow::Result<Self> {
        Self::launch(root, shape, &[])
    }

    fn launch(root: &Path, shape: &Shape, environment: &[(&str, String)]) -> anyhow::Result<Self> {
        let environment: Vec<_> = environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        fs::create_dir_all(root)?;
        let talk = root.join("dev.log");
        let mut command = Command::new(programs().join("helix"));
        command.arg("dev").arg("--data-dir").arg(root);
        command.args(["--coordinators", &shape.coordinators.to_string()]);
        // Given out in one place for all clusters of a test program; a cluster that is there keeps its own.
        command.args(["--base-port", &ports::free(shape.coordinators * 3)?.to_string()]);
        command.args(["--agents", &shape.agents.to_string(), "--capacity", &shape.capacity.to_string()]);
        // Trying podman takes each agent a second, and few tests build images.
        if !shape.settings.iter().any(|setting| setting.starts_with("podman.")) {
            command.args(["--set", "agent.podman.enabled=false"]);
        }
        // How full the disk of this machine is must not decide.
        if !shape.settings.iter().any(|setting| setting.starts_with("disk.")) {
            command.args(["--set", "agent.disk.reserve_bytes=0", "--set", "agent.disk.reserve_inodes=0"]);
        }
        for setting in &shape.settings {
            let role = if setting.starts_with("coordinator.") { "" } else { "agent." };
            command.args(["--set", &format!("{role}{setting}")]);
        }
        command.envs(environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&talk)?);
        let mut dev = command.spawn().context("helix dev does not start")?;
        let stdout = dev.stdout.take().context("stdout is piped")?;
        let (line_tx, line_rx) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = line_tx.send(line);
            }
        });
        let cluster = Self {
            dev,
            root: root.to_owned(),
            keep: None,
            again: Mutex::new(Vec::new()),
            adopted: Mutex::default(),
            environment,
        };
        match line_rx.recv_timeout(PATIENCE) {
            Ok(line) if line.starts_with("ready context=") => Ok(cluster),
            other => {
                let said = fs::read_to_string(&talk).unwrap_or_default();
                bail!("the cluster did not become ready ({other:?}): {said}")
            }
        }
    }

    /// The cluster's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The operator's context.
    #[must_use]
    pub fn context(&self) -> PathBuf {
        self.root.join("context.toml")
    }

    /// A context that knows one coordinator alone.
    pub fn context_of(&self, member: &Member) -> PathBuf {
        let text = fs::read_to_string(self.context()).expect("the context is readable");
        let endpoint = member.grpc.as_deref().expect("a coordinator");
        let lines: Vec<String> =
            text.lines()
                .map(|line| {
                    if line.starts_with("endpoints") { format!("endpoints = [{endpoint:?}]") } else { line.to_owned() }
                })
                .collect();
        let path = self.root.join(format!("context-{}.toml", member.id));
        fs::write(&path, lines.join("\n")).expect("a context can be written");
        path
    }

    /// Every process of the cluster, with its present pid.
    pub fn members(&self) -> Vec<Member> {
        let text = fs::read_to_string(self.root.join("cluster.json")).expect("cluster.json is readable");
        let mut members: Vec<Member> = serde_json::from_str(&text).expect("cluster.json is JSON");
        members.extend(self.adopted.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
        let again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        for member in &mut members {
            let latest = again.iter().rev().find(|(role, id, _)| *role == member.role && *id == member.id);
            if let Some((_, _, child)) = latest {
                member.pid = i32::try_from(child.id()).ok();
            }
        }
        members
    }

    /// Takes in a member that [`Self::start_again`] is to start for the first time.
    pub fn adopt(&self, member: Member) {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner).push(member);
    }

    /// One process.
    pub fn member(&self, role: &str, id: &str) -> Member {
        let found = self.members().into_iter().find(|member| member.role == role && member.id == id);
        found.unwrap_or_else(|| panic!("no {role} {id}"))
    }

    /// All processes of a role.
    pub fn all(&self, role: &str) -> Vec<Member> {
        self.members().into_iter().filter(|member| member.role == role).collect()
    }

    /// The coordinator that leads, once one does.
    pub fn leader(&self) -> Member {
        let id = wait_for("a leader", PATIENCE, || {
            let said = self.helix(&["cluster", "status", "-o", "json", "--connect-timeout", "5s"]);
            let status: Value = serde_json::from_str(&said.stdout).ok()?;
            status["leader"].as_u64()
        });
        self.member("coordinator", &id.to_string())
    }

    /// Kills a process and waits until it is gone.
    pub fn kill(&self, member: &Member) {
        let pid = member.pid.expect("it runs");
        signal(pid, Signal::KILL);
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, _, child) in again.iter_mut().filter(|(_, _, child)| i32::try_from(child.id()) == Ok(pid)) {
            let _ = child.wait();
        }
        wait_for("the process to be gone", PATIENCE, || (!alive(pid)).then_some(()));
    }

    /// Starts a process again, by its argv alone.
    pub fn start_again(&self, member: &Member) {
        let log = self.root.join("logs").join(format!("{}-{}-again.log", member.role, member.id));
        let log = fs::OpenOptions::new().create(true).append(true).open(log).expect("a log can be opened");
        let mut command = Command::new(&member.argv[0]);
        command
            .args(&member.argv[1..])
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a descriptor"))
            .stdout(log);
        let child = command.spawn().expect("the process starts again");
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        again.push((member.role.clone(), member.id.clone(), child));
    }

    /// The exit status of a process that [`Self::start_again`] started, once it has ended, and what it logged.
    pub fn outcome(&self, member: &Member) -> (ExitStatus, String) {
        let status = wait_for("the process to end", PATIENCE, || {
            let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
            let latest = again.iter_mut().rev().find(|(role, id, _)| *role == member.role && *id == member.id);
            latest.and_then(|(_, _, child)| child.try_wait().ok().flatten())
        });
        let log = self.root.join("logs").join(format!("{}-{}-again.log", member.role, member.id));
        (status, fs::read_to_string(log).unwrap_or_default())
    }

    /// A `helix` command on this cluster.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_with(&self.context(), arguments)
    }

    /// A `helix` command with a context.
    #[must_use]
    pub fn command_with(&self, context: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join("helix"));
        command.arg("--context").arg(context).args(arguments).stdin(Stdio::null());
        for name in ["CONTEXT", "FORMAT", "COLOR", "CONNECT_TIMEOUT"] {
            command.env_remove(format!("HELIX_{name}"));
        }
        command
    }

    /// Runs `helix` on this cluster.
    pub fn helix(&self, arguments: &[&str]) -> Said {
        said(&self.command(arguments).output().expect("helix runs"))
    }

    /// Runs `helix` with a context.
    pub fn helix_with(&self, context: &Path, arguments: &[&str]) -> Said {
        said(&self.command_with(context, arguments).output().expect("helix runs"))
    }

    /// Runs `helix`, which must succeed, and reads its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        // Before `--`, which ends the options.
        let place = all.iter().position(|argument| *argument == "--").unwrap_or(all.len());
        all.splice(place..place, ["-o", "json"]);
        let said = self.helix(&all);
        assert_eq!(said.code, 0, "{all:?}: {}", said.stderr);
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{all:?}: {error}: {}", said.stdout))
    }

    /// Submits a shell line that makes nothing; gives the id.
    pub fn submit(&self, line: &str) -> String {
        let said = self.helix(&["submit", "-o", "quiet", "--no-output", "--", line]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        said.stdout.trim().to_owned()
    }

    /// A build's state.
    pub fn state(&self, id: &str) -> String {
        self.json(&["status", id])["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits for a build's state.
    pub fn wait_state(&self, id: &str, state: &str) {
        wait_for(&format!("{id} to be {state}"), PATIENCE, || (self.state(id) == state).then_some(()));
    }

    /// The processes of this cluster: those whose command line, working directory or open files are in its directory.
    #[must_use]
    pub fn processes(&self) -> Vec<(i32, String)> {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid != own && alive(*pid))
            .filter_map(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                let helix = line.contains("helix-") || line.contains("helix ");
                (line.contains(&self.root.display().to_string()) || (helix && self.is_used_by(pid)))
                    .then_some((pid, line))
            })
            .collect()
    }

    fn is_used_by(&self, pid: i32) -> bool {
        let below = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(&self.root));
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        below(PathBuf::from(format!("/proc/{pid}/cwd"))) || open.map(|entry| entry.path()).any(below)
    }

    /// Ends the cluster in order; gives how `helix dev` ended.
    ///
    /// # Errors
    /// When it does not end, or leaves processes.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        if self.dev.try_wait()?.is_none() {
            signal(i32::try_from(self.dev.id())?, Signal::TERM);
        }
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        for round in 0..2 {
            for (role, _, child) in again.iter_mut() {
                if (role == "agent") == (round == 0) && child.try_wait()?.is_none() {
                    signal(i32::try_from(child.id())?, Signal::TERM);
                    end(child, Duration::from_secs(5));
                }
            }
        }
        drop(again);
        if !end(&mut self.dev, Duration::from_secs(25)) {
            bail!("helix dev did not end within 20 s");
        }
        let left = self.processes();
        for (pid, _) in &left {
            signal(*pid, Signal::KILL);
        }
        if left.is_empty() { Ok(()) } else { bail!("processes are left: {left:?}") }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let stopped = self.stop();
        if std::thread::panicking() {
            if let Some(keep) = self.keep.take() {
                eprintln!("the cluster's directory is kept: {}", keep.keep().display());
            }
        } else if let Err(error) = stopped {
            panic!("{error}");
        }
    }
}

/// Waits for a child's end; kills it after `patience`. Whether it ended by itself.
fn end(child: &mut Child, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok(Some(_)) = child.try_wait() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

fn said(output: &Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(255),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
