//! Pieces that commands, rows and replies share.

use std::str::FromStr;
use std::sync::Arc;

use helix_core::command::{Authority, SecretFor, WorkerOffer};
use helix_core::record::{Artifact, BlobRef, DrainedBy, Image, Pinned, SealedLog};
use helix_core::retention::Kept;
use helix_model::{
    AttemptKey, AttemptNumber, BuildId, BuildSpec, Digest, Executor, InvalidField, NodeId, Platform, Reason, Resources,
    TaskIndex,
};
use helix_proto::convert::{spec_from_wire, spec_to_wire};
use helix_proto::{store, v1};

use super::CodecError;

pub(super) fn need<T>(what: &'static str, part: Option<T>) -> Result<T, CodecError> {
    part.ok_or_else(|| CodecError::missing(what))
}

pub(super) fn parse<T: FromStr<Err = InvalidField>>(text: &str) -> Result<T, CodecError> {
    text.parse().map_err(CodecError::from)
}

pub(super) fn parse_some<T: FromStr<Err = InvalidField>>(text: Option<String>) -> Result<Option<T>, CodecError> {
    text.map(|text| parse(&text)).transpose()
}

pub(super) fn builds(texts: &[String]) -> Result<Vec<BuildId>, CodecError> {
    texts.iter().map(|text| parse(text)).collect()
}

pub(super) fn digest(bytes: &[u8]) -> Result<Digest, CodecError> {
    Ok(Digest::from_slice(bytes)?)
}

pub(super) fn digest_to_wire(digest: &Digest) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&digest.0)
}

pub(super) fn spec(wire: Option<v1::BuildSpec>) -> Result<Arc<BuildSpec>, CodecError> {
    Ok(Arc::new(spec_from_wire(need("spec", wire)?)?))
}

pub(super) fn spec_wire(spec: &BuildSpec) -> Option<v1::BuildSpec> {
    Some(spec_to_wire(spec))
}

pub(super) fn key(wire: Option<store::AttemptKey>) -> Result<AttemptKey, CodecError> {
    let wire = need("attempt", wire)?;
    let task = u16::try_from(wire.task)
        .map_err(|_| CodecError::Malformed { what: "attempt", why: format!("task {} is too large", wire.task) })?;
    Ok(AttemptKey { build: parse(&wire.build)?, task: TaskIndex(task), attempt: AttemptNumber(wire.attempt) })
}

pub(super) fn key_wire(key: &AttemptKey) -> store::AttemptKey {
    store::AttemptKey { build: key.build.to_string(), task: u32::from(key.task.0), attempt: key.attempt.0 }
}

pub(super) fn blob(wire: Option<store::BlobRef>) -> Result<BlobRef, CodecError> {
    let wire = need("blob", wire)?;
    Ok(BlobRef {
        digest: digest(&wire.digest)?,
        size: wire.size,
        holders: wire.holders.into_iter().map(NodeId).collect(),
    })
}

pub(super) fn blob_wire(blob: &BlobRef) -> Option<store::BlobRef> {
    let holders = blob.holders.iter().map(|node| node.0).collect();
    Some(store::BlobRef { digest: digest_to_wire(&blob.digest), size: blob.size, holders })
}

pub(super) fn image(wire: store::Image) -> Result<Image, CodecError> {
    Ok(Image {
        digest: digest(&wire.digest)?,
        size: wire.size,
        id: digest(&wire.id)?,
        manifest_size: wire.manifest_size,
        media_type: wire.media_type,
    })
}

pub(super) fn image_wire(image: &Image) -> store::Image {
    store::Image {
        digest: digest_to_wire(&image.digest),
        size: image.size,
        id: digest_to_wire(&image.id),
        manifest_size: image.manifest_size,
        media_type: image.media_type.clone(),
    }
}

pub(super) fn artifact(wire: store::Artifact) -> Result<Artifact, CodecError> {
    Ok(Artifact { name: wire.name, blob: blob(wire.blob)? })
}

pub(super) fn artifacts(wire: Vec<store::Artifact>) -> Result<Vec<Artifact>, CodecError> {
    wire.into_iter().map(artifact).collect()
}

pub(super) fn artifact_wire(artifact: &Artifact) -> store::Artifact {
    store::Artifact { name: artifact.name.clone(), blob: blob_wire(&artifact.blob) }
}

pub(super) fn log(wire: store::SealedLog) -> Result<SealedLog, CodecError> {
    Ok(SealedLog { blob: blob(wire.blob)?, lines: wire.lines })
}

pub(super) fn log_wire(log: &SealedLog) -> store::SealedLog {
    store::SealedLog { blob: blob_wire(&log.blob), lines: log.lines }
}

pub(super) fn authority(wire: Option<store::Authority>) -> Result<Authority, CodecError> {
    match need("authority", wire.and_then(|wire| wire.kind))? {
        store::authority::Kind::Owner(who) => Ok(Authority::Owner(who)),
        store::authority::Kind::Any(who) => Ok(Authority::Any(who)),
    }
}

pub(super) fn authority_wire(authority: &Authority) -> Option<store::Authority> {
    let kind = match authority {
        Authority::Owner(who) => store::authority::Kind::Owner(who.clone()),
        Authority::Any(who) => store::authority::Kind::Any(who.clone()),
    };
    Some(store::Authority { kind: Some(kind) })
}

pub(super) fn pinned(wire: bool) -> Pinned {
    if wire { Pinned::Yes } else { Pinned::No }
}

pub(super) fn kept(word: &str) -> Result<Kept, CodecError> {
    let known = Kept::ALL.into_iter().find(|kept| kept.as_str() == word);
    known.ok_or_else(|| CodecError::Malformed { what: "kept", why: format!("{word:?} is nothing that is kept") })
}

pub(super) fn drained_by(agent: bool) -> DrainedBy {
    if agent { DrainedBy::Agent } else { DrainedBy::Operator }
}

pub(super) fn reason(text: Option<String>) -> Result<Option<Reason>, CodecError> {
    parse_some(text)
}

pub(super) fn reason_wire(reason: Option<Reason>) -> Option<String> {
    reason.map(|reason| reason.as_str().to_owned())
}

pub(super) fn offer(wire: Option<store::WorkerOffer>) -> Result<WorkerOffer, CodecError> {
    let wire = need("offer", wire)?;
    Ok(WorkerOffer {
        address: wire.address,
        capacity: wire.capacity,
        platforms: wire.platforms.iter().map(|text| Platform::new(text)).collect::<Result<_, _>>()?,
        labels: wire.labels,
        executors: wire.executors.iter().map(|text| Executor::parse(text)).collect::<Result<_, _>>()?,
        allows_job_commands: wire.allows_job_commands,
        has_own_command: wire.has_own_command,
        isolation: wire.isolation,
        limits: wire.limits,
        version: wire.version,
        resources: Resources {
            cpu_milli: wire.cpu_milli,
            memory_bytes: wire.memory_bytes,
            disk_bytes: wire.disk_bytes,
        },
        podman: wire.podman,
        emulated: wire.emulated.iter().map(|text| Platform::new(text)).collect::<Result<_, _>>()?,
        secrets: wire.secrets.map(|it| {
            let whom = |restricted| if restricted { SecretFor::CertainRepositories } else { SecretFor::Anybody };
            it.restricted.into_iter().map(|(name, restricted)| (name, whom(restricted))).collect()
        }),
    })
}

pub(super) fn offer_wire(offer: &WorkerOffer) -> Option<store::WorkerOffer> {
    Some(store::WorkerOffer {
        address: offer.address.clone(),
        capacity: offer.capacity,
        platforms: offer.platforms.iter().map(|platform| platform.as_str().to_owned()).collect(),
        labels: offer.labels.clone(),
        executors: offer.executors.iter().map(|executor| executor.as_str().to_owned()).collect(),
        allows_job_commands: offer.allows_job_commands,
        has_own_command: offer.has_own_command,
        isolation: offer.isolation.clone(),
        limits: offer.limits.clone(),
        version: offer.version.clone(),
        cpu_milli: offer.resources.cpu_milli,
        memory_bytes: offer.resources.memory_bytes,
        disk_bytes: offer.resources.disk_bytes,
        podman: offer.podman.clone(),
        emulated: offer.emulated.iter().map(|platform| platform.as_str().to_owned()).collect(),
        secrets: offer.secrets.as_ref().map(|secrets| store::OfferedSecrets {
            restricted: secrets.iter().map(|(name, whom)| (name.clone(), *whom != SecretFor::Anybody)).collect(),
        }),
    })
}
