//! Leases of workers, and the brake: when most workers fall silent at once, the fault is likely ours, and
//! rerunning everything would make it worse.
//!
//! Braked, losses are held back for a minute and then declared for at most a tenth of the workers per lease. The brake is
//! released when most of those workers are back, or when none of them is left to be lost.

use helix_model::{LogTime, WorkerName};

use crate::command::LoseWorker;
use crate::liveness::{Brake, InFlight, Liveness};
use crate::record::{Standing, WorkerRecord};
use crate::state::State;

/// Fewer workers than this are never braked for: half of them may well be one rack.
const BRAKE_WORKERS_MIN: usize = 5;

/// How long losses are held back.
const BRAKE_HOLD_MS: u64 = 60_000;

/// One in so many workers may be declared lost per lease after that.
const BRAKE_SHARE: usize = 10;

/// What `Liveness::brake` should be at `now`, given what it is. Losing the answer only begins the wait anew.
#[must_use]
pub fn brake(state: &State, liveness: &Liveness, now: LogTime) -> Option<Brake> {
    let lease = state.policy.worker_lease_ms;
    let any_lapsed = state.index.present.iter().any(|name| silence(state, liveness, name, now) >= lease);
    if !any_lapsed {
        return None;
    }
    if let Some(brake) = &liveness.brake {
        let away = brake.watched.iter().filter(|name| is_away(state, liveness, name, now)).count();
        return (away * 2 > brake.watched.len()).then(|| brake.clone());
    }
    let recently_lost = state.workers().filter(|worker| {
        let live = liveness.workers.get(&worker.name).filter(|live| live.instance == worker.instance);
        worker.standing == Standing::Lost && live.is_some_and(|live| now.since_ms(live.last_seen) < 2 * lease)
    });
    let watched: std::collections::BTreeSet<WorkerName> =
        state.index.present.iter().cloned().chain(recently_lost.map(|worker| worker.name.clone())).collect();
    let away = watched.iter().filter(|name| is_away(state, liveness, name, now)).count();
    let braked = watched.len() >= BRAKE_WORKERS_MIN && away * 2 > watched.len();
    braked.then_some(Brake { since: now, watched })
}

/// Workers to be declared lost now.
pub(super) fn losses(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime) -> Vec<LoseWorker> {
    let lease = state.policy.worker_lease_ms;
    let loss = |worker: &WorkerRecord| LoseWorker { worker: worker.name.clone(), instance: worker.instance.clone() };
    let free = |name: &&WorkerName| !in_flight.workers.contains(*name);
    // Who said when it would be back is not part of any riddle.
    let overdue = state.index.detached.iter().take_while(|(until, _)| *until <= now).map(|(_, name)| name);
    let mut lost: Vec<LoseWorker> =
        overdue.filter(free).filter_map(|name| state.worker(name)).map(|worker| loss(worker)).collect();
    let allowed = match brake(state, liveness, now) {
        None => usize::MAX,
        Some(brake) => allowance(state, in_flight, &brake, now),
    };
    let lapsed = state.index.present.iter().filter(|name| silence(state, liveness, name, now) >= lease);
    let lapsed = lapsed.filter(free).filter_map(|name| state.worker(name)).take(allowed);
    lost.extend(lapsed.map(|worker| loss(worker)));
    lost
}

/// How many more workers may be declared lost under the brake.
fn allowance(state: &State, in_flight: &InFlight, brake: &Brake, now: LogTime) -> usize {
    let Some(released_ms) = now.since_ms(brake.since).checked_sub(BRAKE_HOLD_MS) else { return 0 };
    let leases = usize::try_from(released_ms / state.policy.worker_lease_ms.max(1)).unwrap_or(usize::MAX);
    let per_lease = (brake.watched.len() / BRAKE_SHARE).max(1);
    let is_lost = |name: &&WorkerName| {
        let lost = state.worker(name).is_some_and(|worker| worker.standing == Standing::Lost);
        lost || in_flight.workers.contains(*name)
    };
    let declared = brake.watched.iter().filter(is_lost).count();
    leases.saturating_add(1).saturating_mul(per_lease).saturating_sub(declared)
}

/// How long a worker has been silent. One that this leader never heard counts from the leader's beginning.
fn silence(state: &State, liveness: &Liveness, name: &WorkerName, now: LogTime) -> u64 {
    now.since_ms(last_heard(state, liveness, name))
}

fn last_heard(state: &State, liveness: &Liveness, name: &WorkerName) -> LogTime {
    let worker = state.worker(name);
    let live = liveness.workers.get(name).filter(|live| worker.is_some_and(|w| w.instance == live.instance));
    // A registration is a sign of life, too; its session may not be noted yet.
    let registered = worker.map_or(LogTime(0), |worker| worker.registered_at);
    live.map_or(liveness.leader_since, |live| live.last_seen).max(registered)
}

/// Lost, or silent for half a lease: longer than any heartbeat's interval.
fn is_away(state: &State, liveness: &Liveness, name: &WorkerName, now: LogTime) -> bool {
    let lost = state.worker(name).is_none_or(|worker| worker.standing == Standing::Lost);
    lost || silence(state, liveness, name, now) * 2 > state.policy.worker_lease_ms
}

/// When the next lease lapses.
pub(super) fn next(state: &State, liveness: &Liveness) -> Option<LogTime> {
    let lease = state.policy.worker_lease_ms;
    state.index.present.iter().map(|name| last_heard(state, liveness, name).plus_ms(lease)).min()
}
