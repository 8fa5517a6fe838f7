//! `helix.agent.v1.AgentService`: who an agent is, by its certificate alone, and where its streams go. Sessions go to the
//! leader's loop, live logs to whoever keeps them.

use std::sync::Arc;

use futures::stream::BoxStream;
use helix_common::auth::peer;
use helix_common::status::status;
use helix_common::tls::PeerInfo;
use helix_model::{ErrorCode, WorkerName};
use helix_proto::agent;
use helix_proto::agent::agent_service_server::{AgentService, AgentServiceServer};
use tonic::{Request, Response, Status, Streaming};

use crate::leader::{Consensus, Leader, Outgoing};
use crate::registry::Registry;

/// Largest message of an agent: a `Hello` with a full spool.
const MESSAGE_BYTES_MAX: usize = helix_model::limits::MESSAGE_BYTES_MAX;

/// Acknowledgements of live log lines.
pub type Acks = BoxStream<'static, Result<agent::PushLogAck, Status>>;

/// Takes an agent's live log lines and answers what is readable.
pub type PushLogs = Arc<dyn Fn(Streaming<agent::PushLog>, PeerInfo) -> Acks + Send + Sync>;

/// The service.
pub struct AgentRpc<C = Registry> {
    leader: Leader<C>,
    push_logs: PushLogs,
}

impl<C: Consensus> AgentRpc<C> {
    /// The service in front of the leader's loop and of the live logs, with its limits set.
    #[must_use]
    pub fn server(leader: Leader<C>, push_logs: PushLogs) -> AgentServiceServer<Self> {
        AgentServiceServer::new(Self { leader, push_logs })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// The caller's identity, and the worker that it is.
// A status is what a handler answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn worker_of<T>(request: &Request<T>) -> Result<(PeerInfo, WorkerName), Status> {
    let peer = peer(request)?;
    let worker = peer
        .identity
        .worker()
        .ok_or_else(|| status(ErrorCode::RoleNotAllowed, format!("{} is no agent", peer.identity)))?;
    Ok((peer, worker))
}

#[tonic::async_trait]
impl<C: Consensus> AgentService for AgentRpc<C> {
    type SessionStream = Outgoing;
    type PushLogsStream = Acks;

    async fn session(
        &self,
        request: Request<Streaming<agent::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (peer, worker) = worker_of(&request)?;
        tracing::debug!(%worker, address = %peer.address, "agent opens a session");
        Ok(Response::new(self.leader.session(worker, request.into_inner())?))
    }

    async fn push_logs(
        &self,
        request: Request<Streaming<agent::PushLog>>,
    ) -> Result<Response<Self::PushLogsStream>, Status> {
        let (peer, _) = worker_of(&request)?;
        Ok(Response::new((self.push_logs)(request.into_inner(), peer)))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use helix_common::status::error_code;
    use helix_proto::agent::agent_message::Message as Said;
    use helix_proto::agent::agent_service_client::AgentServiceClient;
    use helix_proto::agent::coordinator_message::Message;
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
    use tonic::service::interceptor::InterceptedService;
    use tonic::transport::{Channel, Server};

    use super::*;
    use crate::leader::testing::{World, hello, succeeded};

    /// A server whose callers all have this identity.
    async fn serve(leader: Leader<World>, identity: &'static str) -> AgentServiceClient<Channel> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let push_logs: PushLogs = Arc::new(|_, _| futures::stream::empty().boxed());
        let known = move |mut request: Request<()>| {
            let identity = identity.parse().unwrap();
            let peer = PeerInfo { identity, address, serial: "a1".parse().unwrap() };
            request.extensions_mut().insert(peer);
            Ok(request)
        };
        let service = InterceptedService::new(AgentRpc::server(leader, push_logs), known);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        AgentServiceClient::connect(format!("http://{address}")).await.unwrap()
    }

    #[tokio::test]
    async fn an_agent_is_served_over_grpc_as_the_worker_of_its_certificate() {
        let (world, leader) = World::leading();
        let mut client = serve(leader, "spiffe://test/agent/w").await;
        let (said, outbound) = tokio::sync::mpsc::channel(4);
        let mut heard = client.session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        let say = async |message| said.send(agent::AgentMessage { message: Some(message) }).await.unwrap();
        say(Said::Hello(hello("w", 1))).await;
        assert!(matches!(heard.next().await.unwrap().unwrap().message, Some(Message::Welcome(_))));
        let build = world.submit("b");
        let Some(Message::Assign(assign)) = heard.next().await.unwrap().unwrap().message else { panic!("no work") };
        let key = helix_proto::convert::attempt_from_wire(assign.id).unwrap();
        say(Said::Finished(succeeded(&key))).await;
        assert!(matches!(heard.next().await.unwrap().unwrap().message, Some(Message::Forget(_))));
        world.until_finished(&build).await;
    }

    #[tokio::test]
    async fn others_than_agents_and_those_who_find_no_leader_get_a_status() {
        let (world, leader) = World::leading();
        let mut client = serve(leader.clone(), "spiffe://test/client/w").await;
        let refused = client.session(futures::stream::pending()).await.unwrap_err();
        assert_eq!(error_code(&refused), Some(ErrorCode::RoleNotAllowed));
        let mut client = serve(leader, "spiffe://test/agent/w").await;
        world.follow(2, 2);
        let refused = client.session(futures::stream::pending()).await.unwrap_err();
        assert_eq!(error_code(&refused), Some(ErrorCode::NoLeader));
    }
}
