//! Two kinds of pins: the commit that a build's ref meant, and a build that retention passes over.

use helix_model::{AttemptKey, AttemptNumber, TaskIndex};

use crate::command::{PinBuild, PinSource};
use crate::effect::Effect;
use crate::record::{Addendum, Applied};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::{Outcome, check_authority, not_open};

/// The first commit that a current attempt reports counts for every task and attempt of the build.
pub(super) fn pin_source(state: &mut State, c: &PinSource, out: &mut Applied) -> Outcome {
    let key = &c.key;
    if state.finished.contains_key(&key.build) {
        return Err(Rejection::AttemptEnded(key.clone()));
    }
    let Some(mut build) = state.open_copy(&key.build) else { return Err(not_open(state, &key.build)) };
    let Some(task) = build.task(key.task) else { return Err(Rejection::TaskUnknown(key.clone())) };
    let current = task.attempts.last().map_or(AttemptNumber(0), |attempt| attempt.number);
    let Some(attempt) = task.attempts.last().filter(|a| a.number == key.attempt && a.worker == c.worker) else {
        return Err(Rejection::StaleAttempt { key: key.clone(), current });
    };
    if attempt.end.is_some() {
        return Err(Rejection::AttemptEnded(key.clone()));
    }
    let hex = c.commit.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !hex || !matches!(c.commit.len(), 40 | 64) {
        return Err(Rejection::CommitInvalid);
    }
    let commit = build.commit.clone().unwrap_or_else(|| c.commit.clone());
    if build.commit.is_none() {
        build.commit = Some(commit.clone());
        state.put_build(build, out);
    }
    out.effects.push(Effect::SendCommit { key: key.clone(), worker: c.worker.clone(), commit: commit.clone() });
    Ok(Reply::SourcePinned(commit))
}

/// Keeps a build from being purged, or no longer.
pub(super) fn pin_build(state: &mut State, c: &PinBuild, out: &mut Applied) -> Outcome {
    if let Some(finished) = state.finished.get(&c.build) {
        check_authority(&c.build, &finished.submitted_by, &c.authority)?;
        if finished.pinned == c.pinned {
            return Ok(Reply::Unchanged);
        }
        let key = AttemptKey { build: c.build.clone(), task: TaskIndex(0), attempt: AttemptNumber(0) };
        state.put_addendum(key, Addendum::Pinned(c.pinned), out);
        return Ok(Reply::Done);
    }
    let Some(mut build) = state.open_copy(&c.build) else { return Err(not_open(state, &c.build)) };
    check_authority(&c.build, &build.submitted_by, &c.authority)?;
    if build.pinned == c.pinned {
        return Ok(Reply::Unchanged);
    }
    build.pinned = c.pinned;
    state.put_build(build, out);
    Ok(Reply::Done)
}
