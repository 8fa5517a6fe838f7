//! What port 7422 tells.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::node::{One, shell};

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_version_and_metrics() {
    let one = One::start().await;
    let http = one.node.http_address();
    one.client().await.submit(shell("b1")).await;
    for (path, expected) in [
        ("/healthz", "ok"),
        ("/readyz", "ready"),
        ("/version", "\"node\":1"),
        ("/metrics", "helix_builds{state=\"queued\"} 1"),
        ("/metrics", "helix_leader 1"),
        ("/metrics", "helix_fsync_seconds_count"),
        ("/metrics", "helix_commit_seconds_bucket"),
        ("/metrics", "helix_allocation_seconds_count"),
        ("/metrics", "helix_agent_sessions 0"),
        ("/metrics", "helix_disk_free_bytes"),
        ("/metrics", "# EOF"),
    ] {
        let answer = get(http, path).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        assert!(answer.contains(expected), "{path}: no {expected} in {answer}");
    }
    assert!(get(http, "/secrets").await.starts_with("HTTP/1.1 404"));
    one.node.stop().await;
}
