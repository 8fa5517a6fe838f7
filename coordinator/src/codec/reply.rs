//! Replies to and from the form in which the leader hands them to the coordinator that was asked.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use helix_core::{Rejection, Reply, Unfit};
use helix_model::{AttemptNumber, LogTime, Measure, NodeId};
use helix_proto::store;
use helix_proto::store::{rejection, reply, worker_unfit};

use super::CodecError;
use super::parts::{kept, key, key_wire, need, parse};

/// A reply in its wire form.
#[must_use]
pub fn reply_to_wire(reply: &Reply) -> store::Reply {
    let kind = match reply {
        Reply::Done => reply::Kind::Done(store::Nothing {}),
        Reply::Unchanged => reply::Kind::Unchanged(store::Nothing {}),
        Reply::Submitted => reply::Kind::Submitted(store::Nothing {}),
        Reply::SameBuild => reply::Kind::SameBuild(store::Nothing {}),
        Reply::SamePurged(state) => reply::Kind::SamePurged(state.as_str().to_owned()),
        Reply::SourcePinned(commit) => reply::Kind::SourcePinned(commit.clone()),
        Reply::Purged(count) => reply::Kind::Purged(*count),
        Reply::Rejected(rejection) => reply::Kind::Rejected(store::Rejection { kind: Some(rejection_kind(rejection)) }),
    };
    store::Reply { kind: Some(kind) }
}

/// Reads a reply.
///
/// # Errors
/// [`CodecError`], also when a newer leader answers what is unknown here.
pub fn reply_from_wire(wire: store::Reply) -> Result<Reply, CodecError> {
    Ok(match need("reply", wire.kind)? {
        reply::Kind::Done(store::Nothing {}) => Reply::Done,
        reply::Kind::Unchanged(store::Nothing {}) => Reply::Unchanged,
        reply::Kind::Submitted(store::Nothing {}) => Reply::Submitted,
        reply::Kind::SameBuild(store::Nothing {}) => Reply::SameBuild,
        reply::Kind::SamePurged(state) => Reply::SamePurged(parse(&state)?),
        reply::Kind::SourcePinned(commit) => Reply::SourcePinned(commit),
        reply::Kind::Purged(count) => Reply::Purged(count),
        reply::Kind::Rejected(rejected) => Reply::Rejected(rejection(need("rejection", rejected.kind)?)?),
    })
}

fn rejection_kind(rejection: &Rejection) -> rejection::Kind {
    use rejection::Kind;
    match rejection {
        Rejection::IdTaken(build) => Kind::IdTaken(build.to_string()),
        Rejection::QueueFull { queue_max } => Kind::QueueFull(*queue_max),
        Rejection::BuildUnknown(build) => Kind::BuildUnknown(build.to_string()),
        Rejection::BuildPurged(build) => Kind::BuildPurged(build.to_string()),
        Rejection::Expired(build, kept) => {
            Kind::Expired(store::Expired { build: build.to_string(), kept: kept.as_str().to_owned() })
        }
        Rejection::WrongState { from, to } => {
            Kind::WrongState(store::WrongState { from: from.as_str().to_owned(), to: to.as_str().to_owned() })
        }
        Rejection::NotOwner { build, owner } => {
            Kind::NotOwner(store::NotOwner { build: build.to_string(), owner: owner.clone() })
        }
        Rejection::TaskUnknown(key) => Kind::TaskUnknown(key_wire(key)),
        Rejection::TaskNotWaiting(key) => Kind::TaskNotWaiting(key_wire(key)),
        Rejection::StaleAttempt { key, current } => {
            Kind::StaleAttempt(store::StaleAttempt { key: Some(key_wire(key)), current: current.0 })
        }
        Rejection::AttemptEnded(key) => Kind::AttemptEnded(key_wire(key)),
        Rejection::WorkerUnknown(worker) => Kind::WorkerUnknown(worker.to_string()),
        Rejection::InstanceStale(worker) => Kind::InstanceStale(worker.to_string()),
        Rejection::WorkerUnfit { worker, why } => {
            Kind::WorkerUnfit(store::WorkerUnfit { worker: worker.to_string(), why: Some(unfit_why(why)) })
        }
        Rejection::OfferInvalid(why) => Kind::OfferInvalid((*why).to_owned()),
        Rejection::TooFewHolders { what, holders, needed } => {
            Kind::TooFewHolders(store::TooFewHolders { what: what.clone(), holders: *holders, needed: *needed })
        }
        Rejection::ReportInvalid(why) => Kind::ReportInvalid((*why).to_owned()),
        Rejection::CommitInvalid => Kind::CommitInvalid(store::Nothing {}),
        Rejection::NodeEpochTaken { node } => Kind::NodeEpochTaken(node.0),
        Rejection::NodeRemoved { node } => Kind::NodeRemoved(node.0),
        Rejection::NodeVotes { node } => Kind::NodeVotes(node.0),
        Rejection::TooManyRows { given } => Kind::TooManyRows(u64::try_from(*given).unwrap_or(u64::MAX)),
        Rejection::PolicyInvalid(why) => Kind::PolicyInvalid(why.clone()),
        Rejection::PolicyChanged => Kind::PolicyChanged(store::Nothing {}),
        Rejection::ArtifactTaken(name) => Kind::ArtifactTaken(name.clone()),
        Rejection::AttemptRunning(key) => Kind::AttemptRunning(key_wire(key)),
        Rejection::NotDue(key) => Kind::NotDue(key_wire(key)),
    }
}

fn rejection(kind: rejection::Kind) -> Result<Rejection, CodecError> {
    use rejection::Kind;
    Ok(match kind {
        Kind::IdTaken(build) => Rejection::IdTaken(parse(&build)?),
        Kind::QueueFull(queue_max) => Rejection::QueueFull { queue_max },
        Kind::BuildUnknown(build) => Rejection::BuildUnknown(parse(&build)?),
        Kind::BuildPurged(build) => Rejection::BuildPurged(parse(&build)?),
        Kind::Expired(it) => Rejection::Expired(parse(&it.build)?, kept(&it.kept)?),
        Kind::WrongState(it) => Rejection::WrongState { from: parse(&it.from)?, to: parse(&it.to)? },
        Kind::NotOwner(it) => Rejection::NotOwner { build: parse(&it.build)?, owner: it.owner },
        Kind::TaskUnknown(it) => Rejection::TaskUnknown(key(Some(it))?),
        Kind::TaskNotWaiting(it) => Rejection::TaskNotWaiting(key(Some(it))?),
        Kind::StaleAttempt(it) => Rejection::StaleAttempt { key: key(it.key)?, current: AttemptNumber(it.current) },
        Kind::AttemptEnded(it) => Rejection::AttemptEnded(key(Some(it))?),
        Kind::WorkerUnknown(worker) => Rejection::WorkerUnknown(parse(&worker)?),
        Kind::InstanceStale(worker) => Rejection::InstanceStale(parse(&worker)?),
        Kind::WorkerUnfit(it) => {
            Rejection::WorkerUnfit { worker: parse(&it.worker)?, why: unfit(need("why", it.why)?)? }
        }
        Kind::OfferInvalid(why) => Rejection::OfferInvalid(interned(&why)),
        Kind::TooFewHolders(it) => Rejection::TooFewHolders { what: it.what, holders: it.holders, needed: it.needed },
        Kind::ReportInvalid(why) => Rejection::ReportInvalid(interned(&why)),
        Kind::CommitInvalid(store::Nothing {}) => Rejection::CommitInvalid,
        Kind::NodeEpochTaken(node) => Rejection::NodeEpochTaken { node: NodeId(node) },
        Kind::NodeRemoved(node) => Rejection::NodeRemoved { node: NodeId(node) },
        Kind::NodeVotes(node) => Rejection::NodeVotes { node: NodeId(node) },
        Kind::TooManyRows(given) => Rejection::TooManyRows { given: usize::try_from(given).unwrap_or(usize::MAX) },
        Kind::PolicyInvalid(why) => Rejection::PolicyInvalid(why),
        Kind::PolicyChanged(store::Nothing {}) => Rejection::PolicyChanged,
        Kind::ArtifactTaken(name) => Rejection::ArtifactTaken(name),
        Kind::AttemptRunning(it) => Rejection::AttemptRunning(key(Some(it))?),
        Kind::NotDue(it) => Rejection::NotDue(key(Some(it))?),
    })
}

fn unfit_why(why: &Unfit) -> worker_unfit::Why {
    use worker_unfit::Why;
    match why {
        Unfit::Unhealthy => Why::Unhealthy(store::Nothing {}),
        Unfit::Lost => Why::Lost(store::Nothing {}),
        Unfit::Detached => Why::Detached(store::Nothing {}),
        Unfit::Draining => Why::Draining(store::Nothing {}),
        Unfit::Held => Why::Held(store::Nothing {}),
        Unfit::Quarantined { until } => Why::QuarantinedUntilMs(until.0),
        Unfit::Probing => Why::Probing(store::Nothing {}),
        Unfit::Pressure(words) => Why::Pressure(words.clone()),
        Unfit::Full { capacity } => Why::Full(*capacity),
        Unfit::Platform { asked, has } => Why::LacksPlatform(missing(asked, Some(has))),
        Unfit::Label { asked, has } => Why::LacksLabel(missing(asked, has.as_ref())),
        Unfit::Executor { asked, why } => Why::LacksExecutor(missing(asked, Some(why))),
        Unfit::Secret(name) => Why::LacksSecret(name.clone()),
        Unfit::Command => Why::Command(store::Nothing {}),
        Unfit::Resources { what, asked, has } => Why::HasLess(lack(*what, *asked, *has, 0)),
        Unfit::Short { what, asked, left, has } => Why::HasLessLeft(lack(*what, *asked, *has, *left)),
        Unfit::Claimed { build } => Why::Claimed(build.to_string()),
    }
}

fn unfit(why: worker_unfit::Why) -> Result<Unfit, CodecError> {
    use worker_unfit::Why;
    Ok(match why {
        Why::Unhealthy(store::Nothing {}) => Unfit::Unhealthy,
        Why::Lost(store::Nothing {}) => Unfit::Lost,
        Why::Detached(store::Nothing {}) => Unfit::Detached,
        Why::Draining(store::Nothing {}) => Unfit::Draining,
        Why::Held(store::Nothing {}) => Unfit::Held,
        Why::QuarantinedUntilMs(until) => Unfit::Quarantined { until: LogTime(until) },
        Why::Probing(store::Nothing {}) => Unfit::Probing,
        Why::Pressure(words) => Unfit::Pressure(words),
        Why::Full(capacity) => Unfit::Full { capacity },
        // An older leader does not say which.
        Why::Platform(store::Nothing {}) => Unfit::Platform { asked: String::new(), has: String::new() },
        Why::Label(asked) => Unfit::Label { asked, has: None },
        Why::Executor(store::Nothing {}) => Unfit::Executor { asked: String::new(), why: String::new() },
        Why::LacksPlatform(it) => Unfit::Platform { asked: it.asked, has: it.has.unwrap_or_default() },
        Why::LacksLabel(it) => Unfit::Label { asked: it.asked, has: it.has },
        Why::LacksExecutor(it) => Unfit::Executor { asked: it.asked, why: it.has.unwrap_or_default() },
        Why::LacksSecret(name) => Unfit::Secret(name),
        Why::Command(store::Nothing {}) => Unfit::Command,
        Why::Resources(what) => Unfit::Resources { what: parse(&what)?, asked: 0, has: 0 },
        Why::HasLess(it) => Unfit::Resources { what: parse(&it.what)?, asked: it.asked, has: it.has },
        Why::HasLessLeft(it) => Unfit::Short { what: parse(&it.what)?, asked: it.asked, left: it.left, has: it.has },
        Why::Claimed(build) => Unfit::Claimed { build: parse(&build)? },
    })
}

fn missing(asked: &str, has: Option<&String>) -> store::Missing {
    store::Missing { asked: asked.to_owned(), has: has.cloned() }
}

fn lack(what: Measure, asked: u64, has: u64, left: u64) -> store::Lack {
    store::Lack { what: what.as_str().to_owned(), asked, has, left }
}

/// Different explanations kept, at most: the core has a few dozen, a leader that sends more is broken.
const INTERNED_MAX: usize = 256;

static INTERNED: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// The core's explanations are literals; one that comes from a peer is kept for ever, and few are.
fn interned(text: &str) -> &'static str {
    let mut kept = INTERNED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = kept.get(text) {
        return known;
    }
    if kept.len() >= INTERNED_MAX || text.len() > 1024 {
        return "see the leader's log";
    }
    let text: &'static str = Box::leak(text.to_owned().into_boxed_str());
    kept.insert(text);
    text
}
