//! Every kind of command, row and reply reads back what was written; old bytes stay readable; newer ones are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_core::command::{
    AssignTask, Authority, CancelBuild, DetachWorker, DrainWorker, EndUnverified, ExpireAttempt, ExpireBytes,
    ExpireTombstones, FinishAttempt, LoseWorker, Outcome, PinBuild, PinSource, ProbeWorker, PurgeBuilds, RecordImage,
    RegisterArtifact, RegisterNode, RegisterWorker, ReleaseHold, RemoveWorker, RetireNode, SealLog, SecretFor,
    SetPolicy, SubmitBuild, UndrainWorker, WorkerOffer,
};
use helix_core::record::{
    Addendum, Artifact, AttemptEnd, AttemptRecord, BlobRef, BuildRecord, CancelRequest, Counters, Drain, DrainedBy,
    Image, NodeRecord, Pinned, SealedLog, Standing, StopRequest, TaskPhase, TaskRecord, Tombstone, Trust, WorkerRecord,
};
use helix_core::retention::{Expired, Kept, Rule};
use helix_core::{Policy, Rejection, Reply, Row, Unfit};
use helix_model::{
    AttemptKey, AttemptNumber, BuildId, BuildSpec, BuildState, Death, Digest, Executor, Instance, Measure, NodeId,
    Platform, Reason, Resources, Room, TaskIndex, WorkerName,
};

use super::*;

fn build() -> BuildId {
    BuildId::new("b-1").unwrap()
}

fn worker() -> WorkerName {
    WorkerName::new("w1").unwrap()
}

fn instance() -> Instance {
    Instance::new("a.b").unwrap()
}

fn key() -> AttemptKey {
    AttemptKey { build: build(), task: TaskIndex(1), attempt: AttemptNumber(2) }
}

fn blob(byte: u8) -> BlobRef {
    BlobRef { digest: Digest([byte; 32]), size: 7, holders: BTreeSet::from([NodeId(1), NodeId(3)]) }
}

fn artifact() -> Artifact {
    Artifact { name: "out/x".to_owned(), blob: blob(1) }
}

fn log() -> SealedLog {
    SealedLog { blob: blob(2), lines: 9 }
}

fn spec() -> Arc<BuildSpec> {
    Arc::new(BuildSpec {
        repo_url: "https://h/p".to_owned(),
        executor: Some(Executor::Exec),
        platforms: vec![Platform::new("linux/amd64").unwrap()],
        env: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
        ..BuildSpec::default()
    })
}

fn offer() -> WorkerOffer {
    WorkerOffer {
        address: "h:1".to_owned(),
        capacity: 4,
        platforms: BTreeSet::from([Platform::new("linux/arm64").unwrap()]),
        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        executors: BTreeSet::from([Executor::Podman]),
        allows_job_commands: true,
        has_own_command: true,
        isolation: "netns".to_owned(),
        limits: String::new(),
        version: "1".to_owned(),
        resources: Resources { cpu_milli: 1, memory_bytes: 2, disk_bytes: 3 },
        podman: "podman 4, runc".to_owned(),
        emulated: BTreeSet::from([Platform::new("linux/riscv64").unwrap()]),
        secrets: Some(BTreeMap::from([
            ("a".to_owned(), SecretFor::Anybody),
            ("b".to_owned(), SecretFor::CertainRepositories),
        ])),
    }
}

fn image() -> Image {
    let (digest, id) = (Digest([6; 32]), Digest([7; 32]));
    Image { digest, size: 8, id, manifest_size: 9, media_type: "application/x".to_owned() }
}

fn finish(outcome: Outcome) -> Command {
    Command::FinishAttempt(FinishAttempt {
        key: key(),
        worker: worker(),
        instance: instance(),
        outcome,
        exit_code: Some(-1),
        signal: Some(9),
        artifacts: vec![artifact()],
        log: Some(log()),
        death: Death::Proven,
        image: None,
        index: None,
        room: Room::Host,
    })
}

/// The report of an attempt that made an image and pushed an index.
fn indexed() -> Command {
    let success = Outcome::Succeeded { digest: Some(Digest([6; 32])), size: 8, image_tag: "t".to_owned() };
    match finish(success) {
        Command::FinishAttempt(it) => {
            Command::FinishAttempt(FinishAttempt { image: Some(image()), index: Some(Digest([4; 32])), ..it })
        }
        other => other,
    }
}

fn unproven() -> Command {
    match finish(Outcome::Stopped) {
        Command::FinishAttempt(it) => Command::FinishAttempt(FinishAttempt { death: Death::Unproven, ..it }),
        other => other,
    }
}

fn outgrown() -> Command {
    match finish(Outcome::Failed { reason: Reason::DiskFull, message: "m".to_owned() }) {
        Command::FinishAttempt(it) => Command::FinishAttempt(FinishAttempt { room: Room::Own, ..it }),
        other => other,
    }
}

fn submit() -> Command {
    Command::SubmitBuild(SubmitBuild {
        build: build(),
        spec: spec(),
        spec_digest: Digest([5; 32]),
        submitted_by: "client/c".to_owned(),
        retry_of: Some(build()),
    })
}

fn commands() -> Vec<Command> {
    let (worker, instance, build, key) = (worker(), instance(), build(), key());
    let authority = Authority::Owner("client/c".to_owned());
    vec![
        submit(),
        Command::CancelBuild(CancelBuild {
            build: build.clone(),
            authority: Authority::Any("operator/o".to_owned()),
            reason: "why".to_owned(),
        }),
        Command::AssignTask(AssignTask { key: key.clone(), worker: worker.clone(), instance: instance.clone() }),
        Command::PinSource(PinSource { key: key.clone(), worker: worker.clone(), commit: "a".repeat(40) }),
        finish(Outcome::Succeeded { digest: Some(Digest([3; 32])), size: 4, image_tag: "t".to_owned() }),
        finish(Outcome::Failed { reason: Reason::Oom, message: "m".to_owned() }),
        finish(Outcome::Stopped),
        unproven(),
        indexed(),
        Command::RecordImage(RecordImage {
            key: key.clone(),
            worker: worker.clone(),
            instance: instance.clone(),
            image: image(),
        }),
        outgrown(),
        Command::SealLog(SealLog { key: key.clone(), worker: worker.clone(), log: log() }),
        Command::ExpireAttempt(ExpireAttempt { key: key.clone(), reason: Reason::Timeout }),
        Command::EndUnverified(EndUnverified { key: key.clone() }),
        Command::ReleaseHold(ReleaseHold { worker: worker.clone(), instance: instance.clone(), key }),
        Command::RegisterWorker(RegisterWorker { worker: worker.clone(), instance: instance.clone(), offer: offer() }),
        Command::DetachWorker(DetachWorker { worker: worker.clone(), instance: instance.clone() }),
        Command::LoseWorker(LoseWorker { worker: worker.clone(), instance }),
        Command::DrainWorker(DrainWorker { worker: worker.clone(), deadline: Some(LogTime(5)), by: DrainedBy::Agent }),
        Command::DrainWorker(DrainWorker { worker: worker.clone(), deadline: None, by: DrainedBy::Operator }),
        Command::UndrainWorker(UndrainWorker { worker: worker.clone() }),
        Command::ProbeWorker(ProbeWorker { worker: worker.clone() }),
        Command::RemoveWorker(RemoveWorker { worker }),
        Command::RegisterArtifact(RegisterArtifact {
            build: build.clone(),
            authority: authority.clone(),
            artifact: artifact(),
        }),
        Command::PurgeBuilds(PurgeBuilds { builds: vec![build.clone()], cutoff: LogTime(6) }),
        Command::ExpireBytes(ExpireBytes { kept: Kept::Logs, builds: vec![build.clone()] }),
        Command::ExpireTombstones(ExpireTombstones { builds: vec![build.clone()] }),
        Command::PinBuild(PinBuild { build, authority, pinned: Pinned::Yes }),
        Command::SetPolicy(SetPolicy { policy: Policy { copies: 3, ..Policy::default() }, expected: None }),
        Command::SetPolicy(SetPolicy {
            policy: Policy { copies: 3, ..Policy::default() },
            expected: Some(Policy::default()),
        }),
        Command::SetPolicy(SetPolicy { policy: keeping(), expected: None }),
        Command::RegisterNode(RegisterNode {
            node: NodeId(2),
            epoch: u64::MAX,
            grpc: "https://h:7420".to_owned(),
            version: "0.1.0".to_owned(),
            format: 1,
        }),
        Command::RetireNode(RetireNode { node: NodeId(2) }),
    ]
}

/// A policy of all that format 4 brought.
fn keeping() -> Policy {
    let rule = |name: &str| Rule::parse(name).unwrap().unwrap();
    Policy {
        retain_logs_ms: 1,
        retain_artifacts_ms: 2,
        retain_rules: BTreeMap::from([(rule("retain_ms[failed]"), 3), (rule("retain_logs_ms[cancelled,k=v]"), 0)]),
        seal_lost_after_ms: 4,
        scrub_bytes: 0,
        ..Policy::default()
    }
}

/// A build whose logs and artifacts went before it.
fn emptied() -> BuildRecord {
    let mut record = record();
    record.expire(Kept::Logs, LogTime(11));
    record.expire(Kept::Artifacts, LogTime(12));
    record
}

fn attempt(end: bool) -> AttemptRecord {
    AttemptRecord {
        number: AttemptNumber(2),
        worker: worker(),
        instance: instance(),
        assigned_at: LogTime(4),
        stop: Some(StopRequest { reason: Reason::Cancelled, at: LogTime(5) }),
        end: end.then(|| AttemptEnd {
            at: LogTime(6),
            reason: Some(Reason::Signal),
            message: "m".to_owned(),
            exit_code: None,
            signal: Some(9),
            digest: Some(Digest([8; 32])),
            size: 3,
            image_tag: "t".to_owned(),
            verified: true,
            index: None,
        }),
        artifacts: vec![artifact()],
        log: Some(log()),
        image: None,
    }
}

fn record() -> BuildRecord {
    let task = |phase, end| TaskRecord {
        platform: Some(Platform::new("linux/amd64").unwrap()),
        phase,
        attempts: vec![attempt(end)],
        user_retries: 1,
        infra_retries: 2,
    };
    BuildRecord {
        id: build(),
        spec: spec(),
        spec_digest: Digest([5; 32]),
        submitted_by: "client/c".to_owned(),
        retry_of: Some(build()),
        sequence: 12,
        state: BuildState::Running,
        created_at: LogTime(1),
        started_at: Some(LogTime(2)),
        completed_at: Some(LogTime(0)),
        commit: Some("c".repeat(40)),
        cancel: Some(CancelRequest { at: LogTime(3), by: "client/c".to_owned(), reason: String::new() }),
        reason: Some(Reason::Cancelled),
        verified: true,
        tasks: vec![
            task(TaskPhase::Waiting { not_before: LogTime(0) }, true),
            task(TaskPhase::Running, false),
            task(TaskPhase::Ended { state: BuildState::Failed, reason: Some(Reason::Exit), at: LogTime(9) }, true),
        ],
        artifacts: vec![artifact()],
        pinned: Pinned::Yes,
        indexing: None,
        expired: Expired::default(),
    }
}

/// A build with images, and an index to come.
pub(crate) fn with_images() -> BuildRecord {
    let mut record = record();
    record.indexing = Some(TaskIndex(1));
    for attempt in record.tasks.iter_mut().flat_map(|task| &mut task.attempts) {
        attempt.image = Some(image());
        if let Some(end) = &mut attempt.end {
            end.index = Some(Digest([4; 32]));
        }
    }
    record
}

fn node(removed_at: Option<LogTime>) -> NodeRecord {
    NodeRecord { id: NodeId(1), epoch: 2, grpc: "g".to_owned(), version: "v".to_owned(), format: 1, removed_at }
}

fn rows() -> Vec<Row> {
    let worker = |standing, drain| {
        Row::Worker(Arc::new(WorkerRecord {
            name: worker(),
            instance: instance(),
            offer: offer(),
            standing,
            drain,
            held: BTreeSet::from([key()]),
            registered_at: LogTime(7),
            trust: Trust::default(),
        }))
    };
    let trusted = |trust| match worker(Standing::Present, None) {
        Row::Worker(record) => Row::Worker(Arc::new(WorkerRecord { trust, ..(*record).clone() })),
        other => other,
    };
    vec![
        Row::Counters(Counters { next_sequence: 4, last_at: LogTime(5), voters: BTreeSet::from([NodeId(1)]) }),
        Row::Policy(Policy::default()),
        Row::Node(node(None)),
        worker(Standing::Present, None),
        worker(Standing::Detached { until: LogTime(0) }, Some(Drain { deadline: None, by: DrainedBy::Agent })),
        worker(Standing::Lost, Some(Drain { deadline: Some(LogTime(0)), by: DrainedBy::Operator })),
        Row::Build(Arc::new(record())),
        Row::Addendum(key(), Addendum::Log(log())),
        Row::Addendum(key(), Addendum::Artifact(artifact())),
        Row::Addendum(key(), Addendum::Pinned(Pinned::No)),
        Row::Tombstone(Tombstone {
            id: build(),
            spec_digest: Digest([1; 32]),
            state: BuildState::Cancelled,
            purged_at: LogTime(3),
        }),
        trusted(Trust::Full { failed: BTreeSet::from([build()]) }),
        trusted(Trust::Quarantined { until: LogTime(8), round: 0 }),
        trusted(Trust::Probing { since: LogTime(8), round: 2 }),
        Row::Build(Arc::new(with_images())),
        Row::Node(node(Some(LogTime(9)))),
        Row::Policy(keeping()),
        Row::Build(Arc::new(emptied())),
    ]
}

fn rejections() -> Vec<Rejection> {
    let unfit = [
        Unfit::Unhealthy,
        Unfit::Lost,
        Unfit::Detached,
        Unfit::Draining,
        Unfit::Held,
        Unfit::Quarantined { until: LogTime(4) },
        Unfit::Probing,
        Unfit::Pressure("disk".to_owned()),
        Unfit::Full { capacity: 3 },
        Unfit::Platform { asked: "a/b".to_owned(), has: "c/d e/f".to_owned() },
        Unfit::Label { asked: "a=b".to_owned(), has: None },
        Unfit::Label { asked: "a=b".to_owned(), has: Some(String::new()) },
        Unfit::Executor { asked: "podman".to_owned(), why: "none".to_owned() },
        Unfit::Secret("token".to_owned()),
        Unfit::Command,
        Unfit::Resources { what: Measure::Memory, asked: 3, has: 2 },
        Unfit::Short { what: Measure::Cpu, asked: 3, left: 1, has: 9 },
        Unfit::Claimed { build: build() },
    ];
    let mut out: Vec<_> = unfit.map(|why| Rejection::WorkerUnfit { worker: worker(), why }).into();
    out.extend([
        Rejection::IdTaken(build()),
        Rejection::QueueFull { queue_max: 3 },
        Rejection::BuildUnknown(build()),
        Rejection::BuildPurged(build()),
        Rejection::Expired(build(), Kept::Artifacts),
        Rejection::WrongState { from: BuildState::Failed, to: BuildState::Cancelled },
        Rejection::NotOwner { build: build(), owner: "client/c".to_owned() },
        Rejection::TaskUnknown(key()),
        Rejection::TaskNotWaiting(key()),
        Rejection::StaleAttempt { key: key(), current: AttemptNumber(4) },
        Rejection::AttemptEnded(key()),
        Rejection::WorkerUnknown(worker()),
        Rejection::InstanceStale(worker()),
        Rejection::OfferInvalid("capacity"),
        Rejection::TooFewHolders { what: "log".to_owned(), holders: 1, needed: 2 },
        Rejection::ReportInvalid("no log"),
        Rejection::CommitInvalid,
        Rejection::NodeEpochTaken { node: NodeId(4) },
        Rejection::NodeRemoved { node: NodeId(5) },
        Rejection::NodeVotes { node: NodeId(6) },
        Rejection::TooManyRows { given: 300 },
        Rejection::PolicyInvalid("copies".to_owned()),
        Rejection::PolicyChanged,
        Rejection::ArtifactTaken("x".to_owned()),
        Rejection::AttemptRunning(key()),
        Rejection::NotDue(key()),
    ]);
    out
}

#[test]
fn every_command_reads_back() {
    let commands = commands();
    let kinds: BTreeSet<_> = commands.iter().map(|c| format!("{:?}", std::mem::discriminant(c))).collect();
    assert_eq!(kinds.len(), 25, "a kind of command is not tested");
    let wire = commands.iter().map(command_to_wire).collect();
    let bytes = encode_batch(LogTime(99), wire);
    assert_eq!(decode_batch(&bytes).unwrap(), (LogTime(99), commands));
}

#[test]
fn a_worker_that_does_not_say_which_secrets_it_has_is_not_one_that_has_none() {
    for secrets in [None, Some(BTreeMap::new())] {
        let offer = WorkerOffer { secrets, ..offer() };
        let command = Command::RegisterWorker(RegisterWorker { worker: worker(), instance: instance(), offer });
        let bytes = encode_batch(LogTime(1), vec![command_to_wire(&command)]);
        assert_eq!(decode_batch(&bytes).unwrap().1, [command]);
    }
}

#[test]
fn every_row_reads_back() {
    for row in rows() {
        assert_eq!(decode_row(&encode_row(&row)).unwrap(), row);
    }
}

#[test]
fn every_reply_reads_back() {
    let mut replies = vec![
        Reply::Done,
        Reply::Unchanged,
        Reply::Submitted,
        Reply::SameBuild,
        Reply::SamePurged(BuildState::Succeeded),
        Reply::SourcePinned("c".repeat(40)),
        Reply::Purged(7),
    ];
    replies.extend(rejections().into_iter().map(Reply::Rejected));
    for reply in replies {
        assert_eq!(reply_from_wire(reply_to_wire(&reply)).unwrap(), reply);
    }
}

#[test]
fn what_is_newer_or_damaged_is_refused_by_name() {
    let unknown = store::Batch { format: 1, at_ms: 1, commands: vec![store::Command { kind: None }] };
    assert!(matches!(decode_batch(&unknown.encode_to_vec()), Err(CodecError::Newer { .. })));
    let newer = store::Batch { format: COMMAND_FORMAT + 1, at_ms: 1, commands: vec![] };
    let error = decode_batch(&newer.encode_to_vec()).unwrap_err().to_string();
    assert!(error.contains(&format!("format {}", COMMAND_FORMAT + 1)) && error.contains("newer"), "{error}");
    let newer = store::Row { format: ROW_FORMAT + 1, kind: None };
    assert!(matches!(decode_row(&newer.encode_to_vec()), Err(CodecError::Newer { .. })));
    assert!(decode_row(&[0xff; 20]).is_err());
    assert!(decode_row(&[]).is_err());
    let mut bytes = encode_row(&rows()[6]);
    bytes.truncate(bytes.len() / 2);
    assert!(decode_row(&bytes).is_err());
}

/// While an older node is a member, what an older form says as well is put into that, and nothing else is changed.
#[test]
fn what_older_readers_may_miss_is_left_out_for_them_and_no_more() {
    let lowered = |command: &Command, known| {
        let mut wire = command_to_wire(command);
        lower(&mut wire, known);
        (format_of(&wire), command_from_wire(wire).unwrap())
    };
    let offer = WorkerOffer { secrets: Some(BTreeMap::new()), ..offer() };
    let register = |offer| Command::RegisterWorker(RegisterWorker { worker: worker(), instance: instance(), offer });
    let with = register(offer.clone());
    assert_eq!(lowered(&with, 3), (3, with.clone()));
    assert_eq!(lowered(&with, 2), (1, register(WorkerOffer { secrets: None, ..offer })));
    for command in commands() {
        let (format, after) = lowered(&command, 1);
        let registers = matches!(command, Command::RegisterWorker(_));
        let grew = matches!(&command, Command::FinishAttempt(it) if it.room == Room::Own);
        assert!(registers || grew || after == command, "{command:?}");
        assert!(format == 1 || after == command, "{command:?}");
    }
}

/// What needs no newer reader says so, and what would be misread says that too.
#[test]
fn formats_are_the_lowest_that_will_do() {
    let of_command = |command: &Command| {
        let bytes = encode_batch(LogTime(1), vec![command_to_wire(command)]);
        store::Batch::decode(bytes.as_slice()).unwrap().format
    };
    assert_eq!(of_command(&finish(Outcome::Stopped)), 1);
    assert_eq!((of_command(&unproven()), of_command(&indexed())), (2, 3));
    let of_row = |record: BuildRecord| {
        let bytes = encode_row(&Row::Build(Arc::new(record)));
        store::Row::decode(bytes.as_slice()).unwrap().format
    };
    assert_eq!((of_row(record()), of_row(with_images()), of_row(emptied())), (1, 3, 4));
    let setting = |policy: Policy, expected| of_command(&Command::SetPolicy(SetPolicy { policy, expected }));
    assert_eq!((setting(Policy::default(), None), setting(Policy::default(), Some(Policy::default()))), (1, 3));
    assert_eq!((setting(keeping(), None), setting(Policy::default(), Some(keeping()))), (4, 4));
    let of_policy = |policy| store::Row::decode(encode_row(&Row::Policy(policy)).as_slice()).unwrap().format;
    assert_eq!((of_policy(Policy { copies: 3, ..Policy::default() }), of_policy(keeping())), (1, 4));
    let new = Policy::of_new_clusters;
    assert_eq!((setting(new(), None), setting(Policy::default(), Some(new())), of_policy(new())), (5, 5, 5));
    let of_worker = |secrets, trust| {
        let Row::Worker(it) = &rows()[3] else { panic!("no worker") };
        let offer = WorkerOffer { secrets, ..it.offer.clone() };
        let bytes = encode_row(&Row::Worker(Arc::new(WorkerRecord { offer, trust, ..(**it).clone() })));
        store::Row::decode(bytes.as_slice()).unwrap().format
    };
    let quarantined = || Trust::Quarantined { until: LogTime(8), round: 0 };
    assert_eq!((of_worker(None, Trust::default()), of_worker(None, quarantined())), (1, 2));
    assert_eq!((of_worker(Some(BTreeMap::new()), Trust::default()), of_worker(offer().secrets, quarantined())), (3, 3));
}

/// The bytes as first written: a change of them is a change of everything on disk.
#[test]
fn golden_bytes_do_not_change() {
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |out, byte| out + &format!("{byte:02x}"));
    let one = |command: &Command| hex(&encode_batch(LogTime(1), vec![command_to_wire(command)]));
    assert_eq!(
        one(&Command::AssignTask(AssignTask { key: key(), worker: worker(), instance: instance() })),
        "080110011a161a140a090a03622d31100118021202773".to_owned() + "11a03612e62"
    );
    assert_eq!(
        one(&Command::ExpireBytes(ExpireBytes { kept: Kept::Logs, builds: vec![build()] })),
        "080410011a0ec2020b0a03622d3112046c6f6773"
    );
    let tombstone = hex(&encode_row(&rows()[10]));
    assert!(tombstone.starts_with("080142340a03622d311220"), "{tombstone}");
    let counters = hex(&encode_row(&rows()[0]));
    assert_eq!(counters, "08011207080410051a0101");
}
