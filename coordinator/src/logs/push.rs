//! Agents push lines here. One stream carries many attempts.
//!
//! Only the worker that runs or ran an attempt may push its log. Lines are acknowledged when readers can read them;
//! what is sealed already or belongs to nothing is acknowledged and dropped. After a hole the agent is asked to begin anew from
//! line 1, as it does at every coordinator that it comes to, and what is here already is passed over. What is wrong with one
//! attempt's log is said in its acknowledgement; the stream ends only when nobody's lines can be taken.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{FutureExt, Stream, StreamExt};
use helix_common::status::{invalid, status};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{AttemptKey, ErrorCode, WorkerName};
use helix_proto::agent::{PushLog, PushLogAck};
use helix_proto::convert::{attempt_from_wire, attempt_to_wire};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::LogHub;
use super::live::{AppendError, LiveLog, Pushing};
use crate::blobs::STALL;
use crate::plane::AttemptFacts;

/// Messages that are written together, at most: what arrived while the disk was busy.
const TOGETHER_MAX: usize = 16;

/// Attempts on one stream, at most.
const ATTEMPTS_MAX: usize = 4096;

/// What becomes of an attempt's lines.
#[derive(Clone)]
enum Admission {
    /// They are kept.
    Keep(Arc<LiveLog>, Arc<Pushing>),
    /// Nobody needs them here.
    Drop,
    /// They are not taken, and the agent is told why.
    Refuse(Arc<str>),
}

impl LogHub {
    /// Serves an agent's stream until it ends.
    pub fn serve_push<S>(&self, stream: S, worker: WorkerName) -> ReceiverStream<Result<PushLogAck, Status>>
    where
        S: Stream<Item = Result<PushLog, Status>> + Send + Unpin + 'static,
    {
        let (tx, rx) = mpsc::channel(64);
        let hub = self.clone();
        // Ends with the stream, when the agent reads no acknowledgements, or when this node stops.
        tokio::spawn(async move {
            let mut push = Push { hub: hub.clone(), worker, admitted: HashMap::new(), tx: tx.clone() };
            let ended = tokio::select! {
                () = hub.inner.stopping.cancelled() => Err(status(ErrorCode::ShuttingDown, "this node is stopping")),
                () = tx.closed() => Ok(()),
                ended = push.run(stream) => ended,
            };
            if let Err(status) = ended {
                // Whoever is gone needs no status.
                let _ = tx.send_timeout(Err(status), STALL).await;
            }
        });
        ReceiverStream::new(rx)
    }

    async fn admit(&self, key: &AttemptKey, worker: &WorkerName) -> Result<Admission, Status> {
        let unavailable = |error: crate::plane::Unavailable| status(ErrorCode::NoLeader, error.to_string());
        let mut facts = self.inner.plane.attempt(key).await.map_err(unavailable)?;
        if facts == AttemptFacts::Unknown {
            // The agent may know of its assignment before this node does.
            self.inner.plane.barrier().await.map_err(unavailable)?;
            facts = self.inner.plane.attempt(key).await.map_err(unavailable)?;
        }
        match facts {
            AttemptFacts::Unknown | AttemptFacts::Expired | AttemptFacts::Sealed { .. } => Ok(Admission::Drop),
            AttemptFacts::Open { worker: owner, .. } if owner == *worker => {
                let log = self.inner.live.get_or_begin(key);
                let pushing = Arc::new(log.pushing());
                // Whoever removes sealed logs may have passed by between the answer and the log's begin.
                let now = self.inner.plane.attempt(key).await.map_err(unavailable)?;
                if !matches!(now, AttemptFacts::Open { .. }) {
                    self.remove(vec![key.clone()]).await;
                    return Ok(Admission::Drop);
                }
                // Whoever waits for the first line need not look for it.
                self.inner.bells.ring(&key.build);
                Ok(Admission::Keep(log, pushing))
            }
            AttemptFacts::Open { worker: owner, .. } => {
                tracing::warn!(attempt = %key, %worker, %owner, "an agent pushes the log of another's attempt");
                Ok(Admission::Refuse(format!("attempt {key} is not {worker}'s").into()))
            }
        }
    }
}

/// One agent's stream.
struct Push {
    hub: LogHub,
    worker: WorkerName,
    admitted: HashMap<AttemptKey, Admission>,
    tx: mpsc::Sender<Result<PushLogAck, Status>>,
}

impl Push {
    async fn run<S>(&mut self, mut stream: S) -> Result<(), Status>
    where
        S: Stream<Item = Result<PushLog, Status>> + Send + Unpin,
    {
        while let Some(first) = stream.next().await {
            let mut together = vec![first?];
            while together.len() < TOGETHER_MAX
                && let Some(Some(next)) = stream.next().now_or_never()
            {
                together.push(next?);
            }
            self.take(together).await?;
        }
        Ok(())
    }

    async fn take(&mut self, messages: Vec<PushLog>) -> Result<(), Status> {
        let mut work = Vec::with_capacity(messages.len());
        for message in messages {
            let key = attempt_from_wire(message.id.clone()).map_err(|error| invalid(&error))?;
            let admission = match self.admitted.get(&key) {
                Some(admission) => admission.clone(),
                None if self.admitted.len() >= ATTEMPTS_MAX => {
                    return Err(status(ErrorCode::QueueFull, "too many attempts on one stream"));
                }
                None => self.hub.admit(&key, &self.worker).await?,
            };
            if message.last || message.cut {
                // An attempt's last word here; should more come, it is admitted anew.
                self.admitted.remove(&key);
            } else {
                self.admitted.insert(key.clone(), admission.clone());
            }
            work.push((key, admission, message));
        }
        self.hub.check_room()?;
        let limit = self.hub.bytes_max();
        let job = tokio::task::spawn_blocking(move || write(work, limit));
        let Written { acks, refused, failed } =
            job.await.map_err(|_| status(ErrorCode::ShuttingDown, "this node is stopping"))?;
        for (key, why) in refused {
            // Its followers look elsewhere from now on, and what still comes needs no second look.
            if let Some(admission) = self.admitted.get_mut(&key) {
                *admission = Admission::Refuse(why);
            }
        }
        failpoint::pass(Point::LinesAnswer);
        for ack in acks {
            let sent = self.tx.send_timeout(Ok(ack), STALL).await;
            sent.map_err(|_| Status::deadline_exceeded("acknowledgements are not read"))?;
        }
        failed.map_or(Ok(()), Err)
    }
}

/// What became of messages that were written together.
#[derive(Default)]
struct Written {
    acks: Vec<PushLogAck>,
    /// Attempts whose lines are not taken any more, and why.
    refused: Vec<(AttemptKey, Arc<str>)>,
    /// The disk failed: nobody's lines can be taken.
    failed: Option<Status>,
}

/// Appends what came, in order. Acknowledges all that was taken, also when something then failed.
fn write(work: Vec<(AttemptKey, Admission, PushLog)>, limit: u64) -> Written {
    let mut written = Written::default();
    for (key, admission, message) in work {
        let last_seq = message.records.last().map_or(0, |record| record.seq);
        let mut ack = PushLogAck { id: Some(attempt_to_wire(&key)), seq: last_seq, ..PushLogAck::default() };
        match admission {
            Admission::Drop => {}
            Admission::Refuse(why) => ack.refused = why.to_string(),
            Admission::Keep(log, _pushing) => match log.append(&message.records, limit) {
                Ok(seq) => {
                    if message.last {
                        log.complete();
                    }
                    // Of a log that was closed meanwhile, everything is readable in its sealed form.
                    ack.seq = if log.head().borrow().closed { seq.max(last_seq) } else { seq };
                }
                Err(AppendError::Gap { have, got }) => {
                    tracing::debug!(attempt = %key, have, got, "a pushed log has a hole; it is asked for again");
                    (ack.seq, ack.again) = (have, true);
                }
                Err(error @ (AppendError::Malformed { .. } | AppendError::TooLarge(_))) => {
                    tracing::warn!(attempt = %key, %error, "a live log is not taken any more");
                    let why: Arc<str> = error.to_string().into();
                    (ack.seq, ack.refused) = (log.head().borrow().last_seq, why.to_string());
                    written.refused.push((key, why));
                }
                Err(error @ AppendError::Io(_)) => {
                    tracing::error!(attempt = %key, %error, "live log lines cannot be written");
                    written.failed = Some(status(ErrorCode::Internal, format!("attempt {key}: {error}")));
                    return written;
                }
            },
        }
        written.acks.push(ack);
    }
    written
}
