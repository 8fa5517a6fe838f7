//! An agent reports how an attempt ended. Only the current attempt's own worker, in the life that was given the
//! work, is heard; whoever else reports is told to forget it.
//!
//! An agent that cannot prove the death of what it reports says so: the attempt ends all the same, unverified, and the
//! worker is held until somebody proves it. Waiting for a proof that cannot come would help nobody.
//!
//! Forgetting is asked for only when nothing more is wanted. While the log of an ended attempt is not sealed, its
//! worker keeps it and follows up with `SealLog`.

use helix_model::limits::OUTPUTS_MAX;
use helix_model::{Death, LogTime, Reason};

use crate::command::{FinishAttempt, Outcome as End};
use crate::effect::Effect;
use crate::record::{Applied, AttemptEnd};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::ending::{end_attempt, end_without_result};
use super::record_image::check_image;
use super::{Outcome, check_current, check_holders, not_open};

pub(super) fn finish_attempt(state: &mut State, at: LogTime, c: &FinishAttempt, out: &mut Applied) -> Outcome {
    if let Err(rejection) = check_current(state, &c.key, &c.worker, &c.instance) {
        if !state.wants_log(&c.key, &c.worker) {
            out.effects.push(Effect::SendForget { key: c.key.clone(), worker: c.worker.clone() });
        }
        // A report is a proof of death, also of an attempt that the registry had given up.
        let proven = c.death == Death::Proven;
        if proven && super::hold::clear_hold(state, &c.worker, &c.instance, &c.key, out) {
            return Ok(Reply::Done);
        }
        return Err(rejection);
    }
    let Some(mut build) = state.open_copy(&c.key.build) else { return Err(not_open(state, &c.key.build)) };
    let stop = state.running_attempt(&c.key).and_then(|attempt| attempt.stop.as_ref()).map(|stop| stop.reason);
    let counts = build.cancel.is_none() && stop.is_none_or(|reason| reason == Reason::Drained);
    let verified = c.death == Death::Proven;
    let end = match &c.outcome {
        End::Succeeded { digest, size, image_tag } if counts => {
            check_success(state, c)?;
            check_image(&build, c)?;
            AttemptEnd {
                digest: *digest,
                size: *size,
                image_tag: image_tag.clone(),
                reason: None,
                index: c.index,
                ..end_without_result(at, Reason::Internal, "", true)
            }
        }
        End::Succeeded { .. } => {
            end_without_result(at, Reason::Cancelled, "it succeeded after it was to stop", verified)
        }
        End::Failed { reason, message } => end_without_result(at, believable(*reason), message, verified),
        End::Stopped => end_without_result(at, Reason::Internal, stopped_message(stop, c.death), verified),
    };
    let end = AttemptEnd { exit_code: c.exit_code, signal: c.signal, ..end };
    // A failure is committed at once; a log that too few hold yet is sealed behind it.
    let log = c.log.clone().filter(|log| check_holders(state, "log", &log.blob).is_ok());
    let sealed = log.is_some();
    if let Some(task) = build.tasks.get_mut(usize::from(c.key.task.0))
        && let Some(attempt) = task.attempts.last_mut()
    {
        attempt.artifacts.clone_from(&c.artifacts);
        attempt.log = log;
        attempt.image.clone_from(&c.image);
    }
    let policy = state.policy.clone();
    end_attempt(&mut build, &c.key, end, c.room, &policy);
    let ended = build.task(c.key.task).and_then(|task| task.attempts.last()).cloned();
    state.put_build(build, out);
    if let Some(ended) = ended {
        let reason = ended.end.and_then(|end| end.reason);
        super::trust::note_end(state, at, &c.worker, &c.key.build, ended.assigned_at, (reason, c.room), out);
    }
    if c.death == Death::Unproven {
        super::hold::hold(state, &c.worker, &c.key, out);
    }
    if sealed {
        out.effects.push(Effect::LogSealed(c.key.clone()));
        out.effects.push(Effect::SendForget { key: c.key.clone(), worker: c.worker.clone() });
    }
    Ok(Reply::Done)
}

fn stopped_message(stop: Option<Reason>, death: Death) -> &'static str {
    match (stop, death) {
        (None, _) => "the agent stopped it without being asked",
        (Some(_), Death::Proven) => "stopped",
        (Some(_), Death::Unproven) => "stopped; its runner died, and that all its processes are dead is not proven",
    }
}

/// A success names bytes that exist: its log and every artifact, held by as many as policy demands.
fn check_success(state: &State, c: &FinishAttempt) -> Result<(), Rejection> {
    if c.death == Death::Unproven {
        return Err(Rejection::ReportInvalid("a success whose processes may still run"));
    }
    let Some(log) = &c.log else { return Err(Rejection::ReportInvalid("a success without a log")) };
    check_holders(state, "log", &log.blob)?;
    if c.artifacts.len() > OUTPUTS_MAX {
        return Err(Rejection::ReportInvalid("more artifacts than a build may have outputs"));
    }
    for (place, artifact) in c.artifacts.iter().enumerate() {
        if c.artifacts[..place].iter().any(|other| other.name == artifact.name) {
            return Err(Rejection::ReportInvalid("two artifacts of one name"));
        }
        check_holders(state, &format!("artifact {:?}", artifact.name), &artifact.blob)?;
    }
    Ok(())
}

/// Only the registry cancels: an agent that ends an attempt of its own accord has drained it.
fn believable(reason: Reason) -> Reason {
    if reason == Reason::Cancelled { Reason::Drained } else { reason }
}
