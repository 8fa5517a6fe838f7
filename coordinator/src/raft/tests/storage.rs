//! The log and the store by themselves: openraft's suite, torn tails, rebuilds, snapshots under change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use helix_core::record::Applied as Changes;
use helix_core::{Command, RowKey, State};
use helix_model::{LogTime, NodeId};
use openraft::StorageError;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use tempfile::TempDir;

use super::harness::{Cluster, PATIENCE, id, submit, submit_with, until};
use crate::node_dir::NodeDir;
use crate::raft::log_store::{LogLimits, LogStore};
use crate::raft::state_machine::StateMachine;
use crate::raft::store::Store;
use crate::raft::types::{Batch, Entry, LeaderId, LogId, SnapshotMeta, TypeConfig, Vote};
use crate::raft::writer::{RenewWhen, Writer};
use crate::registry::{Applied, Counters, Shared};

fn open_log(path: &Path) -> io::Result<LogStore> {
    LogStore::open(path, LogLimits::default(), Arc::default())
}

/// The store's file is written anew again and again, without an end.
pub(super) const ALWAYS: RenewWhen = RenewWhen { from_bytes: 0, times: 0, rests: 0 };

pub(super) fn open_machine(path: &Path, renewal: RenewWhen) -> (StateMachine, Writer) {
    let store = Arc::new(Store::open(&path.join("registry"), 1 << 20).unwrap());
    let counters: Arc<Counters> = Arc::default();
    let shared = Arc::new(Shared::new(NodeId(1), State::default(), Applied::default(), Arc::clone(&counters)));
    let writer = Writer::start(store, path.join("snapshots"), Vec::new(), counters, renewal).unwrap();
    (StateMachine::new(shared, writer.clone(), None, SnapshotMeta::default()), writer)
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let root = tempfile::tempdir().unwrap();
        let log = open_log(&root.path().join("log")).unwrap();
        let (machine, _) = open_machine(root.path(), ALWAYS);
        Ok((root, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_openrafts_suite() {
    Suite::test_all(Builder).await.unwrap();
}

fn log_id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn entry(index: u64) -> Entry {
    let batch = Batch::new(LogTime(index), vec![submit(&format!("b{index}"))]);
    Entry::new_normal(log_id(index), batch)
}

async fn append(log: &mut LogStore, indexes: std::ops::Range<u64>) {
    let (done, flushed) = TypeConfig::oneshot();
    let entries: Vec<_> = indexes.map(entry).collect();
    log.append(entries, IOFlushed::signal(done)).await.unwrap();
    flushed.await.unwrap().unwrap();
}

fn only_wal(path: &Path) -> PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "wal"));
    files.sort();
    files.pop().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_cut_short_anywhere_keeps_a_prefix() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("log");
    let mut log = open_log(&path).unwrap();
    log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    append(&mut log, 0..4).await;
    drop(log);
    let file = only_wal(&path);
    let whole = std::fs::read(&file).unwrap();
    let copy = root.path().join("copy");
    let mut lengths_seen = std::collections::BTreeSet::new();
    for length in (0..whole.len()).rev() {
        if copy.exists() {
            std::fs::remove_dir_all(&copy).unwrap();
        }
        std::fs::create_dir(&copy).unwrap();
        std::fs::write(copy.join(file.file_name().unwrap()), &whole[..length]).unwrap();
        // Refused is right too, where not even the first record is whole.
        let Ok(mut log) = open_log(&copy) else { continue };
        let entries = log.try_get_log_entries(..).await.unwrap();
        let expected: Vec<_> = (0..4).map(entry).take(entries.len()).collect();
        assert_eq!(entries, expected, "cut to {length}");
        lengths_seen.insert(entries.len());
    }
    assert!(lengths_seen.len() >= 4, "{lengths_seen:?}");
}

/// All of a large file at once would hold up the fsync of every other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_purged_goes_from_the_disk_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("log");
    let mut log = LogStore::open(&path, LogLimits { chunk_bytes: 1 << 10 }, Arc::default()).unwrap();
    append(&mut log, 0..1).await;
    let first = std::fs::File::open(only_wal(&path)).unwrap();
    for index in 1..100 {
        append(&mut log, index..index + 1).await;
    }
    let files = || std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    let before = files().count();
    log.purge(log_id(60)).await.unwrap();
    assert!(files().count() < before, "{before} files");
    until("its bytes are gone", || first.metadata().unwrap().len() == 0).await;
    assert_eq!(log.try_get_log_entries(61..100).await.unwrap().len(), 39);
    drop(log);
    let mut log = open_log(&path).unwrap();
    let entries = log.try_get_log_entries(61..100).await.unwrap();
    assert!(entries.iter().map(|entry| entry.log_id.index()).eq(61..100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_the_log_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("log");
    let mut log = open_log(&path).unwrap();
    append(&mut log, 0..4).await;
    drop(log);
    let file = only_wal(&path);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert!(open_log(&path).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_anywhere_but_in_the_last_record_is_refused_and_cuts_nothing_off() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("log");
    let mut log = open_log(&path).unwrap();
    log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    append(&mut log, 0..2).await;
    let file = only_wal(&path);
    let last = std::fs::metadata(&file).unwrap().len();
    append(&mut log, 2..3).await;
    drop(log);
    let whole = std::fs::read(&file).unwrap();
    let copy = root.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    let target = copy.join(file.file_name().unwrap());
    for place in 0..usize::try_from(last).unwrap() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[place] ^= 1 << bit;
            std::fs::write(&target, &bytes).unwrap();
            assert!(open_log(&copy).is_err(), "bit {bit} of byte {place}");
            assert_eq!(std::fs::read(&target).unwrap(), bytes, "bit {bit} of byte {place}");
        }
    }
}

pub(super) fn apply(state: &mut State, at: u64, commands: &[Command]) -> Changes {
    let mut changes = Changes::default();
    for command in commands {
        state.apply(LogTime(at), command, &mut changes);
    }
    state.finish_entry(&mut changes);
    changes
}

pub(super) fn meta(index: u64) -> SnapshotMeta {
    SnapshotMeta { last_log_id: Some(log_id(index)), ..SnapshotMeta::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_the_state_as_it_began_whatever_changes_meanwhile() {
    for renewal in [RenewWhen::NEVER, ALWAYS] {
        a_snapshot_amid_changes(renewal).await;
    }
}

async fn a_snapshot_amid_changes(renewal: RenewWhen) {
    let root = tempfile::tempdir().unwrap();
    let (_, writer) = open_machine(root.path(), renewal);
    let mut state = State::default();
    for index in 1..=300 {
        // Long rows lie in several parts.
        let padding = "y".repeat(usize::try_from(index * 37 % 9_000).unwrap());
        let changes = apply(&mut state, index, &[submit_with(&format!("b{index}"), &padding)]);
        writer.push(changes.rows, meta(index));
    }
    let frozen = state.clone();
    let taking = {
        let writer = writer.clone();
        tokio::spawn(async move { writer.snapshot().await })
    };
    for index in 301..=1_500 {
        writer.room().await.unwrap();
        let cancel = helix_core::command::CancelBuild {
            build: id(&format!("b{}", index % 300 + 1)),
            authority: helix_core::command::Authority::Any("operator/o".to_owned()),
            reason: String::new(),
        };
        let commands = [Command::CancelBuild(cancel), submit(&format!("b{index}"))];
        writer.push(apply(&mut state, index, &commands).rows, meta(index));
        if index % 100 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let (taken, file) = taking.await.unwrap().unwrap();
    let mut rows = Vec::new();
    let read = crate::raft::snapshot::read(&file, |row| {
        rows.push(crate::codec::decode_row(&row)?);
        Ok(())
    });
    assert_eq!(read.unwrap(), taken);
    let loaded = State::load(rows).unwrap();
    if taken.last_log_id == Some(log_id(300)) {
        assert!(loaded == frozen, "the snapshot is not the state it began with");
    }
    // And the tail makes it the whole.
    writer.snapshot().await.unwrap();
    let (stored, _) = writer.store().load().unwrap();
    assert!(stored == state, "the store is not the state");
    let other = tempfile::tempdir().unwrap();
    let store = Store::open(&other.path().join("registry"), 1 << 20).unwrap();
    store.replace(&writer.snapshots()[0].1).unwrap();
    assert!(store.load().unwrap().0 == state, "snapshot and store differ");
    let record = writer.record(&id("b7")).unwrap();
    assert!(record.is_some());
    let current = root.path().join("registry/current");
    if renewal == ALWAYS {
        // A step begins only when nothing else is to be done, and none has to have yet.
        let anew = async {
            while !current.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), anew).await.expect("the file is not written anew");
    }
    writer.stop().await;
    assert_eq!(current.exists(), renewal == ALWAYS, "the file was written anew, or not");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_snapshot_is_noticed_at_every_byte() {
    let root = tempfile::tempdir().unwrap();
    let (_, writer) = open_machine(root.path(), RenewWhen::NEVER);
    let mut state = State::default();
    writer.push(apply(&mut state, 1, &[submit("a")]).rows, meta(1));
    let (_, file) = writer.snapshot().await.unwrap();
    let whole = std::fs::read(&file).unwrap();
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x10;
        std::fs::write(&file, &bytes).unwrap();
        assert!(crate::raft::snapshot::verify(&file).is_err(), "byte {place}");
        std::fs::write(&file, &whole[..place]).unwrap();
        assert!(crate::raft::snapshot::verify(&file).is_err(), "cut to {place}");
    }
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_gone_or_broken_is_rebuilt_from_snapshot_and_log() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    let registry = cluster.path(node).join("registry");
    cluster.start_all().await;
    cluster.submit(node, &submit("a")).await;
    cluster.stop_all().await;
    // No snapshot yet: the log alone has everything.
    std::fs::remove_dir_all(&registry).unwrap();
    cluster.start_all().await;
    assert!(cluster.has(node, "a").await);
    for round in 0..3 {
        cluster.submit(node, &submit(&format!("s{round}"))).await;
        cluster.registry(node).snapshot().await.unwrap();
    }
    cluster.submit(node, &submit("tail")).await;
    let watched = cluster.registry(node).clone();
    until("the log is purged", || watched.status().purged_index > 0).await;
    drop(watched);
    for damage in [
        |path: &Path| std::fs::remove_dir_all(path).unwrap(),
        // It was rebuilt, and has no first file any more.
        |path: &Path| std::fs::write(path.join("1/db"), b"garbage").unwrap(),
        |path: &Path| std::fs::remove_dir_all(path.join("1")).unwrap(),
        |path: &Path| std::fs::write(path.join("current"), "what").unwrap(),
    ] {
        assert!(!registry.join("1").exists() || registry.join("1/db").exists());
        cluster.stop_all().await;
        damage(&registry);
        cluster.start_all().await;
        for name in ["a", "s0", "s1", "s2", "tail"] {
            assert!(cluster.has(node, name).await, "{name}");
        }
    }
    // A damaged newest snapshot leaves the one before it.
    cluster.stop_all().await;
    let newest = crate::raft::snapshot::list(&cluster.path(node).join("snapshots")).unwrap().remove(0);
    std::fs::write(&newest, b"garbage").unwrap();
    std::fs::remove_dir_all(&registry).unwrap();
    cluster.start_all().await;
    assert!(cluster.has(node, "tail").await && cluster.has(node, "s2").await);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_lost_rows_is_rebuilt() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    for round in 0..4 {
        cluster.submit(node, &submit(&format!("s{round}"))).await;
        cluster.registry(node).snapshot().await.unwrap();
    }
    cluster.submit(node, &submit("tail")).await;
    cluster.stop_all().await;
    for name in ["s1", "tail"] {
        let store = Store::open(&cluster.path(node).join("registry"), 1 << 20).unwrap();
        assert!(store.load().is_ok());
        store.lose(&RowKey::Build(id(name)));
        assert!(store.load().is_err());
        drop(store);
        cluster.start_all().await;
        for name in ["s0", "s1", "s2", "s3", "tail"] {
            assert!(cluster.has(node, name).await, "{name}");
        }
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_snapshot_is_made_of_a_store_that_lost_rows() {
    let root = tempfile::tempdir().unwrap();
    let (_, writer) = open_machine(root.path(), RenewWhen::NEVER);
    let mut state = State::default();
    let changes = apply(&mut state, 1, &[submit("a"), submit("b")]);
    writer.push(changes.rows, meta(1));
    writer.snapshot().await.unwrap();
    writer.store().lose(&RowKey::Build(id("a")));
    let error = writer.snapshot().await.unwrap_err();
    assert!(error.to_string().contains("rows are missing"), "{error}");
    let broken = async { while writer.room().await.is_ok() {} };
    tokio::time::timeout(PATIENCE, broken).await.expect("the writer says that it is broken");
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_ends_before_the_log_begins_is_not_used() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    let snapshots = cluster.path(node).join("snapshots");
    let watched = cluster.registry(node).clone();
    cluster.submit(node, &submit("s0")).await;
    watched.snapshot().await.unwrap();
    let first = crate::raft::snapshot::list(&snapshots).unwrap().remove(0);
    let kept = cluster.root.path().join("kept");
    std::fs::copy(&first, &kept).unwrap();
    for round in 1..4 {
        cluster.submit(node, &submit(&format!("s{round}"))).await;
        watched.snapshot().await.unwrap();
    }
    until("the log is purged", || watched.status().purged_index > 3).await;
    drop(watched);
    cluster.stop_all().await;
    // Both snapshots are lost to damage, and only one is left that is too old.
    for file in crate::raft::snapshot::list(&snapshots).unwrap() {
        std::fs::write(file, b"garbage").unwrap();
    }
    std::fs::copy(&kept, &first).unwrap();
    cluster.start_all().await;
    assert!(cluster.has(node, "s3").await);
    let status = cluster.registry(node).status();
    assert!(status.snapshot_index >= status.purged_index, "{status:?}");
    cluster.stop_all().await;
    // Without the store there is nothing to go on from, and that is said.
    std::fs::remove_dir_all(cluster.path(node).join("registry")).unwrap();
    let newest = crate::raft::snapshot::list(&snapshots).unwrap();
    for file in newest.iter().filter(|file| **file != first) {
        std::fs::write(file, b"garbage").unwrap();
    }
    let dir = NodeDir::open(&cluster.path(node)).unwrap();
    let error = crate::raft::open_for_test(&dir).unwrap_err();
    assert!(error.to_string().contains("cannot be rebuilt"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_step_of_a_walk_passes_over_rows_whose_names_begin_alike() {
    let root = tempfile::tempdir().unwrap();
    let (_, writer) = open_machine(root.path(), RenewWhen::NEVER);
    let names = ["a", "a-", "a-1", "a-10", "a-100", "a-2", "b"];
    let mut state = State::default();
    let commands = names.map(|name| submit_with(name, &"x".repeat(9_000)));
    writer.push(apply(&mut state, 1, &commands).rows, meta(1));
    writer.snapshot().await.unwrap();
    let mut cursor = Vec::new();
    let mut found = Vec::new();
    while let Some((base, _)) = writer.store().walk(&cursor, usize::MAX, 1).unwrap().pop() {
        found.extend(base.strip_prefix(&[5]).map(|name| String::from_utf8(name.to_vec()).unwrap()));
        cursor = base;
    }
    assert_eq!(found, names);
    writer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_the_system_does_not_open_is_left_alone() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.start_all().await;
    cluster.submit(node, &submit("a")).await;
    cluster.stop_all().await;
    let registry = cluster.path(node).join("registry");
    std::fs::rename(registry.join("db"), registry.join("kept")).unwrap();
    std::fs::create_dir(registry.join("db")).unwrap();
    let dir = NodeDir::open(&cluster.path(node)).unwrap();
    assert!(crate::raft::open_for_test(&dir).is_err());
    drop(dir);
    std::fs::remove_dir(registry.join("db")).unwrap();
    std::fs::rename(registry.join("kept"), registry.join("db")).unwrap();
    cluster.start_all().await;
    assert!(cluster.has(node, "a").await);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_often_restarted_writes_snapshots_too() {
    let mut cluster = Cluster::new(1).await;
    let node = NodeId(1);
    cluster.snapshot_log_bytes = 100_000;
    for round in 0..4 {
        cluster.start_all().await;
        // Each life appends less than what makes a snapshot due.
        for part in 0..3 {
            cluster.submit(node, &submit_with(&format!("r{round}-{part}"), &"x".repeat(20_000))).await;
        }
        if round < 3 {
            cluster.stop_all().await;
        }
    }
    let watched = cluster.registry(node).clone();
    until("a snapshot is written", || watched.counters().snapshots.get() > 0).await;
    drop(watched);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_log_does_not_start() {
    let mut cluster = Cluster::new(1).await;
    cluster.start_all().await;
    cluster.stop_all().await;
    std::fs::remove_dir_all(cluster.path(NodeId(1)).join("log")).unwrap();
    let dir = NodeDir::open(&cluster.path(NodeId(1))).unwrap();
    let error = crate::raft::open_for_test(&dir).err().unwrap();
    assert!(error.to_string().contains("cluster add"), "{error}");
}
