//! Who is a member: adding, removing, handing over leadership, on a cluster that serves meanwhile.
//!
//! The leader alone does it, one change at a time, in steps that are each safe to stop at and to repeat: whatever ends a
//! change in the middle, the same call goes on from there. A node gets its vote last and loses it first. Invariant: a node
//! leaves only when every blob that a build names is held by enough of the others, and then its id is spent for ever.

mod add;
mod join;
mod remove;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_common::status::{not_leader, status};
use helix_model::{ErrorCode, NodeId};
use helix_proto::peer::member_service_client::MemberServiceClient;
use helix_proto::{peer, v1};
use tokio::sync::{Mutex, MutexGuard, mpsc, watch};
use tonic::Status;

pub use join::belong;
pub use remove::LastCopies;

use crate::peers::{Peers, Purpose};
use crate::registry::{MemberStatus, MemberStep, MembershipError, Registry};
use crate::repair::Repair;
use crate::rpc::answer;

/// How long a node may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// A call that repeats another waits so long for that one to notice that nobody listens.
const AGAIN_PATIENCE: Duration = Duration::from_secs(15);
/// Whoever asked for a change may not read for so long. Less than a repeated call waits, which then takes its place.
const LISTENER_PATIENCE: Duration = Duration::from_secs(10);
/// Who began to lead knows by then who answers.
const HEARING: Duration = Duration::from_secs(5);
const HEARING_RETRY: Duration = Duration::from_millis(50);
/// How long a successor may take to lead.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(10);
/// It refuses while it lags; then it is asked again.
const TRANSFER_RETRY: Duration = Duration::from_secs(1);

/// Progress, to whoever asked for the change.
pub type Listener = mpsc::Sender<Result<v1::MemberProgress, Status>>;

/// Changes of the members. Clones share everything.
#[derive(Clone)]
pub struct Membership {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    peers: Peers,
    repair: Repair,
    busy: Mutex<()>,
    change: watch::Sender<Option<v1::MemberChange>>,
}

/// Whether a call repeats one whose outcome is unknown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// It is the first.
    Once,
    /// What the former one did is no error.
    Again,
}

impl Membership {
    /// On these handles.
    #[must_use]
    pub fn new(registry: Registry, peers: Peers) -> Self {
        let repair = Repair::new(registry.clone(), peers.clone());
        let change = watch::Sender::new(None);
        Self { inner: Arc::new(Inner { registry, peers, repair, busy: Mutex::new(()), change }) }
    }

    /// What is under way here.
    #[must_use]
    pub fn change(&self) -> Option<v1::MemberChange> {
        self.inner.change.borrow().clone()
    }

    /// What looks after copies of blobs.
    #[must_use]
    pub fn repair(&self) -> Repair {
        self.inner.repair.clone()
    }

    /// Asks a voter to lead, or the best one; who leads then.
    ///
    /// # Errors
    /// The status to answer with.
    pub async fn transfer(&self, to: Option<NodeId>) -> Result<NodeId, Status> {
        let inner = &self.inner;
        inner.expect_leader()?;
        let own = inner.registry.node();
        if to == Some(own) {
            return Ok(own);
        }
        let voters = inner.registry.voters();
        if let Some(to) = to.filter(|to| !voters.contains(to)) {
            let text = format!("node {to} is no voter: `helix cluster status` shows who is");
            return Err(status(ErrorCode::MemberUnknown, text));
        }
        inner.hand_over(to).await
    }
}

impl Inner {
    // A status is what every caller answers with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    fn expect_leader(&self) -> Result<(), Status> {
        let leads = self.registry.leadership().borrow().is_leader;
        if leads { Ok(()) } else { Err(not_leader(self.registry.leader_hint().as_deref())) }
    }

    async fn begin<'a>(
        &'a self,
        kind: &'static str,
        id: NodeId,
        asked: Asked,
        listener: &'a Listener,
    ) -> Result<Change<'a>, Status> {
        self.expect_leader()?;
        let patience = if asked == Asked::Again { AGAIN_PATIENCE } else { Duration::ZERO };
        let busy = match self.busy.try_lock() {
            Ok(busy) => busy,
            Err(_) => tokio::time::timeout(patience, self.busy.lock()).await.map_err(|_| self.is_busy())?,
        };
        let change = Change { inner: self, kind, id, listener, _busy: busy };
        change.at("checking", 0, 0).await?;
        Ok(change)
    }

    fn is_busy(&self) -> Status {
        let what = match &*self.change.borrow() {
            Some(change) => {
                format!("node {} is being {}", change.id, if change.kind == "add" { "added" } else { "removed" })
            }
            None => "a change of the members is being committed".to_owned(),
        };
        status(ErrorCode::MembershipBusy, format!("{what}: one at a time; try again when it is done"))
    }

    fn member_status(&self, id: NodeId) -> Option<MemberStatus> {
        self.registry.status().members.into_iter().find(|member| member.id == id)
    }

    fn answers(&self, id: NodeId) -> bool {
        self.member_status(id).is_some_and(|member| member.healthy)
    }

    fn was_heard(&self, id: NodeId) -> bool {
        self.member_status(id).is_some_and(|member| member.heard)
    }

    /// Waits until this leader knows who answers: at first it has heard nobody, which says nothing about them.
    async fn hear(&self) -> Result<(), Status> {
        let deadline = Instant::now() + HEARING;
        loop {
            self.expect_leader()?;
            let status = self.registry.status();
            let known = status.leader == Some(self.registry.node());
            if known && status.members.iter().all(|member| member.heard == member.healthy) || Instant::now() >= deadline
            {
                return Ok(());
            }
            tokio::time::sleep(HEARING_RETRY).await;
        }
    }

    /// Asks a node at an address who it is.
    async fn introduction(&self, id: NodeId, address: &str) -> Result<peer::IntroduceResponse, Status> {
        let channel = self.peers.channel_at(id, address, Purpose::Control);
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = peer::IntroduceRequest { caller: Some(self.peers.caller(id)) };
        let mut client = MemberServiceClient::new(channel);
        let answer = tokio::time::timeout(INTRODUCTION, client.introduce(request)).await;
        Ok(answer.map_err(|_| Status::deadline_exceeded(format!("no answer within {INTRODUCTION:?}")))??.into_inner())
    }

    async fn commit(&self, step: MemberStep) -> Result<(), Status> {
        let meaning = match &step {
            MemberStep::Admit { .. } => ErrorCode::MemberExists,
            MemberStep::Promote(_) | MemberStep::Drop(_) => ErrorCode::MemberUnknown,
            MemberStep::Demote(_) => ErrorCode::LastMember,
        };
        let refused = match self.registry.change_member(step).await {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        Err(match refused {
            MembershipError::NotLeader { hint } => not_leader(hint.as_deref()),
            MembershipError::Busy => self.is_busy(),
            MembershipError::Refused(why) => status(meaning, why),
            MembershipError::OutcomeUnknown => {
                let text =
                    "whether the members change is unknown: `helix cluster status` tells; the call can be repeated";
                status(ErrorCode::OutcomeUnknown, text)
            }
            MembershipError::ShuttingDown => answer::shutting_down(),
        })
    }

    /// Has somebody else lead: `to`, or the most advanced of those that answer.
    async fn hand_over(&self, to: Option<NodeId>) -> Result<NodeId, Status> {
        let own = self.registry.node();
        let voters = self.registry.voters();
        let others = self.registry.status().members.into_iter().filter(|it| it.id != own && voters.contains(&it.id));
        let best = others.clone().filter(|it| it.healthy).max_by_key(|it| it.last_log_index).map(|it| it.id);
        if others.count() == 0 {
            let text =
                format!("node {own} is the only voter: nobody else can lead; add another with `helix cluster add`");
            return Err(status(ErrorCode::LastMember, text));
        }
        let Some(to) = to.or(best).filter(|to| self.answers(*to)) else {
            let who = to.map_or_else(|| "no other voter answers".to_owned(), |to| format!("node {to} does not answer"));
            let text = format!("{who}: bring it back first, or name another");
            return Err(status(ErrorCode::MemberUnreachable, text));
        };
        let mut leadership = self.registry.leadership();
        let deadline = Instant::now() + TRANSFER_PATIENCE;
        while leadership.borrow_and_update().leader.is_none_or(|leader| leader == own) {
            if Instant::now() >= deadline {
                let text = format!("node {to} did not take over within {TRANSFER_PATIENCE:?}: node {own} still leads");
                return Err(status(ErrorCode::MemberUnreachable, text));
            }
            match self.registry.ask_to_lead(to).await {
                Ok(()) | Err(MembershipError::NotLeader { .. }) => {}
                Err(error) => return Err(status(ErrorCode::ShuttingDown, error.to_string())),
            }
            let _ = tokio::time::timeout(TRANSFER_RETRY, leadership.changed()).await;
        }
        Ok(leadership.borrow().leader.unwrap_or(to))
    }
}

/// A change that is under way. While it lives no other begins.
struct Change<'a> {
    inner: &'a Inner,
    kind: &'static str,
    id: NodeId,
    listener: &'a Listener,
    _busy: MutexGuard<'a, ()>,
}

impl Change<'_> {
    /// Tells how far it is. An error when nobody listens any more, or reads: then it stops where it is, and can be gone on with.
    async fn at(&self, step: &'static str, done: u64, total: u64) -> Result<(), Status> {
        let change = v1::MemberChange { kind: self.kind.to_owned(), id: self.id.0, step: step.to_owned(), done, total };
        let before = self.inner.change.send_replace(Some(change.clone()));
        if before.is_none_or(|before| before.step != step) {
            tracing::info!(kind = self.kind, id = self.id.0, step, "the members change");
        }
        self.tell(v1::MemberProgress { change: Some(change), note: String::new() }).await
    }

    /// Tells something that people should know.
    async fn note(&self, note: String) -> Result<(), Status> {
        tracing::warn!(kind = self.kind, id = self.id.0, note, "the members change");
        self.tell(v1::MemberProgress { change: None, note }).await
    }

    async fn tell(&self, progress: v1::MemberProgress) -> Result<(), Status> {
        let gone = || Status::cancelled("whoever asked for the change has gone, or does not read");
        self.listener.send_timeout(Ok(progress), LISTENER_PATIENCE).await.map_err(|_| gone())
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.inner.change.send_replace(None);
    }
}
