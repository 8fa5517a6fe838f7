//! Somebody asks for a build's end. What waits ends at once; what runs is told to stop, and proves it.

use helix_model::{BuildState, LogTime, Reason};

use crate::command::{Authority, CancelBuild};
use crate::effect::Effect;
use crate::record::{Applied, CancelRequest, StopRequest, TaskPhase};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::{Outcome, check_authority, not_open};

pub(super) fn cancel_build(state: &mut State, at: LogTime, c: &CancelBuild, out: &mut Applied) -> Outcome {
    if let Some(finished) = state.finished.get(&c.build) {
        check_authority(&c.build, &finished.submitted_by, &c.authority)?;
        return match finished.state {
            BuildState::Cancelled => Ok(Reply::Unchanged),
            from @ (BuildState::Queued | BuildState::Running | BuildState::Succeeded | BuildState::Failed) => {
                Err(Rejection::WrongState { from, to: BuildState::Cancelled })
            }
        };
    }
    let Some(mut build) = state.open_copy(&c.build) else { return Err(not_open(state, &c.build)) };
    check_authority(&c.build, &build.submitted_by, &c.authority)?;
    if build.cancel.is_some() {
        return Ok(Reply::Unchanged);
    }
    let (Authority::Owner(by) | Authority::Any(by)) = &c.authority;
    build.cancel = Some(CancelRequest { at, by: by.clone(), reason: c.reason.clone() });
    let mut stops = Vec::new();
    for task in 0..build.tasks.len() {
        let index = helix_model::TaskIndex(u16::try_from(task).unwrap_or(u16::MAX));
        let id = build.id.clone();
        let task = &mut build.tasks[task];
        match task.phase {
            TaskPhase::Waiting { .. } => {
                task.phase = TaskPhase::Ended { state: BuildState::Cancelled, reason: Some(Reason::Cancelled), at };
            }
            TaskPhase::Running => {
                let Some(attempt) = task.attempts.last_mut() else { continue };
                // A stop that was asked for earlier goes on counting from then.
                let since = attempt.stop.as_ref().map_or(at, |stop| stop.at);
                attempt.stop = Some(StopRequest { reason: Reason::Cancelled, at: since });
                let key = helix_model::AttemptKey { build: id, task: index, attempt: attempt.number };
                let worker = attempt.worker.clone();
                stops.push(Effect::SendStop { key, worker, reason: Reason::Cancelled });
            }
            TaskPhase::Ended { .. } => {}
        }
    }
    build.settle(at);
    state.put_build(build, out);
    out.effects.extend(stops);
    Ok(Reply::Done)
}
