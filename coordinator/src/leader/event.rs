//! What the leader's loop is told by sessions and by those who ask it.

use helix_core::Liveness;
use helix_model::{AttemptKey, ErrorCode, WorkerName};
use std::collections::BTreeMap;
use tokio::sync::oneshot;

use super::outbox::Outbox;
use super::sessions::SessionId;
use super::wire::{Speaker, SpooledAttempt};

/// A message to the loop.
#[derive(Debug)]
pub(crate) enum Event {
    /// An agent introduced itself and wants a session.
    Open { who: Speaker, outbox: Outbox, answer: oneshot::Sender<Result<SessionId, CannotOpen>> },
    /// It is registered: reconcile with what it says it has, and begin.
    Ready { who: Speaker, id: SessionId, spooled: Vec<SpooledAttempt> },
    /// A heartbeat.
    Heard { worker: WorkerName, id: SessionId, beat: Beat },
    /// The session is over.
    Closed { worker: WorkerName, id: SessionId },
    /// Somebody asks what the leader knows; `None` where this node does not lead.
    Snapshot(oneshot::Sender<Option<Liveness>>),
}

/// What a heartbeat says.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Beat {
    /// What is short on the host.
    pub(crate) pressure: String,
    /// How long each attempt has been silent.
    pub(crate) silent_ms: BTreeMap<AttemptKey, u64>,
    /// When the agent's certificate ends (Unix milliseconds); 0 where it does not say.
    pub(crate) certificate_not_after_ms: i64,
}

/// Why a session cannot be opened now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum CannotOpen {
    /// This node does not lead; the leader's endpoint, where one is known.
    NotLeader(Option<String>),
    /// Refused, with the word for it; the agent may try again.
    Refused(ErrorCode, String),
}
