//! Logs for clients: the original's lines, and chunks for followers who want speed.
//!
//! Which attempts a reader wants is decided here; where their records are is `logs`' business. A reader who
//! follows stays through retries: when an attempt has ended and the task has not, the next attempt is read too.
//! Every stream is fed by one task, which ends when its reader goes, when the build has ended, or with the server.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use helix_common::status::{invalid, status};
use helix_core::record::{BuildRecord, TaskPhase, TaskRecord};
use helix_model::{AttemptKey, AttemptNumber, BuildId, ErrorCode, InvalidField, TaskIndex};
use helix_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Answers, BuildRpc, view};
use crate::logs::LogQuery;
use crate::registry::Consistency;
use crate::rpc::answer;
use crate::rpc::services::{build_id, consistency};

/// A follower of a coordinator that is cut off from the others would hear nothing more, ever: whether this one still is with them is
/// asked after so long without a word.
const CUT_OFF_CHECK: Duration = Duration::from_secs(10);

/// Messages between the feeding task and a reader: a slow reader slows its own feeder, and nobody else.
const BUFFERED: usize = 64;

impl BuildRpc {
    pub(super) async fn stream_logs(
        &self,
        request: v1::StreamBuildLogsRequest,
    ) -> Result<Answers<v1::BuildLogLine>, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(consistency(request.stale)).await?;
        let record = self.services.record(&id).await?;
        expect_kept(&record)?;
        let tasks = wanted_tasks(&record, &request.task)?;
        let attempts = match (request.all_attempts, request.attempt) {
            (true, 0) => Attempts::All,
            (true, _) => {
                let why = "one attempt or all attempts can be asked for, not both";
                return Err(invalid(&InvalidField::new("attempt", why)));
            }
            (false, 0) => Attempts::Latest,
            (false, number) => Attempts::One(AttemptNumber(number)),
        };
        let consistency = consistency(request.stale);
        let want =
            Want { from_seq: request.from_seq, tail: request.tail, follow: !request.no_follow, attempts, consistency };
        if let Attempts::One(number) = attempts {
            for &task in &tasks {
                expect_attempt(&record, task, number, want.follow)?;
            }
        }
        let (tx, rx) = mpsc::channel(BUFFERED);
        let reader = self.reader(id, want);
        self.services.tasks.spawn(async move {
            let mut sink = Lines { tx, build_id: record.id.to_string(), platform: String::new() };
            for task in tasks {
                sink.platform = record.tasks.get(usize::from(task.0)).map_or_else(String::new, view::platform_of);
                if let Err(end) = reader.read_task(task, &mut sink).await {
                    return sink.end(end).await;
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(rx)))
    }

    pub(super) async fn read_log(&self, request: v1::ReadLogRequest) -> Result<Answers<v1::LogChunk>, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(consistency(request.stale)).await?;
        let record = self.services.record(&id).await?;
        expect_kept(&record)?;
        let task = u16::try_from(request.task).ok().map(TaskIndex).filter(|task| record.task(*task).is_some());
        let Some(task) = task else {
            let why = format!("the build has {} tasks, numbered from 0", record.tasks.len());
            return Err(invalid(&InvalidField::new("task", why)));
        };
        let attempts = match request.attempt {
            0 => Attempts::Latest,
            number => Attempts::One(AttemptNumber(number)),
        };
        if let Attempts::One(number) = attempts {
            expect_attempt(&record, task, number, request.follow)?;
        }
        let consistency = consistency(request.stale);
        let want =
            Want { from_seq: request.from_seq, tail: request.tail, follow: request.follow, attempts, consistency };
        let (tx, rx) = mpsc::channel(BUFFERED);
        let reader = self.reader(id, want);
        self.services.tasks.spawn(async move {
            let mut sink = Chunks { tx };
            if let Err(end) = reader.read_task(task, &mut sink).await {
                sink.end(end).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(rx)))
    }

    fn reader(&self, id: BuildId, want: Want) -> Reader {
        Reader { service: self.clone(), id, want }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Attempts {
    Latest,
    One(AttemptNumber),
    All,
}

struct Want {
    from_seq: u64,
    tail: u64,
    follow: bool,
    attempts: Attempts,
    consistency: Consistency,
}

/// Why a stream ends before all was said.
enum End {
    /// Its reader is gone.
    Gone,
    /// With this status.
    Failed(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

/// Where records go.
trait Sink {
    async fn put(&mut self, chunk: v1::LogChunk) -> Result<(), End>;
    /// Completes when the reader has gone.
    async fn gone(&self);
}

struct Lines {
    tx: mpsc::Sender<Result<v1::BuildLogLine, Status>>,
    build_id: String,
    platform: String,
}

struct Chunks {
    tx: mpsc::Sender<Result<v1::LogChunk, Status>>,
}

impl Sink for Lines {
    async fn put(&mut self, chunk: v1::LogChunk) -> Result<(), End> {
        for record in chunk.records {
            let line = line_of(&self.build_id, &self.platform, chunk.attempt, record);
            self.tx.send(Ok(line)).await.map_err(|_| End::Gone)?;
        }
        Ok(())
    }

    async fn gone(&self) {
        self.tx.closed().await;
    }
}

impl Sink for Chunks {
    async fn put(&mut self, chunk: v1::LogChunk) -> Result<(), End> {
        self.tx.send(Ok(chunk)).await.map_err(|_| End::Gone)
    }

    async fn gone(&self) {
        self.tx.closed().await;
    }
}

impl Lines {
    async fn end(self, end: End) {
        if let End::Failed(status) = end {
            // Whoever is gone needs no status.
            let _ = self.tx.send(Err(status)).await;
        }
    }
}

impl Chunks {
    async fn end(self, end: End) {
        if let End::Failed(status) = end {
            let _ = self.tx.send(Err(status)).await;
        }
    }
}

struct Reader {
    service: BuildRpc,
    id: BuildId,
    want: Want,
}

impl Reader {
    /// Reads what is wanted of one task; with `follow`, until the task has ended.
    async fn read_task(&self, task: TaskIndex, sink: &mut impl Sink) -> Result<(), End> {
        let mut changed = self.service.services.changes.watch(&self.id);
        let mut read_up_to = AttemptNumber(0);
        let mut there = None;
        loop {
            let record = self.service.services.record(&self.id).await?;
            let Some(row) = record.task(task) else { return Ok(()) };
            let there = *there.get_or_insert(row.attempts.last().map_or(AttemptNumber(0), |attempt| attempt.number));
            match self.next_attempt(row, read_up_to) {
                Some(number) => {
                    // Of what came later nothing is old.
                    let wanted = matches!(self.want.attempts, Attempts::One(_)) || number <= there;
                    let (from_seq, tail) = if wanted { (self.want.from_seq, self.want.tail) } else { (0, 0) };
                    let query =
                        LogQuery { key: record.attempt_key(task, number), from_seq, tail, follow: self.want.follow };
                    self.read_attempt(query, sink).await?;
                    read_up_to = number;
                }
                None if !self.want.follow || self.complete(row, read_up_to) => {
                    let wanted = self.want.from_seq <= 1 && !matches!(self.want.attempts, Attempts::One(_));
                    if let Some(line) = word_on_no_attempt(&record, row).filter(|_| wanted) {
                        let chunk = v1::LogChunk { task: u32::from(task.0), attempt: 0, records: vec![line] };
                        sink.put(chunk).await?;
                    }
                    return Ok(());
                }
                None => self.change(&mut changed, sink).await?,
            }
        }
    }

    /// The attempt to read after those up to `read_up_to`, if it exists yet.
    fn next_attempt(&self, row: &TaskRecord, read_up_to: AttemptNumber) -> Option<AttemptNumber> {
        let mut later = row.attempts.iter().map(|attempt| attempt.number).filter(|number| *number > read_up_to);
        match self.want.attempts {
            Attempts::All => later.next(),
            Attempts::Latest => later.next_back(),
            Attempts::One(wanted) => later.find(|number| *number == wanted),
        }
    }

    fn complete(&self, row: &TaskRecord, read_up_to: AttemptNumber) -> bool {
        let ended = matches!(row.phase, TaskPhase::Ended { .. });
        match self.want.attempts {
            Attempts::One(wanted) => ended || read_up_to == wanted,
            Attempts::All | Attempts::Latest => ended,
        }
    }

    async fn read_attempt(&self, query: LogQuery, sink: &mut impl Sink) -> Result<(), End> {
        let services = &self.service.services;
        let mut chunks = pin!(services.logs.read(query).await?);
        loop {
            let next = tokio::select! {
                () = services.stopping.cancelled() => return Err(End::Failed(services.moved())),
                () = sink.gone() => return Err(End::Gone),
                next = chunks.next() => next,
                cut_off = self.cut_off() => return Err(End::Failed(cut_off)),
            };
            match next {
                Some(chunk) => sink.put(chunk?).await?,
                None => return Ok(()),
            }
        }
    }

    /// Waits until this node cannot say any more what the cluster has committed. For ever where nobody asked for that.
    async fn cut_off(&self) -> Status {
        if self.want.consistency == Consistency::Stale || !self.want.follow {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(CUT_OFF_CHECK).await;
            if let Err(status) = self.service.services.freshen(self.want.consistency).await {
                return status;
            }
        }
    }

    async fn change(&self, changed: &mut watch::Receiver<()>, sink: &impl Sink) -> Result<(), End> {
        let services = &self.service.services;
        tokio::select! {
            () = services.stopping.cancelled() => Err(End::Failed(services.moved())),
            () = sink.gone() => Err(End::Gone),
            cut_off = self.cut_off() => Err(End::Failed(cut_off)),
            heard = changed.changed() => heard.map_err(|_| End::Failed(services.moved())),
        }
    }
}

// A status is what the caller answers with; boxing it would only be undone there.
#[allow(clippy::result_large_err)]
fn expect_kept(record: &BuildRecord) -> Result<(), Status> {
    record.expired.logs.map_or(Ok(()), |_| Err(answer::expired(&record.id, "logs")))
}

fn wanted_tasks(record: &BuildRecord, platform: &str) -> Result<Vec<TaskIndex>, Status> {
    let tasks = record.indexed_tasks();
    let wanted: Vec<_> = tasks
        .filter(|(_, task)| platform.is_empty() || view::platform_of(task) == platform)
        .map(|(at, _)| at)
        .collect();
    if wanted.is_empty() {
        let why = format!("build {} has no task for {platform:?}", record.id);
        return Err(invalid(&InvalidField::new("task", why)));
    }
    Ok(wanted)
}

/// An attempt that is asked for by number exists, or may come while the reader follows.
fn expect_attempt(record: &BuildRecord, task: TaskIndex, number: AttemptNumber, follow: bool) -> Result<(), Status> {
    let row = record.task(task);
    let exists = row.is_some_and(|row| row.attempts.iter().any(|attempt| attempt.number == number));
    let may_come = follow && row.is_some_and(|row| !matches!(row.phase, TaskPhase::Ended { .. }));
    if exists || may_come {
        return Ok(());
    }
    let key = AttemptKey { build: record.id.clone(), task, attempt: number };
    Err(status(ErrorCode::LogUnknown, format!("there is no attempt {key}")))
}

/// The one line of a task that ended before any attempt of it was made: how every log of what did not succeed ends.
fn word_on_no_attempt(record: &BuildRecord, row: &TaskRecord) -> Option<v1::LogRecord> {
    let TaskPhase::Ended { state, reason, at } = &row.phase else { return None };
    if !row.attempts.is_empty() {
        return None;
    }
    let mut text = format!("the build {state} before it ran");
    if let Some(reason) = reason {
        text = format!("{text} ({reason})");
    }
    if let Some(cancel) = record.cancel.as_ref().filter(|cancel| !cancel.reason.is_empty()) {
        text = format!("{text}: {}", cancel.reason);
    }
    let stream = v1::LogStream::System.into();
    Some(v1::LogRecord { seq: 1, time_ms: view::unix_ms(*at), stream, data: text.into() })
}

fn line_of(build_id: &str, platform: &str, attempt: u32, record: v1::LogRecord) -> v1::BuildLogLine {
    let stream = match record.stream() {
        v1::LogStream::Stdout => "stdout",
        v1::LogStream::Stderr => "stderr",
        v1::LogStream::System => "system",
        v1::LogStream::Unspecified => "",
    };
    v1::BuildLogLine {
        build_id: build_id.to_owned(),
        line: String::from_utf8_lossy(&record.data).into_owned(),
        timestamp: record.time_ms.div_euclid(1000),
        raw: record.data,
        seq: record.seq,
        stream: stream.to_owned(),
        attempt,
        task: platform.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_bytes_and_read_as_text() {
        let record = v1::LogRecord {
            seq: 7,
            time_ms: 1_999,
            stream: v1::LogStream::Stderr.into(),
            data: b"a\xffb".to_vec().into(),
        };
        let line = line_of("b1", "linux/amd64", 2, record);
        assert_eq!((line.line.as_str(), line.timestamp, line.seq), ("a\u{fffd}b", 1, 7));
        assert_eq!((line.stream.as_str(), &line.raw[..], line.attempt), ("stderr", &b"a\xffb"[..], 2));
    }
}
