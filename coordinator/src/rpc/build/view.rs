//! A build's record as clients see it.
//!
//! Pure translation; the record is never changed. What the original's fields say of a build with several
//! tasks: the first task that failed, in the order given, speaks for it; else its only task; else none does, and what all tasks
//! agree on is said.

use std::collections::BTreeMap;

use helix_core::record::{Artifact, AttemptEnd, AttemptRecord, BuildRecord, Pinned, TaskPhase, TaskRecord};
use helix_model::{BuildState, Digest, LogTime};
use helix_proto::v1;
use sha2::{Digest as _, Sha256};

/// The whole of it.
pub(crate) fn status_of(record: &BuildRecord) -> v1::BuildStatus {
    let speaker = speaker(record);
    let attempt = speaker.and_then(|task| task.attempts.last());
    let end = attempt.and_then(|attempt| attempt.end.as_ref());
    let spec = &record.spec;
    let manifest = manifest_of(record);
    let several = manifest.as_deref().map(|text| index_of(record).unwrap_or(Digest(Sha256::digest(text).into())));
    let sizes = record.tasks.iter().filter_map(|task| Some(task.attempts.last()?.end.as_ref()?.size));
    // Agents say them, and may say anything.
    let sizes = sizes.fold(0, u64::saturating_add);
    v1::BuildStatus {
        build_id: record.id.to_string(),
        state: record.state.as_str().to_owned(),
        started_at: record.started_at.map_or(0, LogTime::unix_s),
        completed_at: record.completed_at.map_or(0, LogTime::unix_s),
        image_tag: end.map_or_else(|| common_tag(record), |end| end.image_tag.clone()),
        image_id: speaker.map_or_else(String::new, image_id),
        executor: spec.executor.map_or_else(String::new, |executor| executor.as_str().to_owned()),
        repo_url: spec.repo_url.clone(),
        r#ref: spec.git_ref.clone(),
        commit: record.commit.clone().unwrap_or_default(),
        digest: several.or(end.and_then(|end| end.digest)).map_or_else(String::new, |digest| digest.to_string()),
        size: if several.is_some() { sizes } else { end.map_or(0, |end| end.size) },
        manifest: manifest.unwrap_or_default(),
        exit_code: end.and_then(|end| end.exit_code),
        signal: end.and_then(|end| end.signal),
        reason: record.reason.map_or_else(String::new, |reason| reason.as_str().to_owned()),
        verified: record.verified,
        worker: attempt.map_or_else(String::new, |attempt| attempt.worker.to_string()),
        attempt: attempt.map_or(0, |attempt| attempt.number.0),
        submitted_by: record.submitted_by.clone(),
        labels: spec.labels.clone(),
        retry_of: record.retry_of.as_ref().map_or_else(String::new, ToString::to_string),
        created_at_ms: unix_ms(record.created_at),
        started_at_ms: record.started_at.map_or(0, unix_ms),
        completed_at_ms: record.completed_at.map_or(0, unix_ms),
        tasks: record.tasks.iter().map(task_of).collect(),
        artifacts: artifacts_of(record),
        message: end.map_or_else(String::new, |end| end.message.clone()),
        cancel_requested: record.cancel.is_some(),
        pinned: record.pinned == Pinned::Yes,
        logs_expired_at_ms: record.expired.logs.map_or(0, unix_ms),
        artifacts_expired_at_ms: record.expired.artifacts.map_or(0, unix_ms),
        cancel_reason: record.cancel.as_ref().map_or_else(String::new, |cancel| cancel.reason.clone()),
    }
}

/// What a build for several platforms made, once all have succeeded: a JSON object of platform to digest, platforms sorted.
/// Where no index of the same was pushed, the build's digest is the sha256 of these bytes.
fn manifest_of(record: &BuildRecord) -> Option<String> {
    if record.tasks.len() < 2 || record.state != BuildState::Succeeded {
        return None;
    }
    let entry = |task: &TaskRecord| Some((platform_of(task), task.attempts.last()?.end.as_ref()?.digest?));
    let entries: Option<BTreeMap<String, Digest>> = record.tasks.iter().map(entry).collect();
    // A platform's characters need no escapes.
    let members = entries?.into_iter().map(|(platform, digest)| format!("\"{platform}\":\"sha256:{digest}\""));
    Some(format!("{{{}}}", members.collect::<Vec<_>>().join(",")))
}

/// The index that names the images of all tasks, where it was pushed.
fn index_of(record: &BuildRecord) -> Option<Digest> {
    record.tasks.iter().find_map(|task| task.attempts.last()?.end.as_ref()?.index)
}

/// The tag of all images of a build for several platforms; empty where they have none in common.
fn common_tag(record: &BuildRecord) -> String {
    let tag_of = |task: &TaskRecord| Some(task.attempts.last()?.end.as_ref()?.image_tag.clone());
    let mut tags = record.tasks.iter().map(tag_of);
    match tags.next().flatten() {
        Some(first) if tags.all(|tag| tag.as_ref() == Some(&first)) => first,
        _ => String::new(),
    }
}

/// podman's id of the image that a task made; empty for none.
fn image_id(task: &TaskRecord) -> String {
    let ended = task.attempts.last().filter(|attempt| attempt.end.is_some());
    ended.and_then(|attempt| attempt.image.as_ref()).map_or_else(String::new, |image| image.id.to_string())
}

/// What the build's tasks made, in the order of tasks, and then what clients registered.
pub(crate) fn artifacts_of(record: &BuildRecord) -> Vec<v1::ArtifactInfo> {
    let made = (0u32..).zip(&record.tasks).flat_map(|(index, task)| {
        let current = task.attempts.last().map_or(&[][..], |attempt| &attempt.artifacts);
        current.iter().map(move |artifact| artifact_of(artifact, index, false))
    });
    made.chain(record.artifacts.iter().map(|artifact| artifact_of(artifact, 0, true))).collect()
}

/// Log time as Unix milliseconds on the wire.
pub(crate) fn unix_ms(at: LogTime) -> i64 {
    i64::try_from(at.0).unwrap_or(i64::MAX)
}

/// Log time for people, in UTC.
pub(crate) fn time_text(at: LogTime) -> String {
    let seconds = at.unix_s().rem_euclid(86_400);
    format!("{:02}:{:02}:{:02} UTC", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

/// The word for where a task stands; a task between attempts waits, whatever its build does.
pub(crate) fn task_state(task: &TaskRecord) -> BuildState {
    match &task.phase {
        TaskPhase::Waiting { .. } => BuildState::Queued,
        TaskPhase::Running => BuildState::Running,
        TaskPhase::Ended { state, .. } => *state,
    }
}

/// The platform's word; empty for any.
pub(crate) fn platform_of(task: &TaskRecord) -> String {
    task.platform.as_ref().map_or_else(String::new, ToString::to_string)
}

fn speaker(record: &BuildRecord) -> Option<&TaskRecord> {
    let failed = record.tasks.iter().find(|task| task_state(task) == BuildState::Failed);
    failed.or(match record.tasks.as_slice() {
        [only] => Some(only),
        _ => None,
    })
}

fn task_of(task: &TaskRecord) -> v1::TaskStatus {
    let attempt = task.attempts.last();
    let end = attempt.and_then(|attempt| attempt.end.as_ref());
    let reason = match &task.phase {
        TaskPhase::Ended { reason, .. } => *reason,
        TaskPhase::Waiting { .. } | TaskPhase::Running => None,
    };
    v1::TaskStatus {
        platform: platform_of(task),
        state: task_state(task).as_str().to_owned(),
        worker: attempt.map_or_else(String::new, |attempt| attempt.worker.to_string()),
        attempt: attempt.map_or(0, |attempt| attempt.number.0),
        digest: end.and_then(|end| end.digest).map_or_else(String::new, |digest| digest.to_string()),
        image_tag: end.map_or_else(String::new, |end| end.image_tag.clone()),
        exit_code: end.and_then(|end| end.exit_code),
        signal: end.and_then(|end| end.signal),
        reason: reason.map_or_else(String::new, |reason| reason.as_str().to_owned()),
        size: end.map_or(0, |end| end.size),
        image_id: image_id(task),
        attempts: task.attempts.iter().map(attempt_of).collect(),
    }
}

fn attempt_of(attempt: &AttemptRecord) -> v1::AttemptStatus {
    let end: Option<&AttemptEnd> = attempt.end.as_ref();
    v1::AttemptStatus {
        number: attempt.number.0,
        worker: attempt.worker.to_string(),
        assigned_at_ms: unix_ms(attempt.assigned_at),
        ended_at_ms: end.map_or(0, |end| unix_ms(end.at)),
        reason: end.and_then(|end| end.reason).map_or_else(String::new, |reason| reason.as_str().to_owned()),
        message: end.map_or_else(String::new, |end| end.message.clone()),
        exit_code: end.and_then(|end| end.exit_code),
        signal: end.and_then(|end| end.signal),
        unverified: end.is_some_and(|end| !end.verified),
    }
}

fn artifact_of(artifact: &Artifact, task: u32, registered: bool) -> v1::ArtifactInfo {
    v1::ArtifactInfo {
        name: artifact.name.clone(),
        digest: artifact.blob.digest.to_string(),
        size: artifact.blob.size,
        task,
        registered,
    }
}

/// Whether a record passes the filters of a list; empty filters pass everything.
pub(crate) fn passes(record: &BuildRecord, repo_url: &str, labels: &BTreeMap<String, String>) -> bool {
    (repo_url.is_empty() || record.spec.repo_url == repo_url)
        && labels.iter().all(|(key, value)| record.spec.labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::with_images;

    #[test]
    fn sizes_beyond_all_measure_are_no_trouble() {
        let mut record = with_images();
        record.state = BuildState::Succeeded;
        let end = record.tasks[0].attempts[0].end.clone();
        for attempt in record.tasks.iter_mut().flat_map(|task| &mut task.attempts) {
            attempt.end = end.clone().map(|end| AttemptEnd { size: u64::MAX, ..end });
        }
        assert_eq!(status_of(&record).size, u64::MAX);
    }
}
