//! The replicated registry as the rest of the coordinator sees it: propose, read, wait. Consensus and storage are behind it.
//!
//! A [`Registry`] is a handle on queues and on the state in memory; tasks and threads elsewhere own the log, the
//! store and the network. What a proposal's error says about its outcome is exact: only
//! [`ProposeError::OutcomeUnknown`] may have been committed, and repeating it is harmless because `apply` checks ids.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use helix_core::record::{BuildRecord, NodeRecord};
use helix_core::state::{Known, State};
use helix_core::{Command, Effect, Policy, Reply};
use helix_model::{BuildId, Digest, LogTime, NodeId};
use tokio::sync::{broadcast, oneshot, watch};

use crate::raft::SavedSnapshot;

mod counters;
mod error;
mod ports;
mod shared;

pub use counters::{BOUNDS_US, Counters, Histogram, Number};
pub use error::{MembershipError, ProposeError, ReadError, StoreError};
use ports::proposals;
pub(crate) use ports::{BarrierRequest, Control, Lookup, Ports, Proposal, Route};
pub use shared::{Applied, Shared};

/// The highest command format this program understands. 2: reports may say that a death is unproven,
/// and workers are probed. 3: a policy takes another's place only if that is still in force,
/// workers say which secrets they have, builds have images, reports may say that an attempt outgrew a disk limit
/// of its own, and nodes are retired. 4: policy has lifetimes of logs and artifacts, rules of retention, and what
/// coordinators do beside builds; logs and artifacts expire before their builds. 5: policy may leave the copies to the
/// number of coordinators.
pub const COMMAND_FORMAT: u32 = 5;

/// Bytes of commands in one log entry: above this nothing more is added.
pub(crate) const ENTRY_BYTES: usize = 256 << 10;

/// Commands in one log entry, at most. Whatever is cut is cut by this: what a follower sends on in one call is one entry of the
/// leader's, with one outcome.
pub(crate) const ENTRY_COMMANDS: usize = 4_096;

/// Ids in one [`Registry::finished_page`] call, at most; more are cut.
pub const PAGE_IDS_MAX: usize = 256;

/// Blobs in one answer of [`Registry::named_blobs`].
pub const NAMED_BLOBS_MAX: usize = 256;

/// A handle on the registry; clones share everything.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Ports>,
}

/// One step of a change of the members. Each may be repeated: what is so already stays so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MemberStep {
    /// The node gets the log, without a vote.
    Admit {
        /// Who.
        node: NodeId,
        /// HOST:PORT of its coordinators' port.
        address: String,
    },
    /// A member gets a vote.
    Promote(NodeId),
    /// A voter loses its vote and still gets the log.
    Demote(NodeId),
    /// A member without a vote is one no more.
    Drop(NodeId),
}

/// How new a read must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Consistency {
    /// At least as new as everything acknowledged before the call, on any coordinator.
    Linearizable,
    /// Whatever this coordinator has applied.
    Stale,
}

/// Who leads, as this node knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leadership {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// The term.
    pub term: u64,
    /// This node leads, and everything committed before its term is applied here.
    pub is_leader: bool,
}

/// A build with everything known of it; never changes.
#[derive(Clone, PartialEq, Debug)]
pub struct BuildView {
    /// The record, addenda put in.
    pub record: Arc<BuildRecord>,
}

/// Consensus as this node sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RaftStatus {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// The term.
    pub term: u64,
    /// The last entry in this node's log.
    pub last_log_index: u64,
    /// The last entry applied here.
    pub applied_index: u64,
    /// The last entry in the newest snapshot; 0 for none.
    pub snapshot_index: u64,
    /// The last entry removed from the log behind snapshots; 0 for none.
    pub purged_index: u64,
    /// Voters and learners.
    pub members: Vec<MemberStatus>,
    /// Stable words: `clock_skew`, `no_leader`, `upgrade_pending`.
    pub warnings: Vec<&'static str>,
}

/// A coordinator as consensus sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberStatus {
    /// Its number.
    pub id: NodeId,
    /// HOST:PORT of its coordinators' port.
    pub address: String,
    /// `leader`, `follower`, `candidate` or `learner`; of others only the leader and learners are told apart.
    pub role: &'static str,
    /// What it is known to have: our own last entry, or what the leader knows a follower flushed; 0 when unknown here.
    pub last_log_index: u64,
    /// What is known to be applied: our own, or what a follower has flushed of it.
    pub applied_index: u64,
    /// It was heard in time. Only the leader knows that of others; elsewhere only the leader and we ourselves are.
    pub healthy: bool,
    /// It was really heard: a leader takes everybody for healthy who had no time to answer yet.
    pub heard: bool,
}

impl Registry {
    pub(crate) fn new(ports: Ports) -> Self {
        Self { inner: Arc::new(ports) }
    }

    /// This node's number.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.inner.identity.id()
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.inner.identity.cluster
    }

    /// This node's data directory's epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.inner.identity.epoch
    }

    /// Commits a command, wherever the leader is, and answers what `apply` said.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        let mut replies = self.propose_all(vec![command]).await?;
        replies.pop().ok_or(ProposeError::OutcomeUnknown)
    }

    /// Commits commands in this order and answers in it; they may share a log entry with others. After an error a
    /// prefix of them may have been committed.
    ///
    /// # Errors
    /// [`ProposeError`]; `OutcomeUnknown` as soon as that holds for one of them.
    pub async fn propose_all(&self, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        self.enqueue(commands, Route::Anywhere).await
    }

    /// Like [`Self::propose_all`], for what this node decided as the leader of a term: taken by nobody else, and in no other
    /// term. Who leads then may know better.
    ///
    /// # Errors
    /// [`ProposeError`]; `NoLeader` when this node does not lead in that term any more.
    pub async fn propose_in_term(&self, term: u64, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        self.enqueue(commands, Route::InTerm(term)).await
    }

    /// Like [`Self::propose_all`], for commands that another coordinator sent here: never sent on.
    pub(crate) async fn propose_forwarded(&self, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        self.enqueue(commands, Route::Forwarded).await
    }

    /// A node that waits to be added has nobody to ask, however long it waits.
    fn is_alone(&self) -> bool {
        self.inner.identity.members.is_empty() && self.inner.shared.members().is_empty()
    }

    async fn enqueue(&self, commands: Vec<Command>, route: Route) -> Result<Vec<Reply>, ProposeError> {
        if self.is_alone() {
            return Err(ProposeError::NoLeader { hint: None });
        }
        let mut answers = Vec::new();
        for (proposal, answer) in proposals(commands, route) {
            if self.inner.proposals.send(proposal).await.is_err() {
                // Of those before nobody knows.
                let error = if answers.is_empty() { ProposeError::ShuttingDown } else { ProposeError::OutcomeUnknown };
                return Err(error);
            }
            answers.push(answer);
        }
        let mut replies = Vec::new();
        let mut failure = None;
        for answer in answers {
            // The proposer answers everything it took; if it died with this in hand, nobody knows.
            match answer.await.unwrap_or(Err(ProposeError::OutcomeUnknown)) {
                Ok(more) => replies.extend(more),
                Err(ProposeError::OutcomeUnknown) => failure = Some(ProposeError::OutcomeUnknown),
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        match failure {
            None => Ok(replies),
            // It says what part waits for, and nobody tries the whole again because of it.
            Some(error @ ProposeError::UpgradePending { .. }) => Err(error),
            // A part is committed: whoever took the whole for refused would have that part committed twice.
            Some(_) if !replies.is_empty() => Err(ProposeError::OutcomeUnknown),
            Some(error) => Err(error),
        }
    }

    /// After `Ok`, what is read here is at least as new as everything acknowledged anywhere before the call.
    /// `Stale` asks nobody.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn barrier(&self, consistency: Consistency) -> Result<(), ReadError> {
        if consistency == Consistency::Stale {
            return Ok(());
        }
        if self.is_alone() {
            return Err(ReadError::NoLeader { hint: None });
        }
        let (reply, answer) = oneshot::channel();
        self.inner.barriers.send(reply).await.map_err(|_| ReadError::ShuttingDown)?;
        answer.await.unwrap_or(Err(ReadError::ShuttingDown))
    }

    /// Looks at the state. Short: `apply` waits for it. There is no await in here.
    pub fn with_state<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.inner.shared.state())
    }

    /// A build, open or finished. Call [`Self::barrier`] first where it must be fresh.
    ///
    /// # Errors
    /// [`StoreError`] when the record of a finished build cannot be read.
    pub async fn build(&self, id: &BuildId) -> Result<Option<BuildView>, StoreError> {
        enum Where {
            Open(Arc<BuildRecord>),
            Store,
            Nowhere,
        }
        let found = self.with_state(|state| match state.build(id) {
            Some(Known::Open(record)) => Where::Open(Arc::clone(record)),
            Some(Known::Finished(_)) => Where::Store,
            Some(_) | None => Where::Nowhere,
        });
        match found {
            Where::Open(record) => Ok(Some(BuildView { record })),
            Where::Store => Ok(self.finished_page(vec![id.clone()]).await?.pop()),
            Where::Nowhere => Ok(None),
        }
    }

    /// The records of finished builds, in the order of `ids`; at most [`PAGE_IDS_MAX`], and those that are gone
    /// meanwhile are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finished_page(&self, mut ids: Vec<BuildId>) -> Result<Vec<BuildView>, StoreError> {
        ids.truncate(PAGE_IDS_MAX);
        let stopped = || StoreError("this node is stopping".to_owned());
        let (reply, answer) = oneshot::channel();
        self.inner.lookups.send(Lookup::Records { ids, reply }).await.map_err(|_| stopped())?;
        let records = answer.await.map_err(|_| stopped())??;
        Ok(records.into_iter().map(|record| BuildView { record }).collect())
    }

    /// Whether any build names these bytes. For collection, after a linearizable barrier. Reads the store: call it
    /// from a thread that may block. When the store cannot be read the answer is yes.
    #[must_use]
    pub fn names_blob(&self, digest: &Digest) -> bool {
        self.with_state(|state| state.names_blob(digest)) || (self.inner.names_blob)(digest)
    }

    /// What follows from commands as they are applied here, on every node. A receiver that lags, and every receiver
    /// after a snapshot was installed, gets `Lagged` and looks at the state again.
    #[must_use]
    pub fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        self.inner.shared.effects()
    }

    /// Who leads.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Log time: on the leader the clock that stamps entries, elsewhere the last stamp applied.
    #[must_use]
    pub fn now(&self) -> LogTime {
        let is_leader = self.inner.leadership.borrow().is_leader;
        if is_leader { self.inner.shared.stamp() } else { self.with_state(State::last_at) }
    }

    /// By how much log time has leapt ahead of the time that passed, ever since this node runs.
    #[must_use]
    pub fn leapt_ms(&self) -> u64 {
        self.inner.shared.clock.leapt_ms()
    }

    /// All coordinators that ever made themselves known.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeRecord> {
        self.with_state(|state| state.nodes().cloned().collect())
    }

    /// The voters by the last membership applied.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.with_state(|state| state.voters().clone())
    }

    /// The cluster's policy.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.with_state(|state| state.policy().clone())
    }

    /// Where clients dial the leader, if one is known and made itself known.
    #[must_use]
    pub fn leader_hint(&self) -> Option<String> {
        let leader = self.inner.leadership.borrow().leader?;
        self.inner.shared.grpc_of(leader)
    }

    /// Consensus as this node sees it.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        self.inner.status.borrow().clone()
    }

    /// Members and where coordinators dial them.
    #[must_use]
    pub fn members(&self) -> BTreeMap<NodeId, String> {
        self.inner.shared.members()
    }

    /// What was counted and measured here.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.inner.shared.counters)
    }

    /// `Some(why)` once this node cannot go on: a failed fsync, an unknown command, another node under its id.
    /// The process should report it and exit.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.inner.failure.clone()
    }

    /// Carries out one step of a change of the members, and returns when it is committed. Leader only. Whether it is
    /// safe is the caller's to know: see `crate::membership`.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn change_member(&self, step: MemberStep) -> Result<(), MembershipError> {
        let (reply, answer) = oneshot::channel();
        self.control(Control::Member { step, reply }).await.map_err(|()| MembershipError::ShuttingDown)?;
        answer.await.unwrap_or(Err(MembershipError::ShuttingDown))
    }

    /// Asks a voter to lead. Leader only. Returns when it was asked; whether it does is seen in [`Self::leadership`].
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn ask_to_lead(&self, to: NodeId) -> Result<(), MembershipError> {
        let (reply, answer) = oneshot::channel();
        self.control(Control::Transfer { to, reply }).await.map_err(|()| MembershipError::ShuttingDown)?;
        answer.await.unwrap_or(Err(MembershipError::ShuttingDown))
    }

    /// Blobs that builds name, in their order from behind `after` on, at most [`NAMED_BLOBS_MAX`]; none at the end. For
    /// all of them as of now, call [`Self::barrier`] first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn named_blobs(&self, after: Option<Digest>) -> Result<Vec<Digest>, StoreError> {
        let stopped = || StoreError("this node is stopping".to_owned());
        let (reply, answer) = oneshot::channel();
        self.inner.lookups.send(Lookup::NamedBlobs { after, reply }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Writes a snapshot now, of everything that is applied here, and removes from the log what two snapshots cover. For all that
    /// was acknowledged by now, call [`Self::barrier`] first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn snapshot(&self) -> Result<SavedSnapshot, StoreError> {
        let stopped = || StoreError("this node is stopping".to_owned());
        let (reply, answer) = oneshot::channel();
        self.control(Control::Snapshot { reply }).await.map_err(|()| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Hands leadership to somebody else if we have it, stops consensus, and writes out what is applied. Returns
    /// when that is done, or soon after `deadline`; both are safe.
    pub async fn transfer_leadership_and_stop(&self, deadline: Duration) {
        let (reply, answer) = oneshot::channel();
        if self.control(Control::Stop { deadline, reply }).await.is_ok() {
            // An error means that the task has ended, which is what was asked for.
            let _ = answer.await;
        }
    }

    async fn control(&self, request: Control) -> Result<(), ()> {
        self.inner.control.send(request).await.map_err(|_| ())
    }
}
