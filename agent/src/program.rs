//! The program from its checked configuration to its exit.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use helix_agent_core::ExitKind;
use helix_common::endpoints::Endpoints;
use helix_common::shutdown::Shutdown;
use helix_common::telemetry;
use helix_common::tls::TlsStore;
use helix_model::AttemptKey;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::agent::{self, Ended, Inputs};
use crate::allowed::{Allowed, Taken};
use crate::config::Config;
use crate::control;
use crate::data_dir::{DataDir, make_private};
use crate::disk::Disks;
use crate::disk::collect;
use crate::executor::podman::{Podman, Standing};
use crate::isolation::Isolated;
use crate::limits::Limiter;
use crate::secrets::Secrets;
use crate::services::Services;
use crate::session::{self, OfferChanges};
use crate::settings::Settings;
use crate::source::git::Mirrors;
use crate::starter::Starter;
use crate::stores::live::LiveLogs;
use crate::stores::{Nodes, Stores};

/// Messages of the session that wait for the loop.
const SESSION_EVENTS_MAX: usize = 1024;

/// How long the first offer waits for podman to be tried.
const FIRST_TRIAL_LIMIT: Duration = Duration::from_secs(10);

/// How long the last messages may take to leave.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Runs the agent until it is told to go. `reread` gives the configuration as it is by then, checked.
///
/// # Errors
/// When it cannot start, or the cluster refuses it for good.
pub async fn run(
    config: Config,
    reread: impl Fn() -> anyhow::Result<Config> + Send + Sync + 'static,
    telemetry: telemetry::Handle,
) -> anyhow::Result<()> {
    let (shutdown, _listener) = Shutdown::install().context("cannot listen to signals")?;
    let tls = TlsStore::load(config.tls.clone())?;
    let own = tls.own_identity();
    if own.worker().is_none_or(|worker| worker.as_str() != config.name) {
        bail!(
            "the certificate is {own}, and `name` is {:?}: they have to be spiffe://CLUSTER/agent/NAME and NAME",
            config.name
        );
    }
    let data = DataDir::open(&config.data_dir)?;
    let endpoints = Endpoints::new(&config.coordinators, Arc::clone(&tls))?;
    let (settings_tx, settings) = watch::channel(None);
    let reloads = shutdown.reloads();
    let services = Arc::new(services(config, data, Arc::clone(&tls), settings.clone()).await?);
    let _reloads = AbortOnDropHandle::new(tokio::spawn(reload(
        reloads,
        Reloads { tls, telemetry, reread: Arc::new(reread), services: Arc::clone(&services) },
    )));
    let listener = control::listen(services.data.root()).context("cannot make the control socket")?;
    let (detach_tx, detach) = mpsc::channel(4);
    let _control = AbortOnDropHandle::new(tokio::spawn(control::serve(listener, detach_tx)));
    let found = {
        let services = Arc::clone(&services);
        tokio::task::spawn_blocking(move || agent::recover(&services)).await?.context("cannot read the spool")?
    };
    let _disks = AbortOnDropHandle::new(tokio::spawn(collect::watch(Arc::clone(&services))));
    let (session_tx, session_rx) = mpsc::channel(SESSION_EVENTS_MAX);
    let alive = found.iter().map(|(key, _)| key.clone()).collect();
    let _podman = AbortOnDropHandle::new(tokio::spawn(look_after_podman(Arc::clone(&services), alive)));
    let mut offer = OfferChanges { podman: services.podman.standing(), allowed: services.allowed.changes() };
    let session = tokio::spawn(async move {
        // So that the first offer is the whole one. Builds that run need nobody yet.
        let tried = offer.podman.wait_for(|standing| *standing != Standing::Untried);
        let _ = tokio::time::timeout(FIRST_TRIAL_LIMIT, tried).await.map(drop);
        session::keep(endpoints, session_tx, settings_tx, offer).await;
    });
    tracing::info!(name = services.config.name, instance = %services.data.instance(), "the agent runs");
    let inputs = Inputs { session: session_rx, detach, shutdown, settings };
    let ended = agent::run(Arc::clone(&services), found, inputs).await;
    farewell(session).await;
    if let Ended::Exit(ExitKind::Done, _) = &ended {
        let services = Arc::clone(&services);
        let _ = tokio::task::spawn_blocking(move || services.podman.unmount()).await;
    }
    match ended {
        Ended::Exit(kind, requests) => {
            let word = match kind {
                ExitKind::Done => "the agent has ended",
                ExitKind::Detached => control::DETACHED,
                ExitKind::DetachedUnheard => control::DETACHED_UNHEARD,
            };
            tracing::info!("{word}");
            for request in requests {
                request.answer(word).await;
            }
            Ok(())
        }
        Ended::Refused(why) => bail!("the cluster refuses this agent: {why}"),
    }
}

async fn services(
    config: Config,
    data: DataDir,
    tls: Arc<TlsStore>,
    settings: watch::Receiver<Option<Arc<Settings>>>,
) -> anyhow::Result<Services> {
    let cluster = tls.own_identity().cluster.to_string();
    // Agents may share a base directory and a host; each has its own place, named after its data directory's life.
    let id: String = data.instance().as_str().chars().take(8).collect();
    // Before anything is started: it may move this process to another cgroup.
    let mut limiter = Limiter::take(&id, config.limits.clone());
    let starter = Starter::new(&config.runner_path, limiter.slots())
        .with_context(|| format!("cannot start {} (`runner_path`)", config.runner_path.display()))?;
    let work_root = config.exec.base_dir.join(id);
    make_private(&work_root).with_context(|| format!("cannot make {}", work_root.display()))?;
    limiter.wall_in(&work_root)?;
    let isolated = Isolated::choose(&config, &work_root, &starter).await?;
    let disks = Disks::new(vec![config.data_dir.clone(), work_root.clone()], config.disk.clone());
    let mirrors = Mirrors::new(&data.mirrors(), &config.source).context("cannot prepare git")?;
    let nodes = Nodes::new(Arc::clone(&tls), settings);
    let (stores, live) = (Stores::new(nodes.clone()), LiveLogs::new(nodes));
    tracing::info!(limits = limiter.words(), "builds are limited by these means");
    let podman =
        Podman::new(&config, limiter.unified(), limiter.prefix()).context("cannot prepare podman's directories")?;
    let secrets = Secrets::of(data.instance());
    Ok(Services {
        allowed: Allowed::new(config.clone()),
        config,
        cluster,
        tls,
        data,
        work_root,
        disks,
        limiter,
        isolated,
        starter,
        mirrors,
        secrets,
        podman,
        stores,
        live,
    })
}

/// Clears up what earlier agents' builds left, and finds out whether podman works.
async fn look_after_podman(services: Arc<Services>, alive: BTreeSet<AttemptKey>) {
    if let Err(error) = services.podman.sweep_all_but(&TaskTracker::new(), &alive).await {
        tracing::error!(%error, "what builds of an earlier agent left cannot be removed");
    }
    services.podman.try_now().await;
    services.podman.keep_trying().await;
}

/// What is read again when asked.
struct Reloads<F> {
    tls: Arc<TlsStore>,
    telemetry: telemetry::Handle,
    reread: Arc<F>,
    services: Arc<Services>,
}

/// Certificates, and of the configuration the log filter, policy and secrets, whenever asked. What cannot be read or does not
/// pass its check leaves what was in force as it was; builds that run go on with what they were given.
async fn reload<F>(mut asked: watch::Receiver<u64>, what: Reloads<F>)
where
    F: Fn() -> anyhow::Result<Config> + Send + Sync + 'static,
{
    while asked.changed().await.is_ok() {
        match what.tls.reload() {
            Ok(closed) => tracing::info!(closed, "certificates were read again"),
            Err(error) => tracing::error!(%error, closed = error.cut, "certificates were read again in part"),
        }
        let reread = Arc::clone(&what.reread);
        match tokio::task::spawn_blocking(move || reread()).await {
            Ok(Ok(config)) => what.take(config),
            Ok(Err(error)) => {
                tracing::error!("the configuration is not taken, and what was in force stays: {error:#}");
            }
            Err(error) => tracing::error!(%error, "reading the configuration panicked"),
        }
    }
}

impl<F> Reloads<F> {
    fn take(&self, config: Config) {
        let filter = config.log.filter.clone();
        let podman_works = self.services.podman.standing().borrow().works();
        match self.services.allowed.take(config, podman_works) {
            Ok(Taken { changed, waiting }) => {
                tracing::info!(changed, "policy and secrets were read again");
                if !waiting.is_empty() {
                    tracing::warn!(keys = waiting.join(", "), "other keys have changed: they count after a restart");
                }
            }
            Err(error) => {
                tracing::error!("the configuration is not taken, and what was in force stays: {error}");
                return;
            }
        }
        let filter = Some(filter.as_str()).filter(|filter| !filter.is_empty());
        if let Err(error) = self.telemetry.reload(filter) {
            tracing::error!(%error, "the log filter cannot be changed");
        }
    }
}

/// Lets the session's last messages out: the loop has gone, its outbox is closed, and the stream ends by itself.
async fn farewell(mut session: JoinHandle<()>) {
    if tokio::time::timeout(FAREWELL_LIMIT, &mut session).await.is_err() {
        session.abort();
    }
}
