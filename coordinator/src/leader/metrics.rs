//! What the leader's part measures.

use helix_core::Effect;
use helix_core::state::{Known, State};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// From the commit of a submit to the commit of its first assignment: the goal is far under a second.
const ALLOCATION_SECONDS: [f64; 14] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];

/// Numbers kept by the loop; clones share them.
#[derive(Clone, Debug)]
pub struct LeaderMetrics {
    /// Agents connected here; 0 where this node does not lead.
    pub sessions: Gauge,
    /// Seconds from a submit's commit to the commit of a task's first assignment.
    pub allocation_seconds: Histogram,
}

impl Default for LeaderMetrics {
    fn default() -> Self {
        Self { sessions: Gauge::default(), allocation_seconds: Histogram::new(ALLOCATION_SECONDS) }
    }
}

impl LeaderMetrics {
    /// Shows them to whoever scrapes.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("helix_agent_sessions", "Agents connected to this leader", self.sessions.clone());
        registry.register(
            "helix_allocation_seconds",
            "From the commit of a submit to the commit of a task's first assignment",
            self.allocation_seconds.clone(),
        );
    }

    pub(crate) fn observe(&self, state: &State, effects: &[Effect]) {
        for effect in effects {
            let Effect::SendAssignment { key, .. } = effect else { continue };
            if key.attempt.0 != 1 {
                continue;
            }
            // One that ended already was assigned in no time worth measuring: it is left out.
            if let (Some(Known::Open(build)), Some(attempt)) = (state.build(&key.build), state.attempt(key)) {
                let waited_ms = attempt.assigned_at.since_ms(build.created_at);
                self.allocation_seconds.observe(waited_ms as f64 / 1000.0);
            }
        }
    }
}
