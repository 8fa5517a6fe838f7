//! From an assignment to a runner that has the order: policy, source, workdir, environment.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use helix_agent_core::{Assignment, Event, StopCause, Verdict};
use helix_model::parse::duration_text;
use helix_model::{BuildSpec, Command, Executor, Reason};
use helix_runner::journal;
use helix_runner::{Order, Privileges};
use tokio_stream::StreamExt as _;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::Attempt;
use super::environment::environment;
use crate::blocking::blocking;
use crate::config::{Config, ExecConfig};
use crate::executor::podman::build;
use crate::limits::Amounts;
use crate::policy;
use crate::services::Services;
use crate::settings::Settings;
use crate::source::archive::{Limits, unpack};
use crate::source::git::Resolved;
use crate::source::{SourceError, reason_of};
use crate::starter::NotStarted;

/// How long processes may take to end after SIGTERM when a limit of the build's is reached.
pub(super) const GRACE_MS: u64 = 5_000;

/// How long what a command leaves behind may go on.
const LEFTOVER_MS: u64 = 1_000;

/// How long unpacking may wait for bytes in all.
const FETCH_LIMIT: Duration = Duration::from_secs(1800);

/// The verdict on an attempt that was stopped. What the agent ends of its own accord it has drained: that is never the build's fault,
/// nor does it count against this worker.
pub(super) fn stopped(cause: StopCause) -> Verdict {
    let drained = |message| Verdict::Failed { reason: Reason::Drained, message };
    match cause {
        StopCause::Registry(_) => Verdict::Stopped,
        StopCause::Drained => drained("the agent had to go".to_owned()),
        StopCause::CutOff { limit_ms } => drained(format!(
            "the agent was cut off from all coordinators for {} (policy.stop_cut_off_after_ms)",
            duration_text(limit_ms)
        )),
    }
}

impl Attempt {
    /// Prepares an attempt and starts its runner. A stop that is wished meanwhile ends it, before any command ran.
    pub(super) async fn prepare(&mut self, assignment: &Assignment) -> Result<(), Verdict> {
        let argv = check_policy(&self.services.allowed.current(), assignment)
            .map_err(|(reason, message)| Verdict::Failed { reason, message })?;
        let spec = &assignment.spec;
        let amounts = self.services.limiter.amounts(&spec.resources);
        let amounts = amounts.map_err(|message| Verdict::Failed { reason: Reason::Policy, message })?;
        // An order holds for good, and fetching has limits of time: an agent that no leader has spoken to yet begins with neither.
        self.settings().await?;
        if !spec.repo_url.is_empty() || spec.source.is_some() {
            self.start_push();
        }
        let made = tokio::select! {
            cause = self.stop_wished() => return Err(stopped(cause)),
            made = self.make_source(assignment, amounts) => made,
        };
        let (commit, left) = made.map_err(|error| Verdict::Failed { reason: error.reason, message: error.message })?;
        self.start_push();
        let limits = self.services.limiter.limits(&self.key, amounts, &self.workdir, left);
        let settings = self.settings().await?;
        let ms = |value: u64| (value > 0).then_some(value);
        let order = Order {
            argv,
            environment: environment(&self.services.config, assignment, &self.workdir, commit.as_ref()),
            workdir: self.workdir.work(),
            user: self.services.isolated.user(&self.key),
            privileges: Privileges::NeverMore,
            cgroup: self.services.limiter.cgroup(&self.key),
            wall_ms: ms(spec.timeout_ms).or(ms(settings.timeout_default_ms)),
            silence_ms: ms(spec.silence_timeout_ms),
            grace_ms: GRACE_MS,
            leftover_ms: LEFTOVER_MS,
            log_bytes_max: settings.log_bytes_max,
            isolation: self.services.isolated.of(&self.workdir),
            limits,
            secrets: None,
        };
        let order = match spec.executor {
            Some(Executor::Podman) => self.podman_order(order, assignment).await?,
            Some(Executor::Exec) | None => order,
        };
        let order = self.with_secrets(order, spec).await?;
        let dir = self.dir.clone();
        let host = |what: &str, error: &io::Error| Verdict::Failed {
            reason: reason_of(error),
            message: format!("{what}: {error}"),
        };
        let (services, workdir, key) = (Arc::clone(&self.services), self.workdir.clone(), self.key.clone());
        if order.isolation.is_some() {
            let handed_over = blocking(move || services.isolated.hand_over(&workdir, &key)).await;
            handed_over.map_err(|error| host("cannot hand over the workdir", &error))?;
        }
        // Much of the above waits for others, and for what a stop does not wait for.
        if let Some(cause) = self.wished.borrow().stop {
            return Err(stopped(cause));
        }
        match self.services.starter.start_ordered(self.dir.clone(), order, self.steps.token()).await {
            Ok(connection) => self.runner = Some(connection),
            Err(NotStarted::Unordered(error)) => return Err(host("cannot write the order", &error)),
            // From the order on a runner may have it: whatever failed, the directory tells.
            Err(NotStarted::Ordered(error)) => {
                if blocking(move || journal::withdraw(&dir)).await.unwrap_or(false) {
                    return Err(host("cannot start a runner", &error));
                }
            }
        }
        Ok(())
    }

    /// The newest settings. A stop ends the wait for the first.
    async fn settings(&self) -> Result<Arc<Settings>, Verdict> {
        tokio::select! {
            cause = self.stop_wished() => Err(stopped(cause)),
            settings = self.services.stores.nodes().settings() => Ok(settings),
        }
    }

    /// Lays out the secrets that the build names, and has the order show them.
    async fn with_secrets(&self, mut order: Order, spec: &BuildSpec) -> Result<Order, Verdict> {
        let config = self.services.allowed.current();
        let laid_out = tokio::select! {
            cause = self.stop_wished() => return Err(stopped(cause)),
            laid_out = self.services.secrets.lay_out(&config, spec, &self.key) => laid_out,
        };
        let Some(laid_out) = laid_out.map_err(|(reason, message)| Verdict::Failed { reason, message })? else {
            return Ok(order);
        };
        if spec.executor == Some(Executor::Podman) {
            build::add_options(&mut order, laid_out.podman_arguments());
        }
        let shown = blocking(move || laid_out.show(&mut order).map(|()| order)).await;
        shown.map_err(|error| Verdict::Failed {
            reason: reason_of(&error),
            message: format!("cannot show the secrets to the build: {error}"),
        })
    }

    /// Makes the workdir with the source in it. Gives the commit, if there is one, and the bytes that are left there.
    async fn make_source(
        &self,
        assignment: &Assignment,
        amounts: Amounts,
    ) -> Result<(Option<Resolved>, u64), SourceError> {
        let (services, workdir, key) = (Arc::clone(&self.services), self.workdir.clone(), self.key.clone());
        let made = blocking(move || {
            workdir.create()?;
            services.limiter.wall(&workdir, &key, amounts)?;
            Ok(bytes_left(&services))
        });
        let left = made.await.map_err(|error| SourceError::host("cannot make the workdir", &error))?;
        let spec = &assignment.spec;
        if spec.repo_url.is_empty() && spec.source.is_none() {
            return Ok((None, left));
        }
        let commit = self.fetch_source(assignment).await?;
        let services = Arc::clone(&self.services);
        Ok((commit, blocking(move || Ok(bytes_left(&services))).await.unwrap_or(u64::MAX)))
    }

    /// Puts the source into the workdir. Gives the commit, if there is one.
    async fn fetch_source(&self, assignment: &Assignment) -> Result<Option<Resolved>, SourceError> {
        let spec = &assignment.spec;
        if !spec.repo_url.is_empty() {
            let _in_use = self.services.mirrors.lease(&spec.repo_url);
            let resolved = self.resolve(assignment).await?;
            self.log_line(format!("checking out {}", resolved.commit)).await;
            let index = self.dir.root().join("index");
            self.services.mirrors.check_out(&spec.repo_url, &resolved, &self.workdir.work(), &index).await?;
            return Ok(Some(resolved));
        }
        if let Some(source) = &spec.source {
            self.log_line(format!("unpacking the uploaded source {}", source.digest)).await;
            self.unpack_source(&source.digest).await?;
        }
        Ok(None)
    }

    /// The commit to build. Where the build has none yet, the first one resolved is agreed on with the registry.
    async fn resolve(&self, assignment: &Assignment) -> Result<Resolved, SourceError> {
        let (url, mirrors) = (&assignment.spec.repo_url, &self.services.mirrors);
        if let Some(commit) = &assignment.commit {
            return mirrors.resolve(url, commit).await;
        }
        let shown = if assignment.spec.git_ref.is_empty() { "HEAD" } else { &assignment.spec.git_ref };
        self.log_line(format!("fetching {shown} of {url}")).await;
        let resolved = mirrors.resolve(url, &assignment.spec.git_ref).await?;
        self.say(Event::SourceResolved(self.key.clone(), resolved.commit.clone())).await;
        let mut wished = self.wished.clone();
        let given =
            wished.wait_for(|wishes| wishes.commit.is_some()).await.ok().and_then(|wishes| wishes.commit.clone());
        // None: the agent is ending.
        let Some(commit) = given else { return std::future::pending().await };
        if commit == resolved.commit { Ok(resolved) } else { mirrors.resolve(url, &commit).await }
    }

    async fn unpack_source(&self, digest: &helix_model::Digest) -> Result<(), SourceError> {
        let (digest, into) = (*digest, self.workdir.work());
        let fetch = async {
            let parts = self.services.stores.get(&digest).await;
            let parts =
                parts.map_err(|error| SourceError::source(format!("cannot fetch the uploaded source: {error}")))?;
            let bytes = parts.map(|part| part.map(|part| part.data).map_err(io::Error::other));
            let bridge = SyncIoBridge::new(StreamReader::new(bytes));
            let unpacked = blocking(move || Ok(unpack(bridge, &digest, &into, Limits::default())));
            unpacked.await.map_err(|error| SourceError::host("cannot unpack the uploaded source", &error))?
        };
        let limit = || SourceError::source(format!("fetching the uploaded source took longer than {FETCH_LIMIT:?}"));
        tokio::time::timeout(FETCH_LIMIT, fetch).await.map_err(|_| limit())?
    }
}

/// Bytes that builds may still fill. A disk that cannot be asked is not filled by this. Blocks.
fn bytes_left(services: &Services) -> u64 {
    services.disks.bytes_above_reserve(&services.work_root).unwrap_or(u64::MAX)
}

/// What will run, if the agent's owner allows it.
fn check_policy(config: &Config, assignment: &Assignment) -> Result<Vec<OsString>, (Reason, String)> {
    let spec = &assignment.spec;
    policy::check(config, assignment)?;
    if spec.repo_url.starts_with("file://") && !config.source.allow_file_urls {
        let message = "file:// URLs are not allowed on this agent (source.allow_file_urls)";
        return Err((Reason::Policy, message.to_owned()));
    }
    if spec.executor == Some(Executor::Podman) {
        if !config.podman.enabled {
            return Err((Reason::Policy, "this agent runs no podman builds (podman.enabled)".to_owned()));
        }
        // What runs is podman; see `podman_order`.
        return Ok(Vec::new());
    }
    let shell = |line: &str| vec![shell_path(&config.exec), "-c".into(), line.into()];
    match &spec.command {
        Some(_) if !config.exec.allow_job_commands => {
            let message = "builds may not bring a command to this agent (exec.allow_job_commands)";
            Err((Reason::Policy, message.to_owned()))
        }
        Some(Command::Shell(line)) if line.trim().is_empty() => Err(nothing_to_run()),
        Some(Command::Argv(words)) if words.first().is_none_or(String::is_empty) => Err(nothing_to_run()),
        Some(Command::Shell(line)) => Ok(shell(line)),
        Some(Command::Argv(words)) => Ok(words.iter().map(OsString::from).collect()),
        None if config.exec.command.trim().is_empty() => Err(nothing_to_run()),
        None => Ok(shell(&config.exec.command)),
    }
}

/// The agent's shell where the agent's own `PATH` has it: whatever `PATH` a build brings, its line is run by that one. A
/// shell that is not there keeps its name, and the start says so.
pub(crate) fn shell_path(exec: &ExecConfig) -> OsString {
    let runs = |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && file.mode() & 0o111 != 0);
    if exec.shell.contains('/') {
        return exec.shell.clone().into();
    }
    let found = exec.path.split(':').filter(|dir| dir.starts_with('/')).map(|dir| Path::new(dir).join(&exec.shell));
    found.into_iter().find(runs).map_or_else(|| exec.shell.clone().into(), OsString::from)
}

fn nothing_to_run() -> (Reason, String) {
    let message = "there is no command: the build brings none, and this agent has none of its own (exec.command)";
    (Reason::NoCommand, message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn policy_comes_first() {
        let mut config = crate::testing::config(Path::new("/data"));
        let check = |config: &Config, spec: BuildSpec| {
            let (key, previous) = ("b.0.1".parse().unwrap(), String::new());
            check_policy(config, &Assignment { key, spec, commit: None, platform: None, previous })
        };
        let with = |command: Option<Command>| BuildSpec { command, ..BuildSpec::default() };
        let line = |text: &str| Some(Command::Shell(text.to_owned()));
        config.exec.allow_job_commands = false;
        assert_eq!(check(&config, with(line("true"))).unwrap_err().0, Reason::Policy);
        assert_eq!(check(&config, with(None)).unwrap_err().0, Reason::NoCommand);
        config.exec.command = "make".to_owned();
        let sh = shell_path(&config.exec);
        assert!(Path::new(&sh).is_absolute(), "{sh:?}");
        assert_eq!(check(&config, with(None)).unwrap(), [sh.clone(), "-c".into(), "make".into()]);
        config.exec.allow_job_commands = true;
        assert_eq!(check(&config, with(line("x y"))).unwrap(), [sh, "-c".into(), "x y".into()]);
        let argv = Command::Argv(vec!["a".to_owned(), "b c".to_owned()]);
        assert_eq!(check(&config, with(Some(argv))).unwrap(), ["a", "b c"]);
        assert_eq!(check(&config, with(line(" "))).unwrap_err().0, Reason::NoCommand);
        let spec = BuildSpec { secrets: BTreeSet::from(["s".to_owned()]), ..with(line("x")) };
        assert_eq!(check(&config, spec).unwrap_err().0, Reason::Policy);
        let spec = BuildSpec { repo_url: "file:///r".to_owned(), ..with(line("x")) };
        config.source.allow_file_urls = false;
        assert_eq!(check(&config, spec).unwrap_err().0, Reason::Policy);
    }
}
