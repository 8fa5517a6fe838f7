//! Deadlines that the leader finds passed: attempts to be stopped, and stops that nobody proved.

use helix_model::{LogTime, Reason, Room};

use crate::command::{EndUnverified, ExpireAttempt};
use crate::effect::Effect;
use crate::record::{Applied, BuildRecord, Policy, Standing, StopRequest};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::ending::{end_attempt, end_without_result};
use super::{Outcome, not_open};

/// Asks the attempt to stop. Once asked, a later reason changes nothing.
pub(super) fn expire_attempt(state: &mut State, at: LogTime, c: &ExpireAttempt, out: &mut Applied) -> Outcome {
    let (mut build, worker) = running(state, &c.key)?;
    let policy = state.policy.clone();
    let drain = state.worker(&worker).and_then(|worker| worker.drain);
    let Some(attempt) = attempt_mut(&mut build, &c.key) else { return Err(Rejection::AttemptEnded(c.key.clone())) };
    if attempt.stop.is_some() {
        return Ok(Reply::Unchanged);
    }
    let assigned_at = attempt.assigned_at;
    let due = match c.reason {
        Reason::Timeout => at >= deadline(assigned_at, build.spec.timeout_ms, &policy),
        Reason::Silence => build.spec.silence_timeout_ms > 0,
        Reason::Drained => drain.and_then(|drain| drain.deadline).is_some_and(|deadline| at >= deadline),
        Reason::Exit
        | Reason::Signal
        | Reason::Oom
        | Reason::NoCommand
        | Reason::ArtifactMissing
        | Reason::Policy
        | Reason::Source
        | Reason::Cancelled
        | Reason::DiskFull
        | Reason::ImagePull
        | Reason::Push
        | Reason::Artifact
        | Reason::WorkerLost
        | Reason::Internal => return Err(Rejection::ReportInvalid("only timeout, silence and drained are deadlines")),
    };
    if !due {
        return Err(Rejection::NotDue(c.key.clone()));
    }
    if let Some(attempt) = attempt_mut(&mut build, &c.key) {
        attempt.stop = Some(StopRequest { reason: c.reason, at });
    }
    state.put_build(build, out);
    out.effects.push(Effect::SendStop { key: c.key.clone(), worker, reason: c.reason });
    Ok(Reply::Done)
}

/// Ends an attempt that was to stop, on a worker that is lost: nobody can prove it dead, and the worker is held until somebody does.
pub(super) fn end_unverified(state: &mut State, at: LogTime, c: &EndUnverified, out: &mut Applied) -> Outcome {
    let (mut build, name) = running(state, &c.key)?;
    let stop = state.running_attempt(&c.key).and_then(|attempt| attempt.stop.clone());
    let Some(stop) = stop else { return Err(Rejection::NotDue(c.key.clone())) };
    if at < stop.at.plus_ms(state.policy.cancel_unverified_after_ms) {
        return Err(Rejection::NotDue(c.key.clone()));
    }
    if state.worker(&name).is_none_or(|worker| worker.standing != Standing::Lost) {
        return Err(Rejection::AttemptRunning(c.key.clone()));
    }
    let policy = state.policy.clone();
    let end = end_without_result(at, stop.reason, "its worker is lost and nobody saw it dead", false);
    end_attempt(&mut build, &c.key, end, Room::Host, &policy);
    state.put_build(build, out);
    super::hold::hold(state, &name, &c.key, out);
    Ok(Reply::Done)
}

/// When a coordinator enforces the wall-clock limit of an attempt.
pub(crate) fn deadline(assigned_at: LogTime, timeout_ms: u64, policy: &Policy) -> LogTime {
    let limit = if timeout_ms > 0 { timeout_ms } else { policy.timeout_default_ms };
    assigned_at.plus_ms(limit).plus_ms(policy.timeout_grace_ms)
}

fn running(state: &State, key: &helix_model::AttemptKey) -> Result<(BuildRecord, helix_model::WorkerName), Rejection> {
    if state.finished.contains_key(&key.build) {
        return Err(Rejection::AttemptEnded(key.clone()));
    }
    let Some(build) = state.open_copy(&key.build) else { return Err(not_open(state, &key.build)) };
    let Some(task) = build.task(key.task) else { return Err(Rejection::TaskUnknown(key.clone())) };
    let current = task.attempts.last().map_or(helix_model::AttemptNumber(0), |attempt| attempt.number);
    if current != key.attempt {
        return Err(Rejection::StaleAttempt { key: key.clone(), current });
    }
    let Some(worker) = task.running().map(|attempt| attempt.worker.clone()) else {
        return Err(Rejection::AttemptEnded(key.clone()));
    };
    Ok((build, worker))
}

fn attempt_mut<'a>(
    build: &'a mut BuildRecord,
    key: &helix_model::AttemptKey,
) -> Option<&'a mut crate::record::AttemptRecord> {
    build.tasks.get_mut(usize::from(key.task.0))?.attempts.last_mut()
}
