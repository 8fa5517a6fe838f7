//! Whether a development cluster can be used: every coordinator ready, every agent a healthy worker.

use std::time::{Duration, Instant};

use helix_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::connection::{Connection, workers};
use crate::context::ContextOptions;
use crate::dev::layout::Layout;
use crate::failure::Failure;

/// Waits until the cluster can be used.
pub(super) async fn wait(layout: &Layout, deadline: Instant) -> Result<(), Failure> {
    let mut waiting_for = String::from("coordinators");
    while Instant::now() < deadline {
        match look(layout).await {
            None => return Ok(()),
            Some(what) => waiting_for = what,
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Err(Failure::plain(format!(
        "not ready in time: waiting for {waiting_for}; the logs are beside {}",
        layout.context_path().display()
    )))
}

/// What is not ready yet.
async fn look(layout: &Layout) -> Option<String> {
    for port in layout.http_ports() {
        if !answers_ready(port).await {
            return Some(format!("http://127.0.0.1:{port}/readyz"));
        }
    }
    let options = ContextOptions { context: Some(layout.context_path()), connect_timeout: Duration::from_secs(5) };
    let connection = match Connection::open(&options) {
        Ok(connection) => connection,
        Err(failure) => return Some(failure.message),
    };
    let call = |channel| async move { workers(channel).list_workers(v1::ListWorkersRequest {}).await };
    match connection.call(call).await {
        Ok(found) => {
            let healthy = found.into_inner().workers.iter().filter(|worker| worker.healthy).count();
            (healthy < layout.agents).then(|| format!("{} agents", layout.agents - healthy))
        }
        Err(failure) => Some(failure.message),
    }
}

async fn answers_ready(port: u16) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut head = [0u8; 12];
        stream.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head.ends_with(b" 200"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), asked).await, Ok(Ok(true)))
}
