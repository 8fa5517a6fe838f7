//! gRPC channels to coordinators: TCP, TLS with the newest material, HTTP/2 with keep-alive.
//!
//! A channel dials again by itself when its connection breaks, and then uses what the [`TlsStore`] holds by then.
//! Message limits are the callers' to set, on their generated clients.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::Service;

pub use crate::tls::Expect;
use crate::tls::{Guarded, Side, TlsStore};

/// How long dialling may take: name, TCP and TLS together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that stopped without closing is noticed within interval and timeout. On control connections that has to be well
/// within an agent's lease, or the attempts of all agents of a leader that hangs would be lost after the fail-over.
const CONTROL_KEEPALIVE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(3));
const BULK_KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// What a channel is for. HTTP/2 serialises a connection's streams, so bytes never share one with control.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Traffic {
    /// Small messages that must not wait.
    Control,
    /// Blobs and logs: large windows.
    Bulk,
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The endpoint is not of the form `https://HOST:PORT`.
    #[error("{0:?} is not an endpoint of the form https://HOST:PORT")]
    Endpoint(String),
    /// Nobody suitable answered.
    #[error("cannot connect to {endpoint}: {why}")]
    Connect {
        /// Where.
        endpoint: String,
        /// The chain of causes.
        why: String,
    },
}

/// A channel that is connected when this returns.
///
/// # Errors
/// [`ChannelError`], also when another than the expected node answers.
pub async fn connect(
    endpoint: &str,
    tls: &Arc<TlsStore>,
    expect: Expect,
    traffic: Traffic,
) -> Result<Channel, ChannelError> {
    let (settings, connector) = prepare(endpoint, tls, expect, traffic)?;
    settings
        .connect_with_connector(connector)
        .await
        .map_err(|error| ChannelError::Connect { endpoint: endpoint.to_owned(), why: causes(&error) })
}

/// A channel that dials when first used; calls fail with UNAVAILABLE while nobody answers.
///
/// # Errors
/// [`ChannelError::Endpoint`]. Needs a tokio runtime.
pub fn lazy(endpoint: &str, tls: &Arc<TlsStore>, expect: Expect, traffic: Traffic) -> Result<Channel, ChannelError> {
    let (settings, connector) = prepare(endpoint, tls, expect, traffic)?;
    Ok(settings.connect_with_connector_lazy(connector))
}

/// Checks an endpoint and gives its canonical form, `https://HOST:PORT`; `HOST:PORT` alone is taken too.
///
/// # Errors
/// [`ChannelError::Endpoint`].
pub fn canonical_endpoint(endpoint: &str) -> Result<String, ChannelError> {
    let uri = parse(endpoint)?;
    Ok(format!("https://{}", uri.authority().map_or("", |authority| authority.as_str())))
}

fn parse(endpoint: &str) -> Result<Uri, ChannelError> {
    let wrong = || ChannelError::Endpoint(endpoint.chars().take(200).collect());
    let text = if endpoint.contains("://") { endpoint.to_owned() } else { format!("https://{endpoint}") };
    let uri: Uri = text.parse().map_err(|_| wrong())?;
    let authority = uri.authority().ok_or_else(wrong)?;
    let plain = uri.scheme() == Some(&Scheme::HTTPS)
        && matches!(uri.path(), "" | "/")
        && uri.query().is_none()
        && !authority.as_str().contains('@');
    if plain && authority.port_u16().is_some_and(|port| port > 0) && !authority.host().is_empty() {
        Ok(uri)
    } else {
        Err(wrong())
    }
}

fn prepare(
    endpoint: &str,
    tls: &Arc<TlsStore>,
    expect: Expect,
    traffic: Traffic,
) -> Result<(Endpoint, Connector), ChannelError> {
    let uri = parse(endpoint)?;
    let wrong = || ChannelError::Endpoint(endpoint.to_owned());
    let authority = uri.authority().ok_or_else(wrong)?;
    // tonic refuses https on a connector of our own, since it cannot see the TLS in there; the requests still
    // carry the true scheme.
    let dialled = Uri::builder().scheme("http").authority(authority.clone()).path_and_query("/").build();
    let (stream_window, connection_window, (interval, timeout)) = match traffic {
        Traffic::Control => (1 << 20, 2 << 20, CONTROL_KEEPALIVE),
        Traffic::Bulk => (8 << 20, 16 << 20, BULK_KEEPALIVE),
    };
    let settings = Endpoint::from(dialled.map_err(|_| wrong())?)
        .origin(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(interval)
        .keep_alive_timeout(timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window);
    Ok((settings, Connector { tls: Arc::clone(tls), expect }))
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Whether a call failed because one side did not take the other's certificate; why, in words.
#[must_use]
pub fn certificate_refused(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls.or_else(|| error.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(why)) => return Some(format!("its certificate: {why}")),
            Some(rustls::Error::AlertReceived(why)) => return Some(format!("it refused ours: {why:?}")),
            Some(_) | None => cause = error.source(),
        }
    }
    None
}

#[derive(Clone)]
struct Connector {
    tls: Arc<TlsStore>,
    expect: Expect,
}

type Connected = TokioIo<Guarded<TlsStream<TcpStream>>>;

impl Service<Uri> for Connector {
    type Response = Connected;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Connected>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            tokio::time::timeout(CONNECT_TIMEOUT, this.dial(&uri)).await.map_err(|_| {
                io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {CONNECT_TIMEOUT:?}"))
            })?
        })
    }
}

impl Connector {
    async fn dial(&self, uri: &Uri) -> io::Result<Connected> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or_default();
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let address = stream.peer_addr()?;
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{host:?} is no host name")))?;
        let stream = TlsConnector::from(self.tls.client_config(&self.expect)).connect(name, stream).await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("the server does not speak HTTP/2 (ALPN h2)"));
        }
        let chain: Vec<_> = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        let (stream, _) = self.tls.guard(stream, &chain, address, Side::Server).map_err(io::Error::other)?;
        Ok(TokioIo::new(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_https_host_and_port() {
        for (given, canonical) in [
            ("https://a:1", "https://a:1"),
            ("https://a:1/", "https://a:1"),
            ("a.b:7420", "https://a.b:7420"),
            ("https://[::1]:7420", "https://[::1]:7420"),
        ] {
            assert_eq!(canonical_endpoint(given).unwrap(), canonical);
        }
        for bad in
            ["", "https://", "a", "http://a:1", "https://a", "https://a:0", "https://a:1/x", "https://u@a:1", "a:99999"]
        {
            assert!(canonical_endpoint(bad).is_err(), "{bad}");
        }
    }
}
