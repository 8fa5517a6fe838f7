//! The leader's table of sessions: at most one for each worker, each with its queue.
//!
//! Invariant: messages for a session that is not ready are dropped, because making it ready derives all of them from the state.

use std::collections::{BTreeMap, VecDeque};

use helix_common::status::status;
use helix_model::{ErrorCode, Instance, LogTime, WorkerName};
use helix_proto::agent::coordinator_message::Message;
use tonic::Status;

use super::outbox::{NotQueued, Outbox, QUEUED_MAX};
use super::wire::Speaker;

/// Places of the queue that what is sent at the start leaves free for what happens meanwhile.
const QUEUE_RESERVE: usize = QUEUED_MAX / 4;

/// Messages behind what reconciliation derived, at most: as many as the queue takes at other times.
const BACKLOG_MAX: usize = QUEUED_MAX;

/// Tells a worker's sessions apart: what an older one still says is not taken for the newer one's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SessionId(pub(crate) u64);

/// One agent, connected.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) instance: Instance,
    pub(crate) opened_at: LogTime,
    /// Registered and reconciled.
    pub(crate) ready: bool,
    outbox: Outbox,
    /// What reconciliation had to say and the queue had no room for, and what came behind it.
    backlog: VecDeque<Message>,
    /// How many of them came behind.
    behind: usize,
}

/// All sessions of this leader.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_worker: BTreeMap<WorkerName, Session>,
    last: u64,
}

impl Sessions {
    /// Adds a session; one that the worker had ends.
    pub(crate) fn open(&mut self, who: &Speaker, outbox: Outbox, now: LogTime) -> SessionId {
        self.last += 1;
        let id = SessionId(self.last);
        let session = Session {
            id,
            instance: who.instance.clone(),
            opened_at: now,
            ready: false,
            outbox,
            backlog: VecDeque::new(),
            behind: 0,
        };
        if let Some(before) = self.by_worker.insert(who.worker.clone(), session) {
            before.outbox.end(Some(status(ErrorCode::StaleAttempt, "another session of this worker took its place")));
        }
        id
    }

    pub(crate) fn get(&self, worker: &WorkerName) -> Option<&Session> {
        self.by_worker.get(worker)
    }

    /// The session under `id`, unless another took its place.
    pub(crate) fn get_mut(&mut self, worker: &WorkerName, id: SessionId) -> Option<&mut Session> {
        self.by_worker.get_mut(worker).filter(|session| session.id == id)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_worker.len()
    }

    /// Workers whose session is ready.
    pub(crate) fn ready(&self) -> impl Iterator<Item = (&WorkerName, &Session)> {
        self.by_worker.iter().filter(|(_, session)| session.ready)
    }

    pub(crate) fn is_ready(&self, worker: &WorkerName) -> bool {
        self.by_worker.get(worker).is_some_and(|session| session.ready)
    }

    /// Sends to the worker if its session is ready. `false` when it had no room, and then the session is over.
    pub(crate) fn send(&mut self, worker: &WorkerName, message: Message) -> bool {
        let Some(session) = self.by_worker.get_mut(worker).filter(|session| session.ready) else { return true };
        if session.say(message).is_ok() {
            return true;
        }
        self.end(worker, Some(status(ErrorCode::StaleAttempt, "the agent does not read its session")));
        false
    }

    /// Ends the worker's session.
    pub(crate) fn end(&mut self, worker: &WorkerName, reason: Option<Status>) -> Option<Session> {
        let session = self.by_worker.remove(worker)?;
        session.outbox.end(reason);
        Some(session)
    }

    /// Ends all, each with a last message.
    pub(crate) fn end_all(&mut self, last: &Message) {
        for (_, session) in std::mem::take(&mut self.by_worker) {
            // No room means that it does not read: the end of the stream says enough.
            let _ = session.outbox.send(last.clone());
            session.outbox.end(None);
        }
    }
}

impl Session {
    /// Sends a first batch as far as there is room, and keeps the rest for [`Self::drain_backlog`].
    pub(crate) fn begin(&mut self, messages: impl IntoIterator<Item = Message>) {
        self.backlog.extend(messages);
        self.ready = true;
        self.drain_backlog();
    }

    /// Sends a message behind all that was to be sent before: a stop must not overtake its assignment.
    fn say(&mut self, message: Message) -> Result<(), NotQueued> {
        self.drain_backlog();
        if self.backlog.is_empty() {
            self.behind = 0;
            return self.outbox.send(message);
        }
        if self.behind >= BACKLOG_MAX {
            return Err(NotQueued);
        }
        self.behind += 1;
        self.backlog.push_back(message);
        Ok(())
    }

    /// Sends more of the backlog while the agent reads.
    pub(crate) fn drain_backlog(&mut self) {
        while self.outbox.room() > QUEUE_RESERVE {
            let Some(message) = self.backlog.pop_front() else { return };
            if self.outbox.send(message).is_err() {
                return;
            }
        }
    }
}
