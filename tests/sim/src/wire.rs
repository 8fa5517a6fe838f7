//! What the wire makes of a report and of an assignment on their way between the two cores, as the shells' own
//! conversions do.

use std::collections::BTreeSet;

use helix_agent_core::{Assignment, Blob, Order, PlatformImage, Report, Verdict};
use helix_core::command::{FinishAttempt, Outcome};
use helix_core::record::{Artifact, BlobRef, Image, SealedLog};
use helix_core::{Effect, Known, State};
use helix_model::{AttemptKey, Death, Instance, Reason, Room, WorkerName};

/// Who speaks on a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Speaker {
    pub(super) worker: WorkerName,
    pub(super) instance: Instance,
}

fn blob(blob: &Blob) -> BlobRef {
    BlobRef { digest: blob.digest, size: blob.size, holders: blob.holders.iter().copied().collect::<BTreeSet<_>>() }
}

/// A sealed log as the registry keeps it.
pub(super) fn sealed(log: &helix_agent_core::SealedLog) -> SealedLog {
    SealedLog { blob: blob(&log.blob), lines: log.lines }
}

/// An image as the registry keeps it.
pub(super) fn image(image: &helix_agent_core::Image) -> Image {
    let helix_agent_core::Image { digest, size, id, manifest_size, media_type } = image.clone();
    Image { digest, size, id, manifest_size, media_type }
}

/// A report in the speaker's name.
pub(super) fn finished(who: &Speaker, key: &AttemptKey, report: &Report) -> FinishAttempt {
    let outcome = match &report.verdict {
        Verdict::Succeeded { image_tag } => {
            let first = report.artifacts.first().map(|artifact| (artifact.blob.digest, artifact.blob.size));
            let made = report.image.as_ref().map(|image| (image.digest, image.size)).or(first);
            let (digest, size) = (made.map(|(digest, _)| digest), made.map_or(0, |(_, size)| size));
            Outcome::Succeeded { digest, size, image_tag: image_tag.clone() }
        }
        Verdict::Failed { reason, message } => Outcome::Failed { reason: *reason, message: message.clone() },
        Verdict::Stopped => Outcome::Stopped,
    };
    let artifact = |made: &helix_agent_core::Artifact| Artifact { name: made.name.clone(), blob: blob(&made.blob) };
    FinishAttempt {
        key: key.clone(),
        worker: who.worker.clone(),
        instance: who.instance.clone(),
        outcome,
        exit_code: report.exit_code,
        signal: report.signal,
        artifacts: report.artifacts.iter().map(artifact).collect(),
        log: report.log.as_ref().map(sealed),
        death: report.death,
        image: report.image.as_ref().map(image),
        index: report.index,
        room: report.room,
    }
}

/// The report that a proof of death is.
pub(super) fn stopped(who: &Speaker, key: &AttemptKey) -> FinishAttempt {
    finished(who, key, &Report { death: Death::Proven, room: Room::Host, ..Report::bare(Verdict::Stopped) })
}

/// The report that stands for one that cannot be taken as it is.
pub(super) fn invalid(report: FinishAttempt, why: &str) -> FinishAttempt {
    let message = format!("the agent's report cannot be taken: {why}");
    let outcome = Outcome::Failed { reason: Reason::Internal, message };
    FinishAttempt { outcome, artifacts: Vec::new(), image: None, index: None, ..report }
}

/// The assignment of an attempt that runs and is not to stop.
pub(super) fn assignment(state: &State, key: &AttemptKey) -> Option<Order> {
    let Some(Known::Open(build)) = state.build(&key.build) else { return None };
    state.running_attempt(key).filter(|attempt| attempt.stop.is_none())?;
    Some(Order::Assign(Box::new(Assignment {
        key: key.clone(),
        spec: (*build.spec).clone(),
        commit: build.commit.clone(),
        platform: build.task(key.task)?.platform.clone(),
        previous: String::new(),
    })))
}

/// What an effect makes the leader say, and to whom.
pub(super) fn order(state: &State, effect: &Effect) -> Option<(WorkerName, Order)> {
    Some(match effect {
        Effect::SendAssignment { key, worker, .. } => (worker.clone(), assignment(state, key)?),
        Effect::SendCommit { key, worker, commit } => (worker.clone(), Order::Commit(key.clone(), commit.clone())),
        Effect::SendImages { key, worker, images } => {
            let images = images.iter().cloned().map(|(platform, digest)| PlatformImage { platform, digest });
            (worker.clone(), Order::Images(key.clone(), images.collect()))
        }
        Effect::SendStop { key, worker, reason } => (worker.clone(), Order::Stop(key.clone(), *reason)),
        Effect::SendForget { key, worker } => (worker.clone(), Order::Forget(key.clone())),
        Effect::BuildChanged(_)
        | Effect::LogSealed(_)
        | Effect::BuildPurged(_)
        | Effect::LogsExpired(_)
        | Effect::WorkerChanged(_)
        | Effect::NodeChanged => return None,
    })
}
