//! Debian's Slurm as a peer: munged, slurmctld and slurmd on this host, one node with so many processors, no accounting.
//!
//! Where Slurm gives a choice it has its default, except that several jobs may begin on processors that the node does not
//! have, as our slots are more than there are processors.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use helix_common::files::{Durability, write_atomic};
use helix_common::ports;
use rustix::process::Signal;

use super::drive::DEADLINE;
use super::figure::per_second;
use super::machine::version;
use crate::cluster::signal;

const INSTALL: &str = "Slurm is absent: apt-get install slurmctld slurmd slurm-client munge";

/// How long a batch may take; one that a busy machine starves is a failed measurement.
const BATCH_MAX: Duration = Duration::from_secs(300);

/// How often the queue is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What runs here and how, or what is missing.
pub(super) fn describe() -> Result<String, String> {
    let version = version(Command::new("slurmctld").arg("-V")).ok_or_else(|| INSTALL.to_owned())?;
    let programs = ["munged", "slurmd", "sinfo", "sbatch", "squeue", "srun"];
    if !programs.iter().all(|program| Command::new(program).arg("-V").output().is_ok()) {
        return Err(INSTALL.to_owned());
    }
    if !rustix::process::geteuid().is_root() {
        return Err("Slurm is driven by root alone".to_owned());
    }
    Ok(format!("{version}, one node, no accounting"))
}

/// A Slurm of one node; ends with its owner.
pub(super) struct Slurm {
    /// In the order in which they were started.
    daemons: Vec<Child>,
    directory: tempfile::TempDir,
}

impl Slurm {
    /// Starts one with so many processors, and waits until its node is idle.
    pub(super) fn start(slots: u32) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("helix-bench-slurm-").tempdir()?;
        let root = directory.path();
        let host = fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned();
        fs::write(root.join("slurm.conf"), config(root, &host, ports::free(2)?, slots))?;
        for part in ["state", "spool"] {
            fs::create_dir(root.join(part))?;
        }
        let mut key = [0_u8; 1024];
        rand::fill(&mut key);
        write_atomic(&root.join("munge.key"), &key, 0o400, Durability::Unsynced)?;
        let mut slurm = Self { daemons: Vec::new(), directory };
        let place = |flag: &str, name: &str| format!("--{flag}={}", slurm.directory.path().join(name).display());
        let munge = [
            "--force".to_owned(),
            "--foreground".to_owned(),
            place("key-file", "munge.key"),
            place("socket", "munge.socket"),
            place("pid-file", "munge.pid"),
            place("log-file", "munge.log"),
            place("seed-file", "munge.seed"),
        ];
        slurm.spawn("munged", &munge)?;
        slurm.spawn("slurmctld", &["-D".to_owned()])?;
        slurm.spawn("slurmd", &["-D".to_owned(), "-N".to_owned(), host])?;
        let end = Instant::now() + DEADLINE;
        while slurm.ask("sinfo", &["-h", "-o", "%T"]).unwrap_or_default().trim() != "idle" {
            ensure!(Instant::now() < end, "Slurm's node is not idle: {}", slurm.last_words());
            std::thread::sleep(LOOK);
        }
        Ok(slurm)
    }

    /// Runs so many times `/bin/true` as one array, from its submit until the queue is empty; how many a second.
    pub(super) fn batch(&self, count: usize) -> anyhow::Result<f64> {
        let outputs = tempfile::tempdir_in(self.directory.path())?;
        let output = format!("--output={}/%a", outputs.path().display());
        let array = format!("--array=1-{count}");
        let started = Instant::now();
        self.ask("sbatch", &["--parsable", &array, &output, "--wrap", "/bin/true"])?;
        while !self.ask("squeue", &["-h", "-r", "-o", "%i"])?.trim().is_empty() {
            ensure!(started.elapsed() < BATCH_MAX, "Slurm's queue does not get empty: {}", self.last_words());
            std::thread::sleep(LOOK);
        }
        let elapsed = started.elapsed();
        let ran = fs::read_dir(outputs.path())?.count();
        ensure!(ran == count, "{ran} of {count} jobs left an output: {}", self.last_words());
        Ok(per_second(count as u64, elapsed))
    }

    /// One `/bin/true` under `srun`, until that has ended.
    pub(super) fn one(&self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        self.ask("srun", &["/bin/true"])?;
        Ok(started.elapsed())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.directory.path().join("slurm.conf")).stdin(Stdio::null());
        command
    }

    fn spawn(&mut self, program: &str, arguments: &[String]) -> anyhow::Result<()> {
        let log = fs::File::create(self.directory.path().join(format!("{program}.out")))?;
        let mut command = self.command(program);
        command.args(arguments).stderr(log.try_clone()?).stdout(log);
        self.daemons.push(command.spawn().context(INSTALL)?);
        Ok(())
    }

    fn ask(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let said = self.command(program).args(arguments).output().context(INSTALL)?;
        if !said.status.success() {
            bail!("{program}: {}: {}", said.status, String::from_utf8_lossy(&said.stderr));
        }
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    fn last_words(&self) -> String {
        let tail = |program: &str| {
            let text = fs::read_to_string(self.directory.path().join(format!("{program}.out"))).unwrap_or_default();
            let mut lines: Vec<_> = text.lines().rev().take(5).map(str::to_owned).collect();
            lines.reverse();
            lines.join("; ")
        };
        ["munged", "slurmctld", "slurmd"].map(tail).join("; ")
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            if let Ok(pid) = i32::try_from(daemon.id()) {
                signal(pid, Signal::TERM);
            }
            let end = Instant::now() + DEADLINE;
            while Instant::now() < end && matches!(daemon.try_wait(), Ok(None)) {
                std::thread::sleep(LOOK);
            }
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn config(root: &Path, host: &str, port: u16, slots: u32) -> String {
    let place = |name: &str| root.join(name).display().to_string();
    let keys = [
        ("ClusterName", "bench".to_owned()),
        ("SlurmctldHost", format!("{host}(127.0.0.1)")),
        ("SlurmUser", "root".to_owned()),
        ("SlurmctldPort", port.to_string()),
        ("SlurmdPort", (port + 1).to_string()),
        ("AuthInfo", format!("socket={}", place("munge.socket"))),
        ("StateSaveLocation", place("state")),
        ("SlurmdSpoolDir", place("spool")),
        ("SlurmctldPidFile", place("slurmctld.pid")),
        ("SlurmdPidFile", place("slurmd.pid")),
        // Without cgroups of its own, which would need systemd.
        ("ProctrackType", "proctrack/linuxproc".to_owned()),
        ("SelectType", "select/cons_tres".to_owned()),
        ("SelectTypeParameters", "CR_CPU".to_owned()),
        ("MaxArraySize", "100001".to_owned()),
        ("MaxJobCount", "100000".to_owned()),
        ("MinJobAge", "2".to_owned()),
        ("ReturnToService", "2".to_owned()),
        // More processors than the host has.
        ("SlurmdParameters", "config_overrides".to_owned()),
    ];
    let mut text: String = keys.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    text.push_str(&format!("NodeName={host} NodeAddr=127.0.0.1 CPUs={slots} State=UNKNOWN\n"));
    text.push_str(&format!("PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"));
    text
}
