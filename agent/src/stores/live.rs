//! Live log lines to a coordinator: one stream to each, shared by all attempts.
//!
//! Lines are read from the spool as fast as they are acknowledged and never kept otherwise. When a stream breaks, the
//! next coordinator gets the log from its first line: it drops what it has by number.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use helix_common::backoff::Backoff;
use helix_model::{AttemptKey, NodeId};
use helix_proto::agent::agent_service_client::AgentServiceClient;
use helix_proto::agent::{PushLog, PushLogAck};
use helix_proto::convert::{attempt_from_wire, attempt_to_wire};
use helix_proto::v1;
use helix_runner::{AttemptDir, Growth, Record, SpoolError, SpoolReader, Stream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

use super::Nodes;
use crate::blocking::blocking;

/// Bytes of lines in one message, about.
const MESSAGE_BYTES: usize = 256 * 1024;

/// Messages of one attempt that wait for their acknowledgement, at most.
const UNACKNOWLEDGED_MAX: usize = 4;

/// Messages of all attempts that wait to be sent to one coordinator.
const WAITING_MAX: usize = 32;

/// How an attempt's spool stands, told to whoever pushes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Counted up whenever there may be more lines.
    pub grown: u64,
    /// No more lines will come.
    pub ended: bool,
}

/// Pushes logs. Clones share the streams.
#[derive(Clone)]
pub struct LiveLogs {
    nodes: Nodes,
    links: Arc<Mutex<HashMap<NodeId, Link>>>,
}

impl LiveLogs {
    /// Pushes to the coordinators given.
    #[must_use]
    pub fn new(nodes: Nodes) -> Self {
        Self { nodes, links: Arc::default() }
    }

    /// Pushes an attempt's log until its last line is acknowledged. Ends early only when the spool is damaged.
    pub async fn push(self, key: AttemptKey, dir: AttemptDir, mut progress: watch::Receiver<Progress>) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let name = key.to_string();
        loop {
            for (node, channel) in self.nodes.ranked(name.as_bytes()).await {
                let feed = self.open(node, channel, &key).await;
                match self.push_to(feed, &key, &dir, &mut progress, &mut backoff).await {
                    Pushed::All => return,
                    Pushed::SpoolLost(error) => {
                        tracing::error!(attempt = %key, %error, "the log cannot be read on; what follows is not shown");
                        return;
                    }
                    Pushed::Broken => self.nodes.note(node, false),
                }
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    async fn push_to(
        &self,
        feed: Option<Feed>,
        key: &AttemptKey,
        dir: &AttemptDir,
        progress: &mut watch::Receiver<Progress>,
        backoff: &mut Backoff,
    ) -> Pushed {
        let Some(mut feed) = feed else { return Pushed::Broken };
        let mut reader = SpoolReader::new(dir);
        loop {
            let now = *progress.borrow_and_update();
            let growth = if now.ended { Growth::Ended } else { Growth::Open };
            let read = blocking(move || {
                let mut reader = reader;
                let records = read_some(&mut reader, growth);
                Ok((reader, records))
            });
            let (back, records) = match read.await {
                Ok((reader, Ok(records))) => (reader, records),
                Ok((_, Err(error))) => return Pushed::SpoolLost(error.into()),
                Err(error) => return Pushed::SpoolLost(error),
            };
            reader = back;
            let more = !records.is_empty();
            let last = now.ended && !more;
            if more || last {
                let seq = records.last().map_or(0, |record| record.seq);
                let message = PushLog { id: Some(attempt_to_wire(key)), records, last };
                if feed.send(message, seq).await.is_err() {
                    return Pushed::Broken;
                }
                backoff.reset();
            }
            if last {
                return if feed.wait_for_all().await.is_ok() { Pushed::All } else { Pushed::Broken };
            }
            if !more {
                tokio::select! {
                    changed = progress.changed() => if changed.is_err() { return Pushed::All },
                    () = feed.broken() => return Pushed::Broken,
                }
            }
        }
    }

    /// A feed on the stream to a coordinator, which is opened if need be.
    async fn open(&self, node: NodeId, channel: Channel, key: &AttemptKey) -> Option<Feed> {
        let (tx, acks) = {
            let mut links = self.lock();
            if links.get(&node).is_none_or(|link| link.tx.is_closed()) {
                links.insert(node, Link::start(channel));
            }
            let link = links.get(&node)?;
            (link.tx.clone(), Arc::clone(&link.acks))
        };
        let (ack_tx, ack_rx) = watch::channel(0);
        acks.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), ack_tx);
        Some(Feed { key: key.clone(), tx, acks, acked: ack_rx, unacknowledged: Vec::new() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Link>> {
        // Nothing panics while holding it.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for LiveLogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LiveLogs")
    }
}

enum Pushed {
    All,
    Broken,
    SpoolLost(io::Error),
}

/// Reads lines for one message.
fn read_some(reader: &mut SpoolReader, growth: Growth) -> Result<Vec<v1::LogRecord>, SpoolError> {
    let mut records = Vec::new();
    let mut bytes = 0;
    while bytes < MESSAGE_BYTES {
        let Some(record) = reader.next_record(growth)? else { break };
        bytes += record.bytes.len() + 32;
        records.push(to_wire(record));
    }
    Ok(records)
}

fn to_wire(record: Record) -> v1::LogRecord {
    let stream = match record.stream {
        Stream::Stdout => v1::LogStream::Stdout,
        Stream::Stderr => v1::LogStream::Stderr,
        Stream::System => v1::LogStream::System,
    };
    let time_ms = i64::try_from(record.time_ms).unwrap_or(i64::MAX);
    v1::LogRecord { seq: record.seq, time_ms, stream: stream.into(), data: Bytes::from(record.bytes) }
}

/// Who waits for acknowledgements on a stream.
type Acks = Arc<Mutex<HashMap<AttemptKey, watch::Sender<u64>>>>;

/// An attempt's share in a stream.
struct Feed {
    key: AttemptKey,
    tx: mpsc::Sender<PushLog>,
    acks: Acks,
    acked: watch::Receiver<u64>,
    /// Last numbers of messages under way.
    unacknowledged: Vec<u64>,
}

/// The stream is gone.
struct Gone;

impl Feed {
    async fn send(&mut self, message: PushLog, seq: u64) -> Result<(), Gone> {
        while self.unacknowledged.len() >= UNACKNOWLEDGED_MAX {
            self.acked.changed().await.map_err(|_| Gone)?;
            self.note_acks();
        }
        if seq > 0 {
            self.unacknowledged.push(seq);
        }
        self.tx.send(message).await.map_err(|_| Gone)
    }

    async fn wait_for_all(&mut self) -> Result<(), Gone> {
        self.note_acks();
        while !self.unacknowledged.is_empty() {
            self.acked.changed().await.map_err(|_| Gone)?;
            self.note_acks();
        }
        Ok(())
    }

    fn note_acks(&mut self) {
        let acked = *self.acked.borrow_and_update();
        self.unacknowledged.retain(|seq| *seq > acked);
    }

    async fn broken(&mut self) {
        while self.acked.changed().await.is_ok() {
            self.note_acks();
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// The stream to one coordinator.
struct Link {
    tx: mpsc::Sender<PushLog>,
    acks: Acks,
    _task: AbortOnDropHandle<()>,
}

impl Link {
    fn start(channel: Channel) -> Self {
        let (tx, rx) = mpsc::channel(WAITING_MAX);
        let acks = Acks::default();
        let task = tokio::spawn(serve(channel, rx, Arc::clone(&acks)));
        Self { tx, acks, _task: AbortOnDropHandle::new(task) }
    }
}

async fn serve(channel: Channel, rx: mpsc::Receiver<PushLog>, acks: Acks) {
    if let Err(status) = exchange(channel, rx, &acks).await {
        tracing::debug!(%status, "a stream of live log lines broke");
    }
    // Whoever waits for an acknowledgement learns that none will come.
    acks.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

async fn exchange(channel: Channel, rx: mpsc::Receiver<PushLog>, acks: &Acks) -> Result<(), tonic::Status> {
    let mut client = AgentServiceClient::new(channel);
    let mut answers = client.push_logs(ReceiverStream::new(rx)).await?.into_inner();
    while let Some(PushLogAck { id, seq }) = answers.message().await? {
        let Ok(key) = attempt_from_wire(id) else { continue };
        let acks = acks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = acks.get(&key) {
            waiting.send_if_modified(|acked| {
                let newer = seq > *acked;
                *acked = (*acked).max(seq);
                newer
            });
        }
    }
    Ok(())
}
