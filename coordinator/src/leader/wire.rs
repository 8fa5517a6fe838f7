//! What agents send, checked and turned into the core's words; and the registry's facts as messages to agents.
//!
//! Everything from an agent is untrusted: sizes are bounded here, and nothing is taken on its word about who it is.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::{FinishAttempt, Outcome, SecretFor, WorkerOffer};
use helix_core::record::{Artifact, AttemptEnd, BlobRef, Image, SealedLog};
use helix_core::state::{Known, State};
use helix_model::{
    AttemptKey, Death, Digest, Executor, Instance, InvalidField, NodeId, Platform, Reason, Resources, Room, WorkerName,
    limits,
};
use helix_proto::agent;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::convert::{attempt_from_wire, attempt_to_wire, spec_to_wire};

/// The longest free text taken from an agent; longer ones are cut.
const TEXT_BYTES_MAX: usize = 1024;
/// Entries in an offer's lists.
const OFFER_ENTRIES_MAX: usize = limits::MAP_ENTRIES_MAX;
/// Coordinators named as holders of one blob.
const HOLDERS_MAX: usize = 64;
/// Artifacts of one attempt: its outputs and what an image leaves.
const ARTIFACTS_MAX: usize = limits::OUTPUTS_MAX * 2;
/// An artifact's name is a path.
const ARTIFACT_NAME_BYTES_MAX: usize = 4096;

/// Who speaks on a session: the certificate's name, and the life it introduced itself with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Speaker {
    pub(crate) worker: WorkerName,
    pub(crate) instance: Instance,
}

/// A checked `Hello`.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Introduction {
    pub(crate) instance: Instance,
    pub(crate) offer: WorkerOffer,
    pub(crate) attempts: Vec<SpooledAttempt>,
    pub(crate) leaving: bool,
}

/// An attempt in an agent's spool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SpooledAttempt {
    pub(crate) key: AttemptKey,
    /// Its report follows by itself.
    pub(crate) ended: bool,
}

/// Checks a `Hello` but for name and protocol, which the session compares itself.
pub(crate) fn introduction(hello: agent::Hello) -> Result<Introduction, InvalidField> {
    let attempts = hello
        .attempts
        .into_iter()
        .map(|offered| Ok(SpooledAttempt { key: attempt_from_wire(offered.id)?, ended: offered.ended }));
    Ok(Introduction {
        instance: Instance::new(&hello.instance)?,
        attempts: attempts.collect::<Result<_, InvalidField>>()?,
        offer: offer(hello.offer.unwrap_or_default(), &hello.version)?,
        leaving: hello.leaving,
    })
}

fn offer(wire: agent::Offer, version: &str) -> Result<WorkerOffer, InvalidField> {
    if wire.capacity == 0 || wire.capacity > limits::WORKER_CAPACITY_MAX {
        let why = format!("{} is not from 1 to {}", wire.capacity, limits::WORKER_CAPACITY_MAX);
        return Err(InvalidField::new("capacity", why));
    }
    if wire.executors.is_empty() {
        return Err(InvalidField::new("executors", "none is offered: there is nothing to run builds with"));
    }
    if wire.platforms.len().max(wire.emulated.len()).max(wire.labels.len()).max(wire.executors.len())
        > OFFER_ENTRIES_MAX
    {
        return Err(InvalidField::new("offer", format!("more than {OFFER_ENTRIES_MAX} entries in one list")));
    }
    let long = |text: &String| text.len() > limits::LABEL_BYTES_MAX;
    if wire.labels.iter().any(|(key, value)| key.is_empty() || long(key) || long(value)) {
        let why = format!("keys and values are at most {} bytes, and keys not empty", limits::LABEL_BYTES_MAX);
        return Err(InvalidField::new("labels", why));
    }
    Ok(WorkerOffer {
        address: line(&wire.address),
        capacity: wire.capacity,
        platforms: wire.platforms.iter().map(|text| Platform::new(text)).collect::<Result<_, _>>()?,
        labels: wire.labels,
        executors: wire.executors.iter().map(|text| Executor::parse(text)).collect::<Result<_, _>>()?,
        allows_job_commands: wire.allows_job_commands,
        has_own_command: wire.has_own_command,
        isolation: line(&wire.isolation),
        limits: line(&wire.limits),
        version: line(version),
        resources: Resources {
            cpu_milli: wire.cpu_milli,
            memory_bytes: wire.memory_bytes,
            disk_bytes: wire.disk_bytes,
        },
        podman: line(&wire.podman),
        emulated: wire.emulated.iter().map(|text| Platform::new(text)).collect::<Result<_, _>>()?,
        secrets: wire.secrets.map(secrets).transpose()?,
    })
}

fn secrets(wire: agent::OfferedSecrets) -> Result<BTreeMap<String, SecretFor>, InvalidField> {
    if wire.restricted.len() > OFFER_ENTRIES_MAX {
        return Err(InvalidField::new("secrets", format!("more than {OFFER_ENTRIES_MAX} names")));
    }
    let whom = |restricted| if restricted { SecretFor::CertainRepositories } else { SecretFor::Anybody };
    let named = |(name, restricted): (String, bool)| {
        if name.is_empty() || name.len() > limits::LABEL_BYTES_MAX {
            let why = format!("a name has from 1 to {} bytes", limits::LABEL_BYTES_MAX);
            return Err(InvalidField::new("secrets", why));
        }
        Ok((name, whom(restricted)))
    };
    wire.restricted.into_iter().map(named).collect()
}

/// A report of an attempt's end, in the speaker's name.
pub(crate) fn finished(wire: agent::Finished, key: AttemptKey, who: &Speaker) -> Result<FinishAttempt, InvalidField> {
    let outcome = match wire.outcome.as_str() {
        "succeeded" => Outcome::Succeeded {
            digest: if wire.digest.is_empty() { None } else { Some(Digest::from_slice(&wire.digest)?) },
            size: wire.size,
            image_tag: line(&wire.image_tag),
        },
        "failed" => Outcome::Failed { reason: wire.reason.parse()?, message: line(&wire.message) },
        "stopped" => Outcome::Stopped,
        other => {
            let why = format!("{:?} is none of succeeded, failed, stopped", line(other));
            return Err(InvalidField::new("outcome", why));
        }
    };
    if wire.artifacts.len() > ARTIFACTS_MAX {
        return Err(InvalidField::new("artifacts", format!("more than {ARTIFACTS_MAX}")));
    }
    Ok(FinishAttempt {
        key,
        worker: who.worker.clone(),
        instance: who.instance.clone(),
        outcome,
        exit_code: wire.exit_code,
        signal: wire.signal,
        artifacts: wire.artifacts.into_iter().map(artifact).collect::<Result<_, _>>()?,
        log: wire.log.map(|log| sealed_log(Some(log))).transpose()?,
        death: if wire.unproven { Death::Unproven } else { Death::Proven },
        image: wire.image.map(|built| image(Some(built))).transpose()?,
        index: if wire.index.is_empty() { None } else { Some(Digest::from_slice(&wire.index)?) },
        room: if wire.own_limit { Room::Own } else { Room::Host },
    })
}

/// An image that was built.
pub(crate) fn image(wire: Option<agent::BuiltImage>) -> Result<Image, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new("image", "the image is missing"))?;
    Ok(Image {
        digest: Digest::from_slice(&wire.sha256)?,
        size: wire.size,
        id: Digest::from_slice(&wire.id)?,
        manifest_size: wire.manifest_size,
        media_type: line(&wire.media_type),
    })
}

fn artifact(wire: agent::StoredArtifact) -> Result<Artifact, InvalidField> {
    if wire.name.is_empty() || wire.name.len() > ARTIFACT_NAME_BYTES_MAX {
        let why = format!("an artifact's name has 1 to {ARTIFACT_NAME_BYTES_MAX} bytes");
        return Err(InvalidField::new("artifacts", why));
    }
    Ok(Artifact { name: wire.name, blob: blob(wire.blob)? })
}

/// A stored log.
pub(crate) fn sealed_log(wire: Option<agent::StoredLog>) -> Result<SealedLog, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new("log", "the log is missing"))?;
    Ok(SealedLog { blob: blob(wire.blob)?, lines: wire.lines })
}

fn blob(wire: Option<agent::StoredBlob>) -> Result<BlobRef, InvalidField> {
    let wire = wire.ok_or_else(|| InvalidField::new("blob", "the blob is missing"))?;
    if wire.holders.len() > HOLDERS_MAX {
        return Err(InvalidField::new("holders", format!("more than {HOLDERS_MAX}")));
    }
    let holders: BTreeSet<_> = wire.holders.into_iter().map(NodeId).collect();
    Ok(BlobRef { digest: Digest::from_slice(&wire.sha256)?, size: wire.size, holders })
}

/// One line of bounded length: agents' texts reach tables and logs.
pub(crate) fn line(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The assignment of an attempt that runs and is not to stop; `None` where that is no longer so.
pub(crate) fn assign(state: &State, key: &AttemptKey) -> Option<Message> {
    let Some(Known::Open(build)) = state.build(&key.build) else { return None };
    let task = build.task(key.task)?;
    let attempt = task.running().filter(|attempt| attempt.number == key.attempt && attempt.stop.is_none())?;
    let before = task.attempts.iter().rev().find(|earlier| earlier.number < attempt.number);
    let previous = before.and_then(|earlier| Some(previous(&earlier.worker, earlier.end.as_ref()?)));
    Some(Message::Assign(agent::Assign {
        id: Some(attempt_to_wire(key)),
        spec: Some(spec_to_wire(&build.spec)),
        commit: build.commit.clone().unwrap_or_default(),
        platform: task.platform.as_ref().map_or_else(String::new, |platform| platform.as_str().to_owned()),
        previous: previous.unwrap_or_default(),
        created_at_ms: i64::try_from(build.created_at.0).unwrap_or(i64::MAX),
        instance: String::new(),
    }))
}

fn previous(worker: &WorkerName, end: &AttemptEnd) -> String {
    let reason = end.reason.map_or("succeeded", Reason::as_str);
    let told = if end.message.is_empty() { String::new() } else { format!(": {}", end.message) };
    let unverified = if end.verified { "" } else { " (not seen dead: a process of it may still run there)" };
    line(&format!("the attempt before ended on {worker} as {reason}{told}{unverified}"))
}

/// "Kill it and see it dead."
pub(crate) fn stop(key: &AttemptKey, reason: Reason) -> Message {
    Message::Stop(agent::Stop { id: Some(attempt_to_wire(key)), reason: reason.as_str().to_owned() })
}

/// "Nothing more is wanted of it."
pub(crate) fn forget(key: &AttemptKey) -> Message {
    Message::Forget(agent::Forget { id: Some(attempt_to_wire(key)) })
}

/// "Build this commit."
pub(crate) fn commit(key: &AttemptKey, commit: String) -> Message {
    Message::Commit(agent::Commit { id: Some(attempt_to_wire(key)), commit })
}

/// "Push the index of these", or, of none, "go on".
pub(crate) fn images(key: &AttemptKey, images: &[(Platform, Digest)]) -> Message {
    let images = images.iter().map(|(platform, digest)| agent::PlatformImage {
        platform: platform.as_str().to_owned(),
        sha256: digest.0.to_vec().into(),
    });
    Message::Images(agent::Images { id: Some(attempt_to_wire(key)), images: images.collect() })
}

/// "Too few hold its bytes."
pub(crate) fn store_again(key: &AttemptKey) -> Message {
    Message::StoreAgain(agent::StoreAgain { id: Some(attempt_to_wire(key)) })
}
