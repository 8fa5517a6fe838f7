//! Watches consensus and tells others: who leads, who is a member, whether this node is broken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_model::NodeId;
use openraft::async_runtime::WatchReceiver;
use openraft::{Instant as _, RaftMetrics, ServerState};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::formats::Ceiling;
use super::timing::Timing;
use super::types::{LogId, Raft, TypeConfig};
use crate::peers::Peers;
use crate::registry::{Applied, Leadership, MemberStatus, RaftStatus, Shared};

/// The whole status is renewed this often; leadership at once.
const RENEW_EVERY: Duration = Duration::from_millis(250);
/// A member that the leader has not heard for so long is not healthy.
const SILENT_AFTER: Duration = Duration::from_secs(1);

/// The task that watches.
pub(super) struct Watcher {
    pub(super) raft: Raft,
    pub(super) shared: Arc<Shared>,
    pub(super) peers: Peers,
    pub(super) leadership: watch::Sender<Leadership>,
    pub(super) status: watch::Sender<RaftStatus>,
    pub(super) timing: Timing,
    pub(super) stop: CancellationToken,
}

fn index(id: Option<&LogId>) -> u64 {
    id.map_or(0, openraft::LogId::index)
}

impl Watcher {
    pub(super) async fn run(self) {
        let mut metrics = self.raft.metrics();
        let mut applied = self.shared.applied();
        let mut reign = (None, 0, Instant::now());
        // The last term in which this node led.
        let mut won = 0;
        let mut tick = tokio::time::interval(RENEW_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut due = true;
        loop {
            // Every entry comes by here several times: the whole is cloned only where it is looked at.
            let (whole, leader, waits_for_own_term) = {
                let seen = metrics.borrow_watched();
                if (reign.0, reign.1) != (seen.current_leader, seen.current_term) {
                    reign = (seen.current_leader, seen.current_term, Instant::now());
                    due = true;
                }
                let leader = self.leader(&seen, reign.2);
                let (leads, is_leader) = self.note_leadership(&seen, leader, *applied.borrow_and_update(), &mut won);
                if let Err(fatal) = &seen.running_state
                    && !self.stop.is_cancelled()
                {
                    self.peers.fail(format!("consensus has stopped: {fatal}"));
                }
                (due.then(|| seen.clone()), leader, leads && !is_leader)
            };
            if let Some(seen) = whole {
                due = false;
                self.status.send_replace(self.look(&seen, leader, reign.2));
            }
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = metrics.changed() => if changed.is_err() {
                    // Ended for a reason it has said so; ended by a panic it says nothing to anybody, ever.
                    if !self.stop.is_cancelled() {
                        self.peers.fail("consensus has ended without a word: its panic stands above".to_owned());
                    }
                    // Not before: whoever waits for a change of leadership would be told at once, again and again.
                    self.stop.cancelled().await;
                    break;
                },
                changed = applied.changed(), if waits_for_own_term => if changed.is_err() { break },
                _ = tick.tick() => due = true,
            }
        }
        self.leadership.send_modify(|leadership| leadership.is_leader = false);
    }

    /// Who leads. A leader cut off from its majority stays one in openraft's eyes, though it can commit nothing: agents that it kept would be
    /// lost to the next one, and nobody else could say so to them.
    fn leader(&self, seen: &RaftMetrics<TypeConfig>, since: Instant) -> Option<u64> {
        if seen.state != ServerState::Leader || seen.current_leader != Some(seen.id) {
            return seen.current_leader;
        }
        // Whose term has just begun was answered by nobody yet.
        let silent = seen.last_quorum_acked.as_ref().map_or(Duration::MAX, |acked| acked.elapsed());
        let alone = silent.min(since.elapsed());
        // The only voter is its own majority.
        let is_sole = || seen.membership_config.membership().voter_ids().all(|voter| voter == seen.id);
        let lease = || Duration::from_millis(self.shared.state().policy().worker_lease_ms);
        let leads = alone < self.timing.election_max || is_sole() || alone < self.timing.alone_max(lease());
        leads.then_some(seen.id)
    }

    /// Tells who leads, if that changed. Whether this node has the votes to, and whether it does.
    fn note_leadership(
        &self,
        seen: &RaftMetrics<TypeConfig>,
        leader: Option<u64>,
        applied: Applied,
        won: &mut u64,
    ) -> (bool, bool) {
        let leads = leader == Some(seen.id) && seen.state == ServerState::Leader;
        let now = Leadership {
            leader: leader.map(NodeId),
            term: seen.current_term,
            // An entry of its own term is applied, so everything before it is.
            is_leader: leads && applied.term == seen.current_term,
        };
        self.leadership.send_if_modified(|before| {
            if *before == now {
                return false;
            }
            tracing::info!(leader = ?now.leader, term = now.term, is_leader = now.is_leader, "leadership");
            // One that stood down for a while and leads again won nothing.
            if now.is_leader && std::mem::replace(won, now.term) != now.term {
                self.shared.counters.elections_won.add(1);
            }
            *before = now;
            true
        });
        (leads, now.is_leader)
    }

    /// How things stand; whoever openraft takes for the leader has been that since `reign`.
    fn look(&self, seen: &RaftMetrics<TypeConfig>, leader: Option<u64>, reign: Instant) -> RaftStatus {
        let leads = leader == Some(seen.id);
        let mut warnings = Vec::new();
        if leader.is_none() {
            warnings.push("no_leader");
        }
        if leads && self.shared.clock.is_skewed() {
            warnings.push("clock_skew");
        }
        if leads && Ceiling::of(self.peers.format(), &self.shared, &self.peers).format < self.peers.format() {
            warnings.push("upgrade_pending");
        }
        let membership = seen.membership_config.membership();
        RaftStatus {
            leader: leader.map(NodeId),
            term: seen.current_term,
            last_log_index: seen.last_log_index.unwrap_or(0),
            applied_index: self.shared.counters.applied_index.get(),
            snapshot_index: index(seen.snapshot.as_ref()),
            purged_index: index(seen.purged.as_ref()),
            members: membership
                .nodes()
                .map(|(id, node)| member(*id, node.address.clone(), seen, leader, reign))
                .collect(),
            warnings,
        }
    }
}

fn member(
    id: u64,
    address: String,
    seen: &RaftMetrics<TypeConfig>,
    leader: Option<u64>,
    reign: Instant,
) -> MemberStatus {
    let voter = seen.membership_config.membership().voter_ids().any(|voter| voter == id);
    let leads = leader == Some(id);
    let own = seen.id == id;
    let role = match (leads, voter) {
        (true, _) => "leader",
        (false, false) => "learner",
        // One that a majority does not answer any more wants its votes, too.
        (false, true) if own && matches!(seen.state, ServerState::Candidate | ServerState::Leader) => "candidate",
        (false, true) => "follower",
    };
    if own {
        let (last_log_index, applied_index) = (seen.last_log_index.unwrap_or(0), index(seen.last_applied.as_ref()));
        return MemberStatus {
            id: NodeId(id),
            address,
            role,
            last_log_index,
            applied_index,
            healthy: true,
            heard: true,
        };
    }
    let matched = seen.replication.as_ref().and_then(|all| all.get(&id)).and_then(Option::as_ref);
    let heard = seen.heartbeat.as_ref().and_then(|all| all.get(&id)).and_then(Option::as_ref);
    // Who leads since a moment ago has heard nobody yet, which says nothing about them.
    let silent = match heard {
        Some(heard) => heard.elapsed() >= SILENT_AFTER,
        None => seen.state != ServerState::Leader || reign.elapsed() >= SILENT_AFTER,
    };
    let last_log_index = index(matched);
    MemberStatus {
        id: NodeId(id),
        address,
        role,
        last_log_index,
        applied_index: last_log_index.min(index(seen.last_applied.as_ref())),
        healthy: leads || !silent,
        heard: heard.is_some() && !silent,
    }
}
