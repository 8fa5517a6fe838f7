//! Replacing the cluster's policy. Values that would break the cluster are refused.

use crate::command::SetPolicy;
use crate::record::{Applied, Policy, Row, RowChange};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

/// Under this a heartbeat each third of the lease would be all that agents do.
const LEASE_MS_MIN: u64 = 300;

/// No duration may be longer than ten years: sums of times stay far from the end of the number line.
const DURATION_MS_MAX: u64 = 3_650 * 86_400_000;

/// The builds that count against a worker stand in its row.
pub(crate) const QUARANTINE_AFTER_MAX: u32 = 100;

pub(super) fn set_policy(state: &mut State, c: &SetPolicy, out: &mut Applied) -> Outcome {
    check(&c.policy)?;
    if state.policy == c.policy {
        return Ok(Reply::Unchanged);
    }
    state.policy = c.policy.clone();
    out.rows.push(RowChange::Put(Row::Policy(c.policy.clone())));
    Ok(Reply::Done)
}

fn check(policy: &Policy) -> Result<(), Rejection> {
    let durations = [
        policy.worker_lease_ms,
        policy.cancel_unverified_after_ms,
        policy.detach_for_ms,
        policy.retry_backoff_ms,
        policy.store_deadline_ms,
        policy.timeout_default_ms,
        policy.timeout_grace_ms,
        policy.retain_ms,
        policy.tombstone_ms,
        policy.quarantine_ms,
    ];
    let wrong = |why| Err(Rejection::PolicyInvalid(why));
    if durations.iter().any(|ms| *ms > DURATION_MS_MAX) {
        return wrong("a duration is longer than ten years");
    }
    if policy.worker_lease_ms < LEASE_MS_MIN {
        return wrong("worker_lease_ms is under 300: workers would be lost between heartbeats");
    }
    if policy.queue_max == 0 {
        return wrong("queue_max is 0: no build could be submitted");
    }
    if policy.quarantine_after > QUARANTINE_AFTER_MAX {
        return wrong("quarantine_after is above 100: builds that failed are kept with each worker");
    }
    if policy.copies == 0 {
        return wrong("copies is 0: a success would name bytes that nobody holds");
    }
    if policy.timeout_default_ms == 0 || policy.store_deadline_ms == 0 {
        return wrong("timeout_default_ms or store_deadline_ms is 0: every attempt would fail");
    }
    if policy.blob_bytes_max == 0 || policy.log_bytes_max == 0 {
        return wrong("blob_bytes_max or log_bytes_max is 0: nothing could be stored");
    }
    Ok(())
}
