//! The agent's loop: events to the core, the core's commands to attempts and session.
//!
//! It owns the core and all attempts' tasks, touches no disk, and awaits nothing but its inputs, so that heartbeats go out
//! whatever builds, disks and coordinators do.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_agent_core::{
    Agent, Command, Event, ExitKind, Found, Message, Mode, Report, SessionNumber, StopCause, Verdict,
};
use helix_common::shutdown::Shutdown;
use helix_common::wall;
use helix_failpoint::{self as failpoint, Point};
use helix_model::{AttemptKey, Reason};
use helix_proto::agent::coordinator_message::Message as FromLeader;
use helix_proto::agent::{self as wire_agent, AgentMessage, agent_message};
use helix_proto::convert::{attempt_from_wire, attempt_to_wire};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::attempt::{self, Begin, Handle};
use crate::config::Config;
use crate::control::DetachRequest;
use crate::services::Services;
use crate::session::{PROTOCOL, SessionEvent};
use crate::settings::Settings;
use crate::wire;

/// Between two looks at what is owed.
const TICK: Duration = Duration::from_millis(500);

/// Between two sweeps of kept workdirs.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// How long a detach waits for the leader.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// How long stopping everything may take, reports included: less than systemd and `helix dev` wait.
const STOP_ALL_LIMIT: Duration = Duration::from_secs(12);

/// How long a leader may take to hear the reports when everything was stopped and nothing else is left to do; and one who is not
/// even there. With the time that processes have to end, it is less than ten seconds.
const UNHEARD_LIMIT: Duration = Duration::from_secs(5);
const UNHEARD_ALONE_LIMIT: Duration = Duration::from_secs(2);

/// Events of attempts that wait for the loop.
const EVENTS_MAX: usize = 1024;

/// How the loop ended.
#[derive(Debug)]
pub enum Ended {
    /// In good order.
    Exit(ExitKind, Vec<DetachRequest>),
    /// The cluster does not want this agent.
    Refused(String),
}

/// The loop's inputs.
#[derive(Debug)]
pub struct Inputs {
    /// From the session.
    pub session: mpsc::Receiver<SessionEvent>,
    /// From the control socket.
    pub detach: mpsc::Receiver<DetachRequest>,
    /// From the process's signals.
    pub shutdown: Shutdown,
    /// The newest settings.
    pub settings: watch::Receiver<Option<Arc<Settings>>>,
}

/// Runs until there is a reason to exit. `found` is what lay in the spool.
pub async fn run(services: Arc<Services>, found: Vec<(AttemptKey, Found)>, inputs: Inputs) -> Ended {
    let (events_tx, events) = mpsc::channel(EVENTS_MAX);
    let mut running = Loop {
        services,
        core: Agent::default(),
        attempts: HashMap::new(),
        outbox: None,
        events_tx,
        started: Instant::now(),
        side_tasks: JoinSet::new(),
        detaching: Vec::new(),
        ended: None,
        unheard_since: None,
    };
    let mut allowed = running.services.allowed.changes();
    running.take_limit(&allowed.borrow_and_update());
    for (key, found) in found {
        running.take(Event::AttemptFound(key, found));
    }
    running.run(events, inputs, allowed).await
}

struct Loop {
    services: Arc<Services>,
    core: Agent,
    attempts: HashMap<AttemptKey, Handle>,
    outbox: Option<(SessionNumber, mpsc::Sender<AgentMessage>)>,
    events_tx: mpsc::Sender<Event>,
    started: Instant,
    /// Bytes stored again, kept workdirs swept.
    side_tasks: JoinSet<()>,
    detaching: Vec<DetachRequest>,
    ended: Option<Ended>,
    /// Since when there is nothing to do but to report to a leader who is not there.
    unheard_since: Option<Instant>,
}

impl Loop {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut inputs: Inputs,
        mut allowed: watch::Receiver<Arc<Config>>,
    ) -> Ended {
        let mut tick = interval(TICK);
        let mut sweep = interval(SWEEP_INTERVAL);
        let mut heartbeat = interval(Duration::from_secs(1));
        for timer in [&mut tick, &mut sweep, &mut heartbeat] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let (mut stop_all_by, mut detach_by) = (None, None);
        loop {
            if let Some(ended) = self.ended.take() {
                return ended;
            }
            let (draining, stopping) = (self.core.mode() != Mode::Working, self.core.mode() == Mode::Stopping);
            tokio::select! {
                // Heartbeats first: they keep the lease.
                biased;
                _ = heartbeat.tick() => self.heartbeat(),
                Some(event) = inputs.session.recv() => self.session_event(event),
                Some(event) = events.recv() => self.take(event),
                Ok(()) = inputs.settings.changed() => {
                    if let Some(settings) = inputs.settings.borrow_and_update().as_ref()
                        && settings.heartbeat_interval != heartbeat.period()
                    {
                        heartbeat = interval(settings.heartbeat_interval);
                        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    }
                }
                Ok(()) = allowed.changed() => self.take_limit(&allowed.borrow_and_update()),
                () = inputs.shutdown.graceful().cancelled(), if !draining => self.take(Event::DrainAsked),
                () = inputs.shutdown.forced().cancelled(), if !stopping && stop_all_by.is_none() => {
                    stop_all_by = Some(tokio::time::Instant::now() + STOP_ALL_LIMIT);
                    self.take(Event::StopAllAsked);
                }
                Some(request) = inputs.detach.recv() => {
                    self.detaching.push(request);
                    detach_by.get_or_insert_with(|| tokio::time::Instant::now() + DETACH_LIMIT);
                    self.take(Event::DetachAsked);
                }
                () = until(stop_all_by) => {
                    stop_all_by = Some(tokio::time::Instant::now() + STOP_ALL_LIMIT);
                    self.take(Event::StopAllTimedOut);
                }
                () = until(detach_by) => {
                    detach_by = None;
                    self.take(Event::DetachTimedOut);
                }
                _ = tick.tick() => self.tick(),
                _ = sweep.tick() => self.sweep_kept(),
                Some(_) = self.side_tasks.join_next(), if !self.side_tasks.is_empty() => {}
            }
        }
    }

    fn take(&mut self, event: Event) {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut commands = Vec::new();
        if let Event::AttemptRemoved(key, _) = &event {
            self.attempts.remove(key);
        }
        self.core.on(now_ms, event, &mut commands);
        for command in commands {
            self.perform(command);
        }
    }

    fn take_limit(&mut self, config: &Config) {
        self.take(Event::CutOffLimitSet(config.policy.stop_cut_off_after_ms));
    }

    fn perform(&mut self, command: Command) {
        match command {
            Command::Start(assignment) => {
                let key = assignment.key.clone();
                tracing::info!(build_id = %key.build, attempt = %key.attempt, task = %key.task, "an attempt was assigned");
                self.start(key, Begin::Fresh(assignment));
            }
            Command::Resume(key) => self.start(key, Begin::Found),
            Command::GiveCommit(key, commit) => self.wish(&key, |wishes| wishes.commit = Some(commit)),
            Command::GiveImages(key, images) => self.wish(&key, |wishes| wishes.images = Some(images)),
            Command::Stop(key, cause) => {
                if let StopCause::CutOff { limit_ms } = cause {
                    tracing::warn!(attempt = %key, limit_ms, "no leader for too long: an attempt is stopped");
                }
                self.wish(&key, |wishes| wishes.stop = Some(cause));
            }
            Command::Remove(key) => self.wish(&key, |wishes| {
                wishes.stop.get_or_insert(StopCause::Registry(Reason::Cancelled));
                wishes.remove = true;
            }),
            Command::StoreAgain(key, report) => self.store_again(key, report),
            Command::Send(message) => {
                let finished = matches!(message, Message::Finished { .. });
                if let Message::Finished { key, report } = &message {
                    log_end(key, report);
                    failpoint::pass(Point::ReportSend);
                }
                self.send(wire::message_to_wire(&message));
                if finished {
                    failpoint::pass(Point::ReportSent);
                }
            }
            Command::Exit(kind) => {
                self.ended = Some(Ended::Exit(kind, std::mem::take(&mut self.detaching)));
            }
        }
    }

    fn start(&mut self, key: AttemptKey, begin: Begin) {
        let handle = attempt::start(Arc::clone(&self.services), key.clone(), begin, self.events_tx.clone());
        self.attempts.insert(key, handle);
    }

    fn wish(&mut self, key: &AttemptKey, wish: impl FnOnce(&mut attempt::Wishes)) {
        if let Some(handle) = self.attempts.get(key) {
            handle.wishes.send_modify(wish);
        }
    }

    /// Loss is harmless: what is not sent now is owed, and said again.
    fn send(&mut self, message: AgentMessage) {
        if let Some((_, outbox)) = &self.outbox
            && outbox.try_send(message).is_err()
        {
            tracing::debug!("a message was not sent: the session is slow or over");
        }
    }

    fn session_event(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::HelloWanted(answer) => {
                // The session was given up meanwhile when nobody takes it.
                let _ = answer.send(self.hello());
            }
            SessionEvent::Opened(session, outbox) => {
                self.outbox = Some((session, outbox));
                self.take(Event::SessionOpened(session));
                self.heartbeat();
            }
            SessionEvent::Closed(session) => {
                if self.outbox.as_ref().is_some_and(|(current, _)| *current == session) {
                    self.outbox = None;
                }
                self.take(Event::SessionClosed(session));
            }
            SessionEvent::Said(session, message) => self.said(session, *message),
            SessionEvent::Refused(why) => self.ended = Some(Ended::Refused(why)),
        }
    }

    fn said(&mut self, session: SessionNumber, message: FromLeader) {
        // What cannot be read must not lie about as assigned for ever.
        let assigned = match &message {
            FromLeader::Assign(assign) => attempt_from_wire(assign.id.clone()).ok(),
            _ => None,
        };
        match wire::order_from_wire(message) {
            Ok(Some(order)) => self.take(Event::Said(session, order)),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "the leader said something that makes no sense");
                if let Some(key) = assigned {
                    let message = format!("the agent cannot read the assignment: {error}");
                    let verdict = Verdict::Failed { reason: Reason::Internal, message };
                    let report = Arc::new(Report::bare(verdict));
                    self.send(wire::message_to_wire(&Message::Finished { key, report }));
                }
            }
        }
    }

    fn hello(&self) -> wire_agent::Hello {
        let offered = self.core.offered();
        wire_agent::Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: self.services.config.name.clone(),
            instance: self.services.data.instance().as_str().to_owned(),
            offer: Some(wire::offer(
                &self.services.allowed.current(),
                self.services.isolated.word(),
                &self.services.limiter.words(),
                &self.services.disks,
                &self.services.podman.standing().borrow(),
            )),
            attempts: offered
                .map(|(key, ended)| wire_agent::OfferedAttempt { id: Some(attempt_to_wire(key)), ended })
                .collect(),
            leaving: matches!(self.core.mode(), Mode::Draining | Mode::Stopping),
        }
    }

    fn heartbeat(&mut self) {
        if self.outbox.is_none() {
            return;
        }
        let progress = |(key, attempt): (&AttemptKey, &helix_agent_core::Attempt)| wire_agent::AttemptProgress {
            id: Some(attempt_to_wire(key)),
            phase: attempt.phase_word().to_owned(),
            silent_ms: self.attempts.get(key).map_or(0, |handle| handle.last_output.silent_ms(&attempt.phase)),
        };
        let attempts = self.core.attempts().map(progress).collect();
        let heartbeat = wire_agent::Heartbeat {
            attempts,
            pressure: self.services.disks.pressure(),
            certificate_not_after_ms: wall::message_ms(self.services.tls.not_after()),
        };
        self.send(AgentMessage { message: Some(agent_message::Message::Heartbeat(heartbeat)) });
    }

    fn tick(&mut self) {
        self.take(Event::Ticked);
        self.leave_unheard();
        // A task ends by itself only after a removal; one that panicked has to be told of.
        let over: Vec<AttemptKey> =
            self.attempts.iter().filter(|(_, handle)| handle.is_over()).map(|(key, _)| key.clone()).collect();
        for key in over {
            let known = self.core.attempts().any(|(other, _)| *other == key);
            if known {
                tracing::error!(attempt = %key, "an attempt's task ended by a fault of ours; it is taken on again");
                let wished = self.attempts.remove(&key).map(|handle| handle.wishes.borrow().clone());
                // Which images there are is asked again, about the image that is pushed again.
                let wished = wished.map(|wished| attempt::Wishes { images: None, ..wished });
                self.start(key.clone(), Begin::Found);
                // What was wanted of it still is: nobody will say so again.
                self.wish(&key, |wishes| *wishes = wished.unwrap_or_default());
            }
        }
    }

    /// Ends an agent that was told to stop everything, has, and is not heard: the reports are on disk, for the next one.
    fn leave_unheard(&mut self) {
        let stopped =
            self.core.mode() == Mode::Stopping && self.core.attempts().all(|(_, attempt)| attempt.has_ended());
        if !stopped {
            self.unheard_since = None;
            return;
        }
        let limit = if self.outbox.is_some() { UNHEARD_LIMIT } else { UNHEARD_ALONE_LIMIT };
        if self.unheard_since.get_or_insert_with(Instant::now).elapsed() >= limit {
            self.take(Event::StopAllTimedOut);
        }
    }

    fn store_again(&mut self, key: AttemptKey, report: Arc<Report>) {
        let (services, events) = (Arc::clone(&self.services), self.events_tx.clone());
        self.side_tasks.spawn(async move {
            let stored = attempt::store_again(&services, &key, &report).await;
            // Nobody listens when the agent is ending.
            let _ = events.send(Event::StoredAgain(key, Box::new(stored))).await;
        });
    }

    fn sweep_kept(&mut self) {
        let services = Arc::clone(&self.services);
        self.side_tasks.spawn_blocking(move || {
            if let Err(error) = attempt::workdir::remove_expired(&services.work_root, wall::now_ms()) {
                tracing::warn!(%error, "kept workdirs cannot be removed");
            }
            services.limiter.put_away(|key| services.data.attempt(key).root().exists());
        });
    }
}

fn log_end(key: &AttemptKey, report: &Report) {
    let (build_id, attempt) = (&key.build, key.attempt);
    match &report.verdict {
        Verdict::Succeeded { .. } => tracing::debug!(%build_id, %attempt, "reporting success"),
        Verdict::Failed { reason, message } => {
            tracing::debug!(%build_id, %attempt, %reason, message, "reporting failure")
        }
        Verdict::Stopped => tracing::debug!(%build_id, %attempt, "reporting a stop"),
    }
}

/// A moment that may never come.
async fn until(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// What an agent that starts finds in its spool. Workdirs of attempts that were reported, and whatever belongs to no attempt, are
/// removed before anything is said. Blocks.
///
/// # Errors
/// When the spool cannot be read.
pub fn recover(services: &Services) -> std::io::Result<Vec<(AttemptKey, Found)>> {
    let (keys, strangers) = services.data.attempts()?;
    for stranger in strangers {
        tracing::warn!(path = %stranger.display(), "this lies in the spool and is no attempt's");
    }
    let mut found = Vec::new();
    for key in keys {
        let dir = services.data.attempt(&key);
        match attempt::classify(&dir) {
            Ok(Some(kind)) => {
                if let Found::Reported(_) = kind {
                    attempt::workdir::Workdir::new(&services.work_root, &key).remove()?;
                }
                found.push((key, kind));
            }
            // The agent died before it had the assignment on disk: the leader sends it again.
            Ok(None) => attempt::workdir::remove_tree(dir.root())?,
            Err(error) => {
                tracing::error!(attempt = %key, %error, "an attempt's spool is damaged");
                found.push((key, Found::Started));
            }
        }
    }
    for entry in std::fs::read_dir(&services.work_root)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let owned = name.starts_with('.') || found.iter().any(|(key, _)| key.to_string() == name);
        if !owned {
            attempt::workdir::remove_whole(&path)?;
        }
    }
    services.limiter.put_away(|key| found.iter().any(|(other, _)| other == key));
    services.secrets.sweep(found.iter().map(|(key, _)| key))?;
    tracing::info!(attempts = found.len(), "the spool was read");
    Ok(found)
}
