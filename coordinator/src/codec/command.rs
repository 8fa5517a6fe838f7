//! Commands to and from their durable form.

use helix_core::Command;
use helix_core::command::{
    AssignTask, CancelBuild, DetachWorker, DrainWorker, EndUnverified, ExpireAttempt, ExpireBytes, ExpireTombstones,
    FinishAttempt, LoseWorker, Outcome, PinBuild, PinSource, ProbeWorker, PurgeBuilds, RecordImage, RegisterArtifact,
    RegisterNode, RegisterWorker, ReleaseHold, RemoveWorker, RetireNode, SealLog, SetPolicy, SubmitBuild,
    UndrainWorker,
};
use helix_core::record::{DrainedBy, Pinned};
use helix_model::{Death, LogTime, NodeId, Room};
use helix_proto::store;
use helix_proto::store::command::Kind;
use helix_proto::store::finish_attempt;

use super::CodecError;
use super::parts::{
    artifact, artifact_wire, artifacts, authority, authority_wire, builds, digest, digest_to_wire, drained_by, image,
    image_wire, kept, key, key_wire, log, log_wire, need, offer, offer_wire, parse, parse_some, pinned, spec,
    spec_wire,
};
use super::policy::{policy, policy_format, policy_wire};
use crate::registry::COMMAND_FORMAT;

/// A command in its durable form.
#[must_use]
pub fn command_to_wire(command: &Command) -> store::Command {
    store::Command { kind: Some(kind(command)) }
}

fn kind(command: &Command) -> Kind {
    match command {
        Command::SubmitBuild(it) => Kind::SubmitBuild(store::SubmitBuild {
            build: it.build.to_string(),
            spec: spec_wire(&it.spec),
            spec_digest: digest_to_wire(&it.spec_digest),
            submitted_by: it.submitted_by.clone(),
            retry_of: it.retry_of.as_ref().map(ToString::to_string),
        }),
        Command::CancelBuild(it) => Kind::CancelBuild(store::CancelBuild {
            build: it.build.to_string(),
            authority: authority_wire(&it.authority),
            reason: it.reason.clone(),
        }),
        Command::AssignTask(it) => Kind::AssignTask(store::AssignTask {
            key: Some(key_wire(&it.key)),
            worker: it.worker.to_string(),
            instance: it.instance.to_string(),
        }),
        Command::PinSource(it) => Kind::PinSource(store::PinSource {
            key: Some(key_wire(&it.key)),
            worker: it.worker.to_string(),
            commit: it.commit.clone(),
        }),
        Command::RecordImage(it) => Kind::RecordImage(store::RecordImage {
            key: Some(key_wire(&it.key)),
            worker: it.worker.to_string(),
            instance: it.instance.to_string(),
            image: Some(image_wire(&it.image)),
        }),
        Command::FinishAttempt(it) => Kind::FinishAttempt(finish_wire(it)),
        Command::SealLog(it) => Kind::SealLog(store::SealLog {
            key: Some(key_wire(&it.key)),
            worker: it.worker.to_string(),
            log: Some(log_wire(&it.log)),
        }),
        Command::ExpireAttempt(it) => Kind::ExpireAttempt(store::ExpireAttempt {
            key: Some(key_wire(&it.key)),
            reason: it.reason.as_str().to_owned(),
        }),
        Command::EndUnverified(it) => Kind::EndUnverified(key_wire(&it.key)),
        Command::RegisterArtifact(it) => Kind::RegisterArtifact(store::RegisterArtifact {
            build: it.build.to_string(),
            authority: authority_wire(&it.authority),
            artifact: Some(artifact_wire(&it.artifact)),
        }),
        Command::PurgeBuilds(it) => Kind::PurgeBuilds(store::PurgeBuilds {
            builds: it.builds.iter().map(ToString::to_string).collect(),
            cutoff_ms: it.cutoff.0,
        }),
        Command::ExpireBytes(it) => Kind::ExpireBytes(store::ExpireBytes {
            builds: it.builds.iter().map(ToString::to_string).collect(),
            kept: it.kept.as_str().to_owned(),
        }),
        Command::ExpireTombstones(it) => {
            Kind::ExpireTombstones(store::BuildIds { builds: it.builds.iter().map(ToString::to_string).collect() })
        }
        Command::PinBuild(it) => Kind::PinBuild(store::PinBuild {
            build: it.build.to_string(),
            authority: authority_wire(&it.authority),
            pinned: it.pinned == Pinned::Yes,
        }),
        Command::SetPolicy(SetPolicy { policy, expected: None }) => Kind::SetPolicy(policy_wire(policy)),
        Command::SetPolicy(SetPolicy { policy, expected: Some(expected) }) => Kind::ChangePolicy(store::ChangePolicy {
            policy: Some(policy_wire(policy)),
            expected: Some(policy_wire(expected)),
        }),
        Command::RegisterNode(it) => Kind::RegisterNode(store::Node {
            id: it.node.0,
            epoch: it.epoch,
            grpc: it.grpc.clone(),
            version: it.version.clone(),
            format: it.format,
            removed_at_ms: None,
        }),
        Command::RetireNode(it) => Kind::RetireNode(it.node.0),
        Command::ReleaseHold(_)
        | Command::RegisterWorker(_)
        | Command::DetachWorker(_)
        | Command::LoseWorker(_)
        | Command::DrainWorker(_)
        | Command::UndrainWorker(_)
        | Command::RemoveWorker(_)
        | Command::ProbeWorker(_) => worker_kind(command),
    }
}

fn worker_kind(command: &Command) -> Kind {
    match command {
        Command::ReleaseHold(it) => Kind::ReleaseHold(store::ReleaseHold {
            worker: it.worker.to_string(),
            instance: it.instance.to_string(),
            key: Some(key_wire(&it.key)),
        }),
        Command::RegisterWorker(it) => Kind::RegisterWorker(store::RegisterWorker {
            worker: it.worker.to_string(),
            instance: it.instance.to_string(),
            offer: offer_wire(&it.offer),
        }),
        Command::DetachWorker(it) => {
            Kind::DetachWorker(store::WorkerLife { worker: it.worker.to_string(), instance: it.instance.to_string() })
        }
        Command::LoseWorker(it) => {
            Kind::LoseWorker(store::WorkerLife { worker: it.worker.to_string(), instance: it.instance.to_string() })
        }
        Command::DrainWorker(it) => Kind::DrainWorker(store::DrainWorker {
            worker: it.worker.to_string(),
            deadline_ms: it.deadline.map(|time| time.0),
            by_agent: it.by == DrainedBy::Agent,
        }),
        Command::UndrainWorker(it) => Kind::UndrainWorker(it.worker.to_string()),
        Command::RemoveWorker(it) => Kind::RemoveWorker(it.worker.to_string()),
        Command::ProbeWorker(it) => Kind::ProbeWorker(it.worker.to_string()),
        other => kind(other),
    }
}

fn finish_wire(it: &FinishAttempt) -> store::FinishAttempt {
    let outcome = match &it.outcome {
        Outcome::Succeeded { digest, size, image_tag } => finish_attempt::Outcome::Succeeded(store::Success {
            digest: digest.as_ref().map(digest_to_wire),
            size: *size,
            image_tag: image_tag.clone(),
        }),
        Outcome::Failed { reason, message } => finish_attempt::Outcome::Failed(store::Failure {
            reason: reason.as_str().to_owned(),
            message: message.clone(),
        }),
        Outcome::Stopped => finish_attempt::Outcome::Stopped(store::Stopped {}),
    };
    store::FinishAttempt {
        key: Some(key_wire(&it.key)),
        worker: it.worker.to_string(),
        instance: it.instance.to_string(),
        outcome: Some(outcome),
        exit_code: it.exit_code,
        signal: it.signal,
        artifacts: it.artifacts.iter().map(artifact_wire).collect(),
        log: it.log.as_ref().map(log_wire),
        unproven: it.death == Death::Unproven,
        image: it.image.as_ref().map(image_wire),
        index: it.index.as_ref().map(digest_to_wire),
        own_limit: it.room == Room::Own,
    }
}

/// The lowest command format whose readers take a command for what it is.
pub(crate) fn format_of(command: &store::Command) -> u32 {
    match &command.kind {
        // A reader of format 2 would pass over these, and think that there is no image or no index.
        Some(Kind::FinishAttempt(it)) if it.image.is_some() || it.index.is_some() => 3,
        // A reader of format 2 would pass over the flag and hold the worker guilty.
        Some(Kind::FinishAttempt(it)) if it.own_limit => 3,
        // A reader of format 1 would pass over the flag and take the attempt for dead.
        Some(Kind::FinishAttempt(it)) if it.unproven => 2,
        Some(Kind::ProbeWorker(_)) => 2,
        Some(Kind::ExpireBytes(_)) => 4,
        // A reader of format 3 would pass over the lifetimes, and keep or purge something else than the others.
        Some(Kind::SetPolicy(it)) => policy_format(it).max(1),
        Some(Kind::ChangePolicy(it)) => {
            [&it.policy, &it.expected].into_iter().flatten().map(policy_format).fold(3, u32::max)
        }
        Some(Kind::RecordImage(_) | Kind::RetireNode(_)) => 3,
        // A reader of format 2 would give such a worker what it cannot take.
        Some(Kind::RegisterWorker(it)) if it.offer.as_ref().is_some_and(|offer| offer.secrets.is_some()) => 3,
        _ => 1,
    }
}

/// Puts a command into a form that readers of format `known` understand, where it means to them what it meant before they
/// were told more: an agent that does not say which secrets it has is given what it may not take and refuses it, and an end
/// for want of room that is nobody's own counts as the host's. Others stay as they are.
pub(crate) fn lower(command: &mut store::Command, known: u32) {
    match &mut command.kind {
        Some(Kind::RegisterWorker(it)) if known < 3 => {
            if let Some(offer) = &mut it.offer {
                offer.secrets = None;
            }
        }
        Some(Kind::FinishAttempt(it)) if known < 3 => it.own_limit = false,
        _ => {}
    }
}

/// Reads a command.
///
/// # Errors
/// [`CodecError`]; a kind that is unknown here is `Newer`.
pub fn command_from_wire(wire: store::Command) -> Result<Command, CodecError> {
    let unknown = CodecError::Newer { what: "a command", needed: COMMAND_FORMAT + 1, known: COMMAND_FORMAT };
    Ok(match wire.kind.ok_or(unknown)? {
        Kind::SubmitBuild(it) => Command::SubmitBuild(SubmitBuild {
            build: parse(&it.build)?,
            spec: spec(it.spec)?,
            spec_digest: digest(&it.spec_digest)?,
            submitted_by: it.submitted_by,
            retry_of: parse_some(it.retry_of)?,
        }),
        Kind::CancelBuild(it) => Command::CancelBuild(CancelBuild {
            build: parse(&it.build)?,
            authority: authority(it.authority)?,
            reason: it.reason,
        }),
        Kind::AssignTask(it) => Command::AssignTask(AssignTask {
            key: key(it.key)?,
            worker: parse(&it.worker)?,
            instance: parse(&it.instance)?,
        }),
        Kind::PinSource(it) => {
            Command::PinSource(PinSource { key: key(it.key)?, worker: parse(&it.worker)?, commit: it.commit })
        }
        Kind::RecordImage(it) => Command::RecordImage(RecordImage {
            key: key(it.key)?,
            worker: parse(&it.worker)?,
            instance: parse(&it.instance)?,
            image: image(need("image", it.image)?)?,
        }),
        Kind::FinishAttempt(it) => Command::FinishAttempt(finish(it)?),
        Kind::SealLog(it) => {
            Command::SealLog(SealLog { key: key(it.key)?, worker: parse(&it.worker)?, log: log(need("log", it.log)?)? })
        }
        Kind::ExpireAttempt(it) => {
            Command::ExpireAttempt(ExpireAttempt { key: key(it.key)?, reason: parse(&it.reason)? })
        }
        Kind::EndUnverified(it) => Command::EndUnverified(EndUnverified { key: key(Some(it))? }),
        Kind::RegisterArtifact(it) => Command::RegisterArtifact(RegisterArtifact {
            build: parse(&it.build)?,
            authority: authority(it.authority)?,
            artifact: artifact(need("artifact", it.artifact)?)?,
        }),
        Kind::PurgeBuilds(it) => {
            Command::PurgeBuilds(PurgeBuilds { builds: builds(&it.builds)?, cutoff: LogTime(it.cutoff_ms) })
        }
        Kind::ExpireBytes(it) => {
            Command::ExpireBytes(ExpireBytes { kept: kept(&it.kept)?, builds: builds(&it.builds)? })
        }
        Kind::ExpireTombstones(it) => Command::ExpireTombstones(ExpireTombstones { builds: builds(&it.builds)? }),
        Kind::PinBuild(it) => Command::PinBuild(PinBuild {
            build: parse(&it.build)?,
            authority: authority(it.authority)?,
            pinned: pinned(it.pinned),
        }),
        Kind::SetPolicy(it) => Command::SetPolicy(SetPolicy { policy: policy(&it)?, expected: None }),
        Kind::ChangePolicy(it) => Command::SetPolicy(SetPolicy {
            policy: policy(&need("policy", it.policy)?)?,
            expected: Some(policy(&need("expected", it.expected)?)?),
        }),
        Kind::RegisterNode(it) => Command::RegisterNode(RegisterNode {
            node: NodeId(it.id),
            epoch: it.epoch,
            grpc: it.grpc,
            version: it.version,
            format: it.format,
        }),
        Kind::RetireNode(node) => Command::RetireNode(RetireNode { node: NodeId(node) }),
        other => return worker_command(other),
    })
}

fn worker_command(kind: Kind) -> Result<Command, CodecError> {
    Ok(match kind {
        Kind::ReleaseHold(it) => Command::ReleaseHold(ReleaseHold {
            worker: parse(&it.worker)?,
            instance: parse(&it.instance)?,
            key: key(it.key)?,
        }),
        Kind::RegisterWorker(it) => Command::RegisterWorker(RegisterWorker {
            worker: parse(&it.worker)?,
            instance: parse(&it.instance)?,
            offer: offer(it.offer)?,
        }),
        Kind::DetachWorker(it) => {
            Command::DetachWorker(DetachWorker { worker: parse(&it.worker)?, instance: parse(&it.instance)? })
        }
        Kind::LoseWorker(it) => {
            Command::LoseWorker(LoseWorker { worker: parse(&it.worker)?, instance: parse(&it.instance)? })
        }
        Kind::DrainWorker(it) => Command::DrainWorker(DrainWorker {
            worker: parse(&it.worker)?,
            deadline: it.deadline_ms.map(LogTime),
            by: drained_by(it.by_agent),
        }),
        Kind::UndrainWorker(worker) => Command::UndrainWorker(UndrainWorker { worker: parse(&worker)? }),
        Kind::RemoveWorker(worker) => Command::RemoveWorker(RemoveWorker { worker: parse(&worker)? }),
        Kind::ProbeWorker(worker) => Command::ProbeWorker(ProbeWorker { worker: parse(&worker)? }),
        other => return command_from_wire(store::Command { kind: Some(other) }),
    })
}

fn finish(it: store::FinishAttempt) -> Result<FinishAttempt, CodecError> {
    let outcome = match need("outcome", it.outcome)? {
        finish_attempt::Outcome::Succeeded(success) => Outcome::Succeeded {
            digest: success.digest.map(|bytes| digest(&bytes)).transpose()?,
            size: success.size,
            image_tag: success.image_tag,
        },
        finish_attempt::Outcome::Failed(failure) => {
            Outcome::Failed { reason: parse(&failure.reason)?, message: failure.message }
        }
        finish_attempt::Outcome::Stopped(store::Stopped {}) => Outcome::Stopped,
    };
    Ok(FinishAttempt {
        key: key(it.key)?,
        worker: parse(&it.worker)?,
        instance: parse(&it.instance)?,
        outcome,
        exit_code: it.exit_code,
        signal: it.signal,
        artifacts: artifacts(it.artifacts)?,
        log: it.log.map(log).transpose()?,
        death: if it.unproven { Death::Unproven } else { Death::Proven },
        image: it.image.map(image).transpose()?,
        index: it.index.map(|bytes| digest(&bytes)).transpose()?,
        room: if it.own_limit { Room::Own } else { Room::Host },
    })
}
