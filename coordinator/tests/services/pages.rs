//! What port 7422 tells.

use std::net::SocketAddr;

use helix_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::node::{One, shell};

const BYTES_SHA256: &str = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9";

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
    let mut client = one.client().await;
    client.submit(shell("b1")).await;
    let sha256 = helix_model::Digest::parse(BYTES_SHA256).unwrap().0.to_vec().into();
    let blobs = vec![v1::SmallBlob { sha256, data: b"bytes".to_vec().into() }];
    client.blobs.put_small_blobs(v1::PutSmallBlobsRequest { blobs, copies: 1 }).await.unwrap();
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
        ("/metrics", "helix_blob_bytes 5"),
        ("/metrics", "helix_blob_segment_syncs 1"),
        ("/metrics", "helix_blobs_short 0"),
        ("/metrics", "helix_live_log_bytes 0"),
        ("/metrics", "# EOF"),
    ] {
        let answer = get(http, path).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        assert!(answer.contains(expected), "{path}: no {expected} in {answer}");
    }
    assert!(get(http, "/secrets").await.starts_with("HTTP/1.1 404"));
    one.node.stop().await;
}
