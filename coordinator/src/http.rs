//! Port 7422: is it alive, is it ready, what is it, how does it do. Plain HTTP, for probes and scrapers.
//!
//! Nothing here changes anything, and nothing tells of builds' contents. Bound to loopback unless told otherwise.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::registry::Consistency;
use crate::rpc::services::Services;

/// A probe that waits longer for the leader is answered "not ready".
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves until `stopping` is cancelled.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(listener: TcpListener, services: Services, stopping: CancellationToken) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .with_state(services);
    axum::serve(listener, routes).with_graceful_shutdown(stopping.cancelled_owned()).await
}

async fn healthy() -> &'static str {
    "ok\n"
}

/// Ready means: there is a leader, and what this node has applied is as new as what the leader acknowledged.
async fn ready(State(services): State<Services>) -> Response {
    if services.stopping.is_cancelled() {
        return not_ready("stopping");
    }
    let registry = &services.registry;
    if registry.members().is_empty() {
        return not_ready(&format!("waits to be added: `helix cluster add {} HOST:7421`", registry.node()));
    }
    let barrier = registry.barrier(Consistency::Linearizable);
    match tokio::time::timeout(READY_TIMEOUT, barrier).await {
        Ok(Ok(())) => "ready\n".into_response(),
        Ok(Err(error)) => not_ready(&error.to_string()),
        Err(_) => not_ready("behind the leader, or no leader"),
    }
}

fn not_ready(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")).into_response()
}

async fn version(State(services): State<Services>) -> Response {
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cluster": services.registry.cluster(),
        "node": services.registry.node().0,
    });
    axum::Json(facts).into_response()
}

async fn metrics(State(services): State<Services>) -> Response {
    let text = services.metrics.encode(&services);
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}
