//! Live log lines to a coordinator: one stream to each, shared by all attempts.
//!
//! Lines are read from the spool as fast as they are acknowledged and never kept otherwise. When a stream breaks, the
//! next coordinator gets the log from its first line: it drops what it has by number. Live logs have no holes: where the
//! spool has one, or is damaged, the rest is read when the log is sealed. What is wrong with one attempt's log ends that
//! attempt's pushing alone.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use helix_common::backoff::Backoff;
use helix_failpoint::{self as failpoint, Point};
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

/// Looks at a place in a spool that seems damaged: its writer may have taken back what was half read.
const DAMAGED_LOOKS_MAX: u32 = 5;

/// Between those looks.
const DAMAGED_PAUSE: Duration = Duration::from_millis(200);

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

    /// Pushes an attempt's log until its last line is acknowledged. Ends early where the spool has a hole, or is damaged,
    /// and when a coordinator takes no more of it.
    pub async fn push(self, key: AttemptKey, dir: AttemptDir, mut progress: watch::Receiver<Progress>) {
        // Many commands say nothing, and of those nobody need hear before the sealed log tells.
        match progress.wait_for(|progress| progress.grown > 0 || progress.ended).await {
            Ok(progress) if progress.grown > 0 => {}
            Ok(_) | Err(_) => return,
        }
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let name = key.to_string();
        loop {
            for (node, channel) in self.nodes.ranked(name.as_bytes()).await {
                let feed = self.open(node, channel, &key).await;
                match self.push_to(feed, &key, &dir, &mut progress, &mut backoff).await {
                    Pushed::All => return,
                    Pushed::Again => {}
                    Pushed::Refused(why) => {
                        tracing::warn!(attempt = %key, why, "the log is not shown on while it grows");
                        return;
                    }
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
        let (mut pushed, mut damaged_looks) = (0, 0);
        loop {
            let now = *progress.borrow_and_update();
            let growth = if now.ended { Growth::Ended } else { Growth::Open };
            let read = blocking(move || {
                let mut reader = reader;
                let records = read_some(&mut reader, growth);
                Ok((reader, records))
            });
            let (back, mut records) = match read.await {
                Ok((reader, Ok(records))) => (reader, records),
                Ok((back, Err(SpoolError::Damaged { .. }))) if damaged_looks < DAMAGED_LOOKS_MAX => {
                    damaged_looks += 1;
                    reader = SpoolReader::resume(dir, back.position());
                    tokio::time::sleep(DAMAGED_PAUSE).await;
                    continue;
                }
                Ok((_, Err(error))) => return feed.cut(error.into()).await,
                Err(error) => return feed.cut(error).await,
            };
            reader = back;
            let whole = before_hole(&records, pushed);
            let cut = whole < records.len();
            records.truncate(whole);
            let more = !records.is_empty();
            let last = now.ended && !more && !cut;
            if let Some(record) = records.last() {
                (pushed, damaged_looks) = (record.seq, 0);
            }
            if more || last || cut {
                let message = PushLog { id: Some(attempt_to_wire(key)), records, last, cut };
                let sent = feed.send(message, if more { pushed } else { 0 }).await;
                if let Err(end) = sent {
                    return end.into();
                }
                backoff.reset();
            }
            if last || cut {
                return feed.wait_for_all().await.map_or_else(Pushed::from, |()| Pushed::All);
            }
            if !more {
                tokio::select! {
                    changed = progress.changed() => if changed.is_err() { return Pushed::All },
                    end = feed.end() => return end.into(),
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
        let (ack_tx, ack_rx) = watch::channel(Acked::default());
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
    /// From the first line, if need be at the same coordinator.
    Again,
    Broken,
    Refused(String),
    SpoolLost(io::Error),
}

impl From<FeedEnd> for Pushed {
    fn from(end: FeedEnd) -> Self {
        match end {
            FeedEnd::Gone => Self::Broken,
            FeedEnd::Again => Self::Again,
            FeedEnd::Refused(why) => Self::Refused(why),
        }
    }
}

/// How many of the records follow each other and the line before them.
fn before_hole(records: &[v1::LogRecord], before: u64) -> usize {
    records.iter().zip(before + 1..).take_while(|(record, expected)| record.seq == *expected).count()
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
type Acks = Arc<Mutex<HashMap<AttemptKey, watch::Sender<Acked>>>>;

/// What a coordinator said of an attempt's lines.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Acked {
    seq: u64,
    again: bool,
    refused: Option<String>,
}

/// An attempt's share in a stream.
struct Feed {
    key: AttemptKey,
    tx: mpsc::Sender<PushLog>,
    acks: Acks,
    acked: watch::Receiver<Acked>,
    /// Last numbers of messages under way.
    unacknowledged: Vec<u64>,
}

/// Why an attempt is not pushed on here.
enum FeedEnd {
    /// The stream is gone.
    Gone,
    /// Lines are missing there.
    Again,
    /// No more of it is taken.
    Refused(String),
}

impl Feed {
    async fn send(&mut self, message: PushLog, seq: u64) -> Result<(), FeedEnd> {
        self.note_acks()?;
        while self.unacknowledged.len() >= UNACKNOWLEDGED_MAX {
            self.next_ack().await?;
        }
        if seq > 0 {
            self.unacknowledged.push(seq);
        }
        failpoint::pass(Point::LinesSend);
        self.tx.send(message).await.map_err(|_| FeedEnd::Gone)
    }

    async fn wait_for_all(&mut self) -> Result<(), FeedEnd> {
        self.note_acks()?;
        while !self.unacknowledged.is_empty() {
            self.next_ack().await?;
        }
        Ok(())
    }

    async fn next_ack(&mut self) -> Result<(), FeedEnd> {
        self.acked.changed().await.map_err(|_| FeedEnd::Gone)?;
        self.note_acks()
    }

    fn note_acks(&mut self) -> Result<(), FeedEnd> {
        let acked = self.acked.borrow_and_update().clone();
        self.unacknowledged.retain(|seq| *seq > acked.seq);
        match acked {
            Acked { refused: Some(why), .. } => Err(FeedEnd::Refused(why)),
            Acked { again: true, .. } => Err(FeedEnd::Again),
            Acked { .. } => Ok(()),
        }
    }

    /// Waits until there is nothing to wait for here.
    async fn end(&mut self) -> FeedEnd {
        loop {
            if let Err(end) = self.next_ack().await {
                return end;
            }
        }
    }

    /// Says that no more comes, because the spool cannot be read on.
    async fn cut(&mut self, error: io::Error) -> Pushed {
        let message = PushLog { id: Some(attempt_to_wire(&self.key)), cut: true, ..PushLog::default() };
        // Where that is not heard, the end of the stream says it.
        let _ = self.send(message, 0).await;
        Pushed::SpoolLost(error)
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
    while let Some(PushLogAck { id, seq, again, refused }) = answers.message().await? {
        let Ok(key) = attempt_from_wire(id) else { continue };
        let acks = acks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = acks.get(&key) {
            waiting.send_if_modified(|acked| {
                let before = acked.clone();
                acked.seq = acked.seq.max(seq);
                acked.again |= again;
                acked.refused = acked.refused.take().or_else(|| (!refused.is_empty()).then(|| refused.clone()));
                *acked != before
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_behind_a_hole_is_not_pushed() {
        let records = |seqs: &[u64]| -> Vec<v1::LogRecord> {
            seqs.iter().map(|seq| v1::LogRecord { seq: *seq, ..v1::LogRecord::default() }).collect()
        };
        assert_eq!(before_hole(&records(&[1, 2, 3]), 0), 3);
        assert_eq!(before_hole(&records(&[5, 6, 9, 10]), 4), 2);
        assert_eq!(before_hole(&records(&[7]), 4), 0);
        assert_eq!(before_hole(&[], 4), 0);
    }
}
