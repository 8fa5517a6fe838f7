//! `helix.v1.ClusterService`: the coordinators themselves. On port 7421, too, where followers ask the leader.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::stream::BoxStream;
use helix_common::auth::peer;
use helix_common::wall;
use helix_model::NodeId;
use helix_proto::v1;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use helix_proto::v1::cluster_service_server::ClusterService;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::services::{Services, consistency};
use super::{answer, policy, snapshot, totals_of};
use crate::blobs::Damage;
use crate::membership::{Asked, LastCopies, Listener, Membership};
use crate::peers::Peers;

type ProgressStream = BoxStream<'static, Result<v1::MemberProgress, Status>>;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct ClusterRpc {
    services: Services,
    peers: Peers,
    membership: Membership,
    saves: Arc<Semaphore>,
}

/// Lost blobs that are named in a status.
const LOST_SHOWN: usize = 20;

/// How long the leader may take to tell of the members.
const LEADER_ANSWER: Duration = Duration::from_secs(2);

impl ClusterRpc {
    /// The service on these handles.
    #[must_use]
    pub fn new(services: Services, peers: Peers, membership: Membership) -> Self {
        Self { services, peers, membership, saves: Arc::new(Semaphore::new(snapshot::SAVES_MAX)) }
    }

    /// Runs a change of the members beside the call, which tells of it.
    fn run<C, F>(&self, change: C) -> Response<ProgressStream>
    where
        C: FnOnce(Membership, Listener) -> F,
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(16);
        let (change, stopping) = (change(self.membership.clone(), tx.clone()), self.services.stopping.clone());
        // Ends with the change, with whoever asked for it, or with this node.
        self.services.tasks.spawn(async move {
            let outcome = tokio::select! {
                outcome = change => outcome,
                () = stopping.cancelled() => Err(answer::shutting_down()),
            };
            if let Err(refusal) = outcome {
                tracing::info!(%refusal, "a change of the members ended early");
                // Whoever went away does not want to know.
                let _ = tx.send(Err(refusal)).await;
            }
        });
        Response::new(ReceiverStream::new(rx).boxed())
    }

    fn status(&self) -> v1::ClusterStatus {
        let registry = &self.services.registry;
        // Who leads is known at once; the rest of the status is renewed a few times a second.
        let leadership = *registry.leadership().borrow();
        let raft = registry.status();
        let nodes = registry.nodes();
        let voters = registry.voters();
        // Who is a member is as new as what is applied; how far each is, is not.
        let members = registry.members().into_iter().map(|(id, address)| {
            let row = nodes.iter().find(|node| node.id == id);
            let seen = raft.members.iter().find(|member| member.id == id);
            let role = match seen.map_or("follower", |member| member.role) {
                _ if leadership.leader == Some(id) => "leader",
                _ if !voters.contains(&id) => "learner",
                "leader" | "learner" => "follower",
                role => role,
            };
            v1::Member {
                id: id.0,
                address,
                role: role.to_owned(),
                last_log_index: seen.map_or(0, |member| member.last_log_index),
                applied_index: seen.map_or(0, |member| member.applied_index),
                healthy: seen.is_some_and(|member| member.healthy),
                grpc: row.map_or_else(String::new, |row| row.grpc.clone()),
                version: row.map_or_else(String::new, |row| row.version.clone()),
            }
        });
        v1::ClusterStatus {
            cluster: registry.cluster().to_owned(),
            leader: leadership.leader.map_or(0, |leader| leader.0),
            term: leadership.term,
            members: members.collect(),
            totals: Some(registry.with_state(totals_of)),
            node: registry.node().0,
            warnings: self.warnings(),
            now_ms: wall::message_ms(SystemTime::now()),
            certificate_not_after_ms: wall::message_ms(self.peers.tls().not_after()),
            free_bytes: self.services.disk.free_bytes(),
            reserve_bytes: registry.with_state(|state| state.policy().disk_reserve_bytes),
            change: self.membership.change(),
            blobs: self.trouble(),
        }
    }

    fn trouble(&self) -> Option<v1::BlobTrouble> {
        let mut lost = self.membership.repair().lost();
        let mut damaged = 0;
        for (digest, damage) in self.services.blobs.health().list() {
            match damage {
                Damage::Waiting => damaged += 1,
                Damage::Lost if lost.contains(&digest) => {}
                Damage::Lost => lost.push(digest),
            }
        }
        let sha256 = lost.iter().take(LOST_SHOWN).map(ToString::to_string).collect();
        let trouble = v1::BlobTrouble { damaged, lost: lost.len() as u64, lost_sha256: sha256 };
        (trouble.damaged + trouble.lost > 0).then_some(trouble)
    }

    /// Only the leader hears all members. Whoever asks elsewhere gets its view of them; if it does not answer, ours.
    async fn as_the_leader_sees_it(&self, own: v1::ClusterStatus) -> v1::ClusterStatus {
        if own.leader == own.node || own.leader == 0 {
            return own;
        }
        let Ok(channel) = self.peers.control(NodeId(own.leader)) else { return own };
        let mut leader = ClusterServiceClient::new(channel);
        let asked = leader.get_cluster_status(v1::GetClusterStatusRequest { stale: true });
        match tokio::time::timeout(LEADER_ANSWER, asked).await {
            Ok(Ok(answer)) => {
                let seen = answer.into_inner();
                let mut warnings = own.warnings;
                warnings.extend(seen.warnings);
                warnings.sort();
                warnings.dedup();
                let blobs = together(own.blobs, seen.blobs);
                v1::ClusterStatus { members: seen.members, warnings, change: seen.change, blobs, ..own }
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the leader does not tell of the members");
                own
            }
            Err(_) => own,
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> =
            self.services.registry.status().warnings.into_iter().map(str::to_owned).collect();
        let reserve = self.services.registry.with_state(|state| state.policy().disk_reserve_bytes);
        if self.services.disk.expect_above(reserve).is_err() {
            warnings.push("disk_reserve".to_owned());
        }
        let v1::BlobTrouble { damaged, lost, .. } = self.trouble().unwrap_or_default();
        let short = self.services.registry.counters().blobs_short.get();
        let words = [(damaged, "blobs_damaged"), (lost, "blobs_lost"), (short, "blobs_short")];
        warnings.extend(words.into_iter().filter(|(count, _)| *count > 0).map(|(_, word)| word.to_owned()));
        if self.services.blobs.store().bucket().is_some_and(|bucket| bucket.totals().failing) {
            warnings.push("bucket_failing".to_owned());
        }
        warnings
    }
}

/// What is damaged here, and what is lost as far as anybody here or the leader knows.
fn together(own: Option<v1::BlobTrouble>, leader: Option<v1::BlobTrouble>) -> Option<v1::BlobTrouble> {
    let (mut own, leader) = match (own, leader) {
        (own, None) => return own,
        (None, Some(leader)) => (v1::BlobTrouble::default(), leader),
        (Some(own), Some(leader)) => (own, leader),
    };
    own.lost = own.lost.max(leader.lost);
    let more = leader.lost_sha256.into_iter().filter(|sha256| !own.lost_sha256.contains(sha256)).collect::<Vec<_>>();
    own.lost_sha256.extend(more);
    own.lost = own.lost.max(own.lost_sha256.len() as u64);
    own.lost_sha256.truncate(LOST_SHOWN);
    (own.damaged + own.lost > 0).then_some(own)
}

#[tonic::async_trait]
impl ClusterService for ClusterRpc {
    async fn get_cluster_status(
        &self,
        request: Request<v1::GetClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatus>, Status> {
        let stale = request.into_inner().stale;
        self.services.freshen(consistency(stale)).await?;
        let own = self.status();
        if stale {
            return Ok(Response::new(own));
        }
        Ok(Response::new(self.as_the_leader_sees_it(own).await))
    }

    async fn get_policy(
        &self,
        request: Request<v1::GetPolicyRequest>,
    ) -> Result<Response<v1::GetPolicyResponse>, Status> {
        policy::get(&self.services, &request.into_inner()).await.map(Response::new)
    }

    async fn set_policy(
        &self,
        request: Request<v1::SetPolicyRequest>,
    ) -> Result<Response<v1::SetPolicyResponse>, Status> {
        let by = peer(&request)?.identity.principal();
        policy::set(&self.services, &request.into_inner(), &by).await.map(Response::new)
    }

    type AddMemberStream = ProgressStream;

    async fn add_member(&self, request: Request<v1::AddMemberRequest>) -> Result<Response<ProgressStream>, Status> {
        let v1::AddMemberRequest { id, address, again } = request.into_inner();
        Ok(self.run(move |membership, listener| async move {
            membership.add(NodeId(id), &address, asked(again), &listener).await
        }))
    }

    type RemoveMemberStream = ProgressStream;

    async fn remove_member(
        &self,
        request: Request<v1::RemoveMemberRequest>,
    ) -> Result<Response<ProgressStream>, Status> {
        let v1::RemoveMemberRequest { id, again, lose_last_copies } = request.into_inner();
        let last = if lose_last_copies { LastCopies::Lose } else { LastCopies::Keep };
        Ok(self.run(move |membership, listener| async move {
            membership.remove(NodeId(id), asked(again), last, &listener).await
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let to = request.into_inner().to;
        let leader = self.membership.transfer((to != 0).then_some(NodeId(to))).await?;
        Ok(Response::new(v1::TransferLeaderResponse { leader: leader.0 }))
    }

    type SaveSnapshotStream = snapshot::SaveStream;

    async fn save_snapshot(
        &self,
        request: Request<v1::SaveSnapshotRequest>,
    ) -> Result<Response<snapshot::SaveStream>, Status> {
        let by = peer(&request)?.identity.principal();
        tracing::info!(by, "a backup is asked for");
        Ok(snapshot::save(&self.services, &self.saves, request.into_inner().list_blobs))
    }
}

fn asked(again: bool) -> Asked {
    if again { Asked::Again } else { Asked::Once }
}
