//! A certificate authority in a temporary directory, servers that answer health checks, and clients, good and bad.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use helix_common::accept::{self, Limits};
use helix_common::auth::AuthLayer;
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, CA_KEY_FILE, REVOKED_FILE, VALID_FOR_DEFAULT};
use helix_common::tls::{TlsFiles, TlsStore};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

/// Longer than anything here takes; a test that reaches it failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Cluster {
    pub(crate) directory: TempDir,
    pub(crate) authority: Authority,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::create("demo").unwrap();
        authority.save(directory.path()).unwrap();
        Self { directory, authority }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Issues an identity and names its files.
    pub(crate) fn files(&self, role: Role, name: &str) -> TlsFiles {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let issued = self.authority.issue(role, name, &names, VALID_FOR_DEFAULT).unwrap();
        let (cert, key) = issued.save(self.directory.path(), &format!("{role}-{name}")).unwrap();
        TlsFiles { ca: self.path(CA_FILE), cert, key, revoked: Some(self.path(REVOKED_FILE)) }
    }

    pub(crate) fn store(&self, role: Role, name: &str) -> Arc<TlsStore> {
        TlsStore::load(self.files(role, name)).unwrap()
    }

    /// A certificate of this authority with whatever a test wants in it.
    pub(crate) fn craft(&self, change: impl FnOnce(&mut CertificateParams)) -> Credentials {
        let ca = std::fs::read_to_string(self.path(CA_FILE)).unwrap();
        let ca_key = KeyPair::from_pem(&std::fs::read_to_string(self.path(CA_KEY_FILE)).unwrap()).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&ca, ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![uri("spiffe://demo/client/crafted")];
        change(&mut params);
        let certificate = params.signed_by(&key, &issuer).unwrap();
        Credentials { cert_pem: certificate.pem(), key_pem: key.serialize_pem() }
    }
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) struct Credentials {
    pub(crate) cert_pem: String,
    pub(crate) key_pem: String,
}

/// A client of rustls's own, which checks the server's host name as any ordinary one does.
pub(crate) fn plain_client(
    cluster: &Cluster,
    credentials: Option<&Credentials>,
    version: &'static SupportedProtocolVersion,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(cluster.path(CA_FILE)).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match credentials {
        None => builder.with_no_client_auth(),
        Some(credentials) => {
            let chain = vec![CertificateDer::from_pem_slice(credentials.cert_pem.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Shakes hands and opens HTTP/2; fine only when the server answers, since with TLS 1.3 a refusal arrives after
/// the client's handshake is done.
pub(crate) async fn knock(address: SocketAddr, config: ClientConfig) -> std::io::Result<()> {
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TcpStream::connect(address).await?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).await?;
    Ok(())
}

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) tls: Arc<TlsStore>,
    pub(crate) answer: Answer,
    _stop: DropGuard,
}

impl Running {
    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

/// What a server answers: a status for as long as one is set, else health.
#[derive(Clone, Default)]
pub(crate) struct Answer(Arc<Mutex<Option<Status>>>);

impl Answer {
    pub(crate) fn set(&self, status: Option<Status>) {
        *self.0.lock().unwrap() = status;
    }
}

/// Clients may check, operators too; others may not.
fn table(path: &str) -> Option<&'static [Role]> {
    match path {
        "/grpc.health.v1.Health/Check" | "/grpc.health.v1.Health/Watch" => Some(&[Role::Client, Role::Operator]),
        _ => None,
    }
}

pub(crate) async fn start(tls: Arc<TlsStore>, limits: Limits) -> Running {
    let listener = accept::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let incoming = accept::serve(listener, Arc::clone(&tls), limits);
    let address = incoming.local_addr().unwrap();
    let answer = Answer::default();
    let shown = answer.clone();
    let health = HealthServer::new(HealthService::from_health_reporter(HealthReporter::new()));
    let service = InterceptedService::new(health, move |request| match shown.0.lock().unwrap().clone() {
        Some(status) => Err(status),
        None => Ok(request),
    });
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let cluster = tls.own_identity().cluster.clone();
    tokio::spawn(async move {
        accept::server()
            .layer(AuthLayer::new(cluster, table))
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stopped.cancelled())
            .await
            .unwrap();
    });
    Running { address, tls, answer, _stop: stop.drop_guard() }
}

pub(crate) async fn check(channel: Channel) -> Result<(), Status> {
    let request = HealthCheckRequest { service: String::new() };
    HealthClient::new(channel).check(request).await.map(|_| ())
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < end, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
