//! `cargo bench-micro`: what the inner parts cost, without network and disks of a cluster: the core's `apply` and `schedule`, the codec
//! of the log, and the path of a line of a build's log. Whole clusters, and peers, are `cargo bench-cluster`'s.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use helix_common::sealed_log::{LogStream, SealedLogWriter};
use helix_coordinator::codec::{command_to_wire, decode_batch, decode_row, encode_batch, encode_row};
use helix_core::command::{AssignTask, FinishAttempt, Outcome, RegisterWorker, SubmitBuild, WorkerOffer};
use helix_core::liveness::{InFlight, Liveness, WorkerLiveness};
use helix_core::record::{Applied, BlobRef, SealedLog};
use helix_core::schedule::schedule;
use helix_core::{Command, Known, Reply, Row, State};
use helix_model::{
    AttemptKey, BuildId, BuildSpec, Command as BuildCommand, Death, Digest, Executor, Instance, LogTime, NodeId,
    Outputs, Platform, Room, WorkerName,
};
use helix_runner::{AttemptDir, SpoolWriter, Stream};

/// Lines of a log that are handled at once, and the characters of each.
const LINES: u64 = 1_000;
const LINE: &[u8] = b"[ 42%] Building CXX object src/CMakeFiles/core.dir/scheduler/placement.cpp.o  -O2";

fn apply(state: &mut State, at: u64, command: &Command) -> Reply {
    let mut changes = Applied::default();
    let reply = state.apply(LogTime(at), command, &mut changes);
    state.finish_entry(&mut changes);
    black_box(changes);
    assert!(!matches!(reply, Reply::Rejected(_)), "{reply:?}");
    reply
}

fn worker(number: usize) -> (WorkerName, Instance) {
    (WorkerName::new(&format!("w{number}")).unwrap(), Instance::new(&format!("life{number}.boot")).unwrap())
}

/// Workers of sixteen kinds, by label.
fn register(number: usize, capacity: u32) -> Command {
    let (worker, instance) = worker(number);
    let offer = WorkerOffer {
        capacity,
        platforms: BTreeSet::from([Platform::new("linux/amd64").unwrap()]),
        labels: BTreeMap::from([("kind".to_owned(), format!("k{}", number % 16))]),
        executors: BTreeSet::from([Executor::Exec]),
        allows_job_commands: true,
        ..WorkerOffer::default()
    };
    Command::RegisterWorker(RegisterWorker { worker, instance, offer })
}

fn build(number: u64) -> BuildId {
    BuildId::new(&format!("b{number}")).unwrap()
}

fn submit(number: u64, labels: BTreeMap<String, String>) -> Command {
    let spec = BuildSpec {
        command: Some(BuildCommand::Argv(vec!["/bin/true".to_owned()])),
        executor: Some(Executor::Exec),
        outputs: Outputs::None,
        labels,
        ..BuildSpec::default()
    };
    Command::SubmitBuild(SubmitBuild {
        build: build(number),
        spec: Arc::new(spec),
        spec_digest: Digest([1; 32]),
        submitted_by: "client/bench".to_owned(),
        retry_of: None,
    })
}

/// What a no-op build is to the registry, from submit to its end.
fn life(number: u64) -> [Command; 3] {
    let key: AttemptKey = format!("b{number}.0.1").parse().unwrap();
    let (worker, instance) = worker(0);
    let blob = BlobRef { digest: Digest([2; 32]), size: 100, holders: BTreeSet::from([NodeId(1), NodeId(2)]) };
    let finish = FinishAttempt {
        key: key.clone(),
        worker: worker.clone(),
        instance: instance.clone(),
        outcome: Outcome::Succeeded { digest: None, size: 0, image_tag: String::new() },
        exit_code: Some(0),
        signal: None,
        artifacts: Vec::new(),
        log: Some(SealedLog { blob, lines: 0 }),
        death: Death::Proven,
        image: None,
        index: None,
        room: Room::Host,
    };
    let assign = AssignTask { key, worker, instance };
    [submit(number, BTreeMap::new()), Command::AssignTask(assign), Command::FinishAttempt(finish)]
}

/// A registry with so many builds that ended.
fn with_finished(count: u64) -> State {
    let mut state = State::default();
    apply(&mut state, 1, &register(0, 8));
    for number in 0..count {
        life(number).iter().for_each(|command| drop(apply(&mut state, 2 + number, command)));
    }
    state
}

fn applying(c: &mut Criterion) {
    let mut group = c.benchmark_group("apply");
    group.throughput(Throughput::Elements(1));
    for finished in [10, 1_000, 100_000] {
        let mut state = with_finished(finished);
        let mut next = finished;
        group.bench_function(BenchmarkId::new("a-build-from-submit-to-end", finished), |b| {
            b.iter(|| {
                life(next).iter().for_each(|command| drop(apply(&mut state, 2 + next, command)));
                next += 1;
            });
        });
    }
    group.finish();
}

fn scheduling(c: &mut Criterion) {
    const AT_ONCE: usize = 256;
    let mut group = c.benchmark_group("schedule");
    group.throughput(Throughput::Elements(AT_ONCE as u64));
    for (workers, queued) in [(50, 500), (5_000, 50_000)] {
        let mut state = State::default();
        let mut liveness = Liveness::default();
        for number in 0..workers {
            apply(&mut state, 1, &register(number, 8));
            let (name, instance) = worker(number);
            liveness.workers.insert(name, WorkerLiveness::opened(instance, LogTime(1)));
        }
        for number in 0..queued {
            let labels = BTreeMap::from([("kind".to_owned(), format!("k{}", number % 16))]);
            apply(&mut state, 2, &submit(number, labels));
        }
        let name = format!("{workers}-workers-{queued}-queued");
        let in_flight = InFlight::default();
        group.bench_function(name, |b| {
            b.iter(|| {
                let made = schedule(&state, &in_flight, &liveness, LogTime(3), AT_ONCE);
                assert_eq!(made.len(), AT_ONCE);
                made
            });
        });
    }
    group.finish();
}

fn coding(c: &mut Criterion) {
    const COMMANDS: u64 = 64;
    let mut group = c.benchmark_group("codec");
    let commands: Vec<Command> = (0..COMMANDS).map(|number| submit(number, BTreeMap::new())).collect();
    let encode = || encode_batch(LogTime(1), commands.iter().map(command_to_wire).collect());
    let bytes = encode();
    group.throughput(Throughput::Elements(COMMANDS));
    group.bench_function("a-batch-of-submits-to-bytes", |b| b.iter(encode));
    group.bench_function("a-batch-of-submits-from-bytes", |b| b.iter(|| decode_batch(&bytes).unwrap()));
    let mut state = State::default();
    apply(&mut state, 1, &submit(1, BTreeMap::new()));
    let Some(Known::Open(record)) = state.build(&build(1)) else { panic!("it was submitted") };
    let row = Row::Build(record.clone());
    let bytes = encode_row(&row);
    group.throughput(Throughput::Elements(1));
    group.bench_function("a-builds-row-to-bytes", |b| b.iter(|| encode_row(&row)));
    group.bench_function("a-builds-row-from-bytes", |b| b.iter(|| decode_row(&bytes).unwrap()));
    group.finish();
}

fn logging(c: &mut Criterion) {
    let mut group = c.benchmark_group("log");
    group.throughput(Throughput::Bytes(LINES * LINE.len() as u64));
    let root = tempfile::tempdir().unwrap();
    let mut spool = SpoolWriter::open(&AttemptDir::new(root.path()), u64::MAX).unwrap();
    group.bench_function("lines-into-the-spool", |b| {
        b.iter(|| {
            for at in 0..LINES {
                spool.append(at, Stream::Stdout, LINE);
            }
            spool.flush().unwrap();
        });
    });
    group.bench_function("lines-into-a-sealed-log", |b| {
        b.iter(|| {
            let mut writer = SealedLogWriter::new(Vec::new()).unwrap();
            for seq in 1..=LINES {
                writer.push_parts(seq, 0, LogStream::Stdout, LINE).unwrap();
            }
            writer.finish().unwrap()
        });
    });
    group.finish();
}

criterion_group! {
    name = micro;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = applying, scheduling, coding, logging
}
criterion_main!(micro);
