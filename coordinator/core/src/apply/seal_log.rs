//! The log of an attempt that did not succeed is sealed behind its end. The first report counts.

use crate::command::SealLog;
use crate::effect::Effect;
use crate::record::{Addendum, Applied};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::{Outcome, check_holders, not_open};

pub(super) fn seal_log(state: &mut State, c: &SealLog, out: &mut Applied) -> Outcome {
    let forget = Effect::SendForget { key: c.key.clone(), worker: c.worker.clone() };
    if state.finished.contains_key(&c.key.build) {
        if !state.wants_log(&c.key, &c.worker) {
            out.effects.push(forget);
            return Ok(Reply::Unchanged);
        }
        check_holders(state, "log", &c.log.blob)?;
        state.put_addendum(c.key.clone(), Addendum::Log(c.log.clone()), out);
        out.effects.extend([Effect::LogSealed(c.key.clone()), forget]);
        return Ok(Reply::Done);
    }
    let Some(mut build) = state.open_copy(&c.key.build) else {
        out.effects.push(forget);
        return Err(not_open(state, &c.key.build));
    };
    let Some(task) = build.tasks.get_mut(usize::from(c.key.task.0)) else {
        return Err(Rejection::TaskUnknown(c.key.clone()));
    };
    let current = task.attempts.last().map_or(helix_model::AttemptNumber(0), |attempt| attempt.number);
    let attempt = task.attempts.iter_mut().find(|attempt| attempt.number == c.key.attempt);
    let Some(attempt) = attempt.filter(|attempt| attempt.worker == c.worker) else {
        out.effects.push(forget);
        return Err(Rejection::StaleAttempt { key: c.key.clone(), current });
    };
    if attempt.end.is_none() {
        return Err(Rejection::AttemptRunning(c.key.clone()));
    }
    if attempt.log.is_some() {
        out.effects.push(forget);
        return Ok(Reply::Unchanged);
    }
    check_holders(state, "log", &c.log.blob)?;
    attempt.log = Some(c.log.clone());
    state.put_build(build, out);
    out.effects.extend([Effect::LogSealed(c.key.clone()), forget]);
    Ok(Reply::Done)
}
