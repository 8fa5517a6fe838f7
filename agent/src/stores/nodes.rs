//! The coordinators as places for bytes: a bulk channel to each, which of them is responsible for what, and which just
//! failed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_common::channel::{self, Traffic};
use helix_common::tls::TlsStore;
use helix_model::NodeId;
use helix_model::placement::rendezvous;
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::settings::Settings;

/// How long a coordinator that failed is asked last.
const AVOIDED_FOR: Duration = Duration::from_secs(2);

/// The coordinators. Clones share everything.
#[derive(Clone)]
pub struct Nodes {
    shared: Arc<Shared>,
}

struct Shared {
    tls: Arc<TlsStore>,
    settings: watch::Receiver<Option<Arc<Settings>>>,
    known: Mutex<HashMap<NodeId, Known>>,
}

struct Known {
    endpoint: String,
    channel: Channel,
    failed_at: Option<Instant>,
}

impl Nodes {
    /// The coordinators that the settings name from now on.
    #[must_use]
    pub fn new(tls: Arc<TlsStore>, settings: watch::Receiver<Option<Arc<Settings>>>) -> Self {
        Self { shared: Arc::new(Shared { tls, settings, known: Mutex::new(HashMap::new()) }) }
    }

    /// The newest settings, if any were heard of: an agent that starts while it is cut off has none.
    #[must_use]
    pub fn settings_known(&self) -> Option<Arc<Settings>> {
        self.shared.settings.borrow().clone()
    }

    /// The newest settings; waits for the first, for as long as no coordinator can be reached. What has to end without one
    /// must not wait here, or only beside a stop.
    pub async fn settings(&self) -> Arc<Settings> {
        let mut receiver = self.shared.settings.clone();
        loop {
            if let Some(settings) = receiver.borrow_and_update().clone() {
                return settings;
            }
            if receiver.changed().await.is_err() {
                // The agent ends, and with it whoever waits here.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Coordinators with their channels, in the order in which they should be asked about `key`.
    pub async fn ranked(&self, key: &[u8]) -> Vec<(NodeId, Channel)> {
        let settings = self.settings().await;
        let order = rendezvous(key, settings.coordinators.iter().map(|(node, _)| *node));
        let mut known = self.lock();
        let mut ranked = Vec::with_capacity(order.len());
        let mut avoided = Vec::new();
        for node in order {
            let Some((_, endpoint)) = settings.coordinators.iter().find(|(id, _)| *id == node) else { continue };
            let Some(channel) = self.channel(&mut known, node, endpoint) else { continue };
            let failed = known.get(&node).and_then(|known| known.failed_at);
            if failed.is_some_and(|at| at.elapsed() < AVOIDED_FOR) {
                avoided.push((node, channel));
            } else {
                ranked.push((node, channel));
            }
        }
        ranked.append(&mut avoided);
        ranked
    }

    fn channel(&self, known: &mut HashMap<NodeId, Known>, node: NodeId, endpoint: &str) -> Option<Channel> {
        if let Some(known) = known.get(&node).filter(|known| known.endpoint == endpoint) {
            return Some(known.channel.clone());
        }
        let tls = &self.shared.tls;
        match channel::lazy(endpoint, tls, tls.expect_node(node), Traffic::Bulk) {
            Ok(channel) => {
                let entry = Known { endpoint: endpoint.to_owned(), channel: channel.clone(), failed_at: None };
                known.insert(node, entry);
                Some(channel)
            }
            Err(error) => {
                tracing::warn!(%node, %error, "the cluster names a coordinator that cannot be dialled");
                None
            }
        }
    }

    /// Notes that a coordinator failed, or did well.
    pub fn note(&self, node: NodeId, well: bool) {
        if let Some(known) = self.lock().get_mut(&node) {
            known.failed_at = if well { None } else { Some(Instant::now()) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Known>> {
        // Nothing panics while holding it.
        self.shared.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nodes")
    }
}
