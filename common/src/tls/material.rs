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
    pub(super) identity: Identity,
    pub(super) not_after: SystemTime,
    pub(super) server: Arc<ServerConfig>,
    members: Arc<Members>,
    roots: Arc<RootCertStore>,
    key: Arc<SingleCertAndKey>,
    revoked: Arc<Revoked>,
    provider: Arc<CryptoProvider>,
}

impl Material {
    pub(super) fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(load_roots(&files.ca)?);
        let revoked = Arc::new(load_revoked(files.revoked.as_deref())?);
        let chain = load_certificates(&files.cert)?;
        let info = describe(&chain[0]).map_err(|error| malformed(&files.cert, error.to_string()))?;
        let identity = info.identity.map_err(|source| TlsError::Identity { path: files.cert.clone(), source })?;
        if revoked.contains(&info.serial) {
            return Err(TlsError::Unusable {
                path: files.cert.clone(),
                why: format!("its serial {} is revoked", info.serial),
            });
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| malformed(&files.ca, error.to_string()))?;
        let members =
            Arc::new(Members { chain: verifier, cluster: identity.cluster.clone(), revoked: Arc::clone(&revoked) });
        check_own(files, &chain, &members, &info.not_before.into(), &info.not_after.into())?;
        let key = Arc::new(SingleCertAndKey::from(load_key(files, chain, &provider)?));
        let material = Self {
            identity,
            not_after: info.not_after.into(),
            server: Arc::new(server_config(&provider, &members, &key)),
            members,
            roots,
            key,
            revoked,
            provider,
        };
        if material.identity.role == Role::Coordinator {
            material.check_serves(files)?;
        }
        Ok(material)
    }

    /// A coordinator's certificate must do for a server as well: better known at start than by every client.
    fn check_serves(&self, files: &TlsFiles) -> Result<(), TlsError> {
        let expect = Expect { cluster: self.identity.cluster.clone(), node: self.identity.node() };
        let chain = load_certificates(&files.cert)?;
        self.coordinators(&expect)
            .verify_server_cert(&chain[0], &chain[1..], &nobody(), &[], UnixTime::now())
            .map(|_| ())
            .map_err(|error| TlsError::Unusable { path: files.cert.clone(), why: format!("cannot serve: {error}") })
    }

    fn coordinators(&self, expect: &Expect) -> Coordinators {
        Coordinators {
            roots: Arc::clone(&self.roots),
            provider: Arc::clone(&self.provider),
            expect: expect.clone(),
            revoked: Arc::clone(&self.revoked),
        }
    }

    pub(super) fn client(&self, expect: &Expect) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has cipher suites for TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.coordinators(expect)))
            .with_client_cert_resolver(Arc::clone(&self.key) as _);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    /// Why this material would not accept a connection that an older one accepted. A certificate that was valid at
    /// the handshake and has run out since is no reason: the connection lives, and its successor is refused.
    pub(super) fn distrusts(&self, connection: &Connection) -> Option<&'static str> {
        if self.revoked.contains(&connection.serial) {
            return Some("certificate revoked");
        }
        let (leaf, rest) = connection.chain.split_first()?;
        let trusted = match connection.side {
            Side::Client => self.members.verify_client_cert(leaf, rest, connection.since).is_ok(),
            Side::Server => {
                let expect = Expect { cluster: self.identity.cluster.clone(), node: None };
                self.coordinators(&expect).verify_server_cert(leaf, rest, &nobody(), &[], connection.since).is_ok()
            }
        };
        if trusted { None } else { Some("authority no longer trusted") }
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

fn load_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        roots.add(certificate).map_err(|error| malformed(path, format!("is no authority's certificate: {error}")))?;
    }
    Ok(roots)
}

fn load_revoked(path: Option<&Path>) -> Result<Revoked, TlsError> {
    let Some(path) = path else { return Ok(Revoked::default()) };
    Revoked::load(path).map_err(|error| match error {
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
