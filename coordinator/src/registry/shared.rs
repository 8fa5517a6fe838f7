//! What the tasks behind the registry share with its handles: the state in memory, how far it is, and its effects.
//!
//! The state has one writer, the task that applies the log. Invariant: [`Shared::applied`] never announces an
//! entry before its changes can be seen through [`Shared::state`].

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use helix_core::Effect;
use helix_core::state::State;
use helix_model::{LogTime, NodeId};
use tokio::sync::{broadcast, watch};

use super::Counters;
use crate::clock::Clock;

/// Messages an effects receiver may be behind before it is told to look again.
const EFFECTS_BEHIND_MAX: usize = 4_096;

/// How far the log is applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// The last applied entry's term; 0 before the first.
    pub term: u64,
    /// The last applied entry's index; 0 before the first, and for it.
    pub index: u64,
}

/// State, progress, effects, clock.
pub struct Shared {
    state: RwLock<State>,
    applied: watch::Sender<Applied>,
    effects: broadcast::Sender<Arc<[Effect]>>,
    members: RwLock<BTreeMap<NodeId, String>>,
    /// The leader's clock.
    pub clock: Clock,
    /// What is counted.
    pub counters: Arc<Counters>,
}

impl Shared {
    /// Shares a state that is loaded up to `applied`.
    #[must_use]
    pub fn new(own: NodeId, state: State, applied: Applied, counters: Arc<Counters>) -> Self {
        Self {
            state: RwLock::new(state),
            applied: watch::Sender::new(applied),
            effects: broadcast::Sender::new(EFFECTS_BEHIND_MAX),
            members: RwLock::new(BTreeMap::new()),
            clock: Clock::new(own),
            counters,
        }
    }

    /// Looks at the state.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the log is applied.
    #[must_use]
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    pub(crate) fn announce(&self, applied: Applied, effects: Vec<Effect>) {
        self.counters.applied_index.set(applied.index);
        self.applied.send_replace(applied);
        if !effects.is_empty() {
            // Nobody listening is fine.
            let _ = self.effects.send(effects.into());
        }
    }

    /// Makes every receiver of effects look at the state again: after a snapshot nobody can say what changed.
    pub(crate) fn announce_everything(&self, applied: Applied) {
        self.counters.applied_index.set(applied.index);
        self.applied.send_replace(applied);
        let nothing: Arc<[Effect]> = Arc::from(Vec::new());
        for _ in 0..=EFFECTS_BEHIND_MAX {
            if self.effects.send(Arc::clone(&nothing)).is_err() {
                break;
            }
        }
    }

    pub(crate) fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        self.effects.subscribe()
    }

    pub(crate) fn set_members(&self, members: BTreeMap<NodeId, String>) {
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = members;
    }

    /// Members of the last membership known, and where coordinators dial them.
    #[must_use]
    pub fn members(&self) -> BTreeMap<NodeId, String> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where clients dial a node.
    #[must_use]
    pub fn grpc_of(&self, node: NodeId) -> Option<String> {
        self.state().node(node).map(|record| record.grpc.clone())
    }

    /// The leader's log time now.
    #[must_use]
    pub fn stamp(&self) -> LogTime {
        let (applied, voters) = {
            let state = self.state();
            (state.last_at(), state.voters().clone())
        };
        self.clock.stamp(applied, &voters)
    }
}
