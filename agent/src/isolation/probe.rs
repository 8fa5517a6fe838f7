//! Finding out whether an isolation works here: a command is run in it, by a runner, as a build's would be.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::time::Duration;

use helix_runner::{AttemptDir, AttemptState, End, Order, Outcome, Privileges};
use tokio::time::Instant;

use super::Isolated;
use crate::attempt::shell_path;
use crate::attempt::workdir::{Workdir, remove_tree};
use crate::blocking::blocking;
use crate::config::Config;
use crate::data_dir::make_private;
use crate::starter::Starter;

/// Far longer than it takes.
const LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(2);

/// A name that no attempt has: its number is 0.
const NAME: &str = "probe";

/// Runs the shell, to do nothing. Says in words what does not work.
pub(super) async fn run(
    isolated: &Isolated,
    config: &Config,
    work_root: &Path,
    starter: &Starter,
) -> Result<(), String> {
    let dir = AttemptDir::new(config.data_dir.join(NAME));
    let key = "probe.0.1".parse().map_err(|_| "no key for a probe".to_owned())?;
    let workdir = Workdir::new(work_root, &key);
    let prepare = || -> io::Result<()> {
        remove_tree(dir.root())?;
        make_private(dir.root())?;
        workdir.create()?;
        isolated.hand_over(&workdir, &key)?;
        order(isolated, config, &workdir, isolated.user(&key)).write(&dir)
    };
    let outcome = match prepare() {
        Ok(()) => outcome(&dir, starter).await,
        Err(error) => Err(error),
    };
    let (root, removed) = (dir.root().to_owned(), workdir.clone());
    let cleared = blocking(move || {
        remove_tree(&root)?;
        removed.remove()
    });
    if let Err(error) = cleared.await {
        tracing::warn!(%error, "what a probe of the isolation left cannot be removed");
    }
    match outcome.map_err(|error| format!("the probe failed: {error}"))?.end {
        End::Exited(0) => Ok(()),
        End::NotStarted { error, .. } => Err(error),
        End::Exited(code) => Err(format!("{} fails in it with exit code {code}", config.exec.shell)),
        End::Signaled(signal) => Err(format!("{} is killed in it by signal {signal}", config.exec.shell)),
    }
}

fn order(isolated: &Isolated, config: &Config, workdir: &Workdir, user: Option<helix_runner::User>) -> Order {
    let environment: [(OsString, OsString); 2] =
        [("PATH".into(), config.exec.path.clone().into()), ("HOME".into(), workdir.home().into())];
    Order {
        argv: vec![shell_path(&config.exec), "-c".into(), ":".into()],
        environment: environment.into(),
        workdir: workdir.work(),
        user,
        privileges: Privileges::NeverMore,
        cgroup: None,
        wall_ms: Some(u64::try_from(LIMIT.as_millis()).unwrap_or(u64::MAX)),
        silence_ms: None,
        grace_ms: 0,
        leftover_ms: 0,
        log_bytes_max: 1024 * 1024,
        isolation: isolated.of(workdir),
        limits: helix_runner::limits::Limits::default(),
        secrets: None,
    }
}

async fn outcome(dir: &AttemptDir, starter: &Starter) -> io::Result<Outcome> {
    starter.start(dir.clone()).await?;
    let deadline = Instant::now() + LIMIT * 2;
    loop {
        let looked_at = dir.clone();
        match blocking(move || helix_runner::inspect(&looked_at)).await? {
            AttemptState::Ended(outcome) => return Ok(outcome),
            AttemptState::RunnerDied => return Err(io::Error::other("the runner died")),
            AttemptState::NotStarted | AttemptState::Running { .. } if Instant::now() < deadline => {}
            AttemptState::NotStarted | AttemptState::Running { .. } => return Err(io::ErrorKind::TimedOut.into()),
        }
        tokio::time::sleep(POLL).await;
    }
}
