//! What the store names after logs, artifacts and builds were let go: exactly what some build's rows still name.

use std::collections::BTreeSet;

use helix_core::command::{
    AssignTask, Authority, ExpireBytes, FinishAttempt, Outcome, PurgeBuilds, RegisterArtifact, RegisterWorker, SealLog,
    SetPolicy, WorkerOffer,
};
use helix_core::record::{Artifact, BlobRef, Policy, SealedLog};
use helix_core::retention::Kept;
use helix_core::{Command, State};
use helix_model::{
    AttemptKey, AttemptNumber, Death, Digest, Executor, Instance, LogTime, NodeId, Reason, Room, TaskIndex, WorkerName,
};

use super::harness::{id, submit};
use super::storage::{ALWAYS, apply, meta, open_machine};
use crate::raft::store::Store;
use crate::raft::writer::{RenewWhen, Writer};

fn worker() -> (WorkerName, Instance) {
    (WorkerName::new("w1").unwrap(), Instance::new("d.b").unwrap())
}

fn key(build: &str) -> AttemptKey {
    AttemptKey { build: id(build), task: TaskIndex(0), attempt: AttemptNumber(1) }
}

fn blob(byte: u8) -> BlobRef {
    BlobRef { digest: Digest([byte; 32]), size: 1, holders: BTreeSet::from([NodeId(1)]) }
}

fn artifact(name: &str, byte: u8) -> Artifact {
    Artifact { name: name.to_owned(), blob: blob(byte) }
}

pub(super) fn register(build: &str, name: &str, byte: u8) -> Command {
    let authority = Authority::Any("operator/o".to_owned());
    Command::RegisterArtifact(RegisterArtifact { build: id(build), authority, artifact: artifact(name, byte) })
}

/// A build that failed with artifacts registered before its end and after, and its log sealed behind it.
fn failed(build: &str, log: u8) -> Vec<Command> {
    let (name, instance) = worker();
    let finish = FinishAttempt {
        key: key(build),
        worker: name.clone(),
        instance: instance.clone(),
        outcome: Outcome::Failed { reason: Reason::Policy, message: "m".to_owned() },
        exit_code: None,
        signal: None,
        artifacts: Vec::new(),
        log: None,
        death: Death::Proven,
        image: None,
        index: None,
        room: Room::Host,
    };
    vec![
        submit(build),
        Command::AssignTask(AssignTask { key: key(build), worker: name.clone(), instance }),
        register(build, "before", 10),
        Command::FinishAttempt(finish),
        register(build, "after", 11),
        // The same bytes as its log's.
        register(build, "log-too", log),
        Command::SealLog(SealLog { key: key(build), worker: name, log: SealedLog { blob: blob(log), lines: 1 } }),
    ]
}

fn let_go(kept: Kept, build: &str) -> Command {
    Command::ExpireBytes(ExpireBytes { kept, builds: vec![id(build)] })
}

/// A registry and its store, which writes when it is told to, or not yet.
struct Both {
    state: State,
    writer: Writer,
    index: u64,
    _root: tempfile::TempDir,
}

impl Both {
    fn new(renewal: RenewWhen) -> Self {
        let root = tempfile::tempdir().unwrap();
        let (_, writer) = open_machine(root.path(), renewal);
        let mut both = Self { state: State::default(), writer, index: 0, _root: root };
        let (worker, instance) = worker();
        let offer = WorkerOffer {
            capacity: 9,
            executors: BTreeSet::from([Executor::Exec]),
            has_own_command: true,
            ..WorkerOffer::default()
        };
        let policy = Policy { retain_logs_ms: 0, retain_artifacts_ms: 0, ..Policy::default() };
        both.push(&[
            Command::RegisterWorker(RegisterWorker { worker, instance, offer }),
            Command::SetPolicy(SetPolicy { policy, expected: None }),
        ]);
        both
    }

    fn push(&mut self, commands: &[Command]) {
        self.index += 1;
        let changes = apply(&mut self.state, self.index, commands);
        self.writer.push(changes.rows, meta(self.index));
    }

    fn named(&self) -> Vec<u8> {
        let named = self.writer.named_blobs(None, 99).unwrap();
        let named: Vec<u8> = named.into_iter().map(|digest| digest.0[0]).collect();
        assert!((0..20).all(|byte| self.writer.names_blob(&Digest([byte; 32])) == named.contains(&byte)));
        named
    }

    /// Everything is in the store, which is the state, and so is what a snapshot makes of it.
    async fn stored(&self) {
        self.writer.snapshot().await.unwrap();
        assert!(self.writer.store().load().unwrap().0 == self.state, "the store is not the state");
        let other = tempfile::tempdir().unwrap();
        let store = Store::open(&other.path().join("registry"), 1 << 20).unwrap();
        store.replace(&self.writer.snapshots()[0].1).unwrap();
        assert!(store.load().unwrap().0 == self.state, "snapshot and store differ");
        let named: Vec<u8> = store.named_blobs(None, 99).unwrap().iter().map(|digest| digest.0[0]).collect();
        assert_eq!(named, self.named());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_some_row_still_names_is_named() {
    // Rows are let go of while they wait for the store, and when they are in it.
    for (stored_before, renewal) in
        [(false, RenewWhen::NEVER), (true, RenewWhen::NEVER), (false, ALWAYS), (true, ALWAYS)]
    {
        let mut both = Both::new(renewal);
        both.push(&failed("a", 1));
        both.push(&failed("b", 2));
        if stored_before {
            both.stored().await;
            assert_eq!(both.named(), [1, 2, 10, 11]);
        }
        both.push(&[let_go(Kept::Logs, "a")]);
        let record = both.writer.record(&id("a")).unwrap().unwrap();
        assert!(record.tasks[0].attempts[0].log.is_none() && record.expired.logs.is_some());
        assert_eq!(record.artifacts.len(), 3, "artifacts are kept");
        both.stored().await;
        assert_eq!(both.named(), [1, 2, 10, 11], "the log's bytes are an artifact's, too");
        both.push(&[let_go(Kept::Artifacts, "a"), let_go(Kept::Logs, "b")]);
        let record = both.writer.record(&id("a")).unwrap().unwrap();
        assert!(record.artifacts.is_empty() && record.expired.artifacts.is_some() && record.expired.logs.is_some());
        both.stored().await;
        assert_eq!(both.named(), [2, 10, 11], "what the other build names stays");
        // Twice is once.
        both.push(&[let_go(Kept::Artifacts, "a"), let_go(Kept::Logs, "a")]);
        let purge = PurgeBuilds { builds: vec![id("b"), id("a")], cutoff: LogTime(u64::MAX) };
        both.push(&[Command::PurgeBuilds(purge)]);
        both.stored().await;
        assert_eq!(both.named(), Vec::<u8>::new());
        assert!(both.writer.record(&id("a")).unwrap().is_none());
        both.writer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_is_used_again_has_nothing_of_what_it_let_go() {
    let mut both = Both::new(ALWAYS);
    both.push(&failed("a", 1));
    both.stored().await;
    let purge = PurgeBuilds { builds: vec![id("a")], cutoff: LogTime(u64::MAX) };
    both.push(&[let_go(Kept::Logs, "a"), Command::PurgeBuilds(purge)]);
    let policy = Policy { tombstone_ms: 0, retain_artifacts_ms: 0, ..Policy::default() };
    let expire = helix_core::command::ExpireTombstones { builds: vec![id("a")] };
    both.push(&[Command::SetPolicy(SetPolicy { policy, expected: None }), Command::ExpireTombstones(expire)]);
    both.push(&failed("a", 3));
    let record = both.writer.record(&id("a")).unwrap().unwrap();
    assert!(record.tasks[0].attempts[0].log.is_some() && record.artifacts.len() == 3);
    both.stored().await;
    assert_eq!(both.named(), [3, 10, 11]);
    both.writer.stop().await;
}
