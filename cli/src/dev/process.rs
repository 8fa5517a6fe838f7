//! The processes of a development cluster: started, minded, stopped, none left behind.
//!
//! This process is the subreaper of all of them: runners outlive their agent, and must not outlive the cluster.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::dev::layout::{Layout, Member};
use crate::failure::Failure;
use crate::output::Output;

/// Agents get this long to cancel what they run.
const AGENTS_WITHIN: Duration = Duration::from_secs(10);

/// Coordinators get this long to hand over and leave.
const COORDINATORS_WITHIN: Duration = Duration::from_secs(5);

/// A process that dies sooner than this after its start is started again only after a pause.
const HASTY: Duration = Duration::from_secs(5);

/// Whether a death is one too many.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// Nothing may die before everything is up.
    Starting,
    /// Deaths are said, and mended if so asked.
    Running,
}

struct Process {
    member: Member,
    pid: Option<Pid>,
    started: Instant,
    /// Where its log began at its start: what is before is of an earlier life.
    log_from: u64,
}

impl Process {
    fn start(member: &Member) -> Result<Self, Failure> {
        let log_from = fs::metadata(&member.log).map_or(0, |log| log.len());
        let pid = Some(spawn(member)?);
        Ok(Self { member: member.clone(), pid, started: Instant::now(), log_from })
    }
}

/// All processes.
pub(super) struct Fleet {
    processes: Vec<Process>,
    cluster_path: PathBuf,
    restart: bool,
}

impl Fleet {
    pub(super) fn start(layout: &Layout, restart: bool) -> Result<Self, Failure> {
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap_or(1));
        set_child_subreaper(own).map_err(|error| Failure::plain(format!("cannot become a subreaper: {error}")))?;
        let mut fleet = Self { processes: Vec::new(), cluster_path: layout.cluster_path(), restart };
        for member in &layout.members {
            fleet.processes.push(Process::start(member)?);
        }
        fleet.write_cluster()?;
        Ok(fleet)
    }

    /// Reaps, says what died, starts it again if so asked. Returns only when something must not be borne.
    pub(super) async fn mind(&mut self, output: &Output, phase: Phase) -> Failure {
        let mut children = match signal(SignalKind::child()) {
            Ok(children) => children,
            Err(error) => return Failure::plain(format!("cannot watch children: {error}")),
        };
        loop {
            let mut died = false;
            for (pid, how) in reap() {
                let Some(index) = self.processes.iter().position(|process| process.pid == Some(pid)) else { continue };
                self.processes[index].pid = None;
                let member = &self.processes[index].member;
                let what = format!("{} {} {how}; its log is {}", member.role, member.id, member.log.display());
                if phase == Phase::Starting {
                    let tail = last_lines(&member.log, self.processes[index].log_from);
                    return Failure::plain(format!("{what}\n{tail}"));
                }
                output.say(&what);
                died = true;
            }
            if died && let Err(failure) = self.write_cluster() {
                return failure;
            }
            let pause = match self.revive(output) {
                Ok(pause) => pause,
                Err(failure) => return failure,
            };
            tokio::select! {
                _ = children.recv() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Starts what died, if so asked; says how long to wait before looking again.
    fn revive(&mut self, output: &Output) -> Result<Duration, Failure> {
        let mut changed = false;
        if self.restart {
            for process in self.processes.iter_mut().filter(|process| process.pid.is_none()) {
                if process.started.elapsed() < HASTY {
                    continue;
                }
                *process = Process::start(&process.member)?;
                output.say(&format!("{} {} started again", process.member.role, process.member.id));
                changed = true;
            }
        }
        if changed {
            self.write_cluster()?;
        }
        Ok(Duration::from_secs(1))
    }

    /// Cancels what runs, stops agents, then coordinators, then whatever is left.
    pub(super) async fn stop(&mut self) {
        self.signal("agent", Signal::TERM);
        // The second one means: now. It is sent until it cannot have been taken for the first.
        self.wait_for("agent", AGENTS_WITHIN, Some(Signal::TERM)).await;
        self.signal("coordinator", Signal::TERM);
        self.wait_for("coordinator", COORDINATORS_WITHIN, None).await;
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            reap();
            let left = descendants();
            if left.is_empty() || Instant::now() > deadline {
                break;
            }
            for pid in left {
                // It may be gone already.
                let _ = kill_process(pid, Signal::KILL);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Whoever finds the file must not take these numbers for somebody's.
        self.processes.iter_mut().for_each(|process| process.pid = None);
        let _ = self.write_cluster();
    }

    fn signal(&self, role: &str, signal: Signal) {
        for pid in self.processes.iter().filter(|process| process.member.role == role).filter_map(|process| process.pid)
        {
            // It may be gone already; nobody else can have its number before it is reaped here.
            let _ = kill_process(pid, signal);
        }
    }

    async fn wait_for(&mut self, role: &str, within: Duration, again: Option<Signal>) {
        let deadline = Instant::now() + within;
        let mut rounds = 0u32;
        loop {
            for (pid, _) in reap() {
                self.processes
                    .iter_mut()
                    .filter(|process| process.pid == Some(pid))
                    .for_each(|process| process.pid = None);
            }
            let left = self.processes.iter().any(|process| process.member.role == role && process.pid.is_some());
            if !left || Instant::now() > deadline {
                return;
            }
            rounds += 1;
            if let Some(signal) = again.filter(|_| rounds.is_multiple_of(25)) {
                self.signal(role, signal);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn write_cluster(&self) -> Result<(), Failure> {
        let all: Vec<_> = self.processes.iter().map(describe).collect();
        let text = serde_json::to_string_pretty(&all).map_err(|error| Failure::plain(error.to_string()))?;
        let next = self.cluster_path.with_extension("next");
        let written = fs::write(&next, text).and_then(|()| fs::rename(&next, &self.cluster_path));
        written.map_err(|error| Failure::plain(format!("cannot write {}: {error}", self.cluster_path.display())))
    }
}

fn describe(process: &Process) -> serde_json::Value {
    let member = &process.member;
    let url = |port: u16| format!("https://127.0.0.1:{port}");
    json!({
        "role": member.role,
        "id": member.id,
        "pid": process.pid.map(|pid| pid.as_raw_nonzero().get()),
        "argv": member.argv,
        "grpc": member.ports.map(|ports| url(ports.grpc)),
        "peer": member.ports.map(|ports| format!("127.0.0.1:{}", ports.peer)),
        "http": member.ports.map(|ports| format!("http://127.0.0.1:{}", ports.http)),
        "data_dir": member.data_dir,
    })
}

fn spawn(member: &Member) -> Result<Pid, Failure> {
    let cannot = |error: std::io::Error| Failure::plain(format!("cannot start {} {}: {error}", member.role, member.id));
    let log: File = OpenOptions::new().create(true).append(true).open(&member.log).map_err(cannot)?;
    let mut command = Command::new(&member.argv[0]);
    command.args(&member.argv[1..]).stdin(Stdio::null()).stdout(log.try_clone().map_err(cannot)?).stderr(log);
    // A Ctrl-C at the terminal is for this process alone, which stops the others in order.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn().map_err(cannot)?;
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| Failure::plain("a child without a pid"))
}

/// Collects every child that has ended, and how.
fn reap() -> Vec<(Pid, String)> {
    let mut ended = Vec::new();
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("ended with code {code}"),
            (None, Some(signal)) => format!("was ended by signal {signal}"),
            (None, None) => "ended".to_owned(),
        };
        ended.push((pid, how));
    }
    ended
}

/// Every living process below this one.
fn descendants() -> Vec<Pid> {
    let mut parents: BTreeMap<i32, i32> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, in parentheses, may hold anything; the state and the parent follow its last one.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (state, parent) = (fields.next(), fields.next().and_then(|parent| parent.parse().ok()));
        if let (Some(state), Some(parent)) = (state, parent)
            && state != "Z"
        {
            parents.insert(pid, parent);
        }
    }
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let below = |mut pid: i32| {
        for _ in 0..parents.len() {
            match parents.get(&pid) {
                Some(parent) if *parent == own => return true,
                Some(parent) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    parents.keys().copied().filter(|pid| below(*pid)).filter_map(Pid::from_raw).collect()
}

/// The last lines of a log, of those behind `from`.
fn last_lines(log: &Path, from: u64) -> String {
    let text = fs::read(log).unwrap_or_default();
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(text.len());
    let text = String::from_utf8_lossy(&text[from..]);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
