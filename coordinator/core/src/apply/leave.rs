//! Ways for a worker to go: for an upgrade, silently, or for good.

use helix_model::{AttemptKey, BuildId, Instance, LogTime, Reason, Room, WorkerName};

use crate::command::{DetachWorker, LoseWorker, RemoveWorker};
use crate::record::{Applied, Standing, WorkerRecord};
use crate::reply::{Rejection, Reply, Unfit};
use crate::state::State;

use super::Outcome;
use super::ending::{Stopping, lose_attempts};

/// The agent goes and its runners stay; it says that it will be back.
pub(super) fn detach_worker(state: &mut State, at: LogTime, c: &DetachWorker, out: &mut Applied) -> Outcome {
    let worker = worker_of(state, &c.worker, &c.instance)?;
    if worker.standing != Standing::Present {
        return Ok(Reply::Unchanged);
    }
    let until = at.plus_ms(state.policy.detach_for_ms);
    state.put_worker(WorkerRecord { standing: Standing::Detached { until }, ..worker }, out);
    Ok(Reply::Done)
}

/// Its lease lapsed. What was asked to stop already waits on: its agent may still come back with the proof.
pub(super) fn lose_worker(state: &mut State, at: LogTime, c: &LoseWorker, out: &mut Applied) -> Outcome {
    let worker = worker_of(state, &c.worker, &c.instance)?;
    match worker.standing {
        Standing::Lost => return Ok(Reply::Unchanged),
        Standing::Detached { until } if until > at => {
            return Err(Rejection::WorkerUnfit { worker: c.worker.clone(), why: Unfit::Detached });
        }
        Standing::Detached { .. } | Standing::Present => {}
    }
    state.put_worker(WorkerRecord { standing: Standing::Lost, ..worker }, out);
    let keys = running(state, &c.worker);
    // However much it ran, it was lost once.
    let last = last_of(state, &keys);
    lose_attempts(state, at, &keys, Stopping::Wait, false, "its worker fell silent for longer than its lease", out);
    if let Some((build, assigned_at)) = last {
        super::trust::note_end(state, at, &c.worker, &build, assigned_at, (Some(Reason::WorkerLost), Room::Host), out);
    }
    Ok(Reply::Done)
}

/// An operator has the registry forget a worker, and all that it was to do or to prove.
pub(super) fn remove_worker(state: &mut State, at: LogTime, c: &RemoveWorker, out: &mut Applied) -> Outcome {
    if state.worker(&c.worker).is_none() {
        return Err(Rejection::WorkerUnknown(c.worker.clone()));
    }
    let keys = running(state, &c.worker);
    lose_attempts(state, at, &keys, Stopping::End, false, "its worker was removed", out);
    state.remove_worker_row(&c.worker, out);
    Ok(Reply::Done)
}

pub(super) fn running(state: &State, worker: &WorkerName) -> Vec<AttemptKey> {
    state.running_on(worker).cloned().collect()
}

/// The build of the attempt assigned last, of those that were not to stop, and when that was: what a loss is counted by. A
/// probe is assigned after everything that ran before it, so that it is the one.
pub(super) fn last_of(state: &State, keys: &[AttemptKey]) -> Option<(BuildId, LogTime)> {
    let of = |key: &AttemptKey| {
        let attempt = state.running_attempt(key).filter(|attempt| attempt.stop.is_none())?;
        Some((key.build.clone(), attempt.assigned_at))
    };
    keys.iter().filter_map(of).max_by_key(|(_, assigned_at)| *assigned_at)
}

fn worker_of(state: &State, name: &WorkerName, instance: &Instance) -> Result<WorkerRecord, Rejection> {
    let Some(worker) = state.worker(name) else { return Err(Rejection::WorkerUnknown(name.clone())) };
    if worker.instance != *instance {
        return Err(Rejection::InstanceStale(name.clone()));
    }
    Ok((**worker).clone())
}
