//! Messages of the session between the wire and the agent's core.

use std::collections::BTreeSet;

use helix_agent_core::{
    Artifact, Assignment, Blob, Death, Image, Message, Order, PlatformImage, Report, SealedLog, Verdict,
};
use helix_model::{AttemptKey, Digest, InvalidField, NodeId, Platform, Reason, Room};
use helix_proto::agent::{self, agent_message, coordinator_message};
use helix_proto::convert::{attempt_from_wire, attempt_to_wire, spec_from_wire, spec_to_wire};

use crate::config::Config;
use crate::disk::Disks;
use crate::executor::podman::Standing;
use crate::secrets::SecretConfig;

/// What the agent offers; `isolation` and `limits` say how builds are kept apart and limited.
#[must_use]
pub fn offer(config: &Config, isolation: &str, limits: &str, disks: &Disks, podman: &Standing) -> agent::Offer {
    let executors = [Some("exec"), podman.works().then_some("podman")];
    let resources = &config.resources;
    let disk = disks.bytes_above_reserve(&config.exec.base_dir).unwrap_or(0);
    let mut offer = agent::Offer {
        address: config.address.clone(),
        capacity: config.capacity,
        platforms: config.platforms.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect(),
        labels: config.labels.clone().into_iter().collect(),
        executors: executors.into_iter().flatten().map(str::to_owned).collect(),
        allows_job_commands: config.exec.allow_job_commands,
        has_own_command: !config.exec.command.is_empty(),
        isolation: isolation.to_owned(),
        cpu_milli: lowered(crate::host::cpu_milli(), resources.cpu_milli),
        memory_bytes: lowered(crate::host::memory_bytes(), resources.memory_bytes),
        disk_bytes: lowered(disk, resources.disk_bytes),
        limits: limits.to_owned(),
        podman: podman.words(),
        emulated: config.podman.emulated.clone(),
        secrets: Some(secrets(config)),
    };
    // What policy would refuse is better not sent.
    offer.executors.retain(|executor| config.policy.allows_executor(executor));
    offer.emulated.retain(|platform| config.policy.allows_platform(platform));
    offer.platforms.retain(|platform| config.policy.allows_platform(platform));
    offer
}

/// The secrets' names, and whether each is for certain repositories alone. Nothing else of them leaves the host.
fn secrets(config: &Config) -> agent::OfferedSecrets {
    let whom = |(name, secret): (&String, &SecretConfig)| (name.clone(), !secret.is_for_all());
    agent::OfferedSecrets { restricted: config.secrets.iter().map(whom).collect() }
}

/// What the host has, or less where the configuration says so. 0 is unknown or unsaid.
fn lowered(host: u64, configured: u64) -> u64 {
    match (host, configured) {
        (has, 0) | (0, has) => has,
        (host, configured) => host.min(configured),
    }
}

/// A message for the session.
#[must_use]
pub fn message_to_wire(message: &Message) -> agent::AgentMessage {
    let inner = match message {
        Message::SourceResolved { key, commit } => {
            let (id, commit) = (Some(attempt_to_wire(key)), commit.clone());
            agent_message::Message::SourceResolved(agent::SourceResolved { id, commit })
        }
        Message::ImagePushed { key, image } => agent_message::Message::ImagePushed(agent::ImagePushed {
            id: Some(attempt_to_wire(key)),
            image: Some(image_to_wire(image)),
        }),
        Message::Finished { key, report } => agent_message::Message::Finished(report_to_wire(key, report)),
        Message::LogSealed { key, log } => agent_message::Message::LogSealed(agent::LogSealed {
            id: Some(attempt_to_wire(key)),
            log: Some(log_to_wire(log)),
        }),
        Message::ProvenDead { key } => {
            agent_message::Message::ProvenDead(agent::ProvenDead { id: Some(attempt_to_wire(key)) })
        }
        Message::Detaching => agent_message::Message::Detaching(agent::Detaching {}),
        Message::Leaving => agent_message::Message::Leaving(agent::Leaving {}),
    };
    agent::AgentMessage { message: Some(inner) }
}

/// What a leader said, as far as it concerns attempts; `None` for what concerns the session.
///
/// # Errors
/// [`InvalidField`] when it is malformed.
pub fn order_from_wire(message: coordinator_message::Message) -> Result<Option<Order>, InvalidField> {
    use coordinator_message::Message as Wire;
    Ok(Some(match message {
        Wire::Assign(assign) => Order::Assign(Box::new(assignment_from_wire(assign)?)),
        Wire::Commit(commit) => Order::Commit(attempt_from_wire(commit.id)?, checked_commit(commit.commit)?),
        Wire::Images(images) => {
            let listed = images.images.into_iter().map(platform_image).collect::<Result<_, _>>()?;
            Order::Images(attempt_from_wire(images.id)?, listed)
        }
        Wire::Stop(stop) => {
            // A reason of a later version is still a stop.
            let reason = stop.reason.parse().unwrap_or(Reason::Cancelled);
            Order::Stop(attempt_from_wire(stop.id)?, reason)
        }
        Wire::Forget(forget) => Order::Forget(attempt_from_wire(forget.id)?),
        Wire::StoreAgain(again) => Order::StoreAgain(attempt_from_wire(again.id)?),
        Wire::DetachAck(_) => Order::DetachAck,
        Wire::Welcome(_) | Wire::Refused(_) | Wire::Settings(_) | Wire::Moved(_) => return Ok(None),
    }))
}

/// An assignment as it is kept and sent.
#[must_use]
pub fn assignment_to_wire(assignment: &Assignment) -> agent::Assign {
    agent::Assign {
        id: Some(attempt_to_wire(&assignment.key)),
        spec: Some(spec_to_wire(&assignment.spec)),
        commit: assignment.commit.clone().unwrap_or_default(),
        platform: assignment.platform.as_ref().map_or_else(String::new, |platform| platform.as_str().to_owned()),
        previous: assignment.previous.clone(),
        created_at_ms: 0,
        instance: String::new(),
    }
}

/// An assignment from the wire. The spec is checked once more: it becomes paths and command lines here.
///
/// # Errors
/// [`InvalidField`] when it is malformed.
pub fn assignment_from_wire(assign: agent::Assign) -> Result<Assignment, InvalidField> {
    let spec = assign.spec.ok_or_else(|| InvalidField::new("spec", "the assignment has no spec"))?;
    let spec = spec_from_wire(spec)?;
    spec.validate()?;
    Ok(Assignment {
        key: attempt_from_wire(assign.id)?,
        spec,
        commit: if assign.commit.is_empty() { None } else { Some(checked_commit(assign.commit)?) },
        platform: if assign.platform.is_empty() { None } else { Some(Platform::new(&assign.platform)?) },
        previous: assign.previous,
    })
}

/// A full commit: it becomes an argument of git.
fn checked_commit(commit: String) -> Result<String, InvalidField> {
    let hex = commit.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if hex && matches!(commit.len(), 40 | 64) {
        Ok(commit)
    } else {
        Err(InvalidField::new("commit", format!("{commit:?} is not a full commit")))
    }
}

/// A report as it is kept and sent.
#[must_use]
pub fn report_to_wire(key: &AttemptKey, report: &Report) -> agent::Finished {
    let mut wire = agent::Finished {
        id: Some(attempt_to_wire(key)),
        exit_code: report.exit_code,
        signal: report.signal,
        artifacts: report.artifacts.iter().map(artifact_to_wire).collect(),
        log: report.log.as_ref().map(log_to_wire),
        unproven: report.death == Death::Unproven,
        own_limit: report.room == Room::Own,
        image: report.image.as_ref().map(image_to_wire),
        index: report.index.map(|digest| digest.0.to_vec().into()).unwrap_or_default(),
        ..agent::Finished::default()
    };
    match &report.verdict {
        Verdict::Succeeded { image_tag } => {
            "succeeded".clone_into(&mut wire.outcome);
            wire.image_tag.clone_from(image_tag);
            if let Some(first) = report.artifacts.first() {
                wire.digest = first.blob.digest.0.to_vec().into();
                wire.size = first.blob.size;
            }
            if let Some(image) = &report.image {
                wire.digest = image.digest.0.to_vec().into();
                wire.size = image.size;
            }
        }
        Verdict::Failed { reason, message } => {
            "failed".clone_into(&mut wire.outcome);
            reason.as_str().clone_into(&mut wire.reason);
            wire.message.clone_from(message);
        }
        Verdict::Stopped => "stopped".clone_into(&mut wire.outcome),
    }
    wire
}

/// A report that was kept.
///
/// # Errors
/// [`InvalidField`] when it is malformed.
pub fn report_from_wire(wire: agent::Finished) -> Result<Report, InvalidField> {
    let verdict = match wire.outcome.as_str() {
        "succeeded" => Verdict::Succeeded { image_tag: wire.image_tag },
        "failed" => Verdict::Failed { reason: wire.reason.parse()?, message: wire.message },
        "stopped" => Verdict::Stopped,
        other => return Err(InvalidField::new("outcome", format!("{other:?} is none"))),
    };
    Ok(Report {
        verdict,
        exit_code: wire.exit_code,
        signal: wire.signal,
        artifacts: wire.artifacts.into_iter().map(artifact_from_wire).collect::<Result<_, _>>()?,
        log: wire.log.map(log_from_wire).transpose()?,
        death: if wire.unproven { Death::Unproven } else { Death::Proven },
        room: if wire.own_limit { Room::Own } else { Room::Host },
        image: wire.image.map(image_from_wire).transpose()?,
        index: if wire.index.is_empty() { None } else { Some(Digest::from_slice(&wire.index)?) },
    })
}

fn platform_image(wire: agent::PlatformImage) -> Result<PlatformImage, InvalidField> {
    Ok(PlatformImage { platform: Platform::new(&wire.platform)?, digest: Digest::from_slice(&wire.sha256)? })
}

fn image_to_wire(image: &Image) -> agent::BuiltImage {
    agent::BuiltImage {
        sha256: image.digest.0.to_vec().into(),
        size: image.size,
        id: image.id.0.to_vec().into(),
        manifest_size: image.manifest_size,
        media_type: image.media_type.clone(),
    }
}

fn image_from_wire(wire: agent::BuiltImage) -> Result<Image, InvalidField> {
    Ok(Image {
        digest: Digest::from_slice(&wire.sha256)?,
        size: wire.size,
        id: Digest::from_slice(&wire.id)?,
        manifest_size: wire.manifest_size,
        media_type: wire.media_type,
    })
}

fn blob_to_wire(blob: &Blob) -> agent::StoredBlob {
    agent::StoredBlob {
        sha256: blob.digest.0.to_vec().into(),
        size: blob.size,
        holders: blob.holders.iter().map(|node| node.0).collect(),
    }
}

fn blob_from_wire(wire: Option<agent::StoredBlob>) -> Result<Blob, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new("blob", "is missing"))?;
    let holders = wire.holders.into_iter().map(NodeId).collect();
    Ok(Blob { digest: Digest::from_slice(&wire.sha256)?, size: wire.size, holders })
}

fn artifact_to_wire(artifact: &Artifact) -> agent::StoredArtifact {
    agent::StoredArtifact { name: artifact.name.clone(), blob: Some(blob_to_wire(&artifact.blob)) }
}

fn artifact_from_wire(wire: agent::StoredArtifact) -> Result<Artifact, InvalidField> {
    Ok(Artifact { name: wire.name, blob: blob_from_wire(wire.blob)? })
}

fn log_to_wire(log: &SealedLog) -> agent::StoredLog {
    agent::StoredLog { blob: Some(blob_to_wire(&log.blob)), lines: log.lines }
}

fn log_from_wire(wire: agent::StoredLog) -> Result<SealedLog, InvalidField> {
    Ok(SealedLog { blob: blob_from_wire(wire.blob)?, lines: wire.lines })
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_model::BuildSpec;

    #[test]
    fn configuration_lowers_what_is_offered_and_never_raises_it() {
        let table = [(8, 0, 8), (8, 3, 3), (8, 9, 8), (0, 3, 3), (0, 0, 0)];
        for (host, configured, offered) in table {
            assert_eq!(lowered(host, configured), offered, "{host} {configured}");
        }
    }

    #[test]
    fn reports_and_assignments_read_back() {
        let key: AttemptKey = "b.1.2".parse().unwrap();
        let blob = |byte| Blob { digest: Digest([byte; 32]), size: 7, holders: vec![NodeId(1), NodeId(3)] };
        let artifacts = vec![Artifact { name: "a/b".to_owned(), blob: blob(1) }];
        for verdict in [
            Verdict::Succeeded { image_tag: "helix/b@sha256:00".to_owned() },
            Verdict::Failed { reason: Reason::Exit, message: "exit code 3".to_owned() },
            Verdict::Stopped,
        ] {
            let log = Some(SealedLog { blob: blob(2), lines: 9 });
            let (exit_code, signal) = (Some(3), Some(9));
            for (death, room) in [(Death::Proven, Room::Own), (Death::Unproven, Room::Host)] {
                let (verdict, log, artifacts) = (verdict.clone(), log.clone(), artifacts.clone());
                let (digest, id) = (Digest([3; 32]), Digest([4; 32]));
                let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
                let image = Some(Image { digest, size: 5, id, manifest_size: 6, media_type });
                let index = Some(Digest([5; 32]));
                let report = Report { verdict, exit_code, signal, artifacts, log, death, room, image, index };
                assert_eq!(report_from_wire(report_to_wire(&key, &report)).unwrap(), report);
            }
        }
        let assignment = Assignment {
            key,
            spec: BuildSpec { repo_url: "https://h/p".to_owned(), ..BuildSpec::default() },
            commit: Some("0123456789".repeat(4)),
            platform: Some(Platform::new("linux/amd64").unwrap()),
            previous: "worker lost".to_owned(),
        };
        assert_eq!(assignment_from_wire(assignment_to_wire(&assignment)).unwrap(), assignment);
    }

    #[test]
    fn what_would_become_a_hostile_argument_is_refused() {
        let mut wire = agent::Assign {
            id: Some(attempt_to_wire(&"b.0.1".parse().unwrap())),
            spec: Some(spec_to_wire(&BuildSpec { repo_url: "https://h/p".to_owned(), ..BuildSpec::default() })),
            commit: "--upload-pack=evil".to_owned(),
            ..agent::Assign::default()
        };
        assert!(assignment_from_wire(wire.clone()).is_err());
        wire.commit.clear();
        assert!(assignment_from_wire(wire.clone()).is_ok());
        let spec = wire.spec.as_mut().unwrap();
        spec.repo_url = "ext::sh -c id".to_owned();
        assert!(assignment_from_wire(wire).is_err());
    }
}
