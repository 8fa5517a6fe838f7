//! Room kept for tasks that ask for much: without it, small tasks would take whatever comes free before it adds up.
//!
//! A task that asks for more than a slot, has waited for a minute and finds no room gets a claim on the worker that lacks
//! least. Nothing behind it in the order is placed there, so that what ends there adds up; what stands before it still is.
//! Claims are few, and last as long as their task waits and their worker could take it.

use std::collections::BTreeMap;

use helix_model::{LogTime, Measure, WorkerName};

use crate::liveness::{Claim, Liveness};
use crate::record::{TaskPhase, Trust, WorkerRecord};
use crate::state::State;
use crate::state::fit::{Ask, unready};
use crate::state::index::Waiting;

use super::{effective, is_able, lookup};

/// How long a task waits before room is kept for it.
const CLAIM_AFTER_MS: u64 = 60_000;

/// Workers whose room is kept at one time, at most: each may stand half empty for a while.
const CLAIMS_MAX: usize = 16;

/// What `Liveness::claims` should be at `now`, given what it is. Losing the answer only begins the choice anew. Walks all workers
/// for each claim that is new: for the leader's tick, not for every pass.
#[must_use]
pub fn claims(state: &State, liveness: &Liveness, now: LogTime) -> BTreeMap<WorkerName, Claim> {
    let mut claims: BTreeMap<WorkerName, Claim> = BTreeMap::new();
    for (waiting, ask) in &state.index.queue.heads {
        if claims.len() >= CLAIMS_MAX {
            break;
        }
        if !has_waited(state, *waiting, ask, now) {
            continue;
        }
        let ask = effective(state, ask);
        let free = state.index.queue.fits.get(&ask).into_iter().flat_map(|fit| &fit.free);
        let able = |name: &WorkerName| state.workers.get(name).is_some_and(|worker| is_able(liveness, worker));
        if free.map(|(_, name)| name).any(|name| able(name) && !claims.contains_key(name)) {
            continue;
        }
        let could = |worker: &WorkerRecord| !claims.contains_key(&worker.name) && could_take(liveness, &ask, worker);
        let kept = liveness.claims.iter().find(|(_, claim)| claim.place() == *waiting).map(|(name, _)| name);
        let kept = kept.filter(|name| state.workers.get(*name).is_some_and(|worker| could(worker)));
        let nearest = || {
            let workers = state.workers.values().filter(|worker| could(worker));
            workers.min_by_key(|worker| (lacks(state, &ask, worker), worker.name.clone())).map(|worker| &worker.name)
        };
        if let Some(name) = kept.or_else(nearest) {
            claims.insert(name.clone(), Claim::of(*waiting));
        }
    }
    claims
}

/// Whether a task asks for more than a slot, and has waited for it long enough.
fn has_waited(state: &State, waiting: Waiting, ask: &Ask, now: LogTime) -> bool {
    let asks = Measure::ALL.into_iter().any(|what| ask.amounts.get(what) > 0);
    asks && lookup(state, waiting).is_some_and(|(_, task)| match task.phase {
        TaskPhase::Waiting { not_before } => now.since_ms(not_before) >= CLAIM_AFTER_MS,
        TaskPhase::Running | TaskPhase::Ended { .. } => false,
    })
}

/// Whether the worker could take it if nothing ran there. One that is only tried is not counted on.
fn could_take(liveness: &Liveness, ask: &Ask, worker: &WorkerRecord) -> bool {
    let trusted = matches!(worker.trust, Trust::Full { .. });
    trusted && ask.unfit(worker).is_none() && unready(worker, 0).is_none() && is_able(liveness, worker)
}

/// What the worker lacks most, in thousandths of what is asked.
fn lacks(state: &State, ask: &Ask, worker: &WorkerRecord) -> u128 {
    let left = state.used_of(&worker.name).left_of(&worker.offer.resources);
    let lack = |what| {
        let (asked, left) = (u128::from(ask.amounts.get(what)), u128::from(left.get(what)));
        asked.saturating_sub(left) * 1_000 / asked.max(1)
    };
    Measure::ALL.into_iter().map(lack).max().unwrap_or(0)
}
