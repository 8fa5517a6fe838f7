//! Making room, in tiers: what nobody needs before what only saves time. And watching, so that it is done early.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Disks, Mark, kept};
use crate::blocking::blocking;
use crate::executor::podman::{Pruned, Tier};
use crate::services::Services;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// How long a store that builds use is waited for.
const PRUNE_PATIENCE: Duration = Duration::from_secs(2);

/// Between two collections that did not help: what fills the disk is not ours.
const IN_VAIN: Duration = Duration::from_secs(30);

/// Keeps an eye on the disks for as long as the agent runs.
pub async fn watch(services: Arc<Services>) {
    let mut collect_at = Instant::now();
    loop {
        let pressure = look(&services, Mark::Reserve).await;
        let before = services.disks.pressure.send_replace(pressure.clone());
        match (before.is_empty(), pressure.is_empty()) {
            (true, false) => tracing::warn!(pressure, "this host is short of room: it takes no new work"),
            (false, true) => tracing::info!("there is room again"),
            _ => {}
        }
        if Instant::now() >= collect_at && !look(&services, Mark::Low).await.is_empty() {
            collect(&services).await;
            if !look(&services, Mark::Low).await.is_empty() {
                collect_at = Instant::now() + IN_VAIN;
            }
            continue;
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(services: &Arc<Services>, mark: Mark) -> String {
    let services = Arc::clone(services);
    blocking(move || Ok(services.disks.short_of(mark))).await.unwrap_or_default()
}

/// Collects until the goal is reached or nothing is left to collect. Whoever comes meanwhile waits for the same.
pub async fn collect(services: &Arc<Services>) {
    let disks: &Disks = &services.disks;
    let _one = disks.collecting.lock().await;
    let mut removed = (0_u32, 0_u32);
    while !look(services, Mark::Goal).await.is_empty() && remove_oldest_kept(services).await {
        removed.0 += 1;
    }
    remove_images(services, Tier::Dangling).await;
    while !look(services, Mark::Goal).await.is_empty() && services.mirrors.remove_least_used().await {
        removed.1 += 1;
    }
    remove_images(services, Tier::Unused).await;
    if removed != (0, 0) {
        tracing::info!(kept_workdirs = removed.0, mirrors = removed.1, "room was made");
    }
}

/// Removes images and layers, unless there is room already or builds use the store.
async fn remove_images(services: &Arc<Services>, tier: Tier) {
    if look(services, Mark::Goal).await.is_empty() {
        return;
    }
    match services.podman.prune(tier, PRUNE_PATIENCE).await {
        Ok(Pruned::Done) => tracing::info!(?tier, "images were removed"),
        Ok(Pruned::Busy) => {}
        Err(error) => tracing::warn!(%error, "images cannot be removed"),
    }
}

/// False when there is none, or it does not go.
async fn remove_oldest_kept(services: &Arc<Services>) -> bool {
    let root = services.work_root.clone();
    let removed = blocking(move || {
        let oldest = kept::list(&root)?.into_iter().next();
        oldest.as_deref().map(crate::attempt::workdir::remove_whole).transpose().map(|removed| removed.is_some())
    });
    removed.await.unwrap_or_else(|error| {
        tracing::warn!(%error, "a kept workdir cannot be removed");
        false
    })
}
