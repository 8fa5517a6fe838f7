//! A client submits a build. The id decides: known with the same spec it is the same build, so a retry is harmless.

use helix_model::limits::TASKS_PER_BUILD_MAX;
use helix_model::{BuildState, LogTime};

use crate::command::SubmitBuild;
use crate::record::{Applied, BuildRecord, Pinned, TaskPhase, TaskRecord};
use crate::reply::{Rejection, Reply};
use crate::retention::Expired;
use crate::state::{Known, State};

use super::Outcome;

pub(super) fn submit_build(state: &mut State, at: LogTime, c: &SubmitBuild, out: &mut Applied) -> Outcome {
    let known = state.build(&c.build).map(|known| match known {
        Known::Open(build) => (build.spec_digest, Reply::SameBuild),
        Known::Finished(build) => (build.spec_digest, Reply::SameBuild),
        Known::Purged(tombstone) => (tombstone.spec_digest, Reply::SamePurged(tombstone.state)),
    });
    if let Some((digest, reply)) = known {
        return if digest == c.spec_digest { Ok(reply) } else { Err(Rejection::IdTaken(c.build.clone())) };
    }
    let queue_max = state.policy.queue_max;
    if state.open.len() as u64 >= queue_max {
        return Err(Rejection::QueueFull { queue_max });
    }
    if c.spec.task_count() > TASKS_PER_BUILD_MAX {
        return Err(Rejection::ReportInvalid("more platforms than a build may have"));
    }
    let task = |platform| TaskRecord {
        platform,
        phase: TaskPhase::Waiting { not_before: at },
        attempts: Vec::new(),
        user_retries: 0,
        infra_retries: 0,
    };
    let mut tasks: Vec<_> = c.spec.platforms.iter().cloned().map(Some).map(task).collect();
    if tasks.is_empty() {
        tasks.push(task(None));
    }
    let record = BuildRecord {
        id: c.build.clone(),
        spec: c.spec.clone(),
        spec_digest: c.spec_digest,
        submitted_by: c.submitted_by.clone(),
        retry_of: c.retry_of.clone(),
        sequence: state.take_sequence(),
        state: BuildState::Queued,
        created_at: at,
        started_at: None,
        completed_at: None,
        commit: None,
        cancel: None,
        reason: None,
        verified: true,
        tasks,
        artifacts: Vec::new(),
        pinned: Pinned::No,
        expired: Expired::default(),
        indexing: None,
    };
    state.put_build(record, out);
    Ok(Reply::Submitted)
}
