//! Hosts in miniature: namespaces with an address, a name and file systems of their own, joined by a bridge.
//!
//! A host is its first process. Its network, mounts and, on all but `admin`, its processes end with it, and it ends
//! with this test, however that ends: nothing has a name outside, so nothing can be left. The bridge lives in a
//! namespace without a host, so that the machine's own network is not touched.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use helix_tests::cluster::{alive, wait_for};

/// How long a step of the runbook may take.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// The programs that hosts are made with.
const TOOLS: &[&str] = &[
    "ip", "unshare", "nsenter", "setpriv", "setsid", "runuser", "useradd", "mount", "hostname", "curl", "stat", "tar",
];

/// What a script did.
#[derive(Debug)]
pub(crate) struct Done {
    /// Whether it ended with 0.
    pub(crate) success: bool,
    /// Standard output and standard error together.
    pub(crate) output: String,
}

struct Host {
    name: String,
    /// `unshare`, whose end is the host's.
    child: Child,
    /// The host's first process.
    pid: i32,
    /// Its network, as the kernel names it.
    network: PathBuf,
}

/// The hosts of one test.
pub(crate) struct Hosts {
    directory: tempfile::TempDir,
    bridge: Host,
    hosts: Vec<Host>,
}

/// Why hosts cannot be made here; `None` when they can.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::getuid().is_root() {
        return Some("only root may make namespaces".to_owned());
    }
    let paths: Vec<PathBuf> =
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).chain(["/usr/sbin".into()]).collect();
    let absent: Vec<&&str> = TOOLS.iter().filter(|tool| !paths.iter().any(|path| path.join(tool).is_file())).collect();
    if !absent.is_empty() {
        return Some(format!("programs are missing: {absent:?}"));
    }
    let directory = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs t \"$0\" && mkdir \"$0/u\" \"$0/w\" && \
                  mount -t overlay o -o lowerdir=/etc,upperdir=\"$0/u\",workdir=\"$0/w\" /etc";
    let mut probe = Command::new("unshare");
    probe
        .args(["--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", script])
        .arg(directory.path());
    let output = probe.output().unwrap();
    (!output.status.success())
        .then(|| format!("no namespaces or overlays: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Hosts {
    /// Makes hosts with addresses 10.74.0.1 onwards, in the order given. They resolve each other as `NAME` and
    /// `NAME.example.com`. The first has no processes of its own: from there the others are reached.
    pub(crate) fn start(names: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("helix-hosts-").tempdir().unwrap();
        let tools = directory.path().join("tools");
        fs::create_dir(&tools).unwrap();
        for (name, text) in [("systemctl", include_str!("systemctl.sh")), ("scp", include_str!("scp.sh"))] {
            write_program(&tools.join(name), text);
        }
        let bridge =
            start_host(directory.path(), "bridge", &["--net"], "ip link set lo up; echo ready; exec sleep 86400");
        run_in(&bridge, "ip link add br0 type bridge && ip link set br0 up");
        let mut made = Self { directory, bridge, hosts: Vec::new() };
        for (index, name) in names.iter().enumerate() {
            let spaces: &[&str] = if index == 0 {
                &["--mount", "--net", "--uts"]
            } else {
                &["--mount", "--net", "--uts", "--ipc", "--pid", "--mount-proc"]
            };
            let host = start_host(made.directory.path(), name, spaces, include_str!("host.sh"));
            made.connect(&host, index + 1);
            made.hosts.push(host);
        }
        let table: String =
            (1..).zip(names).map(|(number, name)| format!("10.74.0.{number} {name}.example.com {name}\n")).collect();
        let script = format!("printf '127.0.0.1 localhost\\n{}' > /etc/hosts", table.replace('\n', "\\n"));
        for name in names {
            assert!(made.run(name, &script).success);
        }
        made
    }

    fn connect(&self, host: &Host, number: usize) {
        let pid = host.pid;
        run_in(
            &self.bridge,
            &format!(
                "ip link add port{number} type veth peer name eth0 netns {pid} && \
                 ip link set port{number} master br0 up && \
                 nsenter --target {pid} --net ip addr add 10.74.0.{number}/24 dev eth0 && \
                 nsenter --target {pid} --net ip link set eth0 up"
            ),
        );
    }

    /// Runs a script on a host, as root. Ends it after a while.
    pub(crate) fn run(&self, host: &str, script: &str) -> Done {
        let found = self.hosts.iter().find(|candidate| candidate.name == host);
        let found = found.unwrap_or_else(|| panic!("there is no host {host}"));
        let path = self.directory.path().join("output");
        let output = File::create(&path).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter", "--target", &found.pid.to_string()]);
        command.args(["--mount", "--net", "--uts"]);
        if host != self.hosts[0].name {
            command.args(["--ipc", "--pid"]);
        }
        command.args(["sh", "-euc", script]).env_clear().stdin(Stdio::null());
        let tools = self.directory.path().join("tools");
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display()));
        command.env("HOME", "/root").env("LANG", "C.UTF-8").env("HOSTS", self.directory.path());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let mut child = command.spawn().unwrap();
        let deadline = std::time::Instant::now() + STEP_LIMIT;
        let success = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.success();
            }
            if std::time::Instant::now() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                break false;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        Done { success, output: String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned() }
    }

    /// The ends of the daemons' logs, for people.
    pub(crate) fn logs(&self) -> String {
        let script = "for log in /var/log/helix-*.log; do [ -e \"$log\" ] && tail -n 15 \"$log\"; done; true";
        let mut text = String::new();
        for host in &self.hosts[1..] {
            text.push_str(&format!("--- {}\n{}", host.name, self.run(&host.name, script).output));
        }
        text
    }

    fn end(&mut self) {
        for host in self.hosts.iter_mut().chain([&mut self.bridge]) {
            let _ = host.child.kill();
            let _ = host.child.wait();
        }
        for host in self.hosts.iter().chain([&self.bridge]) {
            wait_for(&format!("{} to be gone", host.name), Duration::from_secs(10), || {
                let left = processes_in(&host.network);
                (!alive(host.pid) && left.is_empty()).then_some(())
            });
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
            return;
        }
        // A second panic would hide the first.
        for host in self.hosts.iter_mut().chain([&mut self.bridge]) {
            let _ = host.child.kill();
            let _ = host.child.wait();
        }
    }
}

/// Every process that sees this network.
fn processes_in(network: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    entries.filter(|process| fs::read_link(process.join("ns/net")).is_ok_and(|found| found == network)).collect()
}

fn write_program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Starts a host's first process and waits until it says that it is ready.
fn start_host(directory: &Path, name: &str, spaces: &[&str], script: &str) -> Host {
    let own = directory.join(name);
    fs::create_dir(&own).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]).args(spaces);
    command.args(["sh", "-c", script, "init"]).arg(&own).arg(name);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n", "{name} does not start");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let pid = children.trim().parse().unwrap();
    fs::write(directory.join(format!("{name}.pid")), children.trim()).unwrap();
    let network = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    Host { name: name.to_owned(), child, pid, network }
}

/// Runs a script in a host's network alone, with this machine's processes in view.
fn run_in(host: &Host, script: &str) {
    let mut command = Command::new("nsenter");
    command.args(["--target", &host.pid.to_string(), "--net", "sh", "-euc", script]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}: {script}: {}", host.name, String::from_utf8_lossy(&output.stderr));
}
