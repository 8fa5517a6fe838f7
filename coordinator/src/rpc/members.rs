//! `helix.peer.v1.MemberService`, on the coordinators' port: what a leader asks of nodes that join, leave, or take over bytes.
//!
//! Nothing is decided here. A caller is admitted by certificate, cluster, node and epoch, as everywhere among coordinators;
//! one that was removed is told so, and by that learns it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use helix_common::auth;
use helix_common::status::invalid;
use helix_model::{Digest, InvalidField};
use helix_proto::peer;
use helix_proto::peer::member_service_server::MemberService;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::services::Services;
use crate::peers::Peers;
use crate::registry::COMMAND_FORMAT;

/// Digests in one question.
const DIGESTS_MAX: usize = 256;

/// Blobs that are fetched at a time for one caller.
const FETCHES_MAX: usize = 32;

/// Whoever waits for a large blob hears this often that it is still being fetched.
const STILL_FETCHING: Duration = Duration::from_secs(5);

/// The service.
#[derive(Clone)]
pub struct MemberRpc {
    services: Services,
    peers: Peers,
    /// Where clients dial this node.
    grpc: Arc<str>,
}

impl MemberRpc {
    /// The service on these handles.
    #[must_use]
    pub fn new(services: Services, peers: Peers, grpc: &str) -> Self {
        Self { services, peers, grpc: Arc::from(grpc) }
    }
}

#[tonic::async_trait]
impl MemberService for MemberRpc {
    async fn introduce(
        &self,
        request: Request<peer::IntroduceRequest>,
    ) -> Result<Response<peer::IntroduceResponse>, Status> {
        let info = auth::peer(&request)?;
        let from = self.peers.admit_caller(&info, request.into_inner().caller)?;
        Ok(Response::new(peer::IntroduceResponse {
            caller: Some(self.peers.caller(from)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            format: COMMAND_FORMAT,
            grpc: self.grpc.to_string(),
            members: self.services.registry.members().keys().map(|node| node.0).collect(),
        }))
    }

    async fn dismiss(&self, request: Request<peer::DismissRequest>) -> Result<Response<peer::DismissResponse>, Status> {
        let info = auth::peer(&request)?;
        self.peers.admit_caller(&info, request.into_inner().caller)?;
        self.peers.fail_as_removed();
        Ok(Response::new(peer::DismissResponse {}))
    }

    async fn hold_blobs(
        &self,
        request: Request<peer::HoldBlobsRequest>,
    ) -> Result<Response<peer::HoldBlobsResponse>, Status> {
        let info = auth::peer(&request)?;
        let peer::HoldBlobsRequest { caller, sha256 } = request.into_inner();
        self.peers.admit_caller(&info, caller)?;
        let store = self.services.blobs.store();
        let held = digests(&sha256)?.iter().map(|digest| store.size(digest).is_some()).collect();
        Ok(Response::new(peer::HoldBlobsResponse { held }))
    }

    async fn leased_blobs(
        &self,
        request: Request<peer::LeasedBlobsRequest>,
    ) -> Result<Response<peer::LeasedBlobsResponse>, Status> {
        let info = auth::peer(&request)?;
        let peer::LeasedBlobsRequest { caller, after } = request.into_inner();
        self.peers.admit_caller(&info, caller)?;
        let after = if after.is_empty() { None } else { digests(&[after])?.pop() };
        let found = self.services.blobs.store().leased(after, DIGESTS_MAX);
        let sha256 = found.iter().map(|digest| digest.0.to_vec().into()).collect();
        Ok(Response::new(peer::LeasedBlobsResponse { sha256 }))
    }

    type FetchBlobsStream = BoxStream<'static, Result<peer::FetchBlobsResponse, Status>>;

    async fn fetch_blobs(
        &self,
        request: Request<peer::FetchBlobsRequest>,
    ) -> Result<Response<Self::FetchBlobsStream>, Status> {
        let info = auth::peer(&request)?;
        let peer::FetchBlobsRequest { caller, sha256, sparingly } = request.into_inner();
        self.peers.admit_caller(&info, caller)?;
        let wanted = digests(&sha256)?;
        let (blobs, stopping) = (Arc::clone(&self.services.blobs), self.services.stopping.clone());
        let (tx, rx) = mpsc::channel(16);
        // Ends with the list, with whoever asked, or with this node.
        self.services.tasks.spawn(async move {
            // Several at a time, so that small ones share syncs.
            let fetching = wanted.into_iter().map(|digest| {
                let blobs = Arc::clone(&blobs);
                async move { told(digest, blobs.obtain(digest, sparingly).await.map_err(|error| error.to_string())) }
            });
            let mut fetched = futures::stream::iter(fetching).buffer_unordered(FETCHES_MAX);
            loop {
                let answer = tokio::select! {
                    () = stopping.cancelled() => return,
                    answer = fetched.next() => answer,
                    () = tokio::time::sleep(STILL_FETCHING) => Some(peer::FetchBlobsResponse::default()),
                };
                let Some(answer) = answer else { return };
                if tx.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx).boxed()))
    }
}

fn told(digest: Digest, fetched: Result<u64, String>) -> peer::FetchBlobsResponse {
    let (size, failed) = match fetched {
        Ok(size) => (size, String::new()),
        Err(why) => (0, why),
    };
    peer::FetchBlobsResponse { sha256: digest.0.to_vec().into(), size, failed }
}

// A status is what a handler answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn digests(all: &[prost::bytes::Bytes]) -> Result<Vec<Digest>, Status> {
    if all.len() > DIGESTS_MAX {
        return Err(invalid(&InvalidField::new("sha256", format!("more than {DIGESTS_MAX} digests"))));
    }
    all.iter().map(|bytes| Digest::from_slice(bytes).map_err(|error| invalid(&error))).collect()
}
