//! `helix.v1.BuildService`: each RPC by name, what it does in the files beside.
//!
//! Here a request meets its caller's identity and nothing else happens. Who may call an RPC at all is in
//! [`super::roles`]; whose build it is, is checked in `apply`.

mod change;
mod explanation;
mod list;
mod log;
mod read;
mod submit;
pub(crate) mod view;

use std::pin::Pin;

use futures::Stream;
use helix_common::auth::peer;
use helix_proto::v1;
use helix_proto::v1::build_service_server::BuildService;
use tonic::{Request, Response, Status, Streaming};

use super::services::Services;

/// A streamed answer.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct BuildRpc {
    services: Services,
}

impl BuildRpc {
    /// The service on these handles.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }
}

#[tonic::async_trait]
impl BuildService for BuildRpc {
    type StreamBuildLogsStream = Answers<v1::BuildLogLine>;
    type SubmitBuildsStream = Answers<v1::SubmitBuildResult>;
    type ListBuildsStream = Answers<v1::BuildStatus>;
    type ReadLogStream = Answers<v1::LogChunk>;

    async fn submit_build(
        &self,
        request: Request<v1::SubmitBuildRequest>,
    ) -> Result<Response<v1::SubmitBuildResponse>, Status> {
        let principal = peer(&request)?.identity.principal();
        self.submit(&principal, request.into_inner()).await.map(Response::new)
    }

    async fn submit_builds(
        &self,
        request: Request<Streaming<v1::SubmitBuildRequest>>,
    ) -> Result<Response<Self::SubmitBuildsStream>, Status> {
        let principal = peer(&request)?.identity.principal();
        Ok(Response::new(self.submit_all(&principal, request.into_inner())))
    }

    async fn retry_build(
        &self,
        request: Request<v1::RetryBuildRequest>,
    ) -> Result<Response<v1::SubmitBuildResponse>, Status> {
        let principal = peer(&request)?.identity.principal();
        self.retry(&principal, request.into_inner()).await.map(Response::new)
    }

    async fn get_build_status(
        &self,
        request: Request<v1::GetBuildStatusRequest>,
    ) -> Result<Response<v1::BuildStatus>, Status> {
        self.status(request.into_inner()).await.map(Response::new)
    }

    async fn wait_build(&self, request: Request<v1::WaitBuildRequest>) -> Result<Response<v1::BuildStatus>, Status> {
        self.wait(request.into_inner()).await.map(Response::new)
    }

    async fn list_builds(
        &self,
        request: Request<v1::ListBuildsRequest>,
    ) -> Result<Response<Self::ListBuildsStream>, Status> {
        let principal = peer(&request)?.identity.principal();
        self.list(&principal, request.into_inner()).await.map(Response::new)
    }

    async fn resolve_build(
        &self,
        request: Request<v1::ResolveBuildRequest>,
    ) -> Result<Response<v1::ResolveBuildResponse>, Status> {
        let principal = peer(&request)?.identity.principal();
        self.resolve(&principal, request.into_inner()).await.map(Response::new)
    }

    async fn explain_build(
        &self,
        request: Request<v1::ExplainBuildRequest>,
    ) -> Result<Response<v1::ExplainBuildResponse>, Status> {
        self.explain(request.into_inner()).await.map(Response::new)
    }

    async fn stream_build_logs(
        &self,
        request: Request<v1::StreamBuildLogsRequest>,
    ) -> Result<Response<Self::StreamBuildLogsStream>, Status> {
        self.stream_logs(request.into_inner()).await.map(Response::new)
    }

    async fn read_log(&self, request: Request<v1::ReadLogRequest>) -> Result<Response<Self::ReadLogStream>, Status> {
        BuildRpc::read_log(self, request.into_inner()).await.map(Response::new)
    }

    async fn cancel_build(
        &self,
        request: Request<v1::CancelBuildRequest>,
    ) -> Result<Response<v1::CancelBuildResponse>, Status> {
        let peer = peer(&request)?;
        self.cancel(&peer, request.into_inner()).await.map(Response::new)
    }

    async fn purge_builds(
        &self,
        request: Request<v1::PurgeBuildsRequest>,
    ) -> Result<Response<v1::PurgeBuildsResponse>, Status> {
        self.purge(request.into_inner()).await.map(Response::new)
    }

    async fn pin_build(&self, request: Request<v1::PinBuildRequest>) -> Result<Response<v1::PinBuildResponse>, Status> {
        let peer = peer(&request)?;
        self.pin(&peer, request.into_inner()).await.map(Response::new)
    }

    async fn register_artifact(
        &self,
        request: Request<v1::RegisterArtifactRequest>,
    ) -> Result<Response<v1::RegisterArtifactResponse>, Status> {
        let peer = peer(&request)?;
        BuildRpc::register_artifact(self, &peer, request.into_inner()).await.map(Response::new)
    }

    async fn get_artifacts(
        &self,
        request: Request<v1::GetArtifactsRequest>,
    ) -> Result<Response<v1::GetArtifactsResponse>, Status> {
        self.artifacts(request.into_inner()).await.map(Response::new)
    }
}
