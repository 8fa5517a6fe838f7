//! Certificates change under live listeners and live streams.

use std::sync::Arc;
use std::time::Duration;

use helix_common::accept::Limits;
use helix_common::channel::{self, Traffic};
use helix_common::identity::Role;
use helix_common::pki::{Authority, REVOKED_FILE, VALID_FOR_DEFAULT, revoke, show};
use helix_common::tls::{TlsError, TlsFiles, TlsStore};
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::Channel;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::cluster::{Cluster, PATIENCE, Running, check, start, until};

/// Well before the keep-alive would look at a connection again: a cut must not wait for that.
const AT_ONCE: Duration = Duration::from_secs(5);

async fn dial(server: &Running, tls: &Arc<TlsStore>) -> Channel {
    channel::connect(&server.url(), tls, tls.expect_any(), Traffic::Control).await.unwrap()
}

/// A stream that stays open: its first message has arrived.
async fn watch(channel: Channel) -> Streaming<HealthCheckResponse> {
    let request = HealthCheckRequest { service: String::new() };
    let mut stream = HealthClient::new(channel).watch(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    stream
}

fn revoke_own(cluster: &Cluster, tls: &TlsStore) {
    let serial = show(&std::fs::read_to_string(&tls.files().cert).unwrap()).unwrap().serial;
    revoke(cluster.directory.path(), &serial).unwrap();
}

fn failed(tls: &TlsStore) -> Vec<TlsError> {
    tls.reload().unwrap_err().failed
}

#[tokio::test]
async fn a_revoked_client_is_cut_off_mid_stream_and_nobody_else() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let (good, bad) = (cluster.store(Role::Client, "good"), cluster.store(Role::Client, "bad"));
    let (good_channel, bad_channel) = (dial(&server, &good).await, dial(&server, &bad).await);
    let mut good_stream = watch(good_channel.clone()).await;
    let mut bad_stream = watch(bad_channel.clone()).await;
    assert_eq!(server.tls.connections(), 2);

    revoke_own(&cluster, &bad);
    assert_eq!(server.tls.reload().unwrap(), 1);
    let ended = timeout(AT_ONCE, bad_stream.message()).await.expect("cut");
    assert!(ended.is_err(), "{ended:?}");
    assert!(check(bad_channel).await.is_err(), "let in again");
    check(good_channel).await.unwrap();
    assert!(timeout(Duration::from_millis(50), good_stream.message()).await.is_err(), "the good stream ended");
    until("the cut connection is forgotten", || server.tls.connections() == 1).await;
}

#[tokio::test]
async fn a_revoked_server_is_hung_up_on() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let client = cluster.store(Role::Client, "c");
    let mut stream = watch(dial(&server, &client).await).await;
    revoke_own(&cluster, &server.tls);
    assert_eq!(client.reload().unwrap(), 1);
    assert!(timeout(AT_ONCE, stream.message()).await.expect("hung up").is_err());
    // The server itself notices at its next reload, and goes on with what it has.
    assert!(matches!(failed(&server.tls)[..], [TlsError::Unusable { .. }]));
}

#[tokio::test]
async fn a_new_certificate_is_shown_without_a_restart() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let client = cluster.store(Role::Client, "c");
    let old = dial(&server, &client).await;
    let before = server.tls.not_after();
    let longer = cluster.authority.issue(Role::Coordinator, "1", &[], VALID_FOR_DEFAULT * 2).unwrap();
    longer.save(cluster.directory.path(), "coordinator-1").unwrap();
    assert_eq!(server.tls.reload().unwrap(), 0);
    assert!(server.tls.not_after() > before);
    check(old).await.unwrap();
    check(dial(&server, &client).await).await.unwrap();
}

#[tokio::test]
async fn a_bad_reload_changes_nothing() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let client = cluster.store(Role::Client, "c");
    let files = server.tls.files().clone();
    let good = std::fs::read(&files.cert).unwrap();
    // Half-written, someone else's, a list that cannot be read.
    std::fs::write(&files.cert, &good[..good.len() / 2]).unwrap();
    assert!(server.tls.reload().is_err());
    std::fs::copy(cluster.files(Role::Coordinator, "2").cert, &files.cert).unwrap();
    assert!(server.tls.reload().is_err());
    std::fs::copy(cluster.files(Role::Coordinator, "2").key, &files.key).unwrap();
    std::fs::copy(cluster.path("coordinator-2.pem"), &files.cert).unwrap();
    assert!(matches!(failed(&server.tls)[..], [TlsError::IdentityChanged { .. }]));
    std::fs::write(cluster.path(REVOKED_FILE), "not hex").unwrap();
    assert!(server.tls.reload().is_err());
    check(dial(&server, &client).await).await.unwrap();
}

#[tokio::test]
async fn a_part_that_cannot_be_read_keeps_no_other_out() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let (good, bad) = (cluster.store(Role::Client, "good"), cluster.store(Role::Client, "bad"));
    let mut bad_stream = watch(dial(&server, &bad).await).await;
    std::fs::remove_file(&server.tls.files().key).unwrap();
    revoke_own(&cluster, &bad);
    let error = server.tls.reload().unwrap_err();
    assert_eq!((error.failed.len(), error.cut), (1, 1), "{error}");
    assert!(error.to_string().contains("key"), "{error}");
    assert!(timeout(AT_ONCE, bad_stream.message()).await.expect("cut").is_err());
    // A list that is gone keeps what it held: nobody is let in again, and a new authority is believed all the same.
    std::fs::remove_file(cluster.path(REVOKED_FILE)).unwrap();
    let (old_ca, next) = (std::fs::read_to_string(cluster.path("ca.pem")).unwrap(), Authority::create("demo").unwrap());
    std::fs::write(cluster.path("ca.pem"), format!("{old_ca}{}", next.certificate_pem())).unwrap();
    assert_eq!(failed(&server.tls).len(), 2);
    assert!(check(dial(&server, &bad).await).await.is_err(), "let in again");
    let stem = "client-next";
    let (cert, key) =
        next.issue(Role::Client, "next", &[], VALID_FOR_DEFAULT).unwrap().save(cluster.directory.path(), stem).unwrap();
    let files = TlsFiles { cert, key, revoked: None, ..good.files().clone() };
    check(dial(&server, &TlsStore::load(files).unwrap()).await).await.unwrap();
    check(dial(&server, &good).await).await.unwrap();
}

#[tokio::test]
async fn a_connection_ends_with_its_peers_certificate() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let issued = cluster.authority.issue(Role::Client, "brief", &[], Duration::from_secs(3)).unwrap();
    let (cert, key) = issued.save(cluster.directory.path(), "client-brief").unwrap();
    let files = TlsFiles { cert, key, ..server.tls.files().clone() };
    let brief = TlsStore::load(files).unwrap();
    let channel = dial(&server, &brief).await;
    let mut stream = watch(channel.clone()).await;
    let ended = timeout(PATIENCE, stream.message()).await.expect("the stream outlives the certificate");
    assert!(ended.is_err(), "{ended:?}");
    assert!(std::time::SystemTime::now() >= brief.not_after());
    assert!(check(channel).await.is_err(), "let in again");
}

#[tokio::test]
async fn an_authority_is_replaced_under_load() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let client = cluster.store(Role::Client, "c");
    let channel = dial(&server, &client).await;
    let old_ca = std::fs::read_to_string(cluster.path("ca.pem")).unwrap();
    let next = Authority::create("demo").unwrap();

    // Both are trusted, then everybody changes over, then the old one goes.
    std::fs::write(cluster.path("ca.pem"), format!("{old_ca}{}", next.certificate_pem())).unwrap();
    assert_eq!((server.tls.reload().unwrap(), client.reload().unwrap()), (0, 0));
    let mut old_stream = watch(channel.clone()).await;
    next.issue(Role::Coordinator, "1", &[], VALID_FOR_DEFAULT)
        .unwrap()
        .save(cluster.directory.path(), "coordinator-1")
        .unwrap();
    server.tls.reload().unwrap();
    check(dial(&server, &client).await).await.unwrap();
    next.issue(Role::Client, "c", &[], VALID_FOR_DEFAULT).unwrap().save(cluster.directory.path(), "client-c").unwrap();
    client.reload().unwrap();
    let mut new_stream = watch(dial(&server, &client).await).await;

    std::fs::write(cluster.path("ca.pem"), next.certificate_pem()).unwrap();
    assert!(server.tls.reload().unwrap() >= 1, "nothing of the old authority was cut");
    assert!(timeout(AT_ONCE, old_stream.message()).await.expect("cut").is_err());
    assert!(timeout(Duration::from_millis(50), new_stream.message()).await.is_err(), "the new stream ended");
    // The channel that was cut dials again, with the client's new certificate.
    check(channel).await.unwrap();
}
