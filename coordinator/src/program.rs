//! A coordinator from its configuration to its end: opens what it owns, wires the parts, serves, leaves in order.
//!
//! The order of the end matters: sessions and long answers are told to go elsewhere, clients' calls drain,
//! leadership is handed over, consensus stops, and the coordinators' port is the last to close. Every step has a
//! deadline, and none of them is needed for safety: a kill at any moment loses nothing that was acknowledged.

mod node;
pub mod offline;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use helix_common::config::ConfigError;
use helix_common::shutdown::Shutdown;
use helix_common::telemetry::Handle;
use helix_model::NodeId;
use tokio::sync::watch;

pub use node::Node;

use crate::config::Config;

/// The whole end takes no longer.
const END_MAX: Duration = Duration::from_secs(10);

/// Reads `ID=HOST:PORT`.
///
/// # Errors
/// What is wrong with it.
pub fn member(text: &str) -> Result<(NodeId, String), String> {
    let wrong = || format!("{text:?} is not ID=HOST:PORT");
    let (id, address) = text.split_once('=').ok_or_else(wrong)?;
    let id: u64 = id.trim().parse().map_err(|_| wrong())?;
    let endpoint = helix_common::channel::canonical_endpoint(address.trim()).map_err(|_| wrong())?;
    if id == 0 || address.contains("://") {
        return Err(wrong());
    }
    Ok((NodeId(id), endpoint.trim_start_matches("https://").to_owned()))
}

/// Members as they were given, each once.
///
/// # Errors
/// When one is named twice.
pub fn members(given: Vec<(NodeId, String)>) -> anyhow::Result<BTreeMap<NodeId, String>> {
    let mut members = BTreeMap::new();
    for (id, address) in given {
        if members.insert(id, address).is_some() {
            bail!("--members names node {id} twice");
        }
    }
    Ok(members)
}

/// Runs a node until it is asked to end, or cannot go on.
///
/// # Errors
/// What kept it from starting, or from going on, and what to do about it.
pub async fn run(
    config: Config,
    logging: Handle,
    reread: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    // First, so that a signal during a long start is not lost.
    let (shutdown, _listener) = Shutdown::install().context("signals cannot be caught")?;
    let node = tokio::select! {
        started = Node::start(&config) => started?,
        () = shutdown.graceful().cancelled() => return Ok(()),
    };
    let identity = node.identity();
    tracing::info!(
        cluster = identity.cluster,
        node = identity.node,
        grpc = %node.grpc_address(),
        peer = %node.peer_address(),
        http = %node.http_address(),
        advertise = config.advertise,
        version = env!("CARGO_PKG_VERSION"),
        "serving"
    );
    if node.registry().members().is_empty() {
        tracing::info!(
            "this node is no member yet and waits to be added: `helix cluster add {} HOST:{}`",
            identity.node,
            node.peer_address().port()
        );
    }
    let outcome = watch_over(&node, &shutdown, &logging, reread).await;
    let ended = async {
        tokio::select! {
            () = node.stop() => {}
            () = shutdown.forced().cancelled() => tracing::warn!("ending at once"),
        }
    };
    if tokio::time::timeout(END_MAX, ended).await.is_err() {
        tracing::warn!("not everything ended in time");
    }
    outcome
}

/// Serves reloads until the node is asked to end or fails.
async fn watch_over(
    node: &Node,
    shutdown: &Shutdown,
    logging: &Handle,
    reread: impl Fn() -> Result<Config, ConfigError>,
) -> anyhow::Result<()> {
    let mut reloads = shutdown.reloads();
    let mut failure = node.failure();
    loop {
        tokio::select! {
            () = shutdown.graceful().cancelled() => return Ok(()),
            why = failed(&mut failure) => bail!("this node cannot go on: {why}"),
            port = node.port_ended() => return Err(anyhow!("the {port} port ended by itself")),
            changed = reloads.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                reload(node, logging, &reread).await;
            }
        }
    }
}

/// What cannot be reloaded stays as it was; a running node does not end for a mistake in a file.
async fn reload(node: &Node, logging: &Handle, reread: &impl Fn() -> Result<Config, ConfigError>) {
    match reread() {
        Ok(config) => match logging.reload(config.log.filter.as_deref()) {
            Ok(()) => tracing::info!("log filter reloaded"),
            Err(error) => tracing::error!(%error, "the log filter stays as it was"),
        },
        Err(error) => tracing::error!(%error, "the configuration stays as it was"),
    }
    let tls = node.tls();
    match tokio::task::spawn_blocking(move || tls.reload()).await {
        Ok(Ok(cut)) => tracing::info!(cut, "certificates reloaded"),
        Ok(Err(error)) => tracing::error!(%error, cut = error.cut, "certificates were reloaded in part"),
        Err(error) => tracing::error!(%error, "reloading certificates panicked"),
    }
}

async fn failed(failure: &mut watch::Receiver<Option<String>>) -> String {
    match failure.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => "consensus has ended by itself".to_owned(),
    }
}
