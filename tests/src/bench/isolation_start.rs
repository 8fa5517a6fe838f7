//! What isolating a command costs: `true` run bare, in the runner's namespaces, under bubblewrap and under podman, in turns.
//!
//! Ours is what namespaces add to a whole run of `helix-runner`; the peer is what `bwrap`, run directly and without any of us,
//! adds to a bare run. Both show the same parts of the host. Times are of this machine as it is, so medians of many.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_runner::isolation::{Entry, Isolation, Network, Tool};
use helix_runner::{AttemptDir, End, Order, Outcome, Privileges, User};

use super::Settings;
use super::figure::{Figure, Goal, Pair, Row, Times, Unit};
use crate::cluster::programs;

/// Podman takes half a second: once in so many rounds is enough for a median.
const ROUNDS_A_CONTAINER: usize = 8;

/// Parts of `/etc` that both show: about as many as an agent shows.
const ETC_COUNT: usize = 40;

/// Whom builds run as where we are root.
const BUILD_USER: User = User { uid: 0x7000_0001, gid: 0x7000_0001 };

/// The parts of a round.
const PARTS: [&str; 5] =
    ["true alone", "true under bwrap", "runner with true", "runner with true in namespaces", "podman run"];

/// Measures; the pair is of what isolation adds in the medians of all rounds.
///
/// # Errors
/// When a run fails.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let scratch = tempfile::Builder::new().prefix("helix-bench-").tempdir()?;
    let view = view(scratch.path())?;
    let bubblewrap = Path::new("/usr/bin/bwrap").exists();
    let container = Container::find(scratch.path())?;
    let mut times = PARTS.map(Times::new);
    for round in 0..settings.rounds(200, 40) {
        times[0].add(timed(|| run(Command::new("/usr/bin/true")))?);
        if bubblewrap {
            times[1].add(timed(|| run(bwrap(&view)))?);
        }
        times[2].add(attempt(&scratch.path().join(format!("bare-{round}")), None)?);
        let isolation = Isolation { tool: Tool::Namespaces, network: Network::Host, view: view.clone() };
        times[3].add(attempt(&scratch.path().join(format!("own-{round}")), Some(isolation))?);
        if let Some(container) = &container
            && round % ROUNDS_A_CONTAINER == 0
        {
            times[4].add(timed(|| run(container.command()))?);
        }
    }
    let [exec, peer, bare, own, contained] = [0, 1, 2, 3, 4].map(|part| times[part].ms(50.0));
    let ours = own - bare;
    let pair = |peer: Option<f64>| vec![Pair { ours, peer }];
    let mut rows =
        vec![Row::new("beyond bare exec", Unit::Ms, pair(bubblewrap.then_some(peer - exec))).goal(Goal::Ratio(0.5))];
    let mut notes = vec!["the pair is of medians of all rounds, which were made in turns".to_owned()];
    match container {
        Some(_) => rows.push(Row::new("beyond bare exec, beside podman run", Unit::Ms, pair(Some(contained - exec)))),
        None => notes.push("podman cannot run a container here".to_owned()),
    }
    let peer =
        if bubblewrap { "bwrap, the same view of the host" } else { "bwrap is absent: apt-get install bubblewrap" };
    times[0].what += ", which is the floor";
    Ok(Figure {
        name: "isolation-start",
        peer: peer.to_owned(),
        rows: rows.into_iter().map(|row| row.limit(exec, "true alone, started and waited for")).collect(),
        times: times.into_iter().filter(|times| times.count() > 0).collect(),
        history: "every attempt left a result and exited with 0".to_owned(),
        notes,
    })
}

fn view(scratch: &Path) -> anyhow::Result<Vec<Entry>> {
    let mut view = vec![Entry::host("/usr")];
    for name in ["bin", "sbin", "lib", "lib64"] {
        let path = Path::new("/").join(name);
        if let Ok(to) = std::fs::read_link(&path) {
            view.push(Entry::Link { target: path, to });
        } else if path.exists() {
            view.push(Entry::host(path));
        }
    }
    let mut etc: Vec<PathBuf> = std::fs::read_dir("/etc")?.flatten().map(|entry| entry.path()).collect();
    // What the isolation itself provides, and what a link leads away from.
    let own = ["/etc/passwd", "/etc/group", "/etc/hostname", "/etc/mtab"];
    etc.retain(|path| !own.iter().any(|own| path == Path::new(own)) && !path.is_symlink());
    etc.sort();
    view.extend(etc.into_iter().take(ETC_COUNT).map(Entry::host));
    let work = scratch.join("work");
    std::fs::create_dir(&work)?;
    view.push(Entry::own(&work, "/work"));
    Ok(view)
}

fn timed(run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let started = Instant::now();
    run()?;
    Ok(started.elapsed())
}

fn run(mut command: Command) -> anyhow::Result<()> {
    let status = command.stdin(Stdio::null()).status().context("cannot run")?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn bwrap(view: &[Entry]) -> Command {
    let mut command = Command::new("/usr/bin/bwrap");
    command.args(["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--die-with-parent"]);
    command.args(["--new-session", "--uid", "1000", "--gid", "1000", "--proc", "/proc", "--dev", "/dev"]);
    for entry in view {
        match entry {
            Entry::Link { target, to } => command.arg("--symlink").args([to, target]),
            Entry::Bind { source, target, .. } if target == Path::new("/work") => {
                command.arg("--bind").args([source, target])
            }
            Entry::Bind { source, target, .. } => command.arg("--ro-bind").args([source, target]),
        };
    }
    command.args(["--remount-ro", "/", "--chdir", "/work", "/usr/bin/true"]);
    command
}

/// A container with a static program in it.
struct Container {
    runtime: &'static str,
    root: PathBuf,
}

impl Container {
    /// By the first runtime that works here; `None` where none does.
    fn find(scratch: &Path) -> anyhow::Result<Option<Self>> {
        let root = scratch.join("container");
        std::fs::create_dir_all(root.join("bin"))?;
        // Busybox is what it is called as.
        if std::fs::copy("/bin/busybox", root.join("bin/true")).is_err() {
            return Ok(None);
        }
        let found =
            ["crun", "runc"].into_iter().map(|runtime| Self { runtime, root: root.clone() }).find(|container| {
                let status = container.command().stderr(Stdio::null()).status();
                status.is_ok_and(|status| status.success())
            });
        Ok(found)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("podman");
        command.args(["--runtime", self.runtime, "run", "--rm", "--network", "none"]);
        command.args(["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--rootfs"]);
        command.arg(&self.root).arg("/bin/true");
        command
    }
}

/// One attempt, from the start of its runner to its end.
fn attempt(root: &Path, isolation: Option<Isolation>) -> anyhow::Result<Duration> {
    std::fs::create_dir(root)?;
    let dir = AttemptDir::new(root);
    let is_root = rustix::process::geteuid().is_root();
    let order = Order {
        argv: vec!["/usr/bin/true".into()],
        environment: Vec::new(),
        workdir: if isolation.is_some() { "/work".into() } else { root.to_owned() },
        user: (is_root && isolation.is_some()).then_some(BUILD_USER),
        privileges: Privileges::NeverMore,
        cgroup: None,
        wall_ms: None,
        silence_ms: None,
        grace_ms: 0,
        // As an agent orders it.
        leftover_ms: 1_000,
        log_bytes_max: 1024 * 1024,
        isolation,
        limits: helix_runner::limits::Limits::default(),
        secrets: None,
    };
    order.write(&dir)?;
    let mut command = Command::new(programs().join("helix-runner"));
    command.arg(root);
    let time = timed(|| run(command))?;
    let outcome = Outcome::read(&dir)?.context("a runner leaves a result")?;
    ensure!(outcome.end == End::Exited(0), "{:?}", outcome.end);
    std::fs::remove_dir_all(root)?;
    Ok(time)
}
