//! Clients that submit, look and cancel, and write down what they were told.
//!
//! Each build writes a line for its start and its end to a file on the host, numbered lines to its log, and an artifact whose
//! bytes are known: by these the run is judged afterwards.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use helix_common::channel::Traffic;
use helix_common::endpoints::{CallError, Endpoints};
use helix_common::status::error_code;
use helix_common::wall;
use helix_model::{BuildSpec, Command, ErrorCode};
use helix_proto::convert::submit_of_spec;
use helix_proto::v1;
use helix_proto::v1::build_service_client::BuildServiceClient;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::chaos::history::{End, Event, History, Seen};

/// Lines of a build's log.
pub(super) const LINES: usize = 20;

/// How long a submit is tried.
const SUBMIT_LIMIT: Duration = Duration::from_secs(20);

/// How long one answer may take; then its outcome is unknown.
const ANSWER_LIMIT: Duration = Duration::from_secs(8);

/// With so many builds in the queue clients submit at a walk: what waits at the end is waited for, and judged.
const QUEUED_MOST: u64 = 1_000;

/// Between two submits of a client then.
const WALK: Duration = Duration::from_secs(1);

/// A client looks at the queue before each so many of its submits.
const LOOK_EVERY: u32 = 20;

/// The label that tells submits of one id apart.
const CONTENT: &str = "content";

/// What clients share.
pub(super) struct Load {
    /// Since when events are counted.
    pub(super) start: Instant,
    history: Mutex<History>,
    /// Live ids that may be looked at.
    recent: Mutex<Vec<String>>,
    counts: PathBuf,
    stop: AtomicBool,
    /// When clients were told to end.
    stopped: Mutex<Option<Duration>>,
    /// Submits that were refused without need, in words.
    refused: Mutex<Vec<String>>,
    /// Submits acknowledged.
    pub(super) submitted: AtomicU64,
    /// When each was, in order.
    acknowledged: Mutex<Vec<Duration>>,
    /// By how much the wall clock is ahead of `start`'s time.
    wall_ms: i64,
}

/// A stretch of the run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// Since the run began.
    pub(super) begin: Duration,
    /// Likewise.
    pub(super) end: Duration,
}

impl Window {
    /// How long it is.
    pub(super) fn length(self) -> Duration {
        self.end.saturating_sub(self.begin)
    }

    /// How much of it lies in one of these, which may overlap each other.
    pub(super) fn within(self, others: &[Self]) -> Duration {
        let mut others = others.to_vec();
        others.sort_by_key(|other| other.begin);
        let (mut sum, mut at) = (Duration::ZERO, self.begin);
        for other in others {
            let (begin, end) = (other.begin.max(at), other.end.min(self.end));
            sum += end.saturating_sub(begin);
            at = at.max(end);
        }
        sum
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    /// Nothing done yet. Builds count what they do in files below `counts`.
    #[must_use]
    pub(super) fn new(counts: &Path) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            history: Mutex::default(),
            recent: Mutex::default(),
            counts: counts.to_owned(),
            stop: AtomicBool::new(false),
            stopped: Mutex::default(),
            submitted: AtomicU64::new(0),
            refused: Mutex::default(),
            acknowledged: Mutex::default(),
            wall_ms: wall::message_ms(SystemTime::now()),
        })
    }

    /// Clients end after what they do now.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        *lock(&self.stopped) = Some(self.start.elapsed());
    }

    /// What was seen.
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        lock(&self.history)
    }

    /// Submits that were refused although somebody could have taken them, in words.
    pub(super) fn refused(&self) -> Vec<String> {
        lock(&self.refused).clone()
    }

    /// The times without an acknowledged submit, from the load's begin to its end, longest first.
    pub(super) fn gaps(&self) -> Vec<Window> {
        let end = lock(&self.stopped).unwrap_or_else(|| self.start.elapsed());
        let mut acknowledged = lock(&self.acknowledged).clone();
        acknowledged.retain(|at| *at < end);
        let begins = std::iter::once(Duration::ZERO).chain(acknowledged.iter().copied());
        let ends = acknowledged.iter().copied().chain([end]);
        let mut gaps: Vec<Window> = begins.zip(ends).map(|(begin, end)| Window { begin, end }).collect();
        gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length()));
        gaps
    }

    /// A time of the run by the wall clock, in Unix milliseconds.
    pub(super) fn wall_ms(&self, at: Duration) -> i64 {
        self.wall_ms + i64::try_from(at.as_millis()).unwrap_or(i64::MAX)
    }

    fn spec(&self, id: &str, content: &str, random: &mut StdRng) -> BuildSpec {
        // Some are over at once, some last long enough for a fault to meet them.
        let pause = match random.random_range(0..10) {
            0..6 => 0.0,
            6..9 => random.random_range(0.01..0.05),
            _ => random.random_range(0.1..0.6),
        };
        self.spec_of(id, content, pause)
    }

    fn spec_of(&self, id: &str, content: &str, pause: f64) -> BuildSpec {
        let counts = self.counts.display();
        let line = format!(
            "set -e; echo \"$HELIX_BUILD_ID $HELIX_ATTEMPT\" >> {counts}/starts; i=1; \
             while [ $i -le {LINES} ]; do echo \"line $i\"; i=$((i+1)); [ {pause:.3} = 0.000 ] || sleep {pause:.3}; done; \
             echo {id} > \"$HELIX_OUTPUT\"; echo \"$HELIX_BUILD_ID $HELIX_ATTEMPT\" >> {counts}/ends"
        );
        BuildSpec {
            command: Some(Command::Shell(line)),
            labels: [(CONTENT.to_owned(), content.to_owned())].into(),
            ..BuildSpec::default()
        }
    }

    fn note(&self, id: &str, begin: Duration, seen: Seen) {
        let end = self.start.elapsed();
        self.history().note(id, Event { begin, end, seen });
    }

    /// One client, until [`Self::stop`].
    pub(super) async fn client(self: Arc<Self>, endpoints: Endpoints, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let endpoints = endpoints.with_attempt_timeout(Duration::from_secs(3));
        let (mut number, mut walks) = (0, false);
        while !self.stop.load(Ordering::Relaxed) {
            match random.random_range(0..10) {
                0..4 => {
                    number += 1;
                    if walks {
                        sleep(WALK).await;
                    }
                    if walks || number % LOOK_EVERY == 0 {
                        walks = self.queue_is_long(&endpoints).await.unwrap_or(walks);
                    }
                    let id = format!("c{seed:x}-{number}");
                    if random.random_bool(0.1) {
                        // Two at once under one id, with different content: one is taken.
                        let (one, two) = (self.spec(&id, "one", &mut random), self.spec(&id, "two", &mut random));
                        tokio::join!(
                            self.submit(&endpoints, &id, one, "one"),
                            self.submit(&endpoints, &id, two, "two")
                        );
                    } else {
                        let spec = self.spec(&id, "only", &mut random);
                        self.submit(&endpoints, &id, spec, "only").await;
                    }
                }
                4..9 => {
                    if let Some(id) = self.any(&mut random) {
                        let list = endpoints.list();
                        let endpoint = list[random.random_range(0..list.len())].clone();
                        self.read(&endpoints, &endpoint, &id).await;
                    }
                }
                _ => {
                    if let Some(id) = self.any(&mut random) {
                        self.cancel(&endpoints, &id).await;
                    }
                }
            }
            sleep(Duration::from_millis(random.random_range(10..150))).await;
        }
    }

    /// `None` where nobody says.
    async fn queue_is_long(&self, endpoints: &Endpoints) -> Option<bool> {
        let call = |channel| async move {
            ClusterServiceClient::new(channel).get_cluster_status(v1::GetClusterStatusRequest { stale: true }).await
        };
        let status = endpoints.call(ANSWER_LIMIT, call).await.ok()?;
        Some(status.into_inner().totals?.queued > QUEUED_MOST)
    }

    /// One of the latest ids.
    fn any(&self, random: &mut StdRng) -> Option<String> {
        let recent = lock(&self.recent);
        let from = recent.len().saturating_sub(40);
        let latest = &recent[from..];
        (!latest.is_empty()).then(|| latest[random.random_range(0..latest.len())].clone())
    }

    /// A build that nobody cancels, which sleeps so many seconds after each of its lines.
    pub(super) async fn witness(&self, endpoints: &Endpoints, id: &str, pause: f64) {
        // It is waited for, and is not to wait.
        let spec = BuildSpec { priority: 10, ..self.spec_of(id, "only", pause) };
        self.submit_unseen(endpoints, id, spec, "only").await;
    }

    async fn submit(&self, endpoints: &Endpoints, id: &str, spec: BuildSpec, content: &str) {
        lock(&self.recent).push(id.to_owned());
        self.submit_unseen(endpoints, id, spec, content).await;
    }

    async fn submit_unseen(&self, endpoints: &Endpoints, id: &str, spec: BuildSpec, content: &str) {
        let begin = self.start.elapsed();
        self.history().trying(id, begin);
        let request = submit_of_spec(&spec, id);
        let call = |channel| {
            let request = request.clone();
            async move { BuildServiceClient::new(channel).submit_build(request).await }
        };
        match endpoints.call(SUBMIT_LIMIT, call).await {
            Ok(_) => {
                self.submitted.fetch_add(1, Ordering::Relaxed);
                lock(&self.acknowledged).push(self.start.elapsed());
                self.note(id, begin, Seen::Submitted(content.to_owned()));
            }
            Err(CallError::Answered(status)) if error_code(&status) == Some(ErrorCode::IdTaken) => {
                self.note(id, begin, Seen::Taken(content.to_owned()));
            }
            // Nothing is wrong with it, and others could take it.
            Err(CallError::Answered(status)) if error_code(&status) == Some(ErrorCode::DiskReserve) => {
                lock(&self.refused).push(format!("{id}: its submit was refused for good: {}", status.message()));
            }
            // Whether it was taken is unknown.
            Err(_) => {}
        }
    }

    async fn cancel(&self, endpoints: &Endpoints, id: &str) {
        let begin = self.start.elapsed();
        let call = |channel| {
            let request = v1::CancelBuildRequest { build_id: id.to_owned(), reason: "chaos".to_owned() };
            async move { BuildServiceClient::new(channel).cancel_build(request).await }
        };
        match endpoints.call(ANSWER_LIMIT, call).await {
            Ok(_) => self.note(id, begin, Seen::Cancelled),
            Err(CallError::Answered(status)) => match error_code(&status) {
                Some(ErrorCode::WrongState) => self.note(id, begin, Seen::TooLate),
                Some(ErrorCode::BuildUnknown) => self.note(id, begin, Seen::Absent),
                _ => {}
            },
            Err(_) => {}
        }
    }

    /// Looks at a build through one coordinator.
    async fn read(&self, endpoints: &Endpoints, endpoint: &str, id: &str) {
        let begin = self.start.elapsed();
        let Ok(channel) = endpoints.channel_to(endpoint, Traffic::Control) else { return };
        let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale: false };
        let mut client = BuildServiceClient::new(channel);
        if let Ok(Some(seen)) = timeout(ANSWER_LIMIT, client.get_build_status(request)).await.map(seen_of) {
            self.note(id, begin, seen);
        }
    }

    /// Looks at a build until somebody answers; what is noted is what it is at the end.
    pub(super) async fn look(&self, endpoints: &Endpoints, id: &str) -> Result<Seen, String> {
        let begin = self.start.elapsed();
        let call = |channel| {
            let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale: false };
            async move { BuildServiceClient::new(channel).get_build_status(request).await }
        };
        let answer = match endpoints.call(SUBMIT_LIMIT, call).await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(error.into_status()),
        };
        let words = format!("{answer:?}");
        let seen = seen_of(answer).ok_or(words)?;
        self.note(id, begin, seen.clone());
        Ok(seen)
    }
}

fn seen_of(answer: Result<tonic::Response<v1::BuildStatus>, Status>) -> Option<Seen> {
    let status = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return (error_code(&status) == Some(ErrorCode::BuildUnknown)).then_some(Seen::Absent),
    };
    let content = status.labels.get(CONTENT).cloned().unwrap_or_default();
    Some(match status.state.as_str() {
        "queued" | "running" => Seen::Live { content, stopping: status.cancel_requested },
        _ => Seen::Ended {
            content,
            end: End {
                state: status.state,
                at_ms: status.completed_at_ms,
                attempt: status.attempt,
                digest: status.digest,
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(begin: u64, end: u64) -> Window {
        Window { begin: Duration::from_secs(begin), end: Duration::from_secs(end) }
    }

    #[test]
    fn what_lies_within_others_counts_once() {
        let others = [window(5, 8), window(0, 2), window(6, 10), window(30, 40)];
        assert_eq!(window(1, 9).within(&others), Duration::from_secs(1 + 4));
        assert_eq!(window(10, 30).within(&others), Duration::ZERO);
    }
}
