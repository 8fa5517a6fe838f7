//! A build host: the real agent and the real runner, in a directory of their own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, PATIENCE};

/// A host's directory, and the agent that runs on it.
pub(crate) struct Host {
    pub(crate) dir: PathBuf,
    agent: Option<Child>,
    /// What the agent is started by: it ends in becoming it.
    wrapper: Vec<String>,
}

/// The runner stands beside the agent; a test of this package alone has to build it.
fn runner() -> &'static Path {
    static RUNNER: OnceLock<PathBuf> = OnceLock::new();
    RUNNER.get_or_init(|| {
        let path = Path::new(env!("CARGO_BIN_EXE_helix-agent")).with_file_name("helix-runner");
        if path.exists() {
            return path;
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let target = path.parent().unwrap().parent().unwrap();
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "-p", "helix-runner", "--bin", "helix-runner", "--target-dir"]).arg(target);
        assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(), "the runner does not build");
        path
    })
}

impl Host {
    pub(crate) fn new(dir: &Path, cluster: &Cluster) -> Self {
        Self::wrapped(dir, cluster, &[], "")
    }

    /// A host where no cgroup can be made: an empty file system hides them. `None` where namespaces are forbidden.
    pub(crate) fn without_cgroups(dir: &Path, cluster: &Cluster) -> Option<Self> {
        let hide = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
        let user = if rustix::process::geteuid().is_root() { "--mount" } else { "--map-root-user" };
        let wrapper = ["unshare", user, "--mount", "sh", "-c", hide, "sh"];
        let works = Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").stderr(Stdio::null()).status();
        works.is_ok_and(|status| status.success()).then(|| Self::wrapped(dir, cluster, &wrapper, ""))
    }

    /// A host whose configuration has more tables.
    pub(crate) fn with(dir: &Path, cluster: &Cluster, more: &str) -> Self {
        Self::wrapped(dir, cluster, &[], more)
    }

    fn wrapped(dir: &Path, cluster: &Cluster, wrapper: &[&str], more: &str) -> Self {
        let tls = &cluster.tls;
        // How full the disk of this machine is must not decide.
        let no_reserve = if more.contains("[disk]") { "" } else { "[disk]\nreserve_bytes = 0\nreserve_inodes = 0\n" };
        let text = format!(
            "name = 'w1'\ncoordinators = ['{}']\ncapacity = 8\nisolation = 'none'\ndata_dir = '{}'\nrunner_path = '{}'\n\
             [tls]\nca = '{}'\ncert = '{}'\nkey = '{}'\n\
             [exec]\nallow_job_commands = true\n[source]\nallow_file_urls = true\n\
             [podman]\nenabled = false\n{no_reserve}{more}",
            cluster.endpoint,
            dir.join("data").display(),
            runner().display(),
            tls.ca.display(),
            tls.cert.display(),
            tls.key.display(),
        );
        std::fs::write(dir.join("agent.toml"), text).unwrap();
        let wrapper = wrapper.iter().map(|&word| word.to_owned()).collect();
        let mut host = Self { dir: dir.to_owned(), agent: None, wrapper };
        host.start();
        host
    }

    fn command(&self) -> Command {
        let agent = env!("CARGO_BIN_EXE_helix-agent").to_owned();
        let words = self.wrapper.iter().cloned().chain([agent]).collect::<Vec<_>>();
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg("--config")
            .arg(self.dir.join("agent.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    pub(crate) fn start(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log")).unwrap();
        self.agent = Some(self.command().stderr(Stdio::from(log)).spawn().unwrap());
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.agent.as_ref().unwrap().id();
        rustix::process::kill_process(rustix::process::Pid::from_raw(id.cast_signed()).unwrap(), signal).unwrap();
    }

    /// Has it read its files again.
    pub(crate) fn reload(&self) {
        self.signal(rustix::process::Signal::HUP);
    }

    pub(crate) fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    pub(crate) fn kill(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        self.agent.take().unwrap().wait().unwrap();
    }

    pub(crate) async fn detach(&self) -> bool {
        let mut command = self.command();
        let run = move || command.arg("detach").status().unwrap().success();
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    /// Waits for the agent to exit by itself, and says whether it was content.
    pub(crate) async fn exited(&mut self) -> bool {
        let mut agent = self.agent.take().unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = agent.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < end, "the agent does not exit: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// The most memory that the agent had at once.
    pub(crate) fn peak_memory_bytes(&self) -> u64 {
        let id = self.agent.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Names in a directory of the agent's.
    pub(crate) fn names_in(&self, part: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.join("data").join(part)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    /// Workdirs that exist.
    pub(crate) fn workdirs(&self) -> Vec<String> {
        let roots = self.names_in("work");
        roots.iter().flat_map(|root| self.names_in(&format!("work/{root}"))).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent said:\n{}", self.log());
        }
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

/// Waits for a fact about the host.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
