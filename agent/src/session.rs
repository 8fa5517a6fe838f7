//! The session with the leader: found by hints, opened with a Hello, opened again with jitter whenever it ends.
//!
//! Nothing is decided here: what is said goes to the agent, what the agent says goes out. Invariant: the agent hears
//! of a session's end before it hears of the next one's beginning.

use std::sync::Arc;
use std::time::Duration;

use helix_agent_core::SessionNumber;
use helix_common::backoff::Backoff;
use helix_common::channel::Traffic;
use helix_common::endpoints::{Endpoints, Verdict};
use helix_common::status::not_leader;
use helix_proto::agent::agent_service_client::AgentServiceClient;
use helix_proto::agent::coordinator_message::Message as FromLeader;
use helix_proto::agent::{AgentMessage, Hello, Refused, agent_message};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::config::Config;
use crate::executor::podman::Standing;
use crate::settings::Settings;

/// Version of the session's protocol.
pub const PROTOCOL: u32 = 1;

/// Messages that wait to be sent; beyond it they are dropped and repeated later.
pub const OUTBOX_MAX: usize = 1024;

/// How long a coordinator may take to welcome or refuse.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);

/// Leader hints followed without a pause.
const HINTS_IN_A_ROW_MAX: u32 = 3;

/// Between tries at finding the leader, at first and at most.
const WAIT_BASE: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Tries in one lease, at least: who looks for a new leader less often than that loses its builds to a lease that it could keep.
const TRIES_PER_LEASE: u32 = 12;

/// What the agent hears of its sessions.
#[derive(Debug)]
pub enum SessionEvent {
    /// The agent is asked to introduce itself.
    HelloWanted(oneshot::Sender<Hello>),
    /// A leader welcomed us; what goes into the outbox reaches it.
    Opened(SessionNumber, mpsc::Sender<AgentMessage>),
    /// The leader said something that concerns attempts.
    Said(SessionNumber, Box<FromLeader>),
    /// The session is over.
    Closed(SessionNumber),
    /// We are not wanted, and trying again would not help.
    Refused(String),
}

/// What changes the offer.
#[derive(Debug)]
pub struct OfferChanges {
    /// Whether podman works.
    pub podman: watch::Receiver<Standing>,
    /// Policy and secrets.
    pub allowed: watch::Receiver<Arc<Config>>,
}

impl OfferChanges {
    fn forget(&mut self) {
        self.podman.mark_unchanged();
        self.allowed.mark_unchanged();
    }

    async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.podman.changed() => {}
            Ok(()) = self.allowed.changed() => {}
            // Both are gone: the agent is ending.
            else => std::future::pending().await,
        }
    }
}

/// Keeps a session open until the agent hears no more. When `offer` changes a new one begins, since a session has one Hello.
pub async fn keep(
    endpoints: Endpoints,
    agent: mpsc::Sender<SessionEvent>,
    settings: watch::Sender<Option<Arc<Settings>>>,
    mut offer: OfferChanges,
) {
    let mut number = 0;
    let mut hints = 0;
    let mut backoff = Backoff::new(WAIT_BASE, WAIT_MAX);
    while !agent.is_closed() {
        number += 1;
        let session = SessionNumber(number);
        let (endpoint, channel) = match endpoints.channel(Traffic::Control) {
            Ok(chosen) => chosen,
            Err(error) => {
                let _ = agent.send(SessionEvent::Refused(error.to_string())).await;
                return;
            }
        };
        offer.forget();
        let ended = hold(session, channel, &endpoints, &agent, &settings, &mut offer).await;
        if ended.was_open {
            tracing::info!(%endpoint, "the session ended");
            hints = 0;
            backoff.reset();
            if agent.send(SessionEvent::Closed(session)).await.is_err() {
                return;
            }
        }
        let status = match ended.why {
            Why::Refused(Refused { reason, message, retry: false }) => {
                let _ = agent.send(SessionEvent::Refused(format!("{reason}: {message}"))).await;
                return;
            }
            Why::Refused(Refused { reason, message, retry: true }) => {
                tracing::error!(%endpoint, reason, message, "the cluster refuses this agent; trying again");
                Status::unavailable("refused")
            }
            Why::Renewed => continue,
            Why::Moved(leader) => not_leader(Some(&leader).filter(|leader| !leader.is_empty()).map(String::as_str)),
            Why::Broken(status) => status,
        };
        let verdict = endpoints.observe(&endpoint, &status);
        match verdict {
            Verdict::Leader(_) if hints < HINTS_IN_A_ROW_MAX => {
                hints += 1;
                continue;
            }
            Verdict::Leader(_) => hints = 0,
            // Whatever it was, another coordinator may answer otherwise.
            Verdict::Final | Verdict::Again(_) => endpoints.rotate(&endpoint),
            Verdict::Elsewhere(_) => {}
        }
        tracing::debug!(%endpoint, %status, "no session");
        if backoff.failures() == 10 {
            tracing::warn!(%endpoint, %status, "no coordinator takes this agent; builds go on meanwhile");
        }
        let lease = settings.borrow().as_ref().map(|settings| settings.worker_lease);
        let longest = lease.map_or(WAIT_MAX, |lease| (lease / TRIES_PER_LEASE).max(WAIT_BASE));
        tokio::time::sleep(backoff.next_wait().min(longest)).await;
    }
}

struct Ended {
    was_open: bool,
    why: Why,
}

enum Why {
    Refused(Refused),
    Moved(String),
    /// What is offered has changed.
    Renewed,
    Broken(Status),
}

/// Takes in what the leader says of the cluster; above all who its coordinators are, or an agent that outlives those it was
/// configured with would find nobody.
fn note_settings(newer: Option<Arc<Settings>>, endpoints: &Endpoints, settings: &watch::Sender<Option<Arc<Settings>>>) {
    if let Some(newer) = &newer {
        endpoints.learn(newer.coordinators.iter().map(|(_, endpoint)| endpoint.clone()));
    }
    settings.send_replace(newer);
}

/// One session, from its Hello to its end.
async fn hold(
    session: SessionNumber,
    channel: Channel,
    endpoints: &Endpoints,
    agent: &mpsc::Sender<SessionEvent>,
    settings: &watch::Sender<Option<Arc<Settings>>>,
    offer: &mut OfferChanges,
) -> Ended {
    let (outbox, rx) = mpsc::channel(OUTBOX_MAX);
    let opened = tokio::time::timeout(WELCOME_LIMIT, open(channel, outbox.clone(), rx, agent)).await;
    let opened = opened.unwrap_or_else(|_| Err(Why::Broken(Status::unavailable("no welcome in time"))));
    let (welcomed, mut messages) = match opened {
        Ok(opened) => opened,
        Err(why) => return Ended { was_open: false, why },
    };
    note_settings(welcomed.map(Arc::new), endpoints, settings);
    if agent.send(SessionEvent::Opened(session, outbox)).await.is_err() {
        return Ended { was_open: false, why: Why::Broken(Status::cancelled("the agent is ending")) };
    }
    let why = tokio::select! {
        why = listen(session, &mut messages, endpoints, agent, settings) => why,
        () = offer.changed() => Why::Renewed,
    };
    Ended { was_open: true, why }
}

async fn open(
    channel: Channel,
    outbox: mpsc::Sender<AgentMessage>,
    rx: mpsc::Receiver<AgentMessage>,
    agent: &mpsc::Sender<SessionEvent>,
) -> Result<(Option<Settings>, Streaming<helix_proto::agent::CoordinatorMessage>), Why> {
    let ending = || Why::Broken(Status::cancelled("the agent is ending"));
    let (tx, hello) = oneshot::channel();
    agent.send(SessionEvent::HelloWanted(tx)).await.map_err(|_| ending())?;
    let hello = AgentMessage { message: Some(agent_message::Message::Hello(hello.await.map_err(|_| ending())?)) };
    outbox.send(hello).await.map_err(|_| ending())?;
    let mut client = AgentServiceClient::new(channel);
    let mut messages = client.session(ReceiverStream::new(rx)).await.map_err(Why::Broken)?.into_inner();
    match messages.message().await.map_err(Why::Broken)?.and_then(|first| first.message) {
        Some(FromLeader::Welcome(welcome)) => {
            tracing::info!(version = welcome.version, "the leader welcomed this agent");
            Ok((welcome.settings.map(Settings::from), messages))
        }
        Some(FromLeader::Refused(refused)) => Err(Why::Refused(refused)),
        Some(FromLeader::Moved(moved)) => Err(Why::Moved(moved.leader)),
        _ => Err(Why::Broken(Status::unavailable("neither welcomed nor refused"))),
    }
}

async fn listen(
    session: SessionNumber,
    messages: &mut Streaming<helix_proto::agent::CoordinatorMessage>,
    endpoints: &Endpoints,
    agent: &mpsc::Sender<SessionEvent>,
    settings: &watch::Sender<Option<Arc<Settings>>>,
) -> Why {
    loop {
        let message = match messages.message().await {
            Ok(Some(message)) => message.message,
            Ok(None) => return Why::Broken(Status::unavailable("the coordinator ended the session")),
            Err(status) => return Why::Broken(status),
        };
        match message {
            Some(FromLeader::Settings(newer)) => {
                note_settings(Some(Arc::new(newer.into())), endpoints, settings);
            }
            Some(FromLeader::Moved(moved)) => return Why::Moved(moved.leader),
            Some(FromLeader::Refused(refused)) => return Why::Refused(refused),
            Some(other) => match agent.send(SessionEvent::Said(session, Box::new(other))).await {
                Ok(()) => {}
                Err(_) => return Why::Broken(Status::cancelled("the agent is ending")),
            },
            // Of a later version: it has to be harmless to us, or the leader would not say it.
            None => {}
        }
    }
}
