//! Running podman itself: bounded in time and output, and dead when it is no longer wanted.
//!
//! A step dies with the agent (the kernel sees to that), with its time limit, and when the wait for it is given up. Who
//! has to know that nothing of it is left waits for the tracker of the attempt.

#![allow(unsafe_code)] // A hook between fork and exec: what dies with its parent has to say so itself.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::output::last_text;

/// Bytes of each output that are kept: the last ones.
const OUTPUT_BYTES_MAX: usize = 32 * 1024;

/// A program to run.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// The program and its arguments.
    pub(super) argv: Vec<OsString>,
    /// The whole environment.
    pub(super) environment: Vec<(OsString, OsString)>,
    /// Where it runs.
    pub(super) directory: PathBuf,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// What a step said and how it ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The end of its standard output.
    pub stdout: String,
    /// The end of its standard error.
    pub stderr: String,
}

impl Finished {
    /// Whether it ended with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// What it complains of, in one line.
    #[must_use]
    pub fn complaint(&self) -> String {
        let line = self.stderr.lines().rev().find(|line| line.starts_with("Error: "));
        let line = line.or_else(|| self.stderr.lines().rev().find(|line| !line.trim().is_empty()));
        match line {
            Some(line) => super::failure::shortened(line.trim_start_matches("Error: ")),
            None => self.code.map_or_else(|| "a signal ended it".to_owned(), |code| format!("exit code {code}")),
        }
    }
}

/// Runs a step to its end. When the wait is given up it is killed, which the tracker then waits for.
///
/// # Errors
/// When it cannot be started; `TimedOut` when it took longer than its limit, and is dead.
pub(super) async fn run(tracker: &TaskTracker, step: Step) -> io::Result<Finished> {
    let mut program = step.argv.iter();
    let mut command = Command::new(program.next().ok_or(io::ErrorKind::InvalidInput)?);
    command.args(program).env_clear().envs(step.environment).current_dir(step.directory);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    // SAFETY: one system call that changes nothing but this process's own setting, and allocates nothing.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let child = command.spawn().map_err(|error| {
        let program = step.argv.first().map(|program| program.display().to_string()).unwrap_or_default();
        io::Error::new(error.kind(), format!("cannot start {program}: {error}"))
    })?;
    let wanted = CancellationToken::new();
    let _given_up = wanted.clone().drop_guard();
    let task = tracker.spawn(attend(child, wanted, step.limit));
    task.await.map_err(io::Error::other)?
}

async fn attend(mut child: Child, given_up: CancellationToken, limit: Duration) -> io::Result<Finished> {
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let outputs = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let (status, stdout, stderr) =
            tokio::join!(child.wait(), last_text(outputs.0, OUTPUT_BYTES_MAX), last_text(outputs.1, OUTPUT_BYTES_MAX));
        Ok(Finished { code: status?.code(), stdout, stderr })
    };
    let error = tokio::select! {
        ended = ended => return ended,
        () = given_up.cancelled() => io::Error::new(io::ErrorKind::Interrupted, "no longer wanted"),
        () = tokio::time::sleep(limit) => {
            io::Error::new(io::ErrorKind::TimedOut, format!("podman took longer than {limit:?}"))
        }
    };
    // Its leader is not reaped before the wait below, so the group's number is still its own.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    child.wait().await?;
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(line: &str, limit: Duration) -> Step {
        let argv = ["/bin/sh", "-c", line].map(OsString::from).to_vec();
        Step { argv, environment: vec![("PATH".into(), "/usr/bin:/bin".into())], directory: "/".into(), limit }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn says_what_was_said() {
        let tracker = TaskTracker::new();
        let done = run(&tracker, step("echo out; echo 'Error: no such thing' >&2; exit 3", LONG)).await.unwrap();
        assert_eq!((done.code, done.stdout.as_str()), (Some(3), "out\n"));
        assert_eq!(done.complaint(), "no such thing");
        assert!(run(&tracker, Step { argv: vec!["/no/such".into()], ..step("", LONG) }).await.is_err());
    }

    #[tokio::test]
    async fn what_takes_too_long_or_is_not_wanted_is_dead_with_all_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let line = format!("sleep 1000 & echo $! > {}/pid; wait", dir.path().display());
        let child = || std::fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse::<i32>();
        let alive = |pid: i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
        };
        let tracker = TaskTracker::new();
        let error = run(&tracker, step(&line, Duration::from_millis(300))).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let first = child().unwrap();
        std::fs::remove_file(dir.path().join("pid")).unwrap();
        let running = run(&tracker, step(&line, LONG));
        let wait = async {
            while !dir.path().join("pid").exists() || child().is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            _ = running => panic!("it ended by itself"),
            () = wait => {}
        }
        tracker.close();
        tracker.wait().await;
        for pid in [first, child().unwrap()] {
            // Orphans die with the group, and are reaped by init a moment later.
            while alive(pid) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}
