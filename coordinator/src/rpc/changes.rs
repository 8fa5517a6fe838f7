//! Who waits for which build: one listener to the registry's effects wakes exactly those.
//!
//! Without it every waiter would look at every effect, and a thousand waiters times a thousand builds a second
//! is too many looks. Waking is a hint: whoever is woken reads the build again. Invariant: a change that is
//! applied after [`Changes::watch`] returned wakes the receiver.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use helix_core::Effect;
use helix_model::BuildId;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Entries beyond which those that nobody listens to any more are swept.
const SWEEP_FLOOR: usize = 1024;

/// The waiters. Clones share them.
#[derive(Clone, Default, Debug)]
pub struct Changes {
    // A lock, because waiters come from every request and the listener is a task of its own; held for a lookup.
    waiters: Arc<Mutex<Waiters>>,
}

#[derive(Default, Debug)]
struct Waiters {
    by_build: HashMap<BuildId, watch::Sender<()>>,
    sweep_at: usize,
}

impl Changes {
    /// A receiver that changes whenever the build does. Take it first, then read the build.
    #[must_use]
    pub fn watch(&self, id: &BuildId) -> watch::Receiver<()> {
        let mut waiters = self.lock();
        if let Some(sender) = waiters.by_build.get(id) {
            return sender.subscribe();
        }
        if waiters.by_build.len() >= waiters.sweep_at.max(SWEEP_FLOOR) {
            waiters.by_build.retain(|_, sender| sender.receiver_count() > 0);
            waiters.sweep_at = waiters.by_build.len() * 2;
        }
        let (sender, receiver) = watch::channel(());
        waiters.by_build.insert(id.clone(), sender);
        receiver
    }

    /// Listens to the registry's effects until it ends or `stopping` is cancelled.
    pub async fn listen(self, mut effects: Receiver<Arc<[Effect]>>, stopping: CancellationToken) {
        loop {
            let received = tokio::select! {
                () = stopping.cancelled() => return,
                received = effects.recv() => received,
            };
            match received {
                Ok(batch) => self.wake(&batch),
                // What was missed is unknown, so everybody looks again.
                Err(RecvError::Lagged(_)) => self.wake_all(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn wake(&self, effects: &[Effect]) {
        let mut waiters = self.lock();
        if waiters.by_build.is_empty() {
            return;
        }
        for effect in effects {
            if let Effect::BuildChanged(id) | Effect::BuildPurged(id) = effect
                && let Some(sender) = waiters.by_build.get(id)
                && sender.send(()).is_err()
            {
                waiters.by_build.remove(id);
            }
        }
    }

    fn wake_all(&self) {
        self.lock().by_build.retain(|_, sender| sender.send(()).is_ok());
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> BuildId {
        BuildId::new(text).unwrap()
    }

    #[tokio::test]
    async fn a_change_wakes_its_waiters_and_nobody_else() {
        let changes = Changes::default();
        let (tx, rx) = tokio::sync::broadcast::channel(4);
        let stopping = CancellationToken::new();
        let listener = tokio::spawn(changes.clone().listen(rx, stopping.clone()));
        let (mut first, mut second, other) =
            (changes.watch(&id("a")), changes.watch(&id("a")), changes.watch(&id("b")));
        tx.send(Arc::from([Effect::NodeChanged, Effect::BuildChanged(id("a"))])).unwrap();
        first.changed().await.unwrap();
        second.changed().await.unwrap();
        assert!(!other.has_changed().unwrap());
        stopping.cancel();
        listener.await.unwrap();
    }

    #[tokio::test]
    async fn whoever_missed_effects_looks_again() {
        let changes = Changes::default();
        let (tx, rx) = tokio::sync::broadcast::channel(1);
        let mut waiter = changes.watch(&id("a"));
        for _ in 0..3 {
            tx.send(Arc::from([Effect::NodeChanged])).unwrap();
        }
        drop(tx);
        changes.listen(rx, CancellationToken::new()).await;
        waiter.changed().await.unwrap();
    }

    #[test]
    fn entries_without_listeners_are_swept() {
        let changes = Changes::default();
        for number in 0..10 * SWEEP_FLOOR {
            drop(changes.watch(&id(&format!("b{number}"))));
        }
        assert!(changes.lock().by_build.len() <= SWEEP_FLOOR + 1);
    }
}
