//! What every agent is told about the cluster, and the pace of heartbeats.

use helix_core::state::State;
use helix_model::LogTime;
use helix_proto::agent;

/// Heartbeats come no faster than this.
const INTERVAL_MS_MIN: u64 = 1_000;
/// The interval is a multiple of this, so that a worker more does not mean a message to each.
const INTERVAL_STEP_MS: u64 = 250;
/// A heartbeat is late when this many were due since the last.
const LATE_INTERVALS: u64 = 2;
/// The lease is at least this many intervals.
const INTERVALS_PER_LEASE: u64 = 3;

/// The time between heartbeats: the larger of a second and a millisecond for each worker, never over a third of the lease.
pub(crate) fn heartbeat_interval_ms(workers: u64, lease_ms: u64) -> u64 {
    let wanted = workers.div_ceil(INTERVAL_STEP_MS).saturating_mul(INTERVAL_STEP_MS).max(INTERVAL_MS_MIN);
    wanted.min(lease_ms / INTERVALS_PER_LEASE).max(1)
}

/// Whether somebody last seen then is late now: it gets no new work, and keeps what it has.
pub(crate) fn is_late(last_seen: LogTime, now: LogTime, interval_ms: u64) -> bool {
    now.since_ms(last_seen) > interval_ms.saturating_mul(LATE_INTERVALS)
}

/// The settings as the state has them now.
pub(crate) fn settings(state: &State, cluster: &str) -> agent::Settings {
    let policy = state.policy();
    let voters = state.voters();
    // Rows of nodes are kept for ever; those that left the cluster take no bytes.
    let counted = state.nodes().filter(|node| voters.is_empty() || voters.contains(&node.id));
    let coordinators = counted.map(|node| agent::CoordinatorAddress { id: node.id.0, grpc: node.grpc.clone() });
    agent::Settings {
        heartbeat_interval_ms: heartbeat_interval_ms(state.totals().workers, policy.worker_lease_ms),
        worker_lease_ms: policy.worker_lease_ms,
        coordinators: coordinators.collect(),
        copies: policy.copies_of(voters.len()),
        store_deadline_ms: policy.store_deadline_ms,
        blob_bytes_max: policy.blob_bytes_max,
        log_bytes_max: policy.log_bytes_max,
        timeout_default_ms: policy.timeout_default_ms,
        cluster: cluster.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_number_of_workers_and_the_lease() {
        for (workers, lease_ms, interval_ms) in
            [(0, 15_000, 1_000), (1_000, 15_000, 1_000), (1_001, 15_000, 1_250), (9_000, 15_000, 5_000), (1, 900, 300)]
        {
            assert_eq!(heartbeat_interval_ms(workers, lease_ms), interval_ms, "{workers} workers, lease {lease_ms}");
        }
    }

    #[test]
    fn late_is_after_two_intervals_without_a_word() {
        assert!(!is_late(LogTime(1_000), LogTime(3_000), 1_000));
        assert!(is_late(LogTime(1_000), LogTime(3_001), 1_000));
        assert!(!is_late(LogTime(9_000), LogTime(3_001), 1_000));
    }
}
