//! What the files hold, checked once and turned into rustls configurations. Immutable: a reload makes a new one.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};

use super::verify::{Coordinators, Members};
use super::{Connection, Expect, Side, TlsError, TlsFiles};
use crate::identity::{Identity, Role};
use crate::pki::{PkiError, Revoked, describe};

const ALPN: &[u8] = b"h2";

pub(super) struct Material {
    pub(super) server: Arc<ServerConfig>,
    own: Own,
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

/// Whom we believe.
#[derive(Clone)]
struct Trust {
    roots: Arc<RootCertStore>,
    chain: Arc<dyn ClientCertVerifier>,
    revoked: Arc<Revoked>,
}

/// Who we are, and the proof.
#[derive(Clone)]
struct Own {
    identity: Identity,
    not_after: SystemTime,
    key: Arc<SingleCertAndKey>,
}

impl Material {
    pub(super) fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (roots, chain) = load_roots(files, &provider)?;
        let trust = Trust { roots, chain, revoked: load_revoked(files.revoked.as_deref())? };
        let own = Own::load(files, &trust, &provider)?;
        Ok(Self::new(own, trust, provider))
    }

    /// Reads the files again. A part that cannot be used stays as it is here; the errors say which.
    pub(super) fn reload(&self, files: &TlsFiles) -> (Self, Vec<TlsError>) {
        let mut failed = Vec::new();
        let mut trust = self.trust.clone();
        match load_roots(files, &self.provider) {
            Ok((roots, chain)) => (trust.roots, trust.chain) = (roots, chain),
            Err(error) => failed.push(error),
        }
        match load_revoked(files.revoked.as_deref()) {
            Ok(revoked) => trust.revoked = revoked,
            Err(error) => failed.push(error),
        }
        // Our own certificate has no say in whom we believe: without a usable new one the old one is shown on.
        let own = Own::load(files, &trust, &self.provider).and_then(|own| {
            if own.identity == self.own.identity {
                return Ok(own);
            }
            Err(TlsError::IdentityChanged {
                path: files.cert.clone(),
                running: Box::new(self.own.identity.clone()),
                found: Box::new(own.identity),
            })
        });
        let own = own.unwrap_or_else(|error| {
            failed.push(error);
            self.own.clone()
        });
        (Self::new(own, trust, Arc::clone(&self.provider)), failed)
    }

    fn new(own: Own, trust: Trust, provider: Arc<CryptoProvider>) -> Self {
        let members = Arc::new(trust.members(&own.identity));
        Self { server: Arc::new(server_config(&provider, &members, &own.key)), own, trust, provider }
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.own.identity
    }

    pub(super) fn not_after(&self) -> SystemTime {
        self.own.not_after
    }

    pub(super) fn client(&self, expect: &Expect) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has cipher suites for TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.trust.coordinators(expect.clone(), &self.provider)))
            .with_client_cert_resolver(Arc::clone(&self.own.key) as _);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    /// Why this material would not accept a connection that an older one accepted. That a certificate has run out since is
    /// noticed by the connection itself.
    pub(super) fn distrusts(&self, connection: &Connection) -> Option<&'static str> {
        if self.trust.revoked.contains(&connection.serial) {
            return Some("certificate revoked");
        }
        let (leaf, rest) = connection.chain.split_first()?;
        let trusted = match connection.side {
            Side::Client => {
                self.trust.members(&self.own.identity).verify_client_cert(leaf, rest, connection.since).is_ok()
            }
            Side::Server => {
                let expect = Expect { cluster: self.own.identity.cluster.clone(), node: None };
                let verifier = self.trust.coordinators(expect, &self.provider);
                verifier.verify_server_cert(leaf, rest, &nobody(), &[], connection.since).is_ok()
            }
        };
        if trusted { None } else { Some("authority no longer trusted") }
    }
}

impl Trust {
    fn members(&self, own: &Identity) -> Members {
        Members { chain: Arc::clone(&self.chain), cluster: own.cluster.clone(), revoked: Arc::clone(&self.revoked) }
    }

    fn coordinators(&self, expect: Expect, provider: &Arc<CryptoProvider>) -> Coordinators {
        let (roots, provider) = (Arc::clone(&self.roots), Arc::clone(provider));
        Coordinators { roots, provider, expect, revoked: Arc::clone(&self.revoked) }
    }
}

impl Own {
    /// Reads certificate and key, and checks that those we believe would believe us.
    fn load(files: &TlsFiles, trust: &Trust, provider: &Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let unusable = |why| TlsError::Unusable { path: files.cert.clone(), why };
        let chain = load_certificates(&files.cert)?;
        let info = describe(&chain[0]).map_err(|error| malformed(&files.cert, error.to_string()))?;
        let identity = info.identity.map_err(|source| TlsError::Identity { path: files.cert.clone(), source })?;
        if trust.revoked.contains(&info.serial) {
            return Err(unusable(format!("its serial {} is revoked", info.serial)));
        }
        check_own(files, &chain, &trust.members(&identity), &info.not_before.into(), &info.not_after.into())?;
        if identity.role == Role::Coordinator {
            // It must do for a server as well: better known here than by every client.
            let expect = Expect { cluster: identity.cluster.clone(), node: identity.node() };
            let verifier = trust.coordinators(expect, provider);
            let served = verifier.verify_server_cert(&chain[0], &chain[1..], &nobody(), &[], UnixTime::now());
            served.map_err(|error| unusable(format!("cannot serve: {error}")))?;
        }
        let key = Arc::new(SingleCertAndKey::from(load_key(files, chain, provider)?));
        Ok(Self { identity, not_after: info.not_after.into(), key })
    }
}

/// The verifier of coordinators looks at no host name.
fn nobody() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

fn malformed(path: &Path, why: impl Into<String>) -> TlsError {
    TlsError::Malformed { path: path.to_owned(), why: why.into() }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| malformed(path, format!("is not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(malformed(path, "holds no certificate (BEGIN CERTIFICATE)"));
    }
    Ok(chain)
}

fn load_roots(
    files: &TlsFiles,
    provider: &Arc<CryptoProvider>,
) -> Result<(Arc<RootCertStore>, Arc<dyn ClientCertVerifier>), TlsError> {
    let path = &files.ca;
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        roots.add(certificate).map_err(|error| malformed(path, format!("is no authority's certificate: {error}")))?;
    }
    let roots = Arc::new(roots);
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider))
        .build()
        .map_err(|error| malformed(path, error.to_string()))?;
    Ok((roots, chain))
}

fn load_revoked(path: Option<&Path>) -> Result<Arc<Revoked>, TlsError> {
    let Some(path) = path else { return Ok(Arc::default()) };
    Revoked::load(path).map(Arc::new).map_err(|error| match error {
        PkiError::File { path, source } if source.kind() == std::io::ErrorKind::NotFound => malformed(
            &path,
            "does not exist; create it, empty if nothing is revoked, or take it out of the configuration",
        ),
        PkiError::File { path, source } => TlsError::Read { path, source },
        other => malformed(path, other.to_string()),
    })
}

fn load_key(
    files: &TlsFiles,
    chain: Vec<CertificateDer<'static>>,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|error| malformed(&files.key, format!("holds no private key: {error}")))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            malformed(&files.key, format!("is not the key of {}; both must come from one issue", files.cert.display()))
        }
        other => malformed(&files.key, other.to_string()),
    })
}

fn check_own(
    files: &TlsFiles,
    chain: &[CertificateDer<'static>],
    members: &Members,
    not_before: &SystemTime,
    not_after: &SystemTime,
) -> Result<(), TlsError> {
    let Err(error) = members.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()) else { return Ok(()) };
    let why = match &error {
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            format!("expired at {}", utc(not_after))
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => {
            format!("is not valid before {}; check this machine's clock", utc(not_before))
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            format!("was not issued by {}", files.ca.display())
        }
        other => other.to_string(),
    };
    Err(TlsError::Unusable { path: files.cert.clone(), why })
}

fn utc(at: &SystemTime) -> String {
    time::OffsetDateTime::from(*at).to_string()
}

fn server_config(provider: &Arc<CryptoProvider>, members: &Arc<Members>, key: &Arc<SingleCertAndKey>) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring has cipher suites for TLS 1.3")
        .with_client_cert_verifier(Arc::clone(members) as Arc<dyn ClientCertVerifier>)
        .with_cert_resolver(Arc::clone(key) as _);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}
