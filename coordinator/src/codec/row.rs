//! Rows to and from their durable form.

use std::sync::Arc;

use helix_core::Row;
use helix_core::record::{
    Addendum, AttemptEnd, AttemptRecord, BuildRecord, CancelRequest, Counters, Drain, DrainedBy, NodeRecord, Pinned,
    Standing, StopRequest, TaskPhase, TaskRecord, Tombstone, Trust, WorkerRecord,
};
use helix_core::retention::Expired;
use helix_model::{AttemptNumber, LogTime, NodeId, TaskIndex};
use helix_proto::store;
use helix_proto::store::{addendum, row, task, trust, worker};
use prost::Message;

use super::parts::{
    artifact, artifact_wire, artifacts, builds, digest, digest_to_wire, drained_by, image, image_wire, key, key_wire,
    log, log_wire, need, offer, offer_wire, parse, parse_some, pinned, reason, reason_wire, spec, spec_wire,
};
use super::policy::{policy, policy_format, policy_wire};
use super::{CodecError, check_format};

/// The highest form of rows this program understands. 2: a worker's row may say that it is not trusted. 3: a
/// build's may have images, a node's may say that it was removed, a worker's which secrets it has. 4: the
/// policy may have lifetimes of logs and artifacts, and a build's row may say that they are over. 5: it may leave the
/// copies to the number of coordinators.
pub const ROW_FORMAT: u32 = 5;

/// A row's bytes.
#[must_use]
pub fn encode_row(row: &Row) -> Vec<u8> {
    let kind = match row {
        Row::Counters(it) => row::Kind::Counters(store::Counters {
            next_sequence: it.next_sequence,
            last_at_ms: it.last_at.0,
            voters: it.voters.iter().map(|node| node.0).collect(),
        }),
        Row::Policy(it) => row::Kind::Policy(policy_wire(it)),
        Row::Node(it) => row::Kind::Node(store::Node {
            id: it.id.0,
            epoch: it.epoch,
            grpc: it.grpc.clone(),
            version: it.version.clone(),
            format: it.format,
            removed_at_ms: it.removed_at.map(|at| at.0),
        }),
        Row::Worker(it) => row::Kind::Worker(worker_wire(it)),
        Row::Build(it) => row::Kind::Build(build_wire(it)),
        Row::Addendum(attempt, it) => row::Kind::Addendum(store::Addendum {
            key: Some(key_wire(attempt)),
            kind: Some(match it {
                Addendum::Log(it) => addendum::Kind::Log(log_wire(it)),
                Addendum::Artifact(it) => addendum::Kind::Artifact(artifact_wire(it)),
                Addendum::Pinned(it) => addendum::Kind::Pinned(*it == Pinned::Yes),
            }),
        }),
        Row::Tombstone(it) => row::Kind::Tombstone(store::Tombstone {
            id: it.id.to_string(),
            spec_digest: digest_to_wire(&it.spec_digest),
            state: it.state.as_str().to_owned(),
            purged_at_ms: it.purged_at.0,
        }),
    };
    // The lowest that will do, so that what older programs can read they do read.
    let format = match &kind {
        row::Kind::Worker(it) if it.offer.as_ref().is_some_and(|offer| offer.secrets.is_some()) => 3,
        row::Kind::Worker(it) if it.trust.is_some() => 2,
        row::Kind::Build(it) if it.logs_expired_at_ms.or(it.artifacts_expired_at_ms).is_some() => 4,
        // Only attempts that have an image push an index.
        row::Kind::Build(it) if it.tasks.iter().flat_map(|task| &task.attempts).any(|it| it.image.is_some()) => 3,
        row::Kind::Node(it) if it.removed_at_ms.is_some() => 3,
        row::Kind::Policy(it) => policy_format(it),
        _ => 1,
    };
    store::Row { format, kind: Some(kind) }.encode_to_vec()
}

/// Reads a row.
///
/// # Errors
/// [`CodecError`].
pub fn decode_row(bytes: &[u8]) -> Result<Row, CodecError> {
    let wire = store::Row::decode(bytes).map_err(|error| CodecError::bytes("a row", &error))?;
    check_format("a row", wire.format, ROW_FORMAT)?;
    Ok(match need("row", wire.kind)? {
        row::Kind::Counters(it) => Row::Counters(Counters {
            next_sequence: it.next_sequence,
            last_at: LogTime(it.last_at_ms),
            voters: it.voters.into_iter().map(NodeId).collect(),
        }),
        row::Kind::Policy(it) => Row::Policy(policy(&it)?),
        row::Kind::Node(it) => Row::Node(NodeRecord {
            id: NodeId(it.id),
            epoch: it.epoch,
            grpc: it.grpc,
            version: it.version,
            format: it.format,
            removed_at: it.removed_at_ms.map(LogTime),
        }),
        row::Kind::Worker(it) => Row::Worker(Arc::new(worker_record(it)?)),
        row::Kind::Build(it) => Row::Build(Arc::new(build_record(it)?)),
        row::Kind::Addendum(it) => {
            let addendum = match need("addendum", it.kind)? {
                addendum::Kind::Log(it) => Addendum::Log(log(it)?),
                addendum::Kind::Artifact(it) => Addendum::Artifact(artifact(it)?),
                addendum::Kind::Pinned(it) => Addendum::Pinned(pinned(it)),
            };
            Row::Addendum(key(it.key)?, addendum)
        }
        row::Kind::Tombstone(it) => Row::Tombstone(Tombstone {
            id: parse(&it.id)?,
            spec_digest: digest(&it.spec_digest)?,
            state: parse(&it.state)?,
            purged_at: LogTime(it.purged_at_ms),
        }),
    })
}

fn worker_wire(it: &WorkerRecord) -> store::Worker {
    store::Worker {
        name: it.name.to_string(),
        instance: it.instance.to_string(),
        offer: offer_wire(&it.offer),
        standing: Some(match it.standing {
            Standing::Present => worker::Standing::Present(store::Present {}),
            Standing::Detached { until } => worker::Standing::DetachedUntilMs(until.0),
            Standing::Lost => worker::Standing::Lost(store::Lost {}),
        }),
        drain: it.drain.map(|drain| store::Drain {
            deadline_ms: drain.deadline.map(|time| time.0),
            by_agent: drain.by == DrainedBy::Agent,
        }),
        held: it.held.iter().map(key_wire).collect(),
        registered_at_ms: it.registered_at.0,
        trust: trust_wire(&it.trust),
    }
}

fn trust_wire(trust: &Trust) -> Option<store::Trust> {
    let quarantine = |at: LogTime, round| store::Quarantine { at_ms: at.0, round };
    let kind = match trust {
        Trust::Full { failed } if failed.is_empty() => return None,
        Trust::Full { failed } => {
            trust::Kind::Failed(store::BuildIds { builds: failed.iter().map(ToString::to_string).collect() })
        }
        Trust::Quarantined { until, round } => trust::Kind::Quarantined(quarantine(*until, *round)),
        Trust::Probing { since, round } => trust::Kind::Probing(quarantine(*since, *round)),
    };
    Some(store::Trust { kind: Some(kind) })
}

fn trust(wire: Option<store::Trust>) -> Result<Trust, CodecError> {
    let Some(wire) = wire else { return Ok(Trust::default()) };
    Ok(match need("trust", wire.kind)? {
        trust::Kind::Failed(it) => Trust::Full { failed: builds(&it.builds)?.into_iter().collect() },
        trust::Kind::Quarantined(it) => Trust::Quarantined { until: LogTime(it.at_ms), round: it.round },
        trust::Kind::Probing(it) => Trust::Probing { since: LogTime(it.at_ms), round: it.round },
    })
}

fn worker_record(it: store::Worker) -> Result<WorkerRecord, CodecError> {
    Ok(WorkerRecord {
        name: parse(&it.name)?,
        instance: parse(&it.instance)?,
        offer: offer(it.offer)?,
        standing: match need("standing", it.standing)? {
            worker::Standing::Present(store::Present {}) => Standing::Present,
            worker::Standing::DetachedUntilMs(until) => Standing::Detached { until: LogTime(until) },
            worker::Standing::Lost(store::Lost {}) => Standing::Lost,
        },
        drain: it.drain.map(|drain| Drain { deadline: drain.deadline_ms.map(LogTime), by: drained_by(drain.by_agent) }),
        held: it.held.into_iter().map(|held| key(Some(held))).collect::<Result<_, _>>()?,
        registered_at: LogTime(it.registered_at_ms),
        trust: trust(it.trust)?,
    })
}

fn build_wire(it: &BuildRecord) -> store::Build {
    store::Build {
        id: it.id.to_string(),
        spec: spec_wire(&it.spec),
        spec_digest: digest_to_wire(&it.spec_digest),
        submitted_by: it.submitted_by.clone(),
        retry_of: it.retry_of.as_ref().map(ToString::to_string),
        sequence: it.sequence,
        state: it.state.as_str().to_owned(),
        created_at_ms: it.created_at.0,
        started_at_ms: it.started_at.map(|time| time.0),
        completed_at_ms: it.completed_at.map(|time| time.0),
        commit: it.commit.clone(),
        cancel: it.cancel.as_ref().map(|cancel| store::CancelRequest {
            at_ms: cancel.at.0,
            by: cancel.by.clone(),
            reason: cancel.reason.clone(),
        }),
        reason: reason_wire(it.reason),
        verified: it.verified,
        tasks: it.tasks.iter().map(task_wire).collect(),
        artifacts: it.artifacts.iter().map(artifact_wire).collect(),
        pinned: it.pinned == Pinned::Yes,
        indexing: it.indexing.map(|task| u32::from(task.0)),
        logs_expired_at_ms: it.expired.logs.map(|at| at.0),
        artifacts_expired_at_ms: it.expired.artifacts.map(|at| at.0),
    }
}

fn build_record(it: store::Build) -> Result<BuildRecord, CodecError> {
    Ok(BuildRecord {
        id: parse(&it.id)?,
        spec: spec(it.spec)?,
        spec_digest: digest(&it.spec_digest)?,
        submitted_by: it.submitted_by,
        retry_of: parse_some(it.retry_of)?,
        sequence: it.sequence,
        state: parse(&it.state)?,
        created_at: LogTime(it.created_at_ms),
        started_at: it.started_at_ms.map(LogTime),
        completed_at: it.completed_at_ms.map(LogTime),
        commit: it.commit,
        cancel: it.cancel.map(|cancel| CancelRequest {
            at: LogTime(cancel.at_ms),
            by: cancel.by,
            reason: cancel.reason,
        }),
        reason: reason(it.reason)?,
        verified: it.verified,
        tasks: it.tasks.into_iter().map(task_record).collect::<Result<_, _>>()?,
        artifacts: artifacts(it.artifacts)?,
        pinned: pinned(it.pinned),
        indexing: it.indexing.map(task_index).transpose()?,
        expired: Expired {
            logs: it.logs_expired_at_ms.map(LogTime),
            artifacts: it.artifacts_expired_at_ms.map(LogTime),
        },
    })
}

fn task_index(wire: u32) -> Result<TaskIndex, CodecError> {
    let malformed = |_| CodecError::Malformed { what: "a row", why: format!("task {wire} is too large") };
    u16::try_from(wire).map(TaskIndex).map_err(malformed)
}

fn task_wire(it: &TaskRecord) -> store::Task {
    store::Task {
        platform: it.platform.as_ref().map(|platform| platform.as_str().to_owned()),
        phase: Some(match &it.phase {
            TaskPhase::Waiting { not_before } => task::Phase::WaitingUntilMs(not_before.0),
            TaskPhase::Running => task::Phase::Running(store::Running {}),
            TaskPhase::Ended { state, reason, at } => task::Phase::Ended(store::Ended {
                state: state.as_str().to_owned(),
                reason: reason_wire(*reason),
                at_ms: at.0,
            }),
        }),
        attempts: it.attempts.iter().map(attempt_wire).collect(),
        user_retries: it.user_retries,
        infra_retries: it.infra_retries,
    }
}

fn task_record(it: store::Task) -> Result<TaskRecord, CodecError> {
    Ok(TaskRecord {
        platform: it.platform.map(|text| helix_model::Platform::new(&text)).transpose()?,
        phase: match need("phase", it.phase)? {
            task::Phase::WaitingUntilMs(until) => TaskPhase::Waiting { not_before: LogTime(until) },
            task::Phase::Running(store::Running {}) => TaskPhase::Running,
            task::Phase::Ended(ended) => TaskPhase::Ended {
                state: parse(&ended.state)?,
                reason: reason(ended.reason)?,
                at: LogTime(ended.at_ms),
            },
        },
        attempts: it.attempts.into_iter().map(attempt_record).collect::<Result<_, _>>()?,
        user_retries: it.user_retries,
        infra_retries: it.infra_retries,
    })
}

fn attempt_wire(it: &AttemptRecord) -> store::Attempt {
    store::Attempt {
        number: it.number.0,
        worker: it.worker.to_string(),
        instance: it.instance.to_string(),
        assigned_at_ms: it.assigned_at.0,
        stop: it
            .stop
            .as_ref()
            .map(|stop| store::StopRequest { reason: stop.reason.as_str().to_owned(), at_ms: stop.at.0 }),
        end: it.end.as_ref().map(|end| store::AttemptEnd {
            at_ms: end.at.0,
            reason: reason_wire(end.reason),
            message: end.message.clone(),
            exit_code: end.exit_code,
            signal: end.signal,
            digest: end.digest.as_ref().map(digest_to_wire),
            size: end.size,
            image_tag: end.image_tag.clone(),
            verified: end.verified,
            index: end.index.as_ref().map(digest_to_wire),
        }),
        artifacts: it.artifacts.iter().map(artifact_wire).collect(),
        log: it.log.as_ref().map(log_wire),
        image: it.image.as_ref().map(image_wire),
    }
}

fn attempt_record(it: store::Attempt) -> Result<AttemptRecord, CodecError> {
    let stop =
        it.stop.map(|stop| Ok::<_, CodecError>(StopRequest { reason: parse(&stop.reason)?, at: LogTime(stop.at_ms) }));
    Ok(AttemptRecord {
        number: AttemptNumber(it.number),
        worker: parse(&it.worker)?,
        instance: parse(&it.instance)?,
        assigned_at: LogTime(it.assigned_at_ms),
        stop: stop.transpose()?,
        end: it.end.map(attempt_end).transpose()?,
        artifacts: artifacts(it.artifacts)?,
        log: it.log.map(log).transpose()?,
        image: it.image.map(image).transpose()?,
    })
}

fn attempt_end(it: store::AttemptEnd) -> Result<AttemptEnd, CodecError> {
    Ok(AttemptEnd {
        at: LogTime(it.at_ms),
        reason: reason(it.reason)?,
        message: it.message,
        exit_code: it.exit_code,
        signal: it.signal,
        digest: it.digest.map(|bytes| digest(&bytes)).transpose()?,
        size: it.size,
        image_tag: it.image_tag,
        verified: it.verified,
        index: it.index.map(|bytes| digest(&bytes)).transpose()?,
    })
}
