//! Consensus without consensus: one state in memory, commands applied at once, a clock that tests set, and failures that they choose.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use helix_core::command::{Authority, CancelBuild, SubmitBuild};
use helix_core::record::{Applied, BuildRecord};
use helix_core::state::{Known, State};
use helix_core::{Command, Effect, Reply};
use helix_model::{BuildId, BuildSpec, Digest, Executor, LogTime, NodeId, WorkerName};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::leader::{Consensus, Leader, LeaderLoop};
use crate::registry::{Leadership, ProposeError, ReadError};

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What becomes of a proposal that a test wants to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Not committed, and nobody knows.
    Lost,
    /// Committed, and nobody knows.
    Unanswered,
    /// Committed, and its effects are lost.
    Mute,
}

type Matcher = fn(&Command) -> bool;

#[derive(Clone)]
pub(crate) struct World(Arc<Inner>);

struct Inner {
    state: RwLock<State>,
    effects: broadcast::Sender<Arc<[Effect]>>,
    leadership: watch::Sender<Leadership>,
    now_ms: AtomicU64,
    leapt_ms: AtomicU64,
    confirmed: AtomicBool,
    faults: Mutex<VecDeque<(Matcher, Fault)>>,
    history: Mutex<Vec<(Command, Reply)>>,
}

impl World {
    /// A world that leads in term 1, and its loop.
    pub(crate) fn leading() -> (Self, Leader<Self>) {
        let leadership = Leadership { leader: Some(NodeId(1)), term: 1, is_leader: true };
        let world = Self(Arc::new(Inner {
            state: RwLock::new(State::default()),
            effects: broadcast::Sender::new(64),
            leadership: watch::Sender::new(leadership),
            now_ms: AtomicU64::new(1_000_000),
            leapt_ms: AtomicU64::new(0),
            confirmed: AtomicBool::new(true),
            faults: Mutex::default(),
            history: Mutex::default(),
        }));
        let leader = LeaderLoop::spawn(world.clone(), CancellationToken::new());
        (world, leader)
    }

    /// The next command that matches meets this fate.
    pub(crate) fn fail_next(&self, matcher: Matcher, fault: Fault) {
        self.0.faults.lock().unwrap().push_back((matcher, fault));
    }

    pub(crate) fn advance_ms(&self, ms: u64) {
        self.0.now_ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// The clock is moved, and no time passes.
    pub(crate) fn leap_ms(&self, ms: u64) {
        self.0.leapt_ms.fetch_add(ms, Ordering::SeqCst);
        self.advance_ms(ms);
    }

    /// Whether a majority confirms that this node leads.
    pub(crate) fn confirm(&self, confirmed: bool) {
        self.0.confirmed.store(confirmed, Ordering::SeqCst);
    }

    pub(crate) fn lead(&self, term: u64) {
        self.0.leadership.send_replace(Leadership { leader: Some(NodeId(1)), term, is_leader: true });
    }

    pub(crate) fn follow(&self, leader: u64, term: u64) {
        self.0.leadership.send_replace(Leadership { leader: Some(NodeId(leader)), term, is_leader: false });
    }

    /// Applies a command as if somebody else had proposed it.
    pub(crate) fn apply(&self, command: Command) -> Reply {
        self.commit(command, true)
    }

    fn commit(&self, command: Command, audible: bool) -> Reply {
        let mut out = Applied::default();
        let reply = self.0.state.write().unwrap().apply(self.now(), &command, &mut out);
        self.0.history.lock().unwrap().push((command, reply.clone()));
        if audible {
            self.0.effects.send(out.effects.into()).unwrap();
        }
        reply
    }

    pub(crate) fn submit(&self, id: &str) -> BuildId {
        let spec = BuildSpec {
            repo_url: "https://h/p".to_owned(),
            executor: Some(Executor::Exec),
            command: Some(helix_model::Command::Shell("make".to_owned())),
            ..BuildSpec::default()
        };
        self.submit_spec(id, spec)
    }

    pub(crate) fn submit_spec(&self, id: &str, spec: BuildSpec) -> BuildId {
        let build = BuildId::new(id).unwrap();
        let submit = SubmitBuild {
            build: build.clone(),
            spec: Arc::new(spec),
            spec_digest: Digest([1; 32]),
            submitted_by: "client/c".to_owned(),
            retry_of: None,
        };
        assert_eq!(self.apply(Command::SubmitBuild(submit)), Reply::Submitted);
        build
    }

    pub(crate) fn cancel(&self, build: &BuildId) {
        let authority = Authority::Any("operator/o".to_owned());
        let cancel = CancelBuild { build: build.clone(), authority, reason: String::new() };
        assert_eq!(self.apply(Command::CancelBuild(cancel)), Reply::Done);
    }

    /// All commands of a kind that were carried out.
    pub(crate) fn done(&self, matcher: Matcher) -> Vec<Command> {
        let history = self.0.history.lock().unwrap();
        let done = history.iter().filter(|(command, reply)| matcher(command) && !matches!(reply, Reply::Rejected(_)));
        done.map(|(command, _)| command.clone()).collect()
    }

    pub(crate) fn refused(&self) -> Vec<(Command, Reply)> {
        let history = self.0.history.lock().unwrap();
        history.iter().filter(|(_, reply)| matches!(reply, Reply::Rejected(_))).cloned().collect()
    }

    /// An open build.
    pub(crate) fn open(&self, build: &BuildId) -> Arc<BuildRecord> {
        self.with_state(|state| match state.build(build) {
            Some(Known::Open(record)) => Arc::clone(record),
            other => panic!("{build} is not open: {other:?}"),
        })
    }

    pub(crate) fn with<R>(&self, read: impl FnOnce(&State) -> R) -> R {
        self.with_state(read)
    }

    /// Makes these the voters.
    pub(crate) fn members(&self, voters: &[u64]) {
        let voters = voters.iter().copied().map(NodeId).collect();
        self.0.state.write().unwrap().apply_membership(voters, &mut Applied::default());
    }

    /// Sends more effects at once than a receiver can be behind.
    pub(crate) fn overflow_effects(&self) {
        for _ in 0..200 {
            self.0.effects.send(Arc::from(Vec::new())).unwrap();
        }
    }

    /// Waits for the worker's load, where no effect tells.
    pub(crate) async fn until_running_on_quietly(&self, worker: &WorkerName, count: u32) {
        let waiting = async {
            while self.with_state(|state| state.load_of(worker)) != count {
                tokio::task::yield_now().await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{count} attempts do not run on {worker}");
    }

    /// Waits until the state is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let mut effects = self.0.effects.subscribe();
        let waiting = async {
            while !self.with_state(&wanted) {
                // Lagging means that something happened: look again.
                let _ = effects.recv().await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "in vain: {what}");
    }

    pub(crate) async fn until_finished(&self, build: &BuildId) {
        self.until("the build ends", |state| matches!(state.build(build), Some(Known::Finished(_)))).await;
    }
}

impl Consensus for World {
    async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        Ok(self.propose_all(vec![command]).await?.remove(0))
    }

    async fn propose_all(&self, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        tokio::task::yield_now().await;
        if !self.0.leadership.borrow().is_leader {
            return Err(ProposeError::NoLeader { hint: None });
        }
        let mut replies = Vec::new();
        for command in commands {
            let fault = {
                let mut faults = self.0.faults.lock().unwrap();
                let place = faults.iter().position(|(matcher, _)| matcher(&command));
                place.and_then(|place| faults.remove(place)).map(|(_, fault)| fault)
            };
            match fault {
                None => replies.push(self.commit(command, true)),
                Some(Fault::Mute) => replies.push(self.commit(command, false)),
                Some(Fault::Lost) => return Err(ProposeError::OutcomeUnknown),
                Some(Fault::Unanswered) => {
                    self.commit(command, true);
                    return Err(ProposeError::OutcomeUnknown);
                }
            }
        }
        Ok(replies)
    }

    async fn propose_in_term(&self, term: u64, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        if self.0.leadership.borrow().term != term {
            return Err(ProposeError::NoLeader { hint: None });
        }
        self.propose_all(commands).await
    }

    async fn barrier(&self) -> Result<(), ReadError> {
        let confirmed = self.0.confirmed.load(Ordering::SeqCst);
        confirmed.then_some(()).ok_or(ReadError::NoLeader { hint: None })
    }

    fn with_state<R>(&self, read: impl FnOnce(&State) -> R) -> R {
        read(&self.0.state.read().unwrap())
    }

    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        self.0.effects.subscribe()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership.subscribe()
    }

    fn now(&self) -> LogTime {
        LogTime(self.0.now_ms.load(Ordering::SeqCst))
    }

    fn leapt_ms(&self) -> u64 {
        self.0.leapt_ms.load(Ordering::SeqCst)
    }

    fn cluster(&self) -> String {
        "test".to_owned()
    }
}
