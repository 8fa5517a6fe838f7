//! How far a worker is trusted: failures of its own add up over builds, keep it from work for a while, and then it is
//! tried with one attempt at a time.
//!
//! Only what can be the host's doing counts (a full disk, a fault of the agent, a silence): an image that cannot be pulled
//! or a store that cannot be reached says nothing about a worker, and neither does a build that outgrew a limit of its own.
//! One build counts once, because it may be the cause.

use std::collections::BTreeSet;

use helix_model::{BuildId, LogTime, Reason, Room, WorkerName};

use crate::command::ProbeWorker;
use crate::record::{Applied, Policy, Trust, WorkerRecord};
use crate::reply::{Rejection, Reply, Unfit};
use crate::state::State;

use super::Outcome;

/// The longest quarantine: an hour, so that a host that was mended is found out on the same day.
const QUARANTINE_MS_MAX: u64 = 3_600_000;

/// What an attempt's end says of the worker that ran it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// It can run builds.
    Good,
    /// It cannot, by its own fault.
    Bad,
    /// Nothing.
    None,
}

/// The quarantine is over: one attempt may try the worker.
pub(super) fn probe_worker(state: &mut State, at: LogTime, c: &ProbeWorker, out: &mut Applied) -> Outcome {
    let Some(worker) = state.worker(&c.worker) else { return Err(Rejection::WorkerUnknown(c.worker.clone())) };
    let Trust::Quarantined { until, round } = worker.trust else { return Ok(Reply::Unchanged) };
    if until > at {
        return Err(Rejection::WorkerUnfit { worker: c.worker.clone(), why: Unfit::Quarantined { until } });
    }
    let worker = WorkerRecord { trust: Trust::Probing { since: at, round }, ..(**worker).clone() };
    state.put_worker(worker, out);
    Ok(Reply::Done)
}

/// What an end is judged by: why, `None` being a success, and whose disk was full, if one was.
pub(super) type Why = (Option<Reason>, Room);

/// Takes in how an attempt of `build`, assigned at `assigned_at`, ended on a worker.
pub(super) fn note_end(
    state: &mut State,
    at: LogTime,
    name: &WorkerName,
    build: &BuildId,
    assigned_at: LogTime,
    why: Why,
    out: &mut Applied,
) {
    let Some(worker) = state.worker(name) else { return };
    if let Some(trust) = after(&worker.trust, at, build, assigned_at, why, &state.policy) {
        let worker = WorkerRecord { trust, ..(**worker).clone() };
        state.put_worker(worker, out);
    }
}

/// What becomes of the trust in a worker after an attempt's end; `None` if nothing does.
pub(super) fn after(
    trust: &Trust,
    at: LogTime,
    build: &BuildId,
    assigned_at: LogTime,
    why: Why,
    policy: &Policy,
) -> Option<Trust> {
    let fresh = || Trust::Full { failed: BTreeSet::new() };
    match (trust, sign(why)) {
        (Trust::Full { failed }, Sign::Good) => (!failed.is_empty()).then(fresh),
        (Trust::Full { failed }, Sign::Bad) => {
            if policy.quarantine_after == 0 || failed.contains(build) {
                return None;
            }
            let mut failed = failed.clone();
            failed.insert(build.clone());
            let enough = failed.len() as u64 >= u64::from(policy.quarantine_after);
            Some(if enough { quarantine(at, 0, policy) } else { Trust::Full { failed } })
        }
        // Only a probe tells; what began earlier ends as it may.
        (Trust::Probing { since, .. }, _) if assigned_at < *since => None,
        (Trust::Probing { .. }, Sign::Good) => Some(fresh()),
        (Trust::Probing { round, .. }, Sign::Bad) => Some(quarantine(at, round.saturating_add(1), policy)),
        (Trust::Full { .. } | Trust::Probing { .. }, Sign::None) | (Trust::Quarantined { .. }, _) => None,
    }
}

/// Doubles with each probe that failed.
fn quarantine(at: LogTime, round: u32, policy: &Policy) -> Trust {
    let ms = policy.quarantine_ms.saturating_mul(1 << round.min(16)).min(QUARANTINE_MS_MAX.max(policy.quarantine_ms));
    Trust::Quarantined { until: at.plus_ms(ms), round }
}

fn sign((reason, room): Why) -> Sign {
    match reason {
        Some(Reason::DiskFull) if room == Room::Own => Sign::None,
        // A command that ran to its end shows that the host can run commands, however it ended.
        None | Some(Reason::Exit | Reason::ArtifactMissing) => Sign::Good,
        Some(Reason::DiskFull | Reason::Internal | Reason::WorkerLost) => Sign::Bad,
        Some(
            Reason::Signal
            | Reason::Timeout
            | Reason::Silence
            | Reason::Oom
            | Reason::NoCommand
            | Reason::Policy
            | Reason::Source
            | Reason::Cancelled
            | Reason::ImagePull
            | Reason::Push
            | Reason::Artifact
            | Reason::Drained,
        ) => Sign::None,
    }
}
