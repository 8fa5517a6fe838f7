//! An agent pushed the image of one of several platforms. One of the agents then pushes the index that names them all.
//!
//! Who that is the order of the log decides: the task whose image is recorded when all others are. It waits until the
//! others have succeeded, so that the images of an index are final and nobody has to push it twice; the others go on at
//! once. When an attempt is lost meanwhile, its task has no image any more, and whoever waited goes on as well: the
//! attempt that makes up for it is the last then.
//!
//! Invariant: while every task has its image and one still runs, exactly one running attempt is to push the index
//! ([`BuildRecord::indexing`]). So a build that succeeds has its index, and it names what the tasks report.

use helix_model::{BuildState, Digest, Platform, TaskIndex};

use crate::command::{FinishAttempt, RecordImage};
use crate::effect::Effect;
use crate::record::{Applied, BuildRecord, Image, TaskPhase, TaskRecord};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::{Outcome, check_current, not_open};

pub(super) fn record_image(state: &mut State, c: &RecordImage, out: &mut Applied) -> Outcome {
    let key = &c.key;
    check_current(state, key, &c.worker, &c.instance)?;
    let Some(mut build) = state.open_copy(&key.build) else { return Err(not_open(state, &key.build)) };
    let task = build.tasks.get_mut(usize::from(key.task.0));
    let Some(attempt) = task.and_then(|task| task.attempts.last_mut()) else {
        return Err(Rejection::TaskUnknown(key.clone()));
    };
    let known = attempt.image.as_ref() == Some(&c.image);
    attempt.image = Some(c.image.clone());
    let before = build.indexing;
    let part = part(&build, key.task);
    build.indexing = match part {
        Part::None => before.filter(|task| *task != key.task),
        Part::Waits | Part::Pushes(_) => Some(key.task),
    };
    let changed = !known || build.indexing != before;
    // Said again each time, because it may have been lost; where the row changes, `settle_index` says the rest.
    match part {
        Part::None => out.effects.push(send(&build, key.task, Vec::new())?),
        Part::Pushes(images) if !changed => out.effects.push(send(&build, key.task, images)?),
        Part::Waits | Part::Pushes(_) => {}
    }
    if !changed {
        return Ok(Reply::Unchanged);
    }
    state.put_build(build, out);
    Ok(Reply::Done)
}

/// What a task's attempt that has its image has to do with the index.
enum Part {
    /// Nothing: there is none, somebody else pushes it, or it is too early.
    None,
    /// It pushes it, once the others have succeeded.
    Waits,
    /// It pushes the index of these, now.
    Pushes(Vec<(Platform, Digest)>),
}

fn part(build: &BuildRecord, task: TaskIndex) -> Part {
    if !build.spec.pushes_index() {
        return Part::None;
    }
    let mut images = Vec::with_capacity(build.tasks.len());
    let mut others_succeeded = true;
    for (index, other) in build.indexed_tasks() {
        let (Some(platform), Some(image)) = (&other.platform, image_of(other)) else { return Part::None };
        others_succeeded &= index == task || succeeded(other);
        images.push((platform.clone(), image.digest));
    }
    if others_succeeded {
        Part::Pushes(images)
    } else if build.indexing.is_some_and(|indexing| indexing != task) {
        Part::None
    } else {
        Part::Waits
    }
}

fn succeeded(task: &TaskRecord) -> bool {
    matches!(task.phase, TaskPhase::Ended { state: BuildState::Succeeded, .. })
}

/// The image that counts: of the attempt that runs, or that succeeded.
fn image_of(task: &TaskRecord) -> Option<&Image> {
    let counts = succeeded(task) || matches!(task.phase, TaskPhase::Running);
    task.attempts.last().filter(|_| counts)?.image.as_ref()
}

fn send(build: &BuildRecord, task: TaskIndex, images: Vec<(Platform, Digest)>) -> Result<Effect, Rejection> {
    let attempt = build.task(task).and_then(TaskRecord::running);
    let unknown = || Rejection::BuildUnknown(build.id.clone());
    let attempt = attempt.ok_or_else(unknown)?;
    let key = build.attempt_key(task, attempt.number);
    Ok(Effect::SendImages { key, worker: attempt.worker.clone(), images })
}

/// Lets the attempt that was to push the index do so, or go on without, as the other tasks change.
pub(crate) fn settle_index(build: &mut BuildRecord, out: &mut Applied) {
    let Some(task) = build.indexing else { return };
    let running = build.task(task).and_then(TaskRecord::running);
    if running.is_none_or(|attempt| attempt.image.is_none()) {
        build.indexing = None;
        return;
    }
    let images = match part(build, task) {
        Part::Waits => return,
        Part::None => {
            build.indexing = None;
            Vec::new()
        }
        Part::Pushes(images) => images,
    };
    out.effects.extend(send(build, task, images));
}

/// A success of a build with an index is of the image that was recorded, and has the index exactly if it was to push it.
pub(super) fn check_image(build: &BuildRecord, c: &FinishAttempt) -> Result<(), Rejection> {
    let wrong = |why| Err(Rejection::ReportInvalid(why));
    if !build.spec.pushes_index() {
        return if c.index.is_some() { wrong("an index of a build that has none") } else { Ok(()) };
    }
    let recorded = build.task(c.key.task).and_then(image_of);
    // So reported those who knew of no index; what was committed then means the same for ever.
    if recorded.is_none() && c.image.is_none() && c.index.is_none() {
        return Ok(());
    }
    if recorded.is_none() || recorded != c.image.as_ref() {
        return wrong("a success whose image was not recorded");
    }
    match (part(build, c.key.task), c.index) {
        (Part::None, None) | (Part::Pushes(_), Some(_)) => Ok(()),
        (Part::Pushes(_), None) => wrong("a success without the index that it was to push"),
        (Part::Waits, None) => wrong("a success that did not wait for the other platforms"),
        (Part::None | Part::Waits, Some(_)) => wrong("an index that somebody else is to push, or too early"),
    }
}

/// Checks what must be true of every open build's images and its index.
pub(crate) fn check_indexing(build: &BuildRecord) -> Result<(), String> {
    let running = |task: &TaskRecord| matches!(task.phase, TaskPhase::Running);
    if let Some(task) = build.indexing {
        let attempt = build.task(task).and_then(TaskRecord::running);
        if attempt.is_none_or(|attempt| attempt.image.is_none()) || !build.spec.pushes_index() {
            return Err("a task is to push an index and has no image that runs".to_owned());
        }
    }
    let complete = build.spec.pushes_index() && build.tasks.iter().all(|task| image_of(task).is_some());
    if complete && build.tasks.iter().any(running) && build.indexing.is_none() {
        return Err("all images are there and nobody pushes their index".to_owned());
    }
    for attempt in build.tasks.iter().flat_map(|task| &task.attempts) {
        let failed = attempt.end.as_ref().is_some_and(|end| end.reason.is_some());
        if failed && attempt.image.is_some() {
            return Err("an attempt that failed has an image".to_owned());
        }
        if attempt.end.as_ref().is_some_and(|end| end.index.is_some()) {
            return Err("there is an index before the build has succeeded".to_owned());
        }
    }
    Ok(())
}
