//! Who may call what: one table per server, checked before any handler sees a request.
//!
//! Default is denial: a path that the table does not know is refused (UNIMPLEMENTED, for members of the cluster only, so
//! that strangers learn nothing). Whether a caller may touch this build or this attempt is the handler's to decide.

use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures::future::Either;
use helix_model::ErrorCode;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::identity::{Name, Role};
use crate::status::{status, with_metadata};
use crate::tls::PeerInfo;

/// The roles that may call a path (`/package.Service/Method`); `None` for paths that do not exist here.
pub type Table = fn(&str) -> Option<&'static [Role]>;

/// Puts the table in front of a tonic server: `Server::builder().layer(AuthLayer::new(cluster, table))`.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    cluster: Name,
    table: Table,
}

impl AuthLayer {
    /// A layer for members of `cluster`.
    #[must_use]
    pub fn new(cluster: Name, table: Table) -> Self {
        Self { cluster, table }
    }

    /// The decision for one call.
    ///
    /// # Errors
    /// The status to answer with when the call is refused.
    // A status is what the caller answers with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    pub fn decide(&self, peer: Option<&PeerInfo>, path: &str) -> Result<(), Status> {
        let Some(peer) = peer else {
            return Err(status(ErrorCode::IdentityInvalid, "the connection carries no identity"));
        };
        if peer.identity.cluster != self.cluster {
            let message = format!("{} is not of cluster {}", peer.identity, self.cluster);
            return Err(status(ErrorCode::IdentityInvalid, message));
        }
        let Some(roles) = (self.table)(path) else {
            return Err(Status::unimplemented("no such method here"));
        };
        if roles.contains(&peer.identity.role) {
            return Ok(());
        }
        let allowed = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
        Err(with_metadata(
            ErrorCode::RoleNotAllowed,
            format!("role {} may not call {path}; needed: {allowed}", peer.identity.role),
            [("role", peer.identity.role.as_str()), ("allowed", &allowed)],
        ))
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { layer: self.clone(), inner }
    }
}

/// The service that [`AuthLayer`] makes.
#[derive(Clone, Debug)]
pub struct Auth<S> {
    layer: AuthLayer,
    inner: S,
}

impl<S, B> Service<http::Request<B>> for Auth<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<http::Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, ctx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(ctx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>();
        let path = request.uri().path();
        match self.layer.decide(peer, path) {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(refusal) => {
                let identity = peer.map_or_else(|| "none".to_owned(), |peer| peer.identity.to_string());
                let address = peer.map(|peer| tracing::field::display(peer.address));
                let shown: String = path.chars().take(200).collect();
                tracing::warn!(target: "audit", identity, address, path = shown, code = ?refusal.code(), why = refusal.message(), "call refused");
                Either::Right(ready(Ok(refusal.into_http())))
            }
        }
    }
}

/// Who sent a request.
///
/// # Errors
/// UNAUTHENTICATED when the request did not come through our accept loop.
// A status is what a handler answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
pub fn peer<T>(request: &tonic::Request<T>) -> Result<PeerInfo, Status> {
    request
        .extensions()
        .get::<PeerInfo>()
        .cloned()
        .ok_or_else(|| status(ErrorCode::IdentityInvalid, "the connection carries no identity"))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::identity::Identity;
    use crate::status::error_code;

    fn peer(uri: &str) -> PeerInfo {
        let identity: Identity = uri.parse().unwrap();
        PeerInfo { identity, address: "127.0.0.1:1".parse().unwrap(), serial: "a1".parse().unwrap() }
    }

    fn table(path: &str) -> Option<&'static [Role]> {
        match path {
            "/s/Read" => Some(&[Role::Client, Role::Operator]),
            "/s/Nobody" => Some(&[]),
            _ => None,
        }
    }

    #[test]
    fn the_table_decides_and_denies_by_default() {
        let layer = AuthLayer::new("demo".parse().unwrap(), table);
        let code = |peer: Option<&PeerInfo>, path: &str| layer.decide(peer, path).err().map(|status| status.code());
        let client = peer("spiffe://demo/client/c");
        assert_eq!(code(Some(&client), "/s/Read"), None);
        assert_eq!(code(Some(&peer("spiffe://demo/agent/c")), "/s/Read"), Some(Code::PermissionDenied));
        assert_eq!(code(Some(&client), "/s/Nobody"), Some(Code::PermissionDenied));
        for path in ["/s/read", "/s/Read/", "//s/Read", "/s/%52ead", "", "/"] {
            assert_eq!(code(Some(&client), path), Some(Code::Unimplemented), "{path}");
            assert_eq!(code(None, path), Some(Code::Unauthenticated), "{path}");
        }
        assert_eq!(code(Some(&peer("spiffe://other/operator/c")), "/s/Read"), Some(Code::Unauthenticated));
        let refusal = layer.decide(Some(&peer("spiffe://demo/agent/c")), "/s/Read").unwrap_err();
        assert_eq!(error_code(&refusal), Some(ErrorCode::RoleNotAllowed));
    }
}
