//! Whether podman works here, shown by a build of a scratch image with a `RUN` step: in the very store, with the very
//! arguments that builds will have. Of runtimes and cgroups the first way that works is taken.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::{Cgroups, Facts, Podman, Standing};
use crate::blocking::blocking;

/// How long podman may take to say what it is.
const INFO_LIMIT: Duration = Duration::from_secs(30);

/// How long the scratch build may take, on a host that is busy.
const BUILD_LIMIT: Duration = Duration::from_secs(120);

/// Between two trials where it works.
const AGAIN_WORKS: Duration = Duration::from_secs(900);

/// Between two trials where it does not.
const AGAIN_BROKEN: Duration = Duration::from_secs(60);

/// Whether podman may give containers more than the agent has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Limits {
    /// It may.
    MayRaise,
    /// It may not: CAP_SYS_RESOURCE is missing.
    Fixed,
}

/// Whether this process, or one it starts, may raise resource limits.
pub(super) fn may_raise_limits() -> Limits {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = held.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    // Rootless podman asks for no more than it has.
    if !rustix::process::geteuid().is_root() || held & (1 << CAP_SYS_RESOURCE) != 0 {
        Limits::MayRaise
    } else {
        Limits::Fixed
    }
}

impl Podman {
    /// Tries podman now, and again now and then, until the agent ends.
    pub async fn keep_trying(&self) {
        if !self.config.podman.enabled {
            return;
        }
        loop {
            let again = if self.standing.borrow().works() { AGAIN_WORKS } else { AGAIN_BROKEN };
            tokio::time::sleep(again).await;
            self.try_now().await;
        }
    }

    /// Tries podman, and notes what came of it.
    pub async fn try_now(&self) {
        if !self.config.podman.enabled {
            return;
        }
        let found = match self.trial().await {
            Ok(facts) => Standing::Works(facts),
            Err(why) => Standing::Broken(super::failure::shortened(&why)),
        };
        self.standing.send_if_modified(|standing| {
            let changed = *standing != found;
            if changed {
                match &found {
                    Standing::Works(_) => tracing::info!(podman = found.words(), "podman works"),
                    _ => tracing::warn!(podman = found.words(), "podman builds are not offered"),
                }
                *standing = found;
            }
            changed
        });
    }

    async fn trial(&self) -> Result<Facts, String> {
        let _share = self.share().await.map_err(|error| format!("cannot lock the store: {error}"))?;
        let tracker = TaskTracker::new();
        let format = "--format=podman {{.Version.Version}}\n{{.Store.GraphDriverName}}\n{{.Host.OCIRuntime.Path}}";
        let info = self.run(&tracker, vec!["info".into(), format.into()], &self.dir, INFO_LIMIT).await;
        let info = info.map_err(|error| error.to_string())?;
        if !info.success() {
            return Err(format!("podman info: {}", info.complaint()));
        }
        let mut lines = info.stdout.lines().map(str::to_owned);
        let mut line = || lines.next().unwrap_or_default();
        let (version, driver, default_runtime) = (line(), line(), line());
        let context = self.dir.join("trial");
        let place = context.clone();
        let step =
            blocking(move || lay_out(&place)).await.map_err(|error| format!("cannot make a context: {error}"))?;
        tracing::debug!(?step, "trying a scratch build");
        let mut first = None;
        for mut runtime in self.runtimes() {
            if runtime.is_empty() {
                // podman's own choice, by name: the guard has to start it.
                runtime.clone_from(&default_runtime);
            }
            for cgroups in [Cgroups::OfAttempt, Cgroups::OfRuntime] {
                match self.scratch_build(&tracker, &context, &runtime, cgroups).await {
                    Ok(()) => return Ok(Facts { version, runtime, driver, cgroups }),
                    Err(error) => {
                        tracing::debug!(runtime, ?cgroups, %error, "a scratch build failed");
                        first.get_or_insert(format!("a scratch build: {error}"));
                    }
                }
            }
        }
        Err(first.unwrap_or_else(|| "there is no container runtime (runc or crun)".to_owned()))
    }

    /// Which runtimes are tried, in this order: those that are there.
    fn runtimes(&self) -> Vec<String> {
        let configured = &self.config.podman.runtime;
        if !configured.is_empty() || self.config.podman.containers_conf.is_some() {
            return vec![configured.clone()];
        }
        // crun refuses hosts where cgroup v1 has controllers; on others it is the quicker.
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let order = if unified { ["crun", "runc"] } else { ["runc", "crun"] };
        let there = |name: &&str| self.config.exec.path.split(':').any(|dir| Path::new(dir).join(name).exists());
        order.iter().filter(|name| there(name)).map(|name| (*name).to_owned()).collect()
    }

    async fn scratch_build(
        &self,
        tracker: &TaskTracker,
        context: &Path,
        runtime: &str,
        cgroups: Cgroups,
    ) -> Result<(), String> {
        let state = self.dir.join("trial-state");
        let id_file = context.with_extension("id");
        let cgroup = format!("{}/helix-trial-{}/build", self.cgroups.0, std::process::id());
        let mut arguments: Vec<OsString> =
            ["build", "--no-cache", "--layers=false", "--quiet"].map(OsString::from).to_vec();
        let mut option = |name: &str, value: OsString| {
            arguments.push(OsString::from_iter([name.into(), "=".into(), value]));
        };
        option("--iidfile", id_file.clone().into());
        option("--runtime-flag", OsString::from_iter(["root=".into(), state.into_os_string()]));
        option("--runtime", self.config.runner_path.clone().into());
        option("--signature-policy", self.image_policy().into());
        if cgroups == Cgroups::OfAttempt {
            option("--cgroup-parent", cgroup.clone().into());
        }
        if !self.config.podman.network.is_empty() {
            option("--network", self.config.podman.network.clone().into());
        }
        arguments.extend(["--".into(), context.into()]);
        let guard = self.guard_variable(runtime, &self.dir, &self.dir, self.dir.join("refused"));
        let built = self.run_with(tracker, arguments, &self.dir, BUILD_LIMIT, Some(guard)).await;
        let _ = blocking(move || super::sweep::remove_cgroups(&cgroup)).await;
        let built = built.map_err(|error| error.to_string())?;
        if !built.success() {
            // What the runtime says stands before podman's own complaint, which knows its exit code alone.
            let said = built.stderr.lines().find(|line| line.contains("creating container for"));
            return Err(said.map_or_else(|| built.complaint(), str::to_owned));
        }
        let id = blocking(move || std::fs::read_to_string(id_file)).await.map_err(|error| error.to_string())?;
        let removed = self.run(tracker, vec!["rmi".into(), "--force".into(), id.trim().into()], &self.dir, INFO_LIMIT);
        let removed = removed.await.map_err(|error| error.to_string())?;
        if removed.success() { Ok(()) } else { Err(removed.complaint()) }
    }
}

/// Whether the trial runs something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TrialStep {
    /// A program that ends with 0.
    Runs,
    /// There is none for this processor.
    OnlyCopies,
}

/// Makes the scratch build's context. Blocks.
fn lay_out(context: &Path) -> io::Result<TrialStep> {
    use std::os::unix::fs::PermissionsExt as _;
    crate::data_dir::make_private(context)?;
    let (step, program) = match PROGRAM {
        Some((machine, code)) => (TrialStep::Runs, elf(machine, code)),
        None => (TrialStep::OnlyCopies, Vec::new()),
    };
    std::fs::write(context.join("true"), program)?;
    std::fs::set_permissions(context.join("true"), std::fs::Permissions::from_mode(0o755))?;
    let run = if step == TrialStep::Runs { "RUN [\"/true\"]\n" } else { "" };
    std::fs::write(context.join("Dockerfile"), format!("FROM scratch\nCOPY true /true\n{run}"))?;
    Ok(step)
}

/// The machine's number in an ELF header, and instructions that call `exit(0)`.
#[cfg(target_arch = "x86_64")]
const PROGRAM: Option<(u16, &[u8])> = Some((62, &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]));
#[cfg(target_arch = "aarch64")]
const PROGRAM: Option<(u16, &[u8])> =
    Some((183, &[0xa8, 0x0b, 0x80, 0xd2, 0x00, 0x00, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4]));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const PROGRAM: Option<(u16, &[u8])> = None;

/// A program of one segment, as the System V ABI lays it out: needs no file of the host in the image.
fn elf(machine: u16, code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
    };
    let word = |file: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
    };
    let long = |file: &mut Vec<u8>, values: &[u64]| {
        values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
    };
    // Executable, machine, version, entry, program headers at 64, no sections, no flags, sizes of the headers.
    half(&mut file, &[2, machine]);
    word(&mut file, &[1]);
    long(&mut file, &[BASE + HEADERS, 64, 0]);
    word(&mut file, &[0]);
    half(&mut file, &[64, 56, 1, 0, 0, 0]);
    // Load all of it, to be read and executed.
    word(&mut file, &[1, 5]);
    let size = HEADERS + code.len() as u64;
    long(&mut file, &[0, BASE, BASE, size, size, 0x1000]);
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_program_runs_on_this_host() {
        let dir = tempfile::tempdir().unwrap();
        if lay_out(dir.path()).unwrap() == TrialStep::Runs {
            let status = std::process::Command::new(dir.path().join("true")).status().unwrap();
            assert!(status.success());
        }
    }

    #[tokio::test]
    async fn a_podman_that_cannot_work_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = crate::testing::config(dir.path());
        config.podman.root = dir.path().join("storage");
        config.podman.runroot = dir.path().join("run");
        let script = dir.path().join("broken-podman");
        std::fs::write(&script, "#!/bin/sh\necho 'Error: no kernel for that' >&2\nexit 125\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        for (path, told) in
            [("/no/such/podman".to_owned(), "cannot start"), (script.display().to_string(), "no kernel for that")]
        {
            config.podman.podman_path = path;
            let podman = Podman::new(&config, None, "helix-x-").unwrap();
            podman.try_now().await;
            let standing = podman.standing().borrow().clone();
            assert!(matches!(&standing, Standing::Broken(why) if why.contains(told)), "{standing:?}");
        }
    }
}
