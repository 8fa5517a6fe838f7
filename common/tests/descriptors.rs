//! A process that is out of file descriptors goes on accepting when some are free again. Alone in its process, since
//! the limit is the process's.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use helix_common::accept::{self, Limits};
use helix_common::channel::{self, Traffic};
use helix_common::identity::Role;
use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
use helix_common::tls::{TlsFiles, TlsStore};
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::time::timeout;

#[tokio::test]
async fn accepting_survives_the_want_of_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create("demo").unwrap();
    authority.save(directory.path()).unwrap();
    let load = |role, name: &str| {
        let issued = authority.issue(role, name, &["localhost".to_owned()], VALID_FOR_DEFAULT).unwrap();
        let (cert, key) = issued.save(directory.path(), name).unwrap();
        TlsStore::load(TlsFiles { ca: directory.path().join("ca.pem"), cert, key, revoked: None }).unwrap()
    };
    let (server, client) = (load(Role::Coordinator, "1"), load(Role::Client, "c"));
    let limits = Limits { handshake_timeout: Duration::from_secs(600), ..Limits::default() };
    let listener = accept::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut incoming = accept::serve(listener, Arc::clone(&server), limits);

    setrlimit(Resource::Nofile, Rlimit { current: Some(128), maximum: Some(128) }).unwrap();
    // The kernel completes these; each then wants a descriptor to be accepted.
    let mut half_open: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let mut ballast = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        ballast.push(file);
    }
    let nothing = timeout(Duration::from_millis(200), incoming.next()).await;
    assert!(nothing.is_err(), "the stream ended or failed: {nothing:?}");

    // Room for some of those who wait, not for all: the oldest give way to the legitimate one behind them.
    ballast.truncate(ballast.len() - 10);
    half_open.push(std::net::TcpStream::connect(address).unwrap());
    let serving = tokio::spawn(async move { incoming.next().await.unwrap().unwrap() });
    let expect = client.expect_any();
    let endpoint = format!("https://{address}");
    let dialled = channel::connect(&endpoint, &client, expect, Traffic::Control);
    timeout(Duration::from_secs(20), dialled).await.expect("in time").expect("connected");
    let connection = timeout(Duration::from_secs(20), serving).await.expect("in time").expect("accepted");
    assert_eq!(connection.peer().identity.principal(), "client/c");
}
