//! Running git: bounded in time and output, with everything it starts killed when it is no longer wanted.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;

use crate::output::last_text;

/// Bytes of each of git's outputs that are kept: its last words, or a commit.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;

/// What a program said and how it ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) success: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// Kills the program's whole process group when the wait for it is given up.
struct GroupGuard(Option<Pid>);

impl Drop for GroupGuard {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended by itself in between.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs `git` with exactly this environment. `stdin` keeps a lock held for as long as anything of it lives.
///
/// # Errors
/// When it cannot be started, or takes longer than `limit`; it is dead by then, with all that it started in its group.
pub(super) async fn run_git(
    args: &[OsString],
    environment: &[(OsString, OsString)],
    directory: &Path,
    stdin: Stdio,
    limit: Duration,
) -> io::Result<Finished> {
    let mut command = Command::new("git");
    command.args(args).env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
    command.current_dir(directory).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).kill_on_drop(true);
    let mut child = command.spawn()?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let mut guard = GroupGuard(pid);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let all =
        async { tokio::join!(child.wait(), last_text(stdout, OUTPUT_BYTES_MAX), last_text(stderr, OUTPUT_BYTES_MAX)) };
    let (status, stdout, stderr) = tokio::time::timeout(limit, all)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("git took longer than {limit:?}")))?;
    // Its number may be another's from here on; what it left in the background has closed its outputs and is harmless.
    guard.0 = None;
    Ok(Finished { success: status?.success(), stdout, stderr })
}
