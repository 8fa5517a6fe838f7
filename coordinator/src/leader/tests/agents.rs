//! Agents that are two channels: they say what a test has them say, in real messages that went over the wire's encoding.

use futures::StreamExt;
use helix_model::{AttemptKey, WorkerName};
use helix_proto::agent;
use helix_proto::agent::agent_message::Message as Said;
use helix_proto::agent::coordinator_message::Message;
use helix_proto::convert::{attempt_from_wire, attempt_to_wire};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::world::PATIENCE;
use crate::leader::{Consensus, Leader, Outgoing};

pub(crate) const INSTANCE: &str = "data.boot";

/// One connection of an agent.
pub(crate) struct Agent {
    said: mpsc::Sender<Result<agent::AgentMessage, Status>>,
    heard: Outgoing,
}

pub(crate) fn worker(name: &str) -> WorkerName {
    WorkerName::new(name).unwrap()
}

/// A `Hello` that is taken.
pub(crate) fn hello(name: &str, capacity: u32) -> agent::Hello {
    agent::Hello {
        protocol: helix_proto::AGENT_PROTOCOL,
        version: "1".to_owned(),
        name: name.to_owned(),
        instance: INSTANCE.to_owned(),
        offer: Some(agent::Offer {
            capacity,
            platforms: vec!["linux/amd64".to_owned()],
            executors: vec!["exec".to_owned()],
            allows_job_commands: true,
            ..agent::Offer::default()
        }),
        attempts: Vec::new(),
        leaving: false,
    }
}

pub(crate) fn offered(key: &AttemptKey, ended: bool) -> agent::OfferedAttempt {
    agent::OfferedAttempt { id: Some(attempt_to_wire(key)), ended }
}

pub(crate) fn stored_log() -> agent::StoredLog {
    let blob = agent::StoredBlob { sha256: vec![2; 32].into(), size: 3, holders: vec![1] };
    agent::StoredLog { blob: Some(blob), lines: 4 }
}

pub(crate) fn succeeded(key: &AttemptKey) -> agent::Finished {
    agent::Finished {
        id: Some(attempt_to_wire(key)),
        outcome: "succeeded".to_owned(),
        exit_code: Some(0),
        log: Some(stored_log()),
        ..agent::Finished::default()
    }
}

pub(crate) fn failed(key: &AttemptKey) -> agent::Finished {
    let failed =
        agent::Finished { outcome: "failed".to_owned(), reason: "exit".to_owned(), log: None, ..succeeded(key) };
    agent::Finished { exit_code: Some(1), ..failed }
}

impl Agent {
    /// Opens a session and says hello.
    pub(crate) async fn dial<C: Consensus>(leader: &Leader<C>, hello: agent::Hello) -> Self {
        let mut agent = Self::silent(leader, &hello.name);
        agent.say(Said::Hello(hello)).await;
        agent
    }

    pub(crate) fn silent<C: Consensus>(leader: &Leader<C>, name: &str) -> Self {
        let (said, inbound) = mpsc::channel(16);
        let heard = leader.session(worker(name), ReceiverStream::new(inbound)).unwrap();
        Self { said, heard }
    }

    /// Opens a session and waits for the welcome.
    pub(crate) async fn connect<C: Consensus>(leader: &Leader<C>, hello: agent::Hello) -> Self {
        let mut agent = Self::dial(leader, hello).await;
        match agent.next().await {
            Message::Welcome(_) => agent,
            other => panic!("no welcome but {other:?}"),
        }
    }

    pub(crate) async fn say(&mut self, message: Said) {
        let bytes = agent::AgentMessage { message: Some(message) }.encode_to_vec();
        // The session may be over, which the test sees by what it hears.
        let _ = self.said.send(Ok(agent::AgentMessage::decode(&*bytes).unwrap())).await;
    }

    pub(crate) async fn beat(&mut self) {
        self.say(Said::Heartbeat(agent::Heartbeat::default())).await;
    }

    pub(crate) async fn finish(&mut self, finished: agent::Finished) {
        self.say(Said::Finished(finished)).await;
    }

    /// The next message, or the end.
    pub(crate) async fn hear(&mut self) -> Option<Result<Message, Status>> {
        let next = tokio::time::timeout(PATIENCE, self.heard.next()).await.expect("a message in time");
        next.map(|message| message.map(|message| message.message.unwrap()))
    }

    pub(crate) async fn next(&mut self) -> Message {
        self.hear().await.expect("a message").expect("no error")
    }

    /// The next message, with heartbeats while there is none.
    pub(crate) async fn next_while_beating(&mut self) -> Message {
        let wait = std::time::Duration::from_millis(150);
        loop {
            match tokio::time::timeout(wait, self.next()).await {
                Ok(message) => return message,
                Err(_) => self.beat().await,
            }
        }
    }

    /// The next message, which assigns.
    pub(crate) async fn assigned(&mut self) -> AttemptKey {
        match self.next().await {
            Message::Assign(assign) => attempt_from_wire(assign.id).unwrap(),
            other => panic!("no assignment but {other:?}"),
        }
    }

    /// Like [`Self::assigned`], with heartbeats meanwhile.
    pub(crate) async fn assigned_while_beating(&mut self) -> AttemptKey {
        let wait = std::time::Duration::from_millis(50);
        loop {
            self.beat().await;
            if let Ok(key) = tokio::time::timeout(wait, self.assigned()).await {
                return key;
            }
        }
    }

    pub(crate) async fn stopped(&mut self) -> AttemptKey {
        match self.next().await {
            Message::Stop(stop) => attempt_from_wire(stop.id).unwrap(),
            other => panic!("no stop but {other:?}"),
        }
    }

    pub(crate) async fn forgotten(&mut self) -> AttemptKey {
        match self.next().await {
            Message::Forget(forget) => attempt_from_wire(forget.id).unwrap(),
            other => panic!("no forget but {other:?}"),
        }
    }

    /// Reads until the stream ends, and answers how.
    pub(crate) async fn ended(&mut self) -> Option<Status> {
        loop {
            match self.hear().await {
                Some(Ok(_)) => {}
                Some(Err(status)) => return Some(status),
                None => return None,
            }
        }
    }

    pub(crate) async fn refused(&mut self) -> agent::Refused {
        match self.next().await {
            Message::Refused(refused) => refused,
            other => panic!("not refused but {other:?}"),
        }
    }
}
