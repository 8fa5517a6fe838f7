//! Who is kept out, on both ends; and that those who are welcome get in meanwhile.

use std::time::Duration;

use helix_common::accept::{self, Limits};
use helix_common::channel::{self, ChannelError, Traffic};
use helix_common::identity::Role;
use helix_common::pki::{Authority, REVOKED_FILE, revoke, show};
use helix_common::tls::{TlsFiles, TlsStore};
use helix_model::NodeId;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose};
use rustls::version::{TLS12, TLS13};
use time::{Duration as Span, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::cluster::{Cluster, Credentials, PATIENCE, check, knock, plain_client, start, uri};

/// What a test does to a certificate that would be fine.
type Change = Box<dyn Fn(&mut CertificateParams)>;

#[tokio::test]
async fn only_certificates_with_one_valid_identity_of_this_cluster_get_in() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let now = OffsetDateTime::now_utc();
    let refused: &[(&str, Change)] = &[
        (
            "expired",
            Box::new(move |params| {
                params.not_before = now - Span::days(2);
                params.not_after = now - Span::days(1);
            }),
        ),
        ("not yet valid", Box::new(move |params| params.not_before = now + Span::hours(1))),
        ("two identities", Box::new(|params| params.subject_alt_names.push(uri("spiffe://demo/operator/root")))),
        (
            "the same identity twice",
            Box::new(|params| params.subject_alt_names.push(uri("spiffe://demo/client/crafted"))),
        ),
        ("no identity", Box::new(|params| params.subject_alt_names.clear())),
        ("another cluster", Box::new(|params| params.subject_alt_names = vec![uri("spiffe://other/client/c")])),
        ("an unknown role", Box::new(|params| params.subject_alt_names = vec![uri("spiffe://demo/root/c")])),
        ("a URI of another kind", Box::new(|params| params.subject_alt_names = vec![uri("https://demo/client/c")])),
        (
            "for servers only",
            Box::new(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
        ),
    ];
    for (what, change) in refused {
        let credentials = cluster.craft(change);
        let result = knock(server.address, plain_client(&cluster, Some(&credentials), &TLS13)).await;
        assert!(result.is_err(), "let in: {what}");
    }
    let fine = cluster.craft(|_| {});
    knock(server.address, plain_client(&cluster, Some(&fine), &TLS13)).await.unwrap();
}

#[tokio::test]
async fn strangers_and_old_protocols_are_refused() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    let fine = cluster.craft(|_| {});
    assert!(knock(server.address, plain_client(&cluster, None, &TLS13)).await.is_err(), "no certificate");
    assert!(knock(server.address, plain_client(&cluster, Some(&fine), &TLS12)).await.is_err(), "TLS 1.2");

    let other = Cluster::new();
    let foreign = other.craft(|_| {});
    assert!(knock(server.address, plain_client(&cluster, Some(&foreign), &TLS13)).await.is_err(), "another authority");
    let issued = Authority::create("demo").unwrap().issue(Role::Client, "c", &[], Duration::from_secs(60)).unwrap();
    let imposter = Credentials { cert_pem: issued.cert_pem, key_pem: issued.key_pem };
    assert!(
        knock(server.address, plain_client(&cluster, Some(&imposter), &TLS13)).await.is_err(),
        "same name, other key"
    );

    let mut no_alpn = plain_client(&cluster, Some(&fine), &TLS13);
    no_alpn.alpn_protocols.clear();
    assert!(knock(server.address, no_alpn).await.is_err(), "no ALPN");

    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A reset is as good an end as any.
    let _ = timeout(PATIENCE, plain.read_to_end(&mut answer)).await.expect("closed");
    assert!(!answer.starts_with(b"HTTP"), "plain text was answered");
    knock(server.address, plain_client(&cluster, Some(&fine), &TLS13)).await.unwrap();
}

#[tokio::test]
async fn roles_decide_per_method() {
    let cluster = Cluster::new();
    let server = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    for (role, name, code) in [
        (Role::Client, "c", None),
        (Role::Operator, "o", None),
        (Role::Agent, "a", Some(Code::PermissionDenied)),
        (Role::Coordinator, "2", Some(Code::PermissionDenied)),
    ] {
        let tls = cluster.store(role, name);
        let channel = channel::lazy(&server.url(), &tls, tls.expect_any(), Traffic::Control).unwrap();
        assert_eq!(check(channel).await.err().map(|status| status.code()), code, "{role}");
    }
}

async fn dial(
    server: &crate::cluster::Running,
    tls: &std::sync::Arc<TlsStore>,
    node: Option<u64>,
) -> Result<(), String> {
    let expect = node.map_or_else(|| tls.expect_any(), |node| tls.expect_node(NodeId(node)));
    match channel::connect(&server.url(), tls, expect, Traffic::Bulk).await {
        Ok(channel) => check(channel).await.map_err(|status| status.to_string()),
        Err(ChannelError::Connect { why, .. }) => Err(why),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn clients_refuse_servers_that_are_not_whom_they_expect() {
    let cluster = Cluster::new();
    let client = cluster.store(Role::Client, "c");
    let coordinator = start(cluster.store(Role::Coordinator, "1"), Limits::default()).await;
    assert_eq!(dial(&coordinator, &client, None).await, Ok(()));
    assert_eq!(dial(&coordinator, &client, Some(1)).await, Ok(()));
    let why = dial(&coordinator, &client, Some(2)).await.unwrap_err();
    assert!(why.contains("where node 2 was expected"), "{why}");

    let agent = start(cluster.store(Role::Agent, "a"), Limits::default()).await;
    assert!(dial(&agent, &client, None).await.is_err(), "an agent served");
    // With the usage of a server it is still an agent.
    let crafted = cluster.craft(|params| params.subject_alt_names = vec![uri("spiffe://demo/agent/a")]);
    let agent = start(store(&cluster, "crafted-agent", &crafted), Limits::default()).await;
    let why = dial(&agent, &client, None).await.unwrap_err();
    assert!(why.contains("only a coordinator may serve"), "{why}");

    let crafted = cluster.craft(|params| params.subject_alt_names = vec![uri("spiffe://other/coordinator/1")]);
    let stranger = start(store(&cluster, "stranger", &crafted), Limits::default()).await;
    let why = dial(&stranger, &client, None).await.unwrap_err();
    assert!(why.contains("another cluster"), "{why}");

    // The imposter lets our client in, so that only the client's own check is left.
    let other = Cluster::new();
    let both = [cluster.path("ca.pem"), other.path("ca.pem")].map(|path| std::fs::read_to_string(path).unwrap());
    std::fs::write(other.path("ca.pem"), both.concat()).unwrap();
    let imposter = start(other.store(Role::Coordinator, "1"), Limits::default()).await;
    let why = dial(&imposter, &client, None).await.unwrap_err();
    assert!(why.contains("UnknownIssuer") || why.contains("BadSignature"), "{why}");

    let serial = show(&std::fs::read_to_string(&coordinator.tls.files().cert).unwrap()).unwrap().serial;
    revoke(cluster.directory.path(), &serial).unwrap();
    client.reload().unwrap();
    let why = dial(&coordinator, &client, None).await.unwrap_err();
    assert!(why.to_lowercase().contains("revoked"), "{why}");
}

fn store(cluster: &Cluster, stem: &str, credentials: &Credentials) -> std::sync::Arc<TlsStore> {
    TlsStore::load(write(cluster, stem, credentials)).unwrap()
}

fn write(cluster: &Cluster, stem: &str, credentials: &Credentials) -> TlsFiles {
    let (cert, key) = (cluster.path(&format!("{stem}.pem")), cluster.path(&format!("{stem}-key.pem")));
    std::fs::write(&cert, &credentials.cert_pem).unwrap();
    std::fs::write(&key, &credentials.key_pem).unwrap();
    TlsFiles { ca: cluster.path("ca.pem"), cert, key, revoked: None }
}

#[tokio::test]
async fn a_handshake_that_stalls_is_dropped() {
    let cluster = Cluster::new();
    let limits = Limits { handshake_timeout: Duration::from_millis(300), ..Limits::default() };
    let server = start(cluster.store(Role::Coordinator, "1"), limits).await;
    for first in [&b""[..], b"\x16", b"\x16\x03\x01\x02\x00\x01"] {
        let began = Instant::now();
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(first).await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("dropped");
        assert!(began.elapsed() >= Duration::from_millis(250), "dropped too early");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_half_open_connections_do_not_keep_a_legitimate_one_out() {
    helix_common::files::raise_descriptor_limit().unwrap();
    let cluster = Cluster::new();
    // Nothing times out here: what lets the legitimate ones in is that the oldest give way.
    let limits = Limits { handshake_timeout: Duration::from_secs(600), handshakes_max: 100, ..Limits::default() };
    let server = start(cluster.store(Role::Coordinator, "1"), limits).await;
    let client = cluster.store(Role::Client, "c");
    let mut half_open = Vec::new();
    for _ in 0..10 {
        for _ in 0..100 {
            half_open.push(TcpStream::connect(server.address).await.unwrap());
        }
        let began = Instant::now();
        assert_eq!(dial(&server, &client, None).await, Ok(()));
        assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    }
    for gone in &mut half_open[..900] {
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, gone.read_to_end(&mut rest)).await.expect("given way");
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_dropped_and_places_are_given_back() {
    let cluster = Cluster::new();
    let limits = Limits { connections_max: 1, ..Limits::default() };
    let server = start(cluster.store(Role::Coordinator, "1"), limits).await;
    let client = cluster.store(Role::Client, "c");
    let first = channel::connect(&server.url(), &client, client.expect_any(), Traffic::Control).await.unwrap();
    check(first.clone()).await.unwrap();
    assert!(dial(&server, &client, None).await.is_err(), "one too many");
    drop(first);
    timeout(PATIENCE, async { while dial(&server, &client, None).await.is_err() {} }).await.expect("a place");
}

#[tokio::test]
async fn unusable_material_is_refused_with_the_file_named() {
    let cluster = Cluster::new();
    let now = OffsetDateTime::now_utc();
    let good = cluster.files(Role::Client, "good");
    let error = |files: TlsFiles| TlsStore::load(files).expect_err("refused").to_string();

    let mixed = TlsFiles { key: cluster.files(Role::Client, "other").key, ..good.clone() };
    assert!(error(mixed.clone()).contains("other-key.pem: is not the key of"), "{}", error(mixed));
    let missing = TlsFiles { cert: cluster.path("none.pem"), ..good.clone() };
    assert!(error(missing.clone()).contains("none.pem"), "{}", error(missing));
    let swapped = TlsFiles { cert: good.key.clone(), key: good.cert.clone(), ..good.clone() };
    assert!(error(swapped).contains("holds no certificate"));
    let no_list = TlsFiles { revoked: Some(cluster.path("no-list.txt")), ..good.clone() };
    assert!(error(no_list).contains("create it"));
    let foreign = TlsFiles { ca: Cluster::new().files(Role::Client, "x").ca, ..good.clone() };
    // That directory is gone by now; a file that is there but of another authority:
    assert!(error(foreign).contains("cannot read"));
    let other = Cluster::new();
    let foreign = TlsFiles { ca: other.path("ca.pem"), ..good.clone() };
    assert!(error(foreign).contains("was not issued by"));

    let expired = cluster.craft(|params| params.not_after = now - Span::days(1));
    assert!(error(write(&cluster, "expired", &expired)).contains("expired.pem: expired at"));
    let early = cluster.craft(|params| params.not_before = now + Span::days(1));
    assert!(error(write(&cluster, "early", &early)).contains("is not valid before"));
    let double = cluster.craft(|params| params.subject_alt_names.push(uri("spiffe://demo/client/b")));
    assert!(error(write(&cluster, "double", &double)).contains("more than one URI"));
    let cannot_serve = cluster.craft(|params| {
        params.subject_alt_names = vec![uri("spiffe://demo/coordinator/1")];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    assert!(error(write(&cluster, "cannot-serve", &cannot_serve)).contains("cannot serve"));

    let serial = show(&std::fs::read_to_string(&good.cert).unwrap()).unwrap().serial;
    revoke(cluster.directory.path(), &serial).unwrap();
    assert!(error(good.clone()).contains("is revoked"));
    std::fs::write(cluster.path(REVOKED_FILE), "zz\n").unwrap();
    assert!(error(good).contains("line 1"));
}

#[tokio::test]
async fn a_port_in_use_is_named_after_a_second() {
    let taken = accept::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = taken.local_addr().unwrap();
    let began = Instant::now();
    let error = accept::bind(address).await.unwrap_err().to_string();
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert!(error.contains(&format!("cannot listen on {address}")) && error.contains("another port"), "{error}");
    let waiting = tokio::spawn(accept::bind(address));
    tokio::task::yield_now().await;
    drop(taken);
    waiting.await.unwrap().expect("free in time");
}
