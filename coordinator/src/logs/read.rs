//! A reader of one attempt's log: from whichever coordinator has it live, then from its sealed form.
//!
//! A reader pulls: it holds one chunk, and reads the next from a file or a peer when that one was taken. It knows the number
//! of the next line, and whatever happens to its source, it goes on with that line elsewhere.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use helix_common::status::status;
use helix_core::record::SealedLog;
use helix_model::{AttemptKey, ErrorCode, NodeId};
use helix_proto::convert::attempt_to_wire;
use helix_proto::peer::log_peer_service_client::LogPeerServiceClient;
use helix_proto::peer::{LogHeadRequest, LogHeadResponse, ReadLiveLogRequest};
use helix_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::live::{Head, LiveLog, LiveReader};
use super::sealed::{SealedReader, Start};
use super::{Inner, LogHub, LogQuery};
use crate::blobs::STALL;
use crate::plane::{AttemptFacts, EndFacts, Unavailable};

/// How long a peer may take to say what it has.
const PEER_ANSWER: Duration = Duration::from_secs(2);

/// A follower that hears nothing for so long looks whether the lines come elsewhere now.
const QUIET: Duration = Duration::from_secs(15);

/// Between looks while nobody has the next line.
const LOOK_FIRST: Duration = Duration::from_millis(50);
pub(super) const LOOK_MAX: Duration = Duration::from_secs(1);

/// How long a follower waits for what is missing of an attempt that ended without its worker, and with it.
const LOST_PATIENCE: Duration = Duration::from_secs(3);
const SEAL_PATIENCE: Duration = Duration::from_secs(60);

/// How long a reader waits for a sealed log whose holders do not answer.
const HOLDERS_PATIENCE: Duration = Duration::from_secs(10);

impl LogHub {
    /// Reads a log. What this node knows of the attempt decides: call the registry's barrier before, where it must be fresh.
    ///
    /// # Errors
    /// `log_unknown` when there is no such attempt; `expired` when its log was not kept as long as its build; `no_leader` when the registry cannot be read.
    pub async fn read(&self, query: LogQuery) -> Result<ReceiverStream<Result<v1::LogChunk, Status>>, Status> {
        let facts = self.inner.plane.attempt(&query.key).await.map_err(|error| unavailable(&error))?;
        match facts {
            AttemptFacts::Unknown => return Err(unknown(&query.key)),
            AttemptFacts::Expired => return Err(expired(&query.key)),
            AttemptFacts::Open { .. } | AttemptFacts::Sealed { .. } => {}
        }
        let (tx, rx) = mpsc::channel(2);
        let inner = Arc::clone(&self.inner);
        // Ends with its reader, with the log, or when this node stops.
        tokio::spawn(async move {
            inner.readers.fetch_add(1, Ordering::Relaxed);
            let mut reader = Reader {
                bell: inner.bells.listen(&query.key.build),
                next: query.from_seq.max(1),
                tail: query.tail,
                follow: query.follow,
                until: u64::MAX,
                progress: Instant::now(),
                ended: None,
                key: query.key,
                tx: tx.clone(),
                inner: Arc::clone(&inner),
            };
            let outcome = tokio::select! {
                () = tx.closed() => Ok(()),
                () = inner.stopping.cancelled() => Err(status(ErrorCode::ShuttingDown, "this node is stopping")),
                outcome = reader.run() => outcome,
            };
            if let Err(status) = outcome {
                // Whoever is gone, or does not read, needs no status.
                let _ = tx.send_timeout(Err(status), STALL).await;
            }
            inner.readers.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(ReceiverStream::new(rx))
    }
}

struct Reader {
    inner: Arc<Inner>,
    key: AttemptKey,
    /// The line to read next.
    next: u64,
    /// Lines before the end to begin at, until that place is known.
    tail: u64,
    follow: bool,
    /// The last line wanted.
    until: u64,
    tx: mpsc::Sender<Result<v1::LogChunk, Status>>,
    bell: watch::Receiver<()>,
    /// When the last line came.
    progress: Instant,
    /// When this reader learnt that the attempt had ended.
    ended: Option<Instant>,
}

/// Who has the log live, and how far.
pub(super) struct Found {
    pub(super) source: Source,
    pub(super) last_seq: u64,
    pub(super) pushing: bool,
    complete: bool,
}

pub(super) enum Source {
    Here(Arc<LiveLog>),
    Peer(NodeId),
}

/// What all coordinators have of a live log.
pub(super) struct Survey {
    pub(super) found: Vec<Found>,
    /// Coordinators that did not answer.
    pub(super) silent: Vec<NodeId>,
}

/// How a source came to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SourceEnd {
    /// All lines that there will ever be were delivered.
    Complete,
    /// There is nothing more at this place, now or ever.
    Dry,
    /// Something changed, or it was quiet for long: look around, then go on.
    Again,
    /// The reader is gone.
    Gone,
}

impl Reader {
    async fn run(&mut self) -> Result<(), Status> {
        let mut wait = LOOK_FIRST;
        let mut complete = false;
        let mut until = None;
        loop {
            self.bell.borrow_and_update();
            let facts = self.inner.plane.attempt(&self.key).await.map_err(|error| unavailable(&error))?;
            let end = match facts {
                AttemptFacts::Unknown => return Err(unknown(&self.key)),
                AttemptFacts::Expired => return Err(expired(&self.key)),
                AttemptFacts::Sealed { log } => return self.read_sealed(&log).await,
                AttemptFacts::Open { end, .. } => end,
            };
            let survey = self.inner.survey(&self.key).await;
            if self.tail > 0 {
                let last = survey.found.iter().map(|found| found.last_seq).max().unwrap_or(0);
                self.next = self.next.max((last + 1).saturating_sub(self.tail));
                self.tail = 0;
            }
            if !self.follow {
                // What is there now is wanted, and not what comes while it is read.
                let last = || survey.found.iter().map(|found| found.last_seq).max().unwrap_or(0);
                self.until = *until.get_or_insert_with(last);
            }
            let before = self.next;
            let silent = survey.silent;
            let mut again = false;
            let mut nobody = true;
            if let Some(found) = choose(survey.found, self.next, self.follow) {
                nobody = false;
                match self.read_live(found).await? {
                    SourceEnd::Gone => return Ok(()),
                    SourceEnd::Complete => complete = true,
                    SourceEnd::Again => again = true,
                    SourceEnd::Dry => {}
                }
            }
            if self.next > before && self.next <= self.until {
                wait = LOOK_FIRST;
                continue;
            }
            if self.is_over(end.as_ref(), complete, &silent).await? {
                return Ok(());
            }
            if again {
                wait = LOOK_FIRST;
                continue;
            }
            // The lines may come anywhere, or the registry may say how it ended.
            let changed = timeout(wait, self.something_changes(wait, nobody)).await;
            wait = if changed.is_ok() { LOOK_FIRST } else { LOOK_MAX.min(wait * 2) };
        }
    }

    /// Waits until the registry changes the build, or, where nobody has the log, until an agent begins to push it.
    async fn something_changes(&mut self, wait: Duration, nobody: bool) {
        let permit = if nobody { self.inner.remote_waiters.try_acquire().ok() } else { None };
        let elsewhere = async {
            if permit.is_none() {
                std::future::pending::<()>().await;
            }
            self.inner.begun_elsewhere(&self.key, wait).await;
        };
        tokio::select! {
            _ = self.bell.changed() => {}
            () = elsewhere => {}
        }
    }

    /// Whether there is nothing to wait for. Says so where lines are missing.
    async fn is_over(&mut self, end: Option<&EndFacts>, complete: bool, silent: &[NodeId]) -> Result<bool, Status> {
        let Some(end) = end else { return Ok(!self.follow) };
        if complete {
            return Ok(true);
        }
        let ended = *self.ended.get_or_insert_with(Instant::now);
        if self.follow && Instant::now() < waits_until(self.progress, ended, end) {
            return Ok(false);
        }
        let mut why = match (self.next, end.worker_gone()) {
            (1, true) => "the log of this attempt was lost with its worker".to_owned(),
            (next, true) => format!("what followed line {} was lost with the attempt's worker", next - 1),
            (1, false) => "the log of this attempt is not stored yet".to_owned(),
            (next, false) => format!("what followed line {} is not stored yet", next - 1),
        };
        if !silent.is_empty() {
            let names: Vec<_> = silent.iter().map(NodeId::to_string).collect();
            why = format!("{why}; coordinators that do not answer: {}", names.join(", "));
        }
        let line = v1::LogRecord {
            seq: self.next,
            time_ms: i64::try_from(end.at.0).unwrap_or(i64::MAX),
            stream: v1::LogStream::System.into(),
            data: why.into(),
        };
        let _ = self.tx.send(Ok(self.chunk(vec![line]))).await;
        Ok(true)
    }

    async fn read_live(&mut self, found: Found) -> Result<SourceEnd, Status> {
        match found.source {
            Source::Here(log) => Ok(self.read_here(log).await),
            Source::Peer(node) => Ok(self.read_peer(node).await),
        }
    }

    /// Reads this coordinator's file, and follows it while an agent pushes it here.
    async fn read_here(&mut self, log: Arc<LiveLog>) -> SourceEnd {
        let mut head = log.head();
        let mut reader = LiveReader::new(log, self.next);
        loop {
            let now = *head.borrow_and_update();
            let records = match read_live(reader).await {
                Ok((back, records)) => {
                    reader = back;
                    records
                }
                Err(error) => {
                    // Sealed meanwhile, or damaged: the log goes on elsewhere.
                    if error.kind() != std::io::ErrorKind::NotFound {
                        tracing::error!(attempt = %self.key, %error, "a live log cannot be read on");
                    }
                    return SourceEnd::Dry;
                }
            };
            if !records.is_empty() {
                if !self.deliver(records).await {
                    return SourceEnd::Gone;
                }
                if self.next > self.until && !now.complete {
                    return SourceEnd::Dry;
                }
                continue;
            }
            if now.complete {
                return SourceEnd::Complete;
            }
            if self.next > self.until || !self.follow || now.closed || now.pushers == 0 {
                return SourceEnd::Dry;
            }
            tokio::select! {
                changed = head.changed() => if changed.is_err() { return SourceEnd::Dry },
                _ = self.bell.changed() => return SourceEnd::Again,
                () = sleep(QUIET) => return SourceEnd::Again,
            }
        }
    }

    /// Reads a peer's file, and follows it while an agent pushes it there.
    async fn read_peer(&mut self, node: NodeId) -> SourceEnd {
        let inner = Arc::clone(&self.inner);
        let permit = if self.follow { inner.remote_followers.try_acquire().ok() } else { None };
        let request =
            ReadLiveLogRequest { id: Some(attempt_to_wire(&self.key)), from_seq: self.next, follow: permit.is_some() };
        let Some(mut client) = inner.client(node) else { return SourceEnd::Dry };
        let Ok(Ok(stream)) = timeout(PEER_ANSWER, client.read_live_log(request)).await else {
            return SourceEnd::Dry;
        };
        let mut stream = stream.into_inner();
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                _ = self.bell.changed() => return SourceEnd::Again,
                () = sleep(QUIET) => return SourceEnd::Again,
            };
            let Ok(Some(message)) = message else { return SourceEnd::Dry };
            let complete = message.complete;
            // What is not the next line has no place here; a peer that sends it is not asked on.
            let fits = message.records.first().is_none_or(|first| first.seq == self.next);
            if !fits {
                return SourceEnd::Dry;
            }
            if !message.records.is_empty() && !self.deliver(message.records).await {
                return SourceEnd::Gone;
            }
            if complete {
                return SourceEnd::Complete;
            }
        }
    }

    async fn read_sealed(&mut self, log: &SealedLog) -> Result<(), Status> {
        let mut since = Instant::now();
        loop {
            let start = if self.tail > 0 { Start::Tail(self.tail) } else { Start::Seq(self.next) };
            let start = if self.next > 1 && self.tail > 0 {
                Start::Seq(self.next.max((log.lines + 1).saturating_sub(self.tail)))
            } else {
                start
            };
            let before = self.next;
            match self.read_sealed_from(log, start).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    if self.next > before {
                        since = Instant::now();
                    }
                    if since.elapsed() > HOLDERS_PATIENCE {
                        let holders: Vec<_> = log.blob.holders.iter().map(NodeId::to_string).collect();
                        let text = format!("{error}; it was stored on coordinators {}", holders.join(", "));
                        return Err(status(ErrorCode::PeerUnreachable, text));
                    }
                    tracing::warn!(attempt = %self.key, %error, "a sealed log cannot be read on; trying again");
                    sleep(LOOK_MAX).await;
                }
            }
        }
    }

    async fn read_sealed_from(&mut self, log: &SealedLog, start: Start) -> Result<(), String> {
        let (blobs, blob) = (Arc::clone(&self.inner.blobs), log.blob.clone());
        let mut reader = off(move || SealedReader::open(blobs, &blob, start)).await?;
        loop {
            let (back, records) = off(move || reader.read().map(|records| (reader, records))).await?;
            reader = back;
            if records.is_empty() || !self.deliver(records).await {
                return Ok(());
            }
            self.tail = 0;
        }
    }

    /// Hands lines to the reader; whether it is still there.
    async fn deliver(&mut self, records: Vec<v1::LogRecord>) -> bool {
        if let Some(last) = records.last() {
            self.next = last.seq + 1;
            self.progress = Instant::now();
        }
        self.tx.send(Ok(self.chunk(records))).await.is_ok()
    }

    fn chunk(&self, records: Vec<v1::LogRecord>) -> v1::LogChunk {
        v1::LogChunk { task: u32::from(self.key.task.0), attempt: self.key.attempt.0, records }
    }
}

impl Inner {
    /// Asks everybody who has the log live.
    pub(super) async fn survey(&self, key: &AttemptKey) -> Survey {
        let mut found = Vec::new();
        if let Some(log) = self.live.get(key) {
            let head = *log.head().borrow();
            found.push(Found {
                source: Source::Here(log),
                last_seq: head.last_seq,
                pushing: head.pushers > 0,
                complete: head.complete,
            });
            if head.pushers > 0 && !head.closed {
                // It is being pushed right here: nobody has more.
                return Survey { found, silent: Vec::new() };
            }
        }
        let asked = self
            .plane
            .others()
            .into_iter()
            .map(|node| async move { (node, self.ask(node, key, Duration::ZERO).await) });
        let answers = join_all(asked).await;
        let mut silent = Vec::new();
        for (node, answer) in answers {
            match answer {
                Some(head) if head.last_seq > 0 || head.pushing || head.complete => found.push(Found {
                    source: Source::Peer(node),
                    last_seq: head.last_seq,
                    pushing: head.pushing,
                    complete: head.complete,
                }),
                Some(_) => {}
                None => silent.push(node),
            }
        }
        Survey { found, silent }
    }

    /// This coordinator's own part of a log.
    pub(super) fn head(&self, key: &AttemptKey) -> Head {
        self.live.get(key).map(|log| *log.head().borrow()).unwrap_or_default()
    }

    /// Waits until an agent pushes a log here, or has.
    pub(super) async fn begun_here(&self, key: &AttemptKey) -> Head {
        let mut bell = self.bells.listen(&key.build);
        loop {
            bell.borrow_and_update();
            let head = self.head(key);
            if head.pushers > 0 || head.complete || bell.changed().await.is_err() {
                return head;
            }
        }
    }

    /// Waits until an agent pushes a log to another coordinator: each is asked to answer then, or after so long. One of an older
    /// version answers at once; who has nothing is not heard.
    async fn begun_elsewhere(&self, key: &AttemptKey, wait: Duration) {
        let mut answers: FuturesUnordered<_> =
            self.plane.others().into_iter().map(|node| self.ask(node, key, wait)).collect();
        while let Some(answer) = answers.next().await {
            if answer.is_some_and(|head| head.pushing || head.complete) {
                return;
            }
        }
        std::future::pending().await
    }

    async fn ask(&self, node: NodeId, key: &AttemptKey, wait: Duration) -> Option<LogHeadResponse> {
        let mut client = self.client(node)?;
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let request = LogHeadRequest { id: Some(attempt_to_wire(key)), wait_ms };
        let answer = timeout(PEER_ANSWER + wait, client.log_head(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    fn client(&self, node: NodeId) -> Option<LogPeerServiceClient<Channel>> {
        Some(LogPeerServiceClient::new(self.plane.bulk(node)?))
    }
}

/// How long a follower waits for what is missing of an attempt that has ended. One that was silent for long may have said its last lines
/// with its end, which may come before them: it is from then on that they are due.
fn waits_until(progress: Instant, ended: Instant, end: &EndFacts) -> Instant {
    progress.max(ended) + if end.worker_gone() { LOST_PATIENCE } else { SEAL_PATIENCE }
}

/// Whom to read from: who has the next line, the most of it, here rather than there; else, for a follower, who will have it.
fn choose(found: Vec<Found>, next: u64, follow: bool) -> Option<Found> {
    let useful =
        found.into_iter().filter(|found| found.last_seq >= next || found.complete || (follow && found.pushing));
    useful.max_by_key(|found| {
        let here = matches!(found.source, Source::Here(_));
        (found.last_seq >= next, found.last_seq, found.pushing, here)
    })
}

/// Reads some lines of a file, off the async threads.
pub(super) async fn read_live(mut reader: LiveReader) -> std::io::Result<(LiveReader, Vec<v1::LogRecord>)> {
    let job = tokio::task::spawn_blocking(move || reader.read().map(|records| (reader, records)));
    job.await.map_err(std::io::Error::other)?
}

async fn off<T: Send + 'static, E: std::fmt::Display + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    let outcome = tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?;
    outcome.map_err(|error| error.to_string())
}

fn unknown(key: &AttemptKey) -> Status {
    status(ErrorCode::LogUnknown, format!("there is no attempt {key}, or its build was purged"))
}

fn expired(key: &AttemptKey) -> Status {
    crate::rpc::answer::expired(&key.build, "logs")
}

fn unavailable(error: &Unavailable) -> Status {
    status(ErrorCode::NoLeader, error.to_string())
}

#[cfg(test)]
mod tests {
    use helix_model::{LogTime, Reason};

    use super::*;

    #[test]
    fn last_lines_are_waited_for_however_long_an_attempt_was_silent() {
        let end = |reason| EndFacts { at: LogTime(1), reason: Some(reason), agent_lives: true };
        let line = Instant::now();
        let ended = line + Duration::from_secs(3600);
        assert_eq!(waits_until(line, ended, &end(Reason::Exit)), ended + SEAL_PATIENCE);
        assert_eq!(waits_until(line, ended, &end(Reason::WorkerLost)), ended + LOST_PATIENCE);
        // While lines come there are more to wait for.
        let later = ended + Duration::from_secs(50);
        assert_eq!(waits_until(later, ended, &end(Reason::Exit)), later + SEAL_PATIENCE);
    }
}
