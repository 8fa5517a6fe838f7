//! From the registry's words to gRPC's: rejections, failed proposals, failed reads.
//!
//! One place, so that the table of statuses in the interface has one counterpart. Nothing is decided here.

use helix_common::status::{LEADER, invalid, status, with_metadata};
use helix_core::{Rejection, Reply, Unfit};
use helix_model::{BuildId, ErrorCode, InvalidField};
use tonic::Status;

use crate::raft::upgrade_pending;
use crate::registry::{ProposeError, ReadError, StoreError};

/// The status for a rejection, with what stood in the way in words.
pub(crate) fn of_rejection(rejection: &Rejection) -> Status {
    let text = rejection_text(rejection);
    match rejection {
        Rejection::WrongState { from, to } => {
            with_metadata(ErrorCode::WrongState, text, [("from", from.as_str()), ("to", to.as_str())])
        }
        Rejection::ArtifactTaken(_) => invalid(&InvalidField::new("name", text)),
        Rejection::PolicyInvalid(_) => invalid(&InvalidField::new("policy", text)),
        Rejection::TooFewHolders { .. } => status(ErrorCode::PeerUnreachable, text),
        _ => status(rejection.code(), text),
    }
}

/// One line for people on what stood in the way, and what to do where that is not plain.
pub(crate) fn rejection_text(rejection: &Rejection) -> String {
    match rejection {
        Rejection::IdTaken(id) => format!("build {id} exists already, with another spec: choose another id"),
        Rejection::QueueFull { queue_max } => {
            format!("the queue holds {queue_max} unfinished builds, as many as policy allows: retry later")
        }
        Rejection::BuildUnknown(id) => build_unknown_text(id),
        Rejection::BuildPurged(id) => build_purged_text(id),
        Rejection::Expired(build, kept) => expired_text(build, kept.as_str()),
        Rejection::WrongState { from, to } => format!("the build is {from} and cannot become {to}"),
        Rejection::NotOwner { build, owner } => {
            format!("build {build} belongs to {owner}: only they or an operator may do this")
        }
        Rejection::TaskUnknown(key) => format!("{key}: the build has no such task"),
        Rejection::TaskNotWaiting(key) => format!("{key}: the task does not wait for a worker"),
        Rejection::StaleAttempt { key, current } => {
            format!("{key} is not the task's current attempt, which is number {current}")
        }
        Rejection::AttemptEnded(key) => format!("{key} has ended already"),
        Rejection::WorkerUnknown(name) => worker_unknown_text(name.as_str()),
        Rejection::InstanceStale(name) => format!("worker {name} lives another life by now"),
        Rejection::WorkerUnfit { worker, why } => format!("worker {worker} {}", unfit_text(why)),
        Rejection::OfferInvalid(why) => format!("what the worker offers is invalid: {why}"),
        Rejection::TooFewHolders { what, holders, needed } => {
            format!("{holders} coordinators hold {what}, and {needed} must: retry when more can be reached")
        }
        Rejection::ReportInvalid(why) => format!("the report contradicts itself: {why}"),
        Rejection::CommitInvalid => "the commit is not 40 or 64 lower-case hex digits".to_owned(),
        Rejection::NodeEpochTaken { node } => {
            format!("another data directory was made for node {node}: node ids are never used again")
        }
        Rejection::NodeRemoved { node } => {
            format!("node {node} was removed from the cluster: node ids are never used again, choose another")
        }
        Rejection::NodeVotes { node } => format!("node {node} has a vote"),
        Rejection::TooManyRows { given } => format!("{given} ids are more than one command may touch"),
        Rejection::PolicyInvalid(why) => format!("such a policy would break the cluster: {why}"),
        Rejection::PolicyChanged => {
            "the policy is not the one that was to be changed: look at it, and try again".to_owned()
        }
        Rejection::ArtifactTaken(name) => format!("artifact {name:?} is recorded with another digest"),
        Rejection::AttemptRunning(key) => format!("{key} still runs"),
        Rejection::NotDue(key) => format!("{key}: its time has not come"),
    }
}

/// Why a worker may not have a task, to stand after the worker's name.
pub(crate) fn unfit_text(why: &Unfit) -> String {
    match why {
        Unfit::Unhealthy => "is silent: no session, or its heartbeat is late".to_owned(),
        Unfit::Lost => "is lost: its lease lapsed".to_owned(),
        Unfit::Detached => "is away for an upgrade".to_owned(),
        Unfit::Draining => "is draining".to_owned(),
        Unfit::Held => "is held: an attempt on it was not seen dead; start its host anew, or remove it".to_owned(),
        Unfit::Quarantined { until } => {
            format!("is quarantined after failures of its own, until {}", super::build::view::time_text(*until))
        }
        Unfit::Probing => "is being tried with one attempt after failures of its own".to_owned(),
        Unfit::Pressure(words) => format!("takes no new work: its host is short of {words}"),
        Unfit::Full { capacity } => format!("is full: it runs {capacity}, its capacity"),
        Unfit::Platform { asked, has } if has.is_empty() => format!("does not build for {asked}"),
        Unfit::Platform { asked, has } => format!("does not build for {asked}, but for {}", has.replace(' ', ", ")),
        Unfit::Label { asked, has: None } => format!("lacks the label {asked}"),
        Unfit::Label { asked, has: Some(value) } => {
            let key = asked.split('=').next().unwrap_or_default();
            format!("has the label {key}={value}, and {asked} is required")
        }
        Unfit::Executor { asked, why } if why.is_empty() => format!("does not offer the executor {asked}"),
        Unfit::Executor { asked, why } => format!("does not offer the executor {asked}: {why}"),
        Unfit::Secret(name) => format!("has no secret {name}"),
        Unfit::Command => "takes no commands from builds, or has none for a build without one".to_owned(),
        Unfit::Resources { what, asked, has } => {
            format!("has {} {}, the build asks for {}", what.text(*has), what.as_str(), what.text(*asked))
        }
        Unfit::Short { what, asked, left, has } => {
            let (word, left, has, asked) = (what.as_str(), what.text(*left), what.text(*has), what.text(*asked));
            format!("has {left} of {has} {word} left, the build asks for {asked}")
        }
        Unfit::Claimed { build } => format!("is kept free for {build}, which waits longer and asks for more"),
    }
}

/// No such build, and never was as far as anybody remembers.
pub(crate) fn build_unknown(id: &BuildId) -> Status {
    status(ErrorCode::BuildUnknown, build_unknown_text(id))
}

/// The build ended and was purged.
pub(crate) fn build_purged(id: &BuildId) -> Status {
    status(ErrorCode::BuildPurged, build_purged_text(id))
}

/// The build is known; that of it has gone before the rest.
pub(crate) fn expired(id: &BuildId, what: &str) -> Status {
    status(ErrorCode::Expired, expired_text(id, what))
}

/// No such worker.
pub(crate) fn worker_unknown(name: &str) -> Status {
    status(ErrorCode::WorkerUnknown, worker_unknown_text(name))
}

/// Whether a yes-or-no command was carried out; `Unchanged` counts as yes, because asking twice is harmless.
pub(crate) fn expect_done(reply: &Reply) -> Result<(), Status> {
    match reply {
        Reply::Done | Reply::Unchanged => Ok(()),
        Reply::Rejected(rejection) => Err(of_rejection(rejection)),
        Reply::Submitted | Reply::SameBuild | Reply::SamePurged(_) | Reply::SourcePinned(_) | Reply::Purged(_) => {
            Err(unexpected(reply))
        }
    }
}

/// A reply that does not belong to the command: a fault of ours.
pub(crate) fn unexpected(reply: &Reply) -> Status {
    tracing::error!(?reply, "the registry gave a reply that does not belong to the command");
    status(ErrorCode::Internal, "the registry gave a reply that does not belong to the command")
}

/// The status for a proposal that did not come back with a reply.
pub(crate) fn of_propose(error: &ProposeError) -> Status {
    match error {
        ProposeError::NoLeader { hint } => no_leader(hint.as_deref()),
        ProposeError::OutcomeUnknown => {
            let text = "whether this was done is unknown: look, or repeat it, which is harmless under the same id";
            status(ErrorCode::OutcomeUnknown, text)
        }
        ProposeError::ShuttingDown => shutting_down(),
        ProposeError::UpgradePending { node, version, known, .. } => upgrade_pending(error, *node, version, *known),
        ProposeError::Storage(why) => {
            tracing::error!(why, "this node's storage refuses proposals");
            status(ErrorCode::Internal, format!("this node's storage is broken: {why}"))
        }
    }
}

/// The status for a read that could not be made as fresh as was asked.
pub(crate) fn of_read(error: &ReadError) -> Status {
    match error {
        ReadError::NoLeader { hint } => no_leader(hint.as_deref()),
        ReadError::ShuttingDown => shutting_down(),
    }
}

/// This node is stopping.
pub(crate) fn shutting_down() -> Status {
    status(ErrorCode::ShuttingDown, "this coordinator is stopping: go on at another")
}

/// Nobody took it in time. Always `no_leader`, with a time to retry; a hint, where there is one, is worth a try.
fn no_leader(hint: Option<&str>) -> Status {
    let facts = hint.map(|endpoint| (LEADER, endpoint));
    with_metadata(ErrorCode::NoLeader, "no leader answered in time; retry", facts)
}

/// The status for a store that does not answer.
pub(crate) fn of_store(error: &StoreError) -> Status {
    tracing::error!(%error, "the registry's store does not answer");
    status(ErrorCode::Internal, "the registry's store does not answer")
}

fn build_unknown_text(id: &BuildId) -> String {
    format!("there is no build {id}")
}

fn expired_text(id: &BuildId, what: &str) -> String {
    format!(
        "the {what} of build {id} were not kept as long as the build itself: `helix cluster policy get` says how long"
    )
}

fn build_purged_text(id: &BuildId) -> String {
    format!("build {id} had ended and was purged")
}

fn worker_unknown_text(name: &str) -> String {
    format!("there is no worker {name}")
}
