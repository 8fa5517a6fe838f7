//! Every RPC of every service, called by everybody, on both ports, over real TLS: the verdict is the table's.

use std::collections::BTreeSet;
use std::sync::Arc;

use helix_common::channel::{Traffic, connect};
use helix_common::identity::Role;
use helix_common::pki::Authority;
use helix_common::tls::TlsStore;
use helix_coordinator::rpc::roles::{client_port, peer_port};
use prost::Message;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::node::{CLUSTER, One, files};

/// Every path there is, from the descriptors, and health and reflection.
fn paths() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(helix_proto::DESCRIPTORS).unwrap();
    let described = set.file.iter().flat_map(|file| {
        file.service.iter().flat_map(move |service| {
            let name = format!("{}.{}", file.package(), service.name());
            service.method.iter().map(move |method| format!("/{name}/{}", method.name()))
        })
    });
    let others = ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"];
    described.chain(others.map(str::to_owned)).collect()
}

/// Calls a path with an empty body.
async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = path.parse().unwrap();
    // A stream that is answered at once with its headers is an answer, too.
    let answer = client.streaming(Request::new(futures::stream::empty()), path, codec);
    tokio::time::timeout(std::time::Duration::from_secs(20), answer).await.unwrap().map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_by_every_role_is_decided_as_the_table_says() {
    let one = One::start().await;
    let mut seen = BTreeSet::new();
    for (role, name) in [(Role::Coordinator, "1"), (Role::Agent, "a"), (Role::Client, "c"), (Role::Operator, "o")] {
        let tls = one.tls(role, name);
        for (address, table) in [
            (one.node.grpc_address(), client_port as fn(&str) -> Option<&'static [Role]>),
            (one.node.peer_address(), peer_port),
        ] {
            let endpoint = format!("https://{address}");
            let channel = connect(&endpoint, &tls, tls.expect_any(), Traffic::Control).await.unwrap();
            for path in paths() {
                let code = call(&channel, &path).await.map_or_else(|status| status.code(), |()| Code::Ok);
                match table(&path) {
                    None => assert_eq!(code, Code::Unimplemented, "{role} {path} at {address}"),
                    Some(roles) if roles.contains(&role) => {
                        assert_ne!(code, Code::PermissionDenied, "{role} {path} at {address}");
                        assert_ne!(code, Code::Unimplemented, "{role} {path} at {address}");
                    }
                    Some(_) => assert_eq!(code, Code::PermissionDenied, "{role} {path} at {address}"),
                }
                seen.insert(path);
            }
        }
    }
    assert!(seen.contains("/helix.v1.BuildService/SubmitBuild"));
    one.node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_no_answer_at_all() {
    let one = One::start().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Authority::create(CLUSTER).unwrap();
    foreign.save(elsewhere.path()).unwrap();
    let stranger: Arc<TlsStore> = TlsStore::load(files(elsewhere.path(), &foreign, Role::Operator, "mallory")).unwrap();
    for address in [one.node.grpc_address(), one.node.peer_address()] {
        let endpoint = format!("https://{address}");
        assert!(connect(&endpoint, &stranger, stranger.expect_any(), Traffic::Control).await.is_err());
        assert!(!answers_plain_text(address).await);
        assert!(without_certificate(&one, address).await.is_err());
    }
    one.node.stop().await;
}

/// Whether a server speaks HTTP/2 to somebody who does without TLS. A record of TLS that says why not is no answer.
async fn answers_plain_text(address: std::net::SocketAddr) -> bool {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const ALERT: u8 = 21;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    // The preface and empty settings.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut first = [0];
    let read = tokio::time::timeout(std::time::Duration::from_secs(60), stream.read(&mut first));
    // Whoever hangs up with bytes unread resets the connection.
    read.await.expect("the server hangs up").is_ok_and(|length| length > 0 && first[0] != ALERT)
}

/// TLS that trusts the server and shows nothing of itself.
async fn without_certificate(one: &One, address: std::net::SocketAddr) -> std::io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut config = (*one.tls(Role::Client, "c").client_config(&helix_common::tls::Expect {
        cluster: helix_common::identity::Name::new("cluster", CLUSTER).unwrap(),
        node: None,
    }))
    .clone();
    config.client_auth_cert_resolver = Arc::new(Nothing);
    let stream = tokio::net::TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    // In TLS 1.3 the server's refusal arrives after the client's side of the handshake is done.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    match stream.read(&mut [0; 64]).await? {
        0 => Err(std::io::Error::other("closed")),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
