//! Wakes the readers of one build, and nobody else, when the registry changes it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use helix_model::BuildId;
use tokio::sync::watch;

/// A bell per build that somebody listens for.
#[derive(Default)]
pub(super) struct Bells(Mutex<HashMap<BuildId, watch::Sender<()>>>);

impl Bells {
    /// Hears every change of the build from now on.
    pub(super) fn listen(&self, build: &BuildId) -> watch::Receiver<()> {
        self.lock().entry(build.clone()).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    /// The build changed.
    pub(super) fn ring(&self, build: &BuildId) {
        let mut bells = self.lock();
        if let Some(bell) = bells.get(build)
            && bell.send(()).is_err()
        {
            bells.remove(build);
        }
    }

    /// Any build may have changed.
    pub(super) fn ring_all(&self) {
        self.lock().retain(|_, bell| bell.send(()).is_ok());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BuildId, watch::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
