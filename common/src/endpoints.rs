//! A client's view of the cluster: several endpoints, one of them current, the leader where one is known.
//!
//! Shared by the command line and the agent. Calls given to [`Endpoints::call`] must be safe to repeat: an answer that got lost
//! looks like a coordinator that is gone. Which endpoint is current is only a guess that the next answer corrects.

use std::collections::HashMap;
use std::error::Error;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use helix_model::ErrorCode;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::backoff::Backoff;
use crate::channel::{self, ChannelError, Traffic, canonical_endpoint};
use crate::status::{error_code, leader_hint, retry_after};
use crate::tls::{Expect, TlsStore};

/// Leader hints followed without a pause; more of them in a row means that two nodes name each other.
const HINTS_IN_A_ROW_MAX: u32 = 3;

const BACKOFF_BASE: Duration = Duration::from_millis(50);
const BACKOFF_CAP: Duration = Duration::from_secs(2);

/// Why a call got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// A coordinator answered, and repeating would not change the answer.
    #[error("{0}")]
    Answered(Status),
    /// Nobody gave a final answer before the deadline.
    #[error("no coordinator gave an answer within {waited:?}, trying {tried}; last: {last}")]
    NoAnswer {
        /// How long was tried.
        waited: Duration,
        /// The endpoints.
        tried: String,
        /// What the last of them said that said anything; else how the last try failed.
        last: Status,
    },
}

impl CallError {
    /// The last status, whichever kind of failure it was.
    #[must_use]
    pub fn status(&self) -> &Status {
        match self {
            Self::Answered(status) | Self::NoAnswer { last: status, .. } => status,
        }
    }

    /// The last status itself.
    #[must_use]
    pub fn into_status(self) -> Status {
        match self {
            Self::Answered(status) | Self::NoAnswer { last: status, .. } => status,
        }
    }

    /// The word of the last status, if it is one of ours.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        error_code(self.status())
    }
}

/// What an error says about trying again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The answer is final.
    Final,
    /// Ask this endpoint, at once.
    Leader(String),
    /// Ask another endpoint, after a pause of at least this long if given.
    Elsewhere(Option<Duration>),
    /// Ask the same endpoint again, after a pause.
    Again(Option<Duration>),
}

/// Judges an error of a call that is safe to repeat.
#[must_use]
pub fn judge(status: &Status) -> Verdict {
    let word = error_code(status);
    if let (Some(ErrorCode::NotLeader), Some(hint)) = (word, leader_hint(status)) {
        return Verdict::Leader(hint);
    }
    match word {
        // Committed or not: the same call again finds out.
        Some(ErrorCode::OutcomeUnknown) => return Verdict::Again(retry_after(status)),
        // It speaks of that coordinator's disk alone.
        Some(ErrorCode::DiskReserve) => return Verdict::Elsewhere(None),
        Some(_) if status.code() != Code::Unavailable => return Verdict::Final,
        _ => {}
    }
    // Without a source the status came from the server; with one, it was made here: the connection broke.
    let broke_here = status.source().is_some()
        && matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded);
    if status.code() == Code::Unavailable || broke_here {
        Verdict::Elsewhere(retry_after(status))
    } else {
        Verdict::Final
    }
}

/// The endpoints of a cluster and the channels to them. Clones share everything.
#[derive(Clone)]
pub struct Endpoints {
    shared: Arc<Shared>,
}

struct Shared {
    list: Vec<String>,
    tls: Arc<TlsStore>,
    expect: Expect,
    attempt_timeout: Option<Duration>,
    state: Mutex<State>,
}

/// Endpoints learnt beside those configured, at most: a cluster has fewer coordinators.
const LEARNT_MAX: usize = 16;

struct State {
    /// Those configured, and behind them those learnt from the cluster.
    known: Vec<String>,
    /// An index into these, unless a leader that is not among them is being followed.
    current: usize,
    leader: Option<String>,
    channels: HashMap<(String, Traffic), Channel>,
}

impl Endpoints {
    /// Endpoints `https://HOST:PORT`, of which a random one is asked first, so that a crowd of clients spreads.
    ///
    /// # Errors
    /// [`ChannelError::Endpoint`] when one is malformed or there is none.
    pub fn new(list: &[String], tls: Arc<TlsStore>) -> Result<Self, ChannelError> {
        let list: Vec<String> = list.iter().map(|endpoint| canonical_endpoint(endpoint)).collect::<Result<_, _>>()?;
        if list.is_empty() {
            return Err(ChannelError::Endpoint(String::new()));
        }
        let current = rand::random_range(0..list.len());
        let state = State { known: list.clone(), current, leader: None, channels: HashMap::new() };
        let expect = tls.expect_any();
        Ok(Self { shared: Arc::new(Shared { list, tls, expect, attempt_timeout: None, state: Mutex::new(state) }) })
    }

    /// Gives up an attempt after this long and asks elsewhere: a coordinator that hangs must not use up the whole
    /// deadline. Not for calls that wait on purpose.
    #[must_use]
    pub fn with_attempt_timeout(&self, limit: Duration) -> Self {
        let shared = &self.shared;
        let state = shared.lock();
        let copy = State {
            known: state.known.clone(),
            current: state.current,
            leader: state.leader.clone(),
            channels: state.channels.clone(),
        };
        Self {
            shared: Arc::new(Shared {
                list: shared.list.clone(),
                tls: Arc::clone(&shared.tls),
                expect: shared.expect.clone(),
                attempt_timeout: Some(limit),
                state: Mutex::new(copy),
            }),
        }
    }

    /// All configured endpoints.
    #[must_use]
    pub fn list(&self) -> &[String] {
        &self.shared.list
    }

    /// Takes in where the cluster's coordinators are now, beside those configured: whoever runs for long sees members
    /// come and go. What was learnt before and is not named is forgotten.
    pub fn learn(&self, endpoints: impl IntoIterator<Item = String>) {
        let mut state = self.shared.lock();
        let chosen = state.chosen();
        let mut known = self.shared.list.clone();
        for endpoint in endpoints.into_iter().filter_map(|endpoint| canonical_endpoint(&endpoint).ok()) {
            if known.len() < self.shared.list.len() + LEARNT_MAX && !known.contains(&endpoint) {
                known.push(endpoint);
            }
        }
        // Whatever is being asked goes on being asked.
        (state.current, state.leader) = match known.iter().position(|endpoint| *endpoint == chosen) {
            Some(place) => (place, None),
            None => (0, Some(chosen)),
        };
        state.known = known;
    }

    /// The endpoint that would be asked next.
    #[must_use]
    pub fn current(&self) -> String {
        self.shared.lock().chosen()
    }

    /// The channel to the current endpoint.
    ///
    /// # Errors
    /// None in practice: endpoints were checked before.
    pub fn channel(&self, traffic: Traffic) -> Result<(String, Channel), ChannelError> {
        let endpoint = self.current();
        Ok((endpoint.clone(), self.channel_to(&endpoint, traffic)?))
    }

    /// A channel to any endpoint of the cluster, kept for the next call.
    ///
    /// # Errors
    /// [`ChannelError::Endpoint`] when it is malformed.
    pub fn channel_to(&self, endpoint: &str, traffic: Traffic) -> Result<Channel, ChannelError> {
        let endpoint = canonical_endpoint(endpoint)?;
        let mut state = self.shared.lock();
        if let Some(channel) = state.channels.get(&(endpoint.clone(), traffic)) {
            return Ok(channel.clone());
        }
        let channel = channel::lazy(&endpoint, &self.shared.tls, self.shared.expect.clone(), traffic)?;
        // Hints bring endpoints that are not on the list; those of former leaders are not kept for ever.
        let leader = state.leader.clone();
        let list = state.known.clone();
        state.channels.retain(|(known, _), _| list.contains(known) || leader.as_ref() == Some(known));
        state.channels.insert((endpoint, traffic), channel.clone());
        Ok(channel)
    }

    /// Takes note of an error that an endpoint gave, for callers with a loop of their own (streams): the next
    /// [`Self::channel`] is the leader that was named, or another endpoint.
    pub fn observe(&self, endpoint: &str, status: &Status) -> Verdict {
        let verdict = judge(status);
        match &verdict {
            Verdict::Leader(hint) => match canonical_endpoint(hint) {
                Ok(leader) => self.shared.lock().follow(leader),
                // A hint that is no endpoint is as good as none.
                Err(_) => {
                    self.rotate(endpoint);
                    return Verdict::Elsewhere(None);
                }
            },
            Verdict::Elsewhere(_) => self.rotate(endpoint),
            Verdict::Final | Verdict::Again(_) => {}
        }
        verdict
    }

    /// Asks for another endpoint than this one next time.
    pub fn rotate(&self, from: &str) {
        let mut state = self.shared.lock();
        // Another caller may have moved on already.
        if state.chosen() == from {
            state.leader = None;
            let count = state.known.len();
            state.current = (state.current + 1) % count;
            if state.known[state.current] == from {
                state.current = (state.current + 1) % count;
            }
        }
    }

    /// Calls until there is a final answer or the deadline passes: follows leader hints, asks other endpoints where one is
    /// unavailable, waits with jitter between rounds. `f` gets the channel to try and must be safe to repeat.
    ///
    /// # Errors
    /// [`CallError`], which holds the last status.
    pub async fn call<T, F, Fut>(&self, deadline: Duration, f: F) -> Result<T, CallError>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        self.call_with(deadline, Traffic::Control, f).await
    }

    /// [`Self::call`] on channels for other traffic.
    ///
    /// # Errors
    /// [`CallError`], which holds the last status.
    pub async fn call_with<T, F, Fut>(&self, deadline: Duration, traffic: Traffic, f: F) -> Result<T, CallError>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let started = Instant::now();
        let end = started + deadline;
        let mut backoff = Backoff::new(BACKOFF_BASE, BACKOFF_CAP);
        let (mut hints, mut full) = (0, 0);
        // What a coordinator said last says more than that a try was cut short by the deadline.
        let mut told = None;
        loop {
            let (endpoint, channel) = self
                .channel(traffic)
                .map_err(|error| CallError::Answered(Status::invalid_argument(error.to_string())))?;
            let status = match self.attempt(end, f(channel)).await {
                Ok(value) => return Ok(value),
                Err(status) => status,
            };
            if error_code(&status).is_some() {
                told = Some(status.clone());
            }
            full += usize::from(error_code(&status) == Some(ErrorCode::DiskReserve));
            let least = match self.observe(&endpoint, &status) {
                // All are full: that is an answer, and waiting does not change it.
                Verdict::Elsewhere(_) if full >= self.list().len() => return Err(CallError::Answered(status)),
                Verdict::Final => return Err(CallError::Answered(status)),
                Verdict::Leader(_) if hints < HINTS_IN_A_ROW_MAX => {
                    hints += 1;
                    if Instant::now() >= end {
                        return Err(no_answer(started, told.unwrap_or(status), self.list()));
                    }
                    continue;
                }
                Verdict::Leader(_) => None,
                Verdict::Elsewhere(least) | Verdict::Again(least) => least,
            };
            hints = 0;
            tracing::debug!(%endpoint, code = ?status.code(), message = status.message(), "trying again");
            // One failure of each endpoint costs no wait beyond the base: the next one may be well.
            let round = u32::try_from(self.list().len()).unwrap_or(u32::MAX);
            let wait =
                if backoff.failures() < round { backoff.next_wait().min(BACKOFF_BASE) } else { backoff.next_wait() };
            let wait = wait.max(least.unwrap_or_default().min(BACKOFF_CAP));
            if Instant::now() + wait >= end {
                return Err(no_answer(started, told.unwrap_or(status), self.list()));
            }
            sleep(wait).await;
        }
    }

    async fn attempt<T>(&self, end: Instant, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let limit = self.shared.attempt_timeout.map_or(end, |limit| end.min(Instant::now() + limit));
        // Ours, not the server's: retried elsewhere while there is time.
        timeout_at(limit, call).await.unwrap_or_else(|_| Err(Status::unavailable("no answer in time")))
    }
}

fn no_answer(started: Instant, last: Status, list: &[String]) -> CallError {
    CallError::NoAnswer { waited: started.elapsed(), tried: list.join(", "), last }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn chosen(&self) -> String {
        self.leader.clone().unwrap_or_else(|| self.known[self.current].clone())
    }

    fn follow(&mut self, leader: String) {
        match self.known.iter().position(|endpoint| *endpoint == leader) {
            Some(index) => (self.current, self.leader) = (index, None),
            None => self.leader = Some(leader),
        }
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("list", &self.shared.list).field("current", &self.current()).finish()
    }
}
