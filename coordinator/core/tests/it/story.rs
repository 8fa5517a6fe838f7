//! Words for tests to tell stories about a registry: short commands in, replies, effects and rows out.
//!
//! A story checks the invariants after every command, applies every command a second time to a copy to see that nothing more
//! changes, and keeps the rows as a store would, so that it can be loaded again at any point.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_core::command::{self as cmd, Authority, Command, Outcome, WorkerOffer};
use helix_core::effect::Effect;
use helix_core::record::{
    Applied, Artifact, BlobRef, BuildRecord, DrainedBy, Image, Pinned, Row, RowChange, RowKey, SealedLog, TaskPhase,
};
use helix_core::retention::{Kept, Rule};
use helix_core::{InFlight, Known, Liveness, Reply, State, WorkerLiveness, due, invariants, schedule};
use helix_model::{
    AttemptKey, AttemptNumber, BuildId, BuildSpec, Command as Run, Death, Digest, Executor, Instance, LogTime, Measure,
    NodeId, Platform, Reason, Room, TaskIndex, WorkerName,
};

#[derive(Default)]
pub struct Story {
    pub state: State,
    pub now: u64,
    pub rows: BTreeMap<RowKey, Row>,
    /// Effects of the last command.
    pub effects: Vec<Effect>,
    /// What a leader that saw every effect would still have to send.
    pub to_send: BTreeMap<AttemptKey, Effect>,
    pub log: Vec<(u64, Command)>,
    pub liveness: Liveness,
}

impl Story {
    pub fn new() -> Self {
        Self { now: 1_000, ..Self::default() }
    }

    pub fn apply(&mut self, command: Command) -> Reply {
        let mut out = Applied::default();
        let before = self.state.clone();
        let reply = self.state.apply(LogTime(self.now), &command, &mut out);
        self.state.finish_entry(&mut out);
        invariants::check(&self.state).unwrap_or_else(|why| panic!("after {command:?}: {why}"));
        if let (Command::AssignTask(c), Reply::Done) = (&command, &reply) {
            self.check_amounts(&c.worker, &c.key);
        }
        if let Reply::Rejected(_) = reply {
            let mut quiet = before;
            quiet.apply(
                LogTime(self.now),
                &Command::PurgeBuilds(cmd::PurgeBuilds { builds: vec![], cutoff: LogTime(0) }),
                &mut Applied::default(),
            );
            assert_eq!(quiet, self.state, "a rejection changed something: {command:?}");
        }
        let mut again = self.state.clone();
        let mut ignored = Applied::default();
        again.apply(LogTime(self.now), &command, &mut ignored);
        assert_eq!(again, self.state, "the same command twice changed something: {command:?}");
        store(&mut self.rows, &out.rows);
        self.note_effects(&out.effects);
        self.effects = out.effects;
        self.log.push((self.now, command));
        reply
    }

    /// What runs on a worker asks for no more than it has of anything that who was given to it just now asks for. It may have
    /// offered less since the others came, which is no reason to keep away who asks for none of that.
    fn check_amounts(&self, name: &WorkerName, given: &AttemptKey) {
        let has = self.state.worker(name).unwrap().offer.resources;
        let spec = |key: &AttemptKey| match self.state.build(&key.build) {
            Some(Known::Open(build)) => build.spec.resources,
            other => panic!("{key} runs and its build is {other:?}"),
        };
        let (asked, specs) = (spec(given), self.state.running_on(name).map(spec).collect::<Vec<_>>());
        let counts = |what: &Measure| asked.get(*what) > 0 && !matches!(has.get(*what), 0 | u64::MAX);
        for what in Measure::ALL.into_iter().filter(counts) {
            let sum: u128 = specs.iter().map(|spec| u128::from(spec.get(what))).sum();
            assert!(sum <= u128::from(has.get(what)), "{name} was given {sum} of {what:?} and has {has:?}");
        }
    }

    fn note_effects(&mut self, effects: &[Effect]) {
        for effect in effects {
            if let Effect::SendAssignment { key, .. } | Effect::SendStop { key, .. } = effect {
                self.to_send.insert(key.clone(), effect.clone());
            }
        }
        let state = &self.state;
        self.to_send.retain(|key, _| state.running_attempt(key).is_some());
        let pending: Vec<Effect> = state.pending_effects();
        let mut expected: Vec<Effect> = self.to_send.values().cloned().collect();
        expected.sort_by_key(|effect| format!("{effect:?}"));
        let mut pending = pending;
        pending.sort_by_key(|effect| format!("{effect:?}"));
        assert_eq!(pending, expected, "effects and pending effects disagree");
    }

    pub fn load(&self) -> State {
        State::load(self.rows.values().cloned()).expect("rows that apply wrote make a state")
    }

    pub fn wait(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self
    }

    pub fn submit(&mut self, id: &str) -> Reply {
        self.submit_as(id, spec())
    }

    pub fn submit_as(&mut self, id: &str, spec: BuildSpec) -> Reply {
        self.apply(submit(id, spec))
    }

    pub fn worker(&mut self, name: &str, capacity: u32) -> Reply {
        self.worker_life(name, "data1.boot1", offer(capacity))
    }

    pub fn worker_life(&mut self, name: &str, life: &str, offer: WorkerOffer) -> Reply {
        let reply = self.apply(register(name, life, offer));
        self.hear(name, life);
        reply
    }

    pub fn hear(&mut self, name: &str, life: &str) {
        self.liveness.workers.insert(worker(name), WorkerLiveness::opened(instance(life), LogTime(self.now)));
    }

    pub fn assign(&mut self, attempt: &str, name: &str) -> Reply {
        self.apply(assign(attempt, name, "data1.boot1"))
    }

    pub fn finish(&mut self, attempt: &str, name: &str, outcome: Outcome) -> Reply {
        self.apply(finish(attempt, name, "data1.boot1", outcome))
    }

    pub fn cancel(&mut self, id: &str) -> Reply {
        self.apply(cancel(id))
    }

    /// What the scheduler would have assigned, as `ATTEMPT@WORKER`.
    pub fn scheduled(&self, max: usize) -> Vec<String> {
        let commands = schedule::schedule(&self.state, &InFlight::default(), &self.liveness, LogTime(self.now), max);
        let name = |command: Command| match command {
            Command::AssignTask(c) => format!("{}@{}", c.key, c.worker),
            other => panic!("the scheduler proposed {other:?}"),
        };
        commands.into_iter().map(name).collect()
    }

    /// Commits what the scheduler proposes, once.
    pub fn schedule(&mut self, max: usize) -> usize {
        let commands = schedule::schedule(&self.state, &InFlight::default(), &self.liveness, LogTime(self.now), max);
        let count = commands.len();
        for command in commands {
            assert_eq!(self.apply(command), Reply::Done, "the scheduler proposed what cannot be");
        }
        count
    }

    pub fn claim(&mut self) {
        self.liveness.claims = schedule::claims(&self.state, &self.liveness, LogTime(self.now));
    }

    pub fn due(&mut self) -> Vec<Command> {
        self.liveness.brake = due::brake(&self.state, &self.liveness, LogTime(self.now));
        due::due(&self.state, &InFlight::default(), &self.liveness, LogTime(self.now))
    }

    /// Where a build stands: its state, reason and tasks in few words.
    pub fn show(&self, id: &str) -> String {
        let Some(build) = self.record(id) else { return "unknown".to_owned() };
        let tasks: Vec<String> = build.tasks.iter().map(show_task).collect();
        let reason = build.reason.map_or_else(String::new, |reason| format!(" ({reason})"));
        let verified = if build.verified { "" } else { " unverified" };
        format!("{}{reason}{verified}: {}", build.state, tasks.join(", "))
    }

    pub fn record(&self, id: &str) -> Option<Arc<BuildRecord>> {
        match self.rows.get(&RowKey::Build(build(id))) {
            Some(Row::Build(record)) => Some(Arc::clone(record)),
            _ => None,
        }
    }
}

fn show_task(task: &helix_core::record::TaskRecord) -> String {
    let number = task.attempts.len();
    match &task.phase {
        TaskPhase::Waiting { not_before } => format!("waits from {} after {number}", not_before.0),
        TaskPhase::Running => {
            let attempt = task.running().unwrap();
            let stop = attempt.stop.as_ref().map_or_else(String::new, |stop| format!(" stopping ({})", stop.reason));
            format!("attempt {number} on {}{stop}", attempt.worker)
        }
        TaskPhase::Ended { state, reason, .. } => {
            let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
            format!("{state}{reason} after {number}")
        }
    }
}

pub fn store(rows: &mut BTreeMap<RowKey, Row>, changes: &[RowChange]) {
    for change in changes {
        match change {
            RowChange::Put(row) => {
                rows.insert(row.key(), row.clone());
            }
            RowChange::Delete(key) => {
                rows.remove(key);
            }
            RowChange::DeleteAddenda(build) => {
                rows.retain(|key, _| !matches!(key, RowKey::Addendum(attempt, _) if attempt.build == *build));
            }
            RowChange::Expire(build, kept, at) => {
                if let Some(Row::Build(record)) = rows.get_mut(&RowKey::Build(build.clone())) {
                    std::sync::Arc::make_mut(record).expire(*kept, *at);
                }
                let about = |key: &RowKey| matches!(key, RowKey::Addendum(attempt, _) if attempt.build == *build);
                rows.retain(|key, _| !about(key) || Kept::of_key(key) != Some(*kept));
            }
        }
    }
}

pub fn build(id: &str) -> BuildId {
    BuildId::new(id).unwrap()
}

pub fn worker(name: &str) -> WorkerName {
    WorkerName::new(name).unwrap()
}

pub fn instance(life: &str) -> Instance {
    Instance::new(life).unwrap()
}

/// Reads `BUILD.TASK.ATTEMPT`.
pub fn key(text: &str) -> AttemptKey {
    text.parse().unwrap()
}

pub fn platform(text: &str) -> Platform {
    Platform::new(text).unwrap()
}

pub fn digest(byte: u8) -> Digest {
    Digest([byte; 32])
}

pub fn spec() -> BuildSpec {
    BuildSpec { executor: Some(Executor::Exec), command: Some(Run::Shell("make".to_owned())), ..BuildSpec::default() }
}

pub fn offer(capacity: u32) -> WorkerOffer {
    WorkerOffer {
        capacity,
        platforms: BTreeSet::from([platform("linux/amd64")]),
        executors: BTreeSet::from([Executor::Exec]),
        allows_job_commands: true,
        ..WorkerOffer::default()
    }
}

/// A stand-in for the sha256 of a spec's bytes: differs where the bytes differ in sum.
pub fn spec_digest(spec: &BuildSpec) -> Digest {
    let mut out = [0u8; 32];
    for (place, byte) in spec.canonical_bytes().iter().enumerate() {
        out[place % 32] = out[place % 32].wrapping_mul(31).wrapping_add(*byte);
    }
    Digest(out)
}

pub fn submit(id: &str, spec: BuildSpec) -> Command {
    let spec_digest = spec_digest(&spec);
    Command::SubmitBuild(cmd::SubmitBuild {
        build: build(id),
        spec: Arc::new(spec),
        spec_digest,
        submitted_by: "client/ann".to_owned(),
        retry_of: None,
    })
}

pub fn register(name: &str, life: &str, offer: WorkerOffer) -> Command {
    Command::RegisterWorker(cmd::RegisterWorker { worker: worker(name), instance: instance(life), offer })
}

pub fn assign(attempt: &str, name: &str, life: &str) -> Command {
    Command::AssignTask(cmd::AssignTask { key: key(attempt), worker: worker(name), instance: instance(life) })
}

pub fn finish(attempt: &str, name: &str, life: &str, outcome: Outcome) -> Command {
    let success = matches!(outcome, Outcome::Succeeded { .. });
    Command::FinishAttempt(cmd::FinishAttempt {
        key: key(attempt),
        worker: worker(name),
        instance: instance(life),
        outcome,
        exit_code: Some(if success { 0 } else { 1 }),
        signal: None,
        artifacts: if success { vec![artifact("artifact.out", 7)] } else { vec![] },
        log: success.then(|| sealed(9)),
        death: Death::Proven,
        image: None,
        index: None,
        room: Room::Host,
    })
}

/// A success of a podman build, of this image.
pub fn finish_image(attempt: &str, name: &str, life: &str, image: Image, index: Option<Digest>) -> Command {
    let outcome =
        Outcome::Succeeded { digest: Some(image.digest), size: 3, image_tag: "helix-build/x:latest".to_owned() };
    match finish(attempt, name, life, outcome) {
        Command::FinishAttempt(c) => {
            Command::FinishAttempt(cmd::FinishAttempt { artifacts: vec![], image: Some(image), index, ..c })
        }
        other => panic!("no report: {other:?}"),
    }
}

/// The same report of an attempt that outgrew a limit of its own.
pub fn outgrown(report: Command) -> Command {
    match report {
        Command::FinishAttempt(c) => Command::FinishAttempt(cmd::FinishAttempt { room: Room::Own, ..c }),
        other => panic!("no report: {other:?}"),
    }
}

pub fn record_image(attempt: &str, name: &str, life: &str, image: Image) -> Command {
    Command::RecordImage(cmd::RecordImage { key: key(attempt), worker: worker(name), instance: instance(life), image })
}

pub fn image(byte: u8) -> Image {
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    Image { digest: digest(byte), size: 3, id: digest(byte.wrapping_add(100)), manifest_size: 0, media_type }
}

/// The same report of an agent that cannot prove the death.
pub fn unproven(report: Command) -> Command {
    match report {
        Command::FinishAttempt(c) => Command::FinishAttempt(cmd::FinishAttempt { death: Death::Unproven, ..c }),
        other => panic!("no report: {other:?}"),
    }
}

pub fn cancel(id: &str) -> Command {
    let authority = Authority::Owner("client/ann".to_owned());
    Command::CancelBuild(cmd::CancelBuild { build: build(id), authority, reason: "enough".to_owned() })
}

pub fn lose(name: &str, life: &str) -> Command {
    Command::LoseWorker(cmd::LoseWorker { worker: worker(name), instance: instance(life) })
}

pub fn expire(attempt: &str, reason: Reason) -> Command {
    Command::ExpireAttempt(cmd::ExpireAttempt { key: key(attempt), reason })
}

pub fn end_unverified(attempt: &str) -> Command {
    Command::EndUnverified(cmd::EndUnverified { key: key(attempt) })
}

pub fn seal(attempt: &str, name: &str) -> Command {
    Command::SealLog(cmd::SealLog { key: key(attempt), worker: worker(name), log: sealed(5) })
}

pub fn drain(name: &str, deadline: Option<u64>) -> Command {
    let deadline = deadline.map(LogTime);
    Command::DrainWorker(cmd::DrainWorker { worker: worker(name), deadline, by: DrainedBy::Operator })
}

pub fn purge(ids: &[&str], cutoff: u64) -> Command {
    let builds = ids.iter().map(|id| build(id)).collect();
    Command::PurgeBuilds(cmd::PurgeBuilds { builds, cutoff: LogTime(cutoff) })
}

pub fn rule(name: &str) -> Rule {
    Rule::parse(name).unwrap().unwrap()
}

pub fn let_go(kept: Kept, ids: &[&str]) -> Command {
    Command::ExpireBytes(cmd::ExpireBytes { kept, builds: ids.iter().map(|id| build(id)).collect() })
}

pub fn pin(id: &str, pinned: Pinned) -> Command {
    Command::PinBuild(cmd::PinBuild { build: build(id), authority: Authority::Any("operator/op".to_owned()), pinned })
}

pub fn register_artifact(id: &str, name: &str, byte: u8) -> Command {
    let authority = Authority::Owner("client/ann".to_owned());
    Command::RegisterArtifact(cmd::RegisterArtifact { build: build(id), authority, artifact: artifact(name, byte) })
}

pub fn pin_source(attempt: &str, name: &str, commit: &str) -> Command {
    let commit = commit.to_owned();
    Command::PinSource(cmd::PinSource { key: key(attempt), worker: worker(name), commit })
}

pub fn register_node(node: u64, epoch: u64) -> Command {
    Command::RegisterNode(cmd::RegisterNode {
        node: NodeId(node),
        epoch,
        grpc: "https://h:7420".to_owned(),
        version: "0.1.0".to_owned(),
        format: 1,
    })
}

pub fn retire_node(node: u64) -> Command {
    Command::RetireNode(cmd::RetireNode { node: NodeId(node) })
}

pub fn success() -> Outcome {
    Outcome::Succeeded { digest: Some(digest(7)), size: 3, image_tag: "helix/x".to_owned() }
}

pub fn failed(reason: Reason) -> Outcome {
    Outcome::Failed { reason, message: reason.to_string() }
}

pub fn blob(byte: u8) -> BlobRef {
    BlobRef { digest: digest(byte), size: 3, holders: BTreeSet::from([NodeId(1), NodeId(2)]) }
}

pub fn artifact(name: &str, byte: u8) -> Artifact {
    Artifact { name: name.to_owned(), blob: blob(byte) }
}

pub fn sealed(byte: u8) -> SealedLog {
    SealedLog { blob: blob(byte), lines: 1 }
}

pub fn task(index: u16) -> TaskIndex {
    TaskIndex(index)
}

pub fn attempt(number: u32) -> AttemptNumber {
    AttemptNumber(number)
}
