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
use crate::session;
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

/// Runs the agent until it is told to go.
///
/// # Errors
/// When it cannot start, or the cluster refuses it for good.
pub async fn run(config: Config, telemetry: telemetry::Handle) -> anyhow::Result<()> {
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
    let _reloads = AbortOnDropHandle::new(reload(&shutdown, Arc::clone(&tls), telemetry, config.log.filter.clone()));
    let (settings_tx, settings) = watch::channel(None);
    let services = Arc::new(services(config, data, tls, settings.clone()).await?);
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
    let mut standing = services.podman.standing();
    let session = tokio::spawn(async move {
        // So that the first offer is the whole one. Builds that run need nobody yet.
        let tried = standing.wait_for(|standing| *standing != Standing::Untried);
        let _ = tokio::time::timeout(FIRST_TRIAL_LIMIT, tried).await.map(drop);
        session::keep(endpoints, session_tx, settings_tx, standing).await;
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
                ExitKind::Detached => "detached",
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
    let limiter = Limiter::take(&id, config.limits.clone());
    let starter = Starter::new(&config.runner_path, limiter.slots())
        .with_context(|| format!("cannot start {} (`runner_path`)", config.runner_path.display()))?;
    let work_root = config.exec.base_dir.join(id);
    make_private(&work_root).with_context(|| format!("cannot make {}", work_root.display()))?;
    let isolated = Isolated::choose(&config, &work_root, &starter).await?;
    let disks = Disks::new(vec![config.data_dir.clone(), work_root.clone()], config.disk.clone());
    let mirrors = Mirrors::new(&data.mirrors(), &config.source).context("cannot prepare git")?;
    let nodes = Nodes::new(tls, settings);
    let (stores, live) = (Stores::new(nodes.clone()), LiveLogs::new(nodes));
    tracing::info!(limits = limiter.words(), "builds are limited by these means");
    let podman =
        Podman::new(&config, limiter.unified(), limiter.prefix()).context("cannot prepare podman's directories")?;
    let secrets = Secrets::of(data.instance());
    Ok(Services {
        config,
        cluster,
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

/// Certificates and the log filter, whenever asked.
fn reload(shutdown: &Shutdown, tls: Arc<TlsStore>, telemetry: telemetry::Handle, filter: String) -> JoinHandle<()> {
    let mut reloads = shutdown.reloads();
    tokio::spawn(async move {
        while reloads.changed().await.is_ok() {
            match tls.reload() {
                Ok(closed) => tracing::info!(closed, "certificates were read again"),
                Err(error) => tracing::error!(%error, closed = error.cut, "certificates were read again in part"),
            }
            let filter = Some(filter.as_str()).filter(|filter| !filter.is_empty());
            if let Err(error) = telemetry.reload(filter) {
                tracing::error!(%error, "the log filter cannot be changed");
            }
        }
    })
}

/// Lets the session's last messages out: the loop has gone, its outbox is closed, and the stream ends by itself.
async fn farewell(mut session: JoinHandle<()>) {
    if tokio::time::timeout(FAREWELL_LIMIT, &mut session).await.is_err() {
        session.abort();
    }
}
