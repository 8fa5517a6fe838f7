//! The leader gives a waiting task to a worker. Everything the scheduler believed is checked again here.

use helix_model::{AttemptNumber, BuildState, LogTime};

use crate::command::AssignTask;
use crate::effect::Effect;
use crate::record::{Applied, AttemptRecord, TaskPhase};
use crate::reply::{Rejection, Reply};
use crate::state::State;
use crate::state::fit::{Ask, unready};

use super::{Outcome, not_open};

pub(super) fn assign_task(state: &mut State, at: LogTime, c: &AssignTask, out: &mut Applied) -> Outcome {
    let key = &c.key;
    if state.finished.contains_key(&key.build) {
        return Err(Rejection::TaskNotWaiting(key.clone()));
    }
    let Some(mut build) = state.open_copy(&key.build) else { return Err(not_open(state, &key.build)) };
    let spec = build.spec.clone();
    let Some(task) = build.tasks.get_mut(usize::from(key.task.0)) else {
        return Err(Rejection::TaskUnknown(key.clone()));
    };
    let current = task.attempts.last().map_or(AttemptNumber(0), |attempt| attempt.number);
    if key.attempt.0.checked_sub(1) != Some(current.0) {
        return Err(Rejection::StaleAttempt { key: key.clone(), current });
    }
    let TaskPhase::Waiting { not_before } = task.phase else { return Err(Rejection::TaskNotWaiting(key.clone())) };
    if not_before > at {
        return Err(Rejection::TaskNotWaiting(key.clone()));
    }
    let Some(worker) = state.worker(&c.worker) else { return Err(Rejection::WorkerUnknown(c.worker.clone())) };
    if worker.instance != c.instance {
        return Err(Rejection::InstanceStale(c.worker.clone()));
    }
    let ask = Ask::of(&spec, task.platform.as_ref());
    let unready = || unready(worker, state.load_of(&c.worker));
    let short = || ask.short(worker, &state.used_of(&c.worker));
    if let Some(why) = ask.unfit_leniently(worker).or_else(unready).or_else(short) {
        return Err(Rejection::WorkerUnfit { worker: c.worker.clone(), why });
    }
    task.attempts.push(AttemptRecord {
        number: key.attempt,
        worker: c.worker.clone(),
        instance: c.instance.clone(),
        assigned_at: at,
        stop: None,
        end: None,
        artifacts: Vec::new(),
        log: None,
        image: None,
    });
    task.phase = TaskPhase::Running;
    build.state = BuildState::Running;
    build.started_at = build.started_at.or(Some(at));
    state.put_build(build, out);
    let (key, worker, instance) = (key.clone(), c.worker.clone(), c.instance.clone());
    out.effects.push(Effect::SendAssignment { key, worker, instance });
    Ok(Reply::Done)
}
