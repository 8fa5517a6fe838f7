//! The task that owns consensus: membership, snapshots, the log's tail, and the orderly end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_model::NodeId;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{members, voters};
use crate::node_dir::NodeDir;
use crate::raft::SavedSnapshot;
use crate::raft::server::Incoming;
use crate::raft::types::Raft;
use crate::raft::writer::Writer;
use crate::registry::{Control, Leadership, MembershipError, Shared, StoreError};

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A leader that cannot purge hands over when its log has grown by so many times the bytes of a snapshot's trigger.
const STUCK_SNAPSHOTS: u64 = 4;
/// Of a million builds, on a slow disk.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(600);
/// A change of the members needs a majority to answer, and no more.
const MEMBERSHIP_WAIT: Duration = Duration::from_secs(30);
/// A change that a former leader left half done is completed after so long.
const JOINT_PATIENCE: Duration = Duration::from_secs(3);

/// See the module.
pub(super) struct Controller {
    pub(super) raft: Raft,
    pub(super) shared: Arc<Shared>,
    pub(super) writer: Writer,
    pub(super) incoming: Arc<Incoming>,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) queue: mpsc::Receiver<Control>,
    pub(super) tasks: JoinSet<()>,
    pub(super) stop: CancellationToken,
    pub(super) snapshot_log_bytes: u64,
    /// Kept locked until everything has ended.
    pub(super) dir: Arc<NodeDir>,
}

impl Controller {
    pub(super) async fn run(mut self) {
        let keeper = Keeper {
            raft: self.raft.clone(),
            shared: Arc::clone(&self.shared),
            writer: self.writer.clone(),
            incoming: Arc::clone(&self.incoming),
            threshold: self.snapshot_log_bytes,
        };
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = keeper.run() => {}
                () = stop.cancelled() => {}
            }
        });
        while let Some(request) = self.queue.recv().await {
            match request {
                Control::Member { step, reply } => {
                    let change = members::carry_out(self.raft.clone(), step);
                    self.change_membership(change, reply);
                }
                Control::Transfer { to, reply } => {
                    let change = members::ask_to_lead(self.raft.clone(), to);
                    self.change_membership(change, reply);
                }
                Control::Snapshot { reply } => {
                    let (raft, shared, writer) = (self.raft.clone(), Arc::clone(&self.shared), self.writer.clone());
                    let stop = self.stop.clone();
                    self.tasks.spawn(async move {
                        let result = tokio::select! {
                            result = snapshot_now(&raft, &shared, &writer) => result,
                            () = stop.cancelled() => Err(StoreError("this node is stopping".to_owned())),
                        };
                        // Whoever went away does not want to know.
                        drop(reply.send(result));
                    });
                }
                Control::Stop { deadline, reply } => {
                    self.end(deadline).await;
                    let _ = reply.send(());
                    return;
                }
            }
        }
        self.end(Duration::ZERO).await;
    }

    fn change_membership(
        &mut self,
        change: impl Future<Output = Result<(), MembershipError>> + Send + 'static,
        reply: oneshot::Sender<Result<(), MembershipError>>,
    ) {
        let (shared, stop) = (Arc::clone(&self.shared), self.stop.clone());
        self.tasks.spawn(async move {
            let result = tokio::select! {
                result = tokio::time::timeout(MEMBERSHIP_WAIT, change) => {
                    result.unwrap_or(Err(MembershipError::OutcomeUnknown))
                }
                // The end of this node does not wait for voters that do not answer.
                () = stop.cancelled() => Err(MembershipError::ShuttingDown),
            };
            let result = result.map_err(|error| match error {
                MembershipError::NotLeader { hint } => {
                    let leader = hint.and_then(|leader| leader.parse().ok()).map(NodeId);
                    MembershipError::NotLeader { hint: leader.and_then(|leader| shared.grpc_of(leader)) }
                }
                other => other,
            });
            drop(reply.send(result));
        });
    }

    async fn end(&mut self, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        self.hand_over(deadline).await;
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(%error, "a task of consensus panicked");
            }
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(%error, "consensus did not end well");
        }
        self.writer.stop().await;
        self.dir.release();
    }

    /// Asks the most advanced other voter to lead, and waits until it does, a leader at most a few elections.
    async fn hand_over(&mut self, deadline: Instant) {
        let own = *self.raft.node_id();
        while self.leadership.borrow_and_update().leader == Some(NodeId(own)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(successor) = successor(&self.raft, own) else { return };
            if left.is_zero() {
                tracing::warn!(successor, "leadership was not handed over in time");
                return;
            }
            if let Err(error) = self.raft.trigger().transfer_leader(successor).await {
                tracing::warn!(%error, "leadership cannot be handed over");
                return;
            }
            // It may refuse because it lags; then it is asked again.
            let _ = tokio::time::timeout(left.min(Duration::from_secs(1)), self.leadership.changed()).await;
        }
    }
}

/// The other voter that has most of the log.
pub(super) fn successor(raft: &Raft, own: u64) -> Option<u64> {
    let metrics = raft.metrics().borrow_watched().clone();
    let matched = metrics.replication.unwrap_or_default();
    let others = voters(raft).into_iter().filter(|voter| *voter != own);
    others.max_by_key(|voter| matched.get(voter).cloned().flatten())
}

/// Has a snapshot written that covers what is applied by now, and removes from the log what two of them cover.
async fn snapshot_now(raft: &Raft, shared: &Shared, writer: &Writer) -> Result<SavedSnapshot, StoreError> {
    let wanted = shared.applied().borrow().index;
    let began = Instant::now();
    loop {
        raft.trigger().snapshot().await.map_err(|error| StoreError(error.to_string()))?;
        for _ in 0..20 {
            let newest = writer.snapshots().into_iter().next();
            let told = raft.metrics().borrow_watched().snapshot;
            if let Some((meta, path)) = newest
                && meta.last_log_id.is_some_and(|newest| newest.index() >= wanted && told >= Some(newest))
                // Two newer ones may have taken its place by now: then one of them will do.
                && let Ok(saved) = SavedSnapshot::open(&meta, &path)
            {
                purge(raft, writer).await;
                return Ok(saved);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if began.elapsed() > SNAPSHOT_WAIT {
            return Err(StoreError("no snapshot was written in time".to_owned()));
        }
    }
}

/// Removes from the log what the older of two snapshots covers.
async fn purge(raft: &Raft, writer: &Writer) {
    let kept = writer.snapshots();
    let [_, (older, _)] = &kept[..] else { return };
    let Some(upto) = older.last_log_id else { return };
    let (told, purged) = {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.snapshot, metrics.purged)
    };
    if told >= Some(upto)
        && purged < Some(upto)
        && let Err(error) = raft.trigger().purge_log(upto.index()).await
    {
        tracing::debug!(%error, "the log is not purged");
    }
}

/// Writes snapshots as the log grows.
struct Keeper {
    raft: Raft,
    shared: Arc<Shared>,
    writer: Writer,
    incoming: Arc<Incoming>,
    threshold: u64,
}

impl Keeper {
    async fn run(self) {
        let mut stuck = None;
        let mut joint = None;
        let mut mark = self.shared.counters.log_appended_bytes.get();
        // What former lives of this node appended since their last snapshot, or one that is often restarted would
        // never write any. Up to the threshold is kept behind a snapshot anyway.
        let mut before = self.shared.counters.log_bytes.get().saturating_sub(self.threshold);
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let appended = self.shared.counters.log_appended_bytes.get();
            if appended.saturating_sub(mark).saturating_add(before) >= self.threshold {
                mark = appended;
                before = 0;
                if let Err(error) = self.raft.trigger().snapshot().await {
                    tracing::debug!(%error, "no snapshot");
                    return;
                }
            }
            purge(&self.raft, &self.writer).await;
            self.incoming.forget(self.shared.applied().borrow().index);
            self.unstick(&mut stuck, appended).await;
            self.complete_joint(&mut joint).await;
        }
    }

    /// A leader that dies between the two entries of a change leaves two sets of voters in force. Its successor goes on to
    /// the second, or what was asked for would weigh on every decision until the next change.
    async fn complete_joint(&self, since: &mut Option<Instant>) {
        let (leads, joint) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let sets = metrics.membership_config.membership().get_joint_config().len();
            (metrics.current_leader == Some(metrics.id), sets > 1)
        };
        if !leads || !joint {
            *since = None;
        } else if since.get_or_insert_with(Instant::now).elapsed() >= JOINT_PATIENCE {
            *since = None;
            match tokio::time::timeout(MEMBERSHIP_WAIT, members::complete(self.raft.clone())).await {
                Ok(Ok(())) => tracing::info!("a change of the members that was left half done is complete"),
                Ok(Err(error)) => tracing::debug!(%error, "a change of the members is not completed"),
                Err(_) => tracing::warn!("a change of the members is not completed: no majority answers"),
            }
        }
    }

    /// openraft's leader never purges what it means to send to a member that is away, so its log would grow until
    /// that member is back. Another leader, which purged as a follower, sends it a snapshot instead.
    async fn unstick(&self, stuck: &mut Option<u64>, appended: u64) {
        let (leads, purged) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.current_leader == Some(metrics.id), metrics.purged)
        };
        let kept = self.writer.snapshots();
        let behind = kept.get(1).is_some_and(|(older, _)| older.last_log_id > purged);
        if !leads || !behind {
            *stuck = None;
            return;
        }
        let since = *stuck.get_or_insert(appended);
        if appended.saturating_sub(since) < self.threshold.saturating_mul(STUCK_SNAPSHOTS) {
            return;
        }
        *stuck = Some(appended);
        let own = *self.raft.node_id();
        if let Some(successor) = successor(&self.raft, own) {
            tracing::info!(successor, "handing leadership over, so that the log can be purged");
            if let Err(error) = self.raft.trigger().transfer_leader(successor).await {
                tracing::debug!(%error, "leadership is not handed over");
            }
        } else {
            // Nobody else has a vote.
            tracing::warn!(
                "the log is kept whole for a member that is away: bring it back, or `helix cluster remove` it"
            );
        }
    }
}
