//! Removing a coordinator: what it alone holds is copied, its vote goes, what came meanwhile is copied, its id is spent,
//! and it is told.

use std::time::Duration;

use helix_common::status::{not_leader, status};
use helix_core::Command;
use helix_core::command::RetireNode;
use helix_model::{ErrorCode, NodeId};
use helix_proto::peer;
use helix_proto::peer::member_service_client::MemberServiceClient;
use tonic::Status;

use super::{Asked, Change, INTRODUCTION, Inner, Listener, Membership};
use crate::peers::Purpose;
use crate::registry::MemberStep;
use crate::repair::Pace;
use crate::rpc::answer;

/// The command format that knows how a node retires.
const RETIRES_SINCE: u32 = 3;
/// How often a node is told that it was removed; one that does not hear it learns it when it speaks to anybody.
const DISMISSALS: u32 = 3;

/// What becomes of bytes that nobody else holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LastCopies {
    /// The node stays.
    Keep,
    /// They are given up.
    Lose,
}

impl Membership {
    /// Removes a member for ever.
    ///
    /// # Errors
    /// The status to answer with.
    pub async fn remove(
        &self,
        id: NodeId,
        asked: Asked,
        last_copies: LastCopies,
        listener: &Listener,
    ) -> Result<(), Status> {
        let inner = &*self.inner;
        let change = inner.begin("remove", id, asked, listener).await?;
        let Some(address) = inner.registry.members().get(&id).cloned() else {
            return if asked == Asked::Again && inner.is_removed(id) {
                change.at("done", 0, 0).await
            } else {
                Err(inner.unknown(id))
            };
        };
        inner.hear().await?;
        inner.expect_removable(id)?;
        if id == inner.registry.node() {
            let leader = inner.hand_over(None).await?;
            change.note(format!("node {id} led; node {leader} leads now and goes on")).await?;
            return Err(not_leader(inner.registry.leader_hint().as_deref()));
        }
        let reachable = inner.introduction(id, &address).await.is_ok();
        // One that an earlier call retired stops by itself, and all it held was copied before: it is not asked any more.
        if !inner.is_removed(id) {
            change.retire(last_copies, reachable).await?;
        }
        change.at("removing", 0, 0).await?;
        inner.commit(MemberStep::Drop(id)).await?;
        if reachable {
            inner.dismiss(id, &address).await;
        }
        change.at("done", 0, 0).await
    }
}

#[allow(clippy::result_large_err)]
impl Inner {
    pub(super) fn is_removed(&self, id: NodeId) -> bool {
        self.registry.with_state(|state| state.node(id).is_some_and(|node| node.removed_at.is_some()))
    }

    fn unknown(&self, id: NodeId) -> Status {
        let text = if self.is_removed(id) {
            format!("node {id} was removed already")
        } else {
            format!("node {id} is no member: `helix cluster status` shows who is")
        };
        status(ErrorCode::MemberUnknown, text)
    }

    fn expect_removable(&self, id: NodeId) -> Result<(), Status> {
        let mut left = self.registry.voters();
        left.remove(&id);
        if left.is_empty() {
            let text = format!("node {id} is the only voter: add another with `helix cluster add` first");
            return Err(status(ErrorCode::LastMember, text));
        }
        let (needed, answer) = (left.len() / 2 + 1, left.iter().filter(|voter| self.was_heard(**voter)).count());
        if answer < needed {
            let text = format!(
                "without node {id} there are {} voters, of which {needed} must answer, and {answer} do: bring the others \
                 back first, or remove those that are gone for good before this one",
                left.len()
            );
            return Err(status(ErrorCode::QuorumUnsafe, text));
        }
        let old = self.registry.nodes().into_iter().find(|node| left.contains(&node.id) && node.format < RETIRES_SINCE);
        if let Some(old) = old {
            let text = format!(
                "node {} runs {}, which does not know how a node is removed: upgrade it first",
                old.id, old.version
            );
            return Err(status(ErrorCode::UpgradePending, text));
        }
        Ok(())
    }

    /// Tells the node. It may have gone meanwhile, and learns it otherwise when it comes back.
    async fn dismiss(&self, id: NodeId, address: &str) {
        for _ in 0..DISMISSALS {
            let Ok(channel) = self.peers.channel_at(id, address, Purpose::Control) else { return };
            let request = peer::DismissRequest { caller: Some(self.peers.caller(id)) };
            let told = tokio::time::timeout(INTRODUCTION, MemberServiceClient::new(channel).dismiss(request)).await;
            if matches!(told, Ok(Ok(_))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        tracing::warn!(id = id.0, "a node that was removed could not be told; it learns it when it speaks to anybody");
    }
}

impl Change<'_> {
    /// Copies what the node holds, takes its vote, and spends its id.
    async fn retire(&self, last_copies: LastCopies, reachable: bool) -> Result<(), Status> {
        let (inner, id) = (self.inner, self.id);
        if !reachable {
            self.note(format!("node {id} does not answer: only what others hold can be copied")).await?;
        }
        // While it votes: whatever is found now, nothing has changed.
        self.copy(last_copies, reachable).await?;
        if inner.registry.voters().contains(&id) {
            self.at("demoting", 0, 0).await?;
            // Copying took a while, and without a quorum of those that stay this could never be committed.
            inner.hear().await?;
            inner.expect_removable(id)?;
            inner.commit(MemberStep::Demote(id)).await?;
            // What was stored before its copies ceased to count.
            self.copy(last_copies, reachable).await?;
        }
        self.at("removing", 0, 0).await?;
        let retire = inner.registry.propose(Command::RetireNode(RetireNode { node: id })).await;
        answer::expect_done(&retire.map_err(|error| answer::of_propose(&error))?)
    }

    /// `answered`: whether the node that leaves did when the change began.
    async fn copy(&self, last_copies: LastCopies, answered: bool) -> Result<(), Status> {
        let plan = self.inner.repair.plan(Some(self.id), Pace::Now);
        self.at("copying", 0, 0).await?;
        let mut pass = self.inner.repair.pass(&plan).await?;
        while pass.step().await? {
            self.inner.expect_leader()?;
            self.at("copying", pass.tally.checked, 0).await?;
        }
        let tally = pass.tally;
        if let Some(why) = tally.leases_unknown.as_ref().filter(|_| answered) {
            let text = format!(
                "node {} stopped answering before it said which uploads it keeps for builds to come ({why}): repeat; \
                 --lose-last-copies gives them up",
                self.id
            );
            if last_copies == LastCopies::Keep {
                return Err(status(ErrorCode::MemberUnreachable, text));
            }
            self.note(text).await?;
        }
        tracing::info!(id = self.id.0, ?tally, "what a node that leaves held was looked after");
        if tally.last_copies > 0 && last_copies == LastCopies::Keep {
            let text = format!(
                "{} blobs are held by node {} alone, or by nobody that answers, such as {}: bring back who holds them, or \
                 make room, and repeat; --lose-last-copies gives them up",
                tally.last_copies,
                self.id,
                tally.examples.join("; ")
            );
            return Err(status(ErrorCode::LastCopy, text));
        }
        if tally.last_copies > 0 {
            self.note(format!("{} blobs are given up, such as {}", tally.last_copies, tally.examples.join("; ")))
                .await?;
        }
        if tally.short > 0 {
            let text = format!("{} blobs have fewer than {} copies: is a disk full?", tally.short, plan.copies);
            self.note(text).await?;
        }
        Ok(())
    }
}
