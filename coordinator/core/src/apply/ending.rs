//! How an attempt ends and what becomes of its task: over, or waiting for another attempt.
//!
//! The rules of retries are here alone. A committed cancel beats everything; a stop that was asked for beats
//! what is reported later; budgets are the build's for the user's failures and the policy's for ours. A task may be run
//! again although its last attempt was not seen dead, as after a loss; who must not have that says so at submit.
//!
//! A build that outgrew the disk that it asked for does so wherever it runs: like memory, that is paid by the user's budget.
//! One that asked for none met the limit of that one agent's configuration, and may fit elsewhere: ours, as any `disk_full`.

use helix_model::limits::ATTEMPTS_PER_TASK_MAX;
use helix_model::{AttemptKey, BuildSpec, BuildState, Fault, LogTime, OnWorkerLoss, Reason, Room};

use crate::record::{Applied, AttemptEnd, BuildRecord, Policy, StopRequest, TaskPhase, TaskRecord};
use crate::state::State;

/// The longest back-off between two attempts.
const BACKOFF_MS_MAX: u64 = 60_000;

/// An end without a result.
pub(super) fn end_without_result(at: LogTime, reason: Reason, message: &str, verified: bool) -> AttemptEnd {
    AttemptEnd {
        at,
        reason: Some(reason),
        message: message.to_owned(),
        exit_code: None,
        signal: None,
        digest: None,
        size: 0,
        image_tag: String::new(),
        verified,
        index: None,
    }
}

/// Ends the running attempt of a task, decides what becomes of the task and, if it was the last, of the build.
/// `end.reason` is the agent's or the registry's view; a committed cancel or stop overrules it here.
pub(super) fn end_attempt(build: &mut BuildRecord, key: &AttemptKey, mut end: AttemptEnd, room: Room, policy: &Policy) {
    let at = end.at;
    let spec = build.spec.clone();
    let cancelled = build.cancel.is_some();
    let Some(task) = build.tasks.get_mut(usize::from(key.task.0)) else { return };
    let Some(attempt) = task.attempts.last_mut() else { return };
    let stop = attempt.stop.as_ref().map(|stop| stop.reason);
    end.reason = if cancelled { Some(Reason::Cancelled) } else { overruled(stop, end.reason) };
    let (reason, verified) = (end.reason, end.verified);
    if reason.is_some() {
        (end.digest, end.size, end.image_tag, end.index) = (None, 0, String::new(), None);
        attempt.artifacts.clear();
        attempt.image = None;
    }
    attempt.end = Some(end);
    task.phase = match reason {
        None => TaskPhase::Ended { state: BuildState::Succeeded, reason: None, at },
        Some(Reason::Cancelled) if cancelled => {
            TaskPhase::Ended { state: BuildState::Cancelled, reason: Some(Reason::Cancelled), at }
        }
        Some(reason) => {
            let may_live = reason == Reason::WorkerLost || !verified;
            let lost_for_good = may_live && spec.on_worker_loss == OnWorkerLoss::Fail;
            match next_attempt(task, (reason, fault(reason, room, &spec)), stop, spec.retries, policy, at) {
                Some(not_before) if !lost_for_good => TaskPhase::Waiting { not_before },
                Some(_) | None => TaskPhase::Ended { state: BuildState::Failed, reason: Some(reason), at },
            }
        }
    };
    build.settle(at);
}

/// What a stop that was committed makes of a later report. A time-out stands whatever comes after it; a drain
/// only moves the work, so a success that beat it is a success.
fn overruled(stop: Option<Reason>, reported: Option<Reason>) -> Option<Reason> {
    match (stop, reported) {
        (None, reported) => reported,
        (Some(Reason::Drained), None) => None,
        (Some(stop), _) => Some(stop),
    }
}

/// Whose budget pays for another attempt.
fn fault(reason: Reason, room: Room, spec: &BuildSpec) -> Fault {
    match (reason, room) {
        (Reason::DiskFull, Room::Own) if spec.resources.disk_bytes > 0 => Fault::User,
        _ => reason.fault(),
    }
}

/// When the task may be tried again after ending with `reason`, and the budget that pays for it; `None` if it may not.
fn next_attempt(
    task: &mut TaskRecord,
    (reason, fault): (Reason, Fault),
    stop: Option<Reason>,
    user_budget: u32,
    policy: &Policy,
    at: LogTime,
) -> Option<LogTime> {
    if task.attempts.len() >= ATTEMPTS_PER_TASK_MAX {
        return None;
    }
    // An operator's drain is nobody's failure: it costs no budget and no time.
    if stop == Some(Reason::Drained) {
        return Some(at);
    }
    if matches!(reason, Reason::NoCommand | Reason::Policy | Reason::Cancelled) {
        return None;
    }
    let (spent, budget) = match fault {
        Fault::User => (&mut task.user_retries, user_budget),
        Fault::Infrastructure => (&mut task.infra_retries, policy.infra_retries),
    };
    if *spent >= budget {
        return None;
    }
    *spent += 1;
    let doublings = (task.user_retries + task.infra_retries).saturating_sub(1).min(16);
    Some(at.plus_ms(policy.retry_backoff_ms.saturating_mul(1 << doublings).min(BACKOFF_MS_MAX)))
}

/// What a lost worker means for attempts that were asked to stop already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopping {
    /// They wait on for proof, or for the end of the registry's patience.
    Wait,
    /// They end, too.
    End,
}

/// Ends what ran on a worker that is gone, or on an earlier life of it. `verified` says whether the processes must be dead,
/// as after a boot. Answers the attempts that were to stop and ended without proof.
pub(super) fn lose_attempts(
    state: &mut State,
    at: LogTime,
    keys: &[AttemptKey],
    stopping: Stopping,
    verified: bool,
    message: &str,
    out: &mut Applied,
) -> Vec<AttemptKey> {
    let mut unproven = Vec::new();
    for key in keys {
        let Some(mut build) = state.open_copy(&key.build) else { continue };
        let stop: Option<&StopRequest> = state.running_attempt(key).and_then(|attempt| attempt.stop.as_ref());
        match stop {
            Some(_) if stopping == Stopping::Wait => continue,
            Some(_) if !verified => unproven.push(key.clone()),
            Some(_) | None => {}
        }
        let end = end_without_result(at, Reason::WorkerLost, message, verified);
        let policy = state.policy.clone();
        end_attempt(&mut build, key, end, Room::Host, &policy);
        state.put_build(build, out);
    }
    unproven
}
