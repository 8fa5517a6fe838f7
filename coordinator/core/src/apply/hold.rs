//! What keeps a worker from new work for a while: holds until a death is proven, and drains.

use helix_model::{AttemptKey, Instance, WorkerName};

use crate::command::{DrainWorker, ReleaseHold, UndrainWorker};
use crate::record::{Applied, Drain, DrainedBy, Trust, WorkerRecord};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

/// The worker proves that an attempt which ended unverified is dead. The same life can, and another one on the same
/// boot of the host, which sees the same processes.
pub(super) fn release_hold(state: &mut State, c: &ReleaseHold, out: &mut Applied) -> Outcome {
    let Some(worker) = state.worker(&c.worker) else { return Err(Rejection::WorkerUnknown(c.worker.clone())) };
    if worker.instance.boot_id() != c.instance.boot_id() {
        return Err(Rejection::InstanceStale(c.worker.clone()));
    }
    let cleared = clear_hold(state, &c.worker, &c.instance, &c.key, out);
    Ok(if cleared { Reply::Done } else { Reply::Unchanged })
}

/// Gives the worker no work until it is proven that an attempt which ended unverified there is dead.
pub(super) fn hold(state: &mut State, name: &WorkerName, key: &AttemptKey, out: &mut Applied) {
    let Some(worker) = state.worker(name).filter(|worker| !worker.held.contains(key)) else { return };
    let mut worker = (**worker).clone();
    worker.held.insert(key.clone());
    state.put_worker(worker, out);
}

/// Clears one hold, if it is there and the reporter sees the host as it was.
pub(super) fn clear_hold(
    state: &mut State,
    name: &WorkerName,
    instance: &Instance,
    key: &AttemptKey,
    out: &mut Applied,
) -> bool {
    let worker = state.worker(name).filter(|worker| worker.instance.boot_id() == instance.boot_id());
    let Some(worker) = worker.filter(|worker| worker.held.contains(key)) else { return false };
    let mut worker = (**worker).clone();
    worker.held.remove(key);
    state.put_worker(worker, out);
    true
}

pub(super) fn drain_worker(state: &mut State, c: &DrainWorker, out: &mut Applied) -> Outcome {
    let Some(worker) = state.worker(&c.worker) else { return Err(Rejection::WorkerUnknown(c.worker.clone())) };
    let drain = Drain { deadline: c.deadline, by: c.by };
    // An operator's drain outlives an agent's wish, whichever came first.
    let overruled = c.by == DrainedBy::Agent && worker.drain.is_some_and(|present| present.by == DrainedBy::Operator);
    if worker.drain == Some(drain) || overruled {
        return Ok(Reply::Unchanged);
    }
    let worker = WorkerRecord { drain: Some(drain), ..(**worker).clone() };
    state.put_worker(worker, out);
    Ok(Reply::Done)
}

/// An operator's word that the worker is well: no drain, and none of its failures counts any more.
pub(super) fn undrain_worker(state: &mut State, c: &UndrainWorker, out: &mut Applied) -> Outcome {
    let Some(worker) = state.worker(&c.worker) else { return Err(Rejection::WorkerUnknown(c.worker.clone())) };
    if worker.drain.is_none() && worker.trust == Trust::default() {
        return Ok(Reply::Unchanged);
    }
    let worker = WorkerRecord { drain: None, trust: Trust::default(), ..(**worker).clone() };
    state.put_worker(worker, out);
    Ok(Reply::Done)
}
