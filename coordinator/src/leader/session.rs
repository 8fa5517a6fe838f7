//! One agent's session, from its `Hello` to its end: a task of its own that checks what it reads, proposes what
//! the agent reports, and tells the loop who is alive. It never decides.
//!
//! Failure first: an agent that says nothing, nonsense or too much loses its session, with a status that says why;
//! a report whose fate is unknown is answered by nothing, and the agent repeats it.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use helix_common::status::{invalid, status};
use helix_core::command::RegisterWorker;
use helix_core::record::{DrainedBy, Standing};
use helix_core::state::State;
use helix_core::{Command, Rejection, Reply};
use helix_model::{ErrorCode, InvalidField, WorkerName};
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::{AGENT_PROTOCOL, agent};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tonic::Status;
use tracing::{debug, info, warn};

use super::budget::Budget;
use super::consensus::Consensus;
use super::event::{Beat, CannotOpen, Event};
use super::outbox::Outbox;
use super::reports::{Answer, Report, Subject, carry_out, drain, invalid_report};
use super::sessions::SessionId;
use super::wire::{self, Introduction, Speaker};
use crate::registry::ProposeError;

/// How long a connection may take to say `Hello`.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// Reports of one agent under way: four for each of the most slots a worker has. What comes on top is repeated later.
const REPORTS_MAX: usize = 4 * helix_model::limits::WORKER_CAPACITY_MAX as usize;
/// Heartbeats closer together than this are not passed on: they say nothing new.
const BEAT_SPACING: Duration = Duration::from_millis(20);
/// Malformed messages after which a session ends.
const MALFORMED_MAX: u32 = 16;

/// What a session needs of the leader.
pub(crate) struct Session<C> {
    pub(crate) consensus: C,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) outbox: Outbox,
    /// The name in the agent's certificate.
    pub(crate) worker: WorkerName,
}

/// How a session ends, other than by the agent's going.
enum Ending {
    /// A message that says why, and that ends it.
    Refused(ErrorCode, String, Retry),
    /// A status.
    Status(Status),
    /// Ended by the loop, or the agent is gone.
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    Yes,
    No,
}

impl<C: Consensus> Session<C> {
    /// Serves the session until it ends.
    pub(crate) async fn run<S>(self, mut inbound: S)
    where
        S: Stream<Item = Result<agent::AgentMessage, Status>> + Send + Unpin,
    {
        let mut open = None;
        let ending = self.serve(&mut inbound, &mut open).await;
        if let Some((worker, id)) = open {
            // The loop is gone only when the whole node is.
            let _ = self.events.send(Event::Closed { worker, id }).await;
        }
        match ending {
            Ending::Refused(code, message, retry) => {
                warn!(worker = %self.worker, reason = code.as_str(), message, "agent's session refused");
                let retry = retry == Retry::Yes;
                let refused = agent::Refused { reason: code.as_str().to_owned(), message, retry };
                // Where even this finds no room, the end of the stream has to do.
                let _ = self.outbox.send(Message::Refused(refused));
                self.outbox.end(None);
            }
            Ending::Status(status) => {
                info!(worker = %self.worker, status = %status.message(), "agent's session ended");
                self.outbox.end(Some(status));
            }
            Ending::Over => self.outbox.end(None),
        }
    }

    async fn serve<S>(&self, inbound: &mut S, open: &mut Option<(WorkerName, SessionId)>) -> Ending
    where
        S: Stream<Item = Result<agent::AgentMessage, Status>> + Send + Unpin,
    {
        let introduction = match self.hello(inbound).await {
            Ok(introduction) => introduction,
            Err(ending) => return ending,
        };
        let who = Speaker { worker: self.worker.clone(), instance: introduction.instance.clone() };
        let id = match self.open(&who).await {
            Ok(id) => id,
            Err(ending) => return ending,
        };
        *open = Some((who.worker.clone(), id));
        let registered = tokio::select! {
            registered = self.register(&who, &introduction) => registered,
            () = self.outbox.over() => Err(Ending::Over),
        };
        if let Err(ending) = registered {
            return ending;
        }
        info!(worker = %who.worker, instance = %who.instance, version = introduction.offer.version, "agent connected");
        let ready = Event::Ready { who: who.clone(), id, spooled: introduction.attempts };
        if self.events.send(ready).await.is_err() {
            return Ending::Status(status(ErrorCode::ShuttingDown, "the coordinator is stopping"));
        }
        Conversation::new(self, who, id).run(inbound).await
    }

    async fn hello<S>(&self, inbound: &mut S) -> Result<Introduction, Ending>
    where
        S: Stream<Item = Result<agent::AgentMessage, Status>> + Send + Unpin,
    {
        let first = tokio::select! {
            first = timeout(HELLO_WAIT, inbound.next()) => first,
            () = self.outbox.over() => return Err(Ending::Over),
        };
        let message = match first {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(_)) | None) => return Err(Ending::Over),
            Err(_) => return Err(Ending::Status(invalid(&InvalidField::new("hello", "none came in time")))),
        };
        let Some(Said::Hello(hello)) = message.message else {
            return Err(Ending::Status(invalid(&InvalidField::new("hello", "the first message must be a Hello"))));
        };
        if hello.protocol != AGENT_PROTOCOL {
            let text = format!(
                "the agent {} speaks session protocol {}, this coordinator {} speaks {AGENT_PROTOCOL}",
                wire::line(&hello.version),
                hello.protocol,
                env!("CARGO_PKG_VERSION"),
            );
            return Err(Ending::Refused(ErrorCode::VersionSkew, text, Retry::No));
        }
        if hello.name != self.worker.as_str() {
            let text = format!(
                "the agent calls itself {:?}, its certificate {:?}: set `name`, or issue another certificate",
                wire::line(&hello.name),
                self.worker
            );
            return Err(Ending::Refused(ErrorCode::NotOwner, text, Retry::No));
        }
        wire::introduction(hello)
            .map_err(|wrong| Ending::Refused(ErrorCode::InvalidField, wrong.to_string(), Retry::No))
    }

    async fn open(&self, who: &Speaker) -> Result<SessionId, Ending> {
        let stopping = || Ending::Status(status(ErrorCode::ShuttingDown, "the coordinator is stopping"));
        let (answer, opened) = oneshot::channel();
        let open = Event::Open { who: who.clone(), outbox: self.outbox.clone(), answer };
        self.events.send(open).await.map_err(|_| stopping())?;
        match opened.await.map_err(|_| stopping())? {
            Ok(id) => Ok(id),
            Err(CannotOpen::NotLeader(leader)) => {
                Err(Ending::Status(helix_common::status::not_leader(leader.as_deref())))
            }
            Err(CannotOpen::Refused(code, text)) => Err(Ending::Refused(code, text, Retry::Yes)),
        }
    }

    /// Brings the registry's row in line with what the agent says of itself. A leader that others have replaced without its knowing must not get
    /// past this: what it does not know it would tell the agent to forget.
    async fn register(&self, who: &Speaker, introduction: &Introduction) -> Result<(), Ending> {
        let commands = self.consensus.with_state(|state| registration(state, who, introduction));
        if commands.is_empty() {
            let confirmed = self.consensus.barrier().await;
            return confirmed.map_err(|error| {
                Ending::Status(status(ErrorCode::NoLeader, format!("whether this node leads is not certain: {error}")))
            });
        }
        let replies = self.consensus.propose_all(commands).await.map_err(|error| Ending::Status(unproposed(&error)))?;
        for reply in replies {
            match reply {
                Reply::Rejected(Rejection::OfferInvalid(why)) => {
                    return Err(Ending::Refused(ErrorCode::InvalidField, format!("offer: {why}"), Retry::No));
                }
                Reply::Rejected(rejection) => {
                    return Err(Ending::Refused(rejection.code(), format!("{rejection:?}"), Retry::Yes));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What must be committed before the agent's row says what its `Hello` says; usually nothing.
fn registration(state: &State, who: &Speaker, introduction: &Introduction) -> Vec<Command> {
    let row = state.worker(&who.worker);
    let drained_by = row.and_then(|row| row.drain.as_ref()).map(|drain| drain.by);
    let known = row.is_some_and(|row| {
        row.instance == who.instance && row.offer == introduction.offer && row.standing == Standing::Present
    });
    let mut commands = Vec::new();
    // Registering ends the drain that an agent before asked for itself.
    if !known || (drained_by == Some(DrainedBy::Agent) && !introduction.leaving) {
        commands.push(Command::RegisterWorker(RegisterWorker {
            worker: who.worker.clone(),
            instance: who.instance.clone(),
            offer: introduction.offer.clone(),
        }));
    }
    if introduction.leaving && (!commands.is_empty() || drained_by.is_none()) {
        commands.push(drain(who));
    }
    commands
}

fn unproposed(error: &ProposeError) -> Status {
    let code = match error {
        ProposeError::OutcomeUnknown => ErrorCode::OutcomeUnknown,
        ProposeError::ShuttingDown => ErrorCode::ShuttingDown,
        ProposeError::UpgradePending { .. } => ErrorCode::UpgradePending,
        ProposeError::Storage(_) => ErrorCode::Internal,
        _ => ErrorCode::NoLeader,
    };
    status(code, format!("the worker could not be registered: {error}"))
}

/// A session that is open.
struct Conversation<'a, C> {
    session: &'a Session<C>,
    who: Speaker,
    id: SessionId,
    work: FuturesUnordered<BoxFuture<'static, (Subject, Answer)>>,
    busy: BTreeSet<Subject>,
    budget: Budget,
    malformed: u32,
    last_beat: Option<Instant>,
}

impl<'a, C: Consensus> Conversation<'a, C> {
    fn new(session: &'a Session<C>, who: Speaker, id: SessionId) -> Self {
        Self {
            session,
            who,
            id,
            work: FuturesUnordered::new(),
            busy: BTreeSet::new(),
            budget: Budget::new(Instant::now()),
            malformed: 0,
            last_beat: None,
        }
    }

    async fn run<S>(mut self, inbound: &mut S) -> Ending
    where
        S: Stream<Item = Result<agent::AgentMessage, Status>> + Send + Unpin,
    {
        let outbox = self.session.outbox.clone();
        let over = outbox.over();
        tokio::pin!(over);
        loop {
            let step = tokio::select! {
                () = &mut over => return Ending::Over,
                Some((subject, answer)) = self.work.next(), if !self.work.is_empty() => {
                    self.busy.remove(&subject);
                    self.answer(answer)
                }
                message = inbound.next() => match message {
                    Some(Ok(message)) => self.on_message(message).await,
                    Some(Err(error)) => {
                        debug!(worker = %self.who.worker, error = error.message(), "agent's stream broke");
                        return Ending::Over;
                    }
                    None => return Ending::Over,
                },
            };
            if let Err(ending) = step {
                return ending;
            }
        }
    }

    fn answer(&self, answer: Answer) -> Result<(), Ending> {
        match answer {
            Answer::Nothing => Ok(()),
            Answer::Send(message) => self
                .session
                .outbox
                .send(*message)
                .map_err(|_| Ending::Status(status(ErrorCode::StaleAttempt, "the agent does not read its session"))),
            Answer::Obsolete => Err(Ending::Status(status(
                ErrorCode::StaleAttempt,
                "the registry counts on another life of this worker, or on none: introduce yourself again",
            ))),
        }
    }

    async fn on_message(&mut self, message: agent::AgentMessage) -> Result<(), Ending> {
        if !self.budget.spend(Instant::now()) {
            let text = "the agent sends more than its session allows";
            warn!(worker = %self.who.worker, "{text}");
            return Err(Ending::Status(invalid(&InvalidField::new("session", text))));
        }
        let report = match message.message {
            Some(Said::Heartbeat(heartbeat)) => return self.on_heartbeat(heartbeat).await,
            Some(said) => self.report(said),
            // A message of a later protocol: it is for those who know it.
            None => return Ok(()),
        };
        match report {
            Ok(report) => {
                self.begin(report);
                Ok(())
            }
            Err(wrong) => self.on_malformed(&wrong),
        }
    }

    fn report(&self, said: Said) -> Result<Report, InvalidField> {
        let key = helix_proto::convert::attempt_from_wire;
        Ok(match said {
            Said::SourceResolved(said) => Report::Source { key: key(said.id)?, commit: said.commit },
            Said::ImagePushed(said) => Report::Image { key: key(said.id)?, image: wire::image(said.image)? },
            Said::Finished(said) => Report::Finished(Box::new(self.finished(said)?)),
            Said::LogSealed(said) => Report::Log { key: key(said.id)?, log: wire::sealed_log(said.log)? },
            Said::ProvenDead(said) => Report::Dead { key: key(said.id)? },
            Said::Detaching(agent::Detaching {}) => Report::Detaching,
            Said::Leaving(agent::Leaving {}) => Report::Leaving,
            Said::Hello(_) => return Err(InvalidField::new("hello", "a session has one Hello")),
            Said::Heartbeat(_) => return Err(InvalidField::new("heartbeat", "heartbeats are no reports")),
        })
    }

    /// A report that cannot be read still ends its attempt, or its build would hang until its time-out.
    fn finished(&self, said: agent::Finished) -> Result<helix_core::command::FinishAttempt, InvalidField> {
        let key = helix_proto::convert::attempt_from_wire(said.id.clone())?;
        let (exit_code, signal, unproven) = (said.exit_code, said.signal, said.unproven);
        wire::finished(said, key.clone(), &self.who).or_else(|wrong| {
            warn!(worker = %self.who.worker, attempt = %key, %wrong, "agent's report cannot be read");
            let outcome = "stopped".to_owned();
            let bare = agent::Finished { outcome, exit_code, signal, unproven, ..agent::Finished::default() };
            Ok(invalid_report(wire::finished(bare, key, &self.who)?, &wrong.to_string()))
        })
    }

    fn begin(&mut self, report: Report) {
        let subject = report.subject();
        // What is under way needs no second proposal, and what finds no room is repeated by the agent.
        if self.work.len() >= REPORTS_MAX || !self.busy.insert(subject.clone()) {
            return;
        }
        let work = carry_out(self.session.consensus.clone(), self.who.clone(), report);
        self.work.push(work.map(|answer| (subject, answer)).boxed());
    }

    async fn on_heartbeat(&mut self, heartbeat: agent::Heartbeat) -> Result<(), Ending> {
        let now = Instant::now();
        if self.last_beat.is_some_and(|last| now.duration_since(last) < BEAT_SPACING) {
            return Ok(());
        }
        self.last_beat = Some(now);
        let most = helix_model::limits::WORKER_CAPACITY_MAX as usize;
        let mut silent_ms = std::collections::BTreeMap::new();
        for progress in heartbeat.attempts.into_iter().take(most) {
            match helix_proto::convert::attempt_from_wire(progress.id) {
                Ok(key) => {
                    silent_ms.insert(key, progress.silent_ms);
                }
                Err(wrong) => self.on_malformed(&wrong)?,
            }
        }
        let agent::Heartbeat { pressure, certificate_not_after_ms, .. } = heartbeat;
        let beat = Beat { pressure: wire::line(&pressure), silent_ms, certificate_not_after_ms };
        let heard = Event::Heard { worker: self.who.worker.clone(), id: self.id, beat };
        let stopping = |_| Ending::Status(status(ErrorCode::ShuttingDown, "the coordinator is stopping"));
        self.session.events.send(heard).await.map_err(stopping)
    }

    fn on_malformed(&mut self, wrong: &InvalidField) -> Result<(), Ending> {
        self.malformed += 1;
        warn!(worker = %self.who.worker, %wrong, count = self.malformed, "malformed message from an agent");
        if self.malformed >= MALFORMED_MAX { Err(Ending::Status(invalid(wrong))) } else { Ok(()) }
    }
}
