//! The two gRPC ports: which services stand on each, their limits, and how they end.
//!
//! Port 7420 serves clients and agents, port 7421 the other coordinators. Who may call what is in [`roles`].

pub mod agent;
pub(crate) mod answer;
pub mod blob;
pub mod build;
pub mod changes;
pub mod cluster;
pub mod members;
mod policy;
pub mod ports;
pub mod roles;
pub mod services;
mod snapshot;
pub mod worker;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use helix_common::accept::{self, Limits};
use helix_common::auth::{AuthLayer, Table};
use helix_common::identity::Name;
use helix_common::tls::TlsStore;
use helix_core::state::State;
use helix_proto::v1;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;

/// Calls under way at once on one connection; more wait.
const STREAMS_MAX: u32 = 1024;

/// A connection on which nothing was heard for so long is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// And is closed when it does not answer for so long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Windows: how much a peer may send before it is read, for a stream and for a connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Header lists larger than this are refused.
const HEADERS_MAX: u32 = 16 << 10;

/// Streams that a peer opened and reset before we saw them: more on one connection are an attack (CVE-2023-44487).
const PENDING_RESETS_MAX: usize = 32;

/// One port: its socket, and what stands on it.
pub struct Port {
    /// The socket, bound already.
    pub listener: TcpListener,
    /// Who may call what.
    pub table: Table,
    /// The services.
    pub routes: Routes,
}

impl Port {
    /// Serves until `stop` completes and all calls have ended. Drop the future to end them at once.
    ///
    /// # Errors
    /// When the transport fails for good.
    pub async fn serve(
        self,
        tls: Arc<TlsStore>,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<(), tonic::transport::Error> {
        let cluster: Name = tls.own_identity().cluster.clone();
        let incoming = accept::serve(self.listener, tls, Limits::default());
        Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_max_header_list_size(HEADERS_MAX)
            .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
            .layer(AuthLayer::new(cluster, self.table))
            .add_routes(self.routes)
            .serve_with_incoming_shutdown(incoming, stop)
            .await
    }
}

/// The sums that several answers carry.
pub(crate) fn totals_of(state: &State) -> v1::GetTotalsResponse {
    let totals = state.totals();
    v1::GetTotalsResponse {
        workers: totals.workers,
        capacity: totals.capacity,
        load: totals.load,
        queued: totals.queued,
        running: totals.running,
    }
}
