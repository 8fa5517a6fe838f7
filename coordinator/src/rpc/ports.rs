//! What stands on each port.

use std::sync::Arc;

use futures::StreamExt;
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_proto::DESCRIPTORS;
use helix_proto::peer::log_peer_service_server::LogPeerServiceServer;
use helix_proto::peer::member_service_server::MemberServiceServer;
use helix_proto::v1::blob_service_server::BlobServiceServer;
use helix_proto::v1::build_service_server::BuildServiceServer;
use helix_proto::v1::cluster_service_server::ClusterServiceServer;
use helix_proto::v1::worker_service_server::WorkerServiceServer;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::agent::{AgentRpc, PushLogs};
use super::blob::BlobRpc;
use super::build::BuildRpc;
use super::cluster::ClusterRpc;
use super::members::MemberRpc;
use super::services::Services;
use super::worker::WorkerRpc;
use crate::leader::Leader;
use crate::raft::{PeerHandler, RaftHandler};
use crate::registry::Leadership;

/// Room beside the payload of a message that carries bytes.
const MESSAGE_OVERHEAD: usize = 64 * 1024;

/// Names under which health is told; the empty one is the whole server.
const HEALTH_NAMES: [&str; 5] =
    ["", "helix.v1.BuildService", "helix.v1.WorkerService", "helix.v1.ClusterService", "helix.v1.BlobService"];

/// Port 7420: clients and agents, health and reflection.
///
/// # Errors
/// When the descriptors compiled into this program cannot be read.
pub fn clients(
    services: &Services,
    cluster: &ClusterRpc,
    leader: Leader,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<Routes, tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tasks.spawn(tell_health(reporter, services.registry.leadership(), stop.clone()));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let logs = services.logs.clone();
    let push_logs: PushLogs = Arc::new(move |pushed, peer| logs.push(pushed, &peer).boxed());
    let routes = Routes::new(
        BuildServiceServer::new(BuildRpc::new(services.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX),
    )
    .add_service(WorkerServiceServer::new(WorkerRpc::new(services.clone())))
    .add_service(ClusterServiceServer::new(cluster.clone()))
    .add_service(blob_service(services))
    .add_service(AgentRpc::server(leader, push_logs))
    .add_service(health)
    .add_service(reflection().build_v1()?)
    .add_service(reflection().build_v1alpha()?);
    Ok(routes)
}

/// Port 7421: consensus, what coordinators ask each other, and bytes.
#[must_use]
pub fn peers(
    services: &Services,
    cluster: &ClusterRpc,
    members: MemberRpc,
    raft: RaftHandler,
    peer: PeerHandler,
) -> Routes {
    Routes::new(raft.service())
        .add_service(peer.service())
        .add_service(MemberServiceServer::new(members))
        .add_service(blob_service(services))
        .add_service(ClusterServiceServer::new(cluster.clone()))
        .add_service(LogPeerServiceServer::new(services.logs.clone()))
}

fn blob_service(services: &Services) -> BlobServiceServer<BlobRpc> {
    BlobServiceServer::new(BlobRpc::new(Arc::clone(&services.blobs)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX + MESSAGE_OVERHEAD)
        .max_encoding_message_size(MESSAGE_BYTES_MAX + MESSAGE_OVERHEAD)
}

/// Serving means that a leader is known: without one nothing can be answered.
async fn tell_health(reporter: HealthReporter, mut leadership: watch::Receiver<Leadership>, stop: CancellationToken) {
    loop {
        let known = leadership.borrow_and_update().leader.is_some();
        let status = if known { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in HEALTH_NAMES {
            reporter.set_service_status(name, status).await;
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = leadership.changed() => if changed.is_err() { break },
        }
    }
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
}
