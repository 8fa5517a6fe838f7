//! The core's scheduler alone, without a network or a disk: 5,000 workers, 50,000 queued builds of which half ask for labels.
//!
//! A placement is decided in batches as large as a leader's, and applied to the state, as it would be on every node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use helix_core::command::{RegisterWorker, SubmitBuild, WorkerOffer};
use helix_core::{Applied, Command, InFlight, Liveness, Reply, State, WorkerLiveness, invariants, schedule};
use helix_model::{BuildId, BuildSpec, Digest, Executor, Instance, LogTime, Platform, WorkerName};

use super::Settings;
use super::figure::{Figure, Goal, Pair, Row, Unit, median, per_second};
use super::ours::no_op;

const WORKERS: usize = 5_000;
const QUEUED: usize = 50_000;

/// Slots of a worker: in the end every one is taken.
const SLOTS: u32 = 10;

/// Zones that workers are in, and that every second build asks for one of.
const ZONES: usize = 10;

/// As many as a leader puts into one log entry.
const BATCH: usize = 512;

/// When all this is.
const NOW: LogTime = LogTime(1_000_000);

/// Measures.
///
/// # Errors
/// When a placement is refused, or not all are made.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let (state, liveness) = world()?;
    let (mut pairs, mut first, mut last) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..settings.rounds(5, 2) {
        let marks = fill(state.clone(), &liveness)?;
        let tenths = marks.len() / 10;
        let whole: Duration = marks.iter().map(|(_, time)| *time).sum();
        pairs.push(Pair { ours: per_second(QUEUED as u64, whole), peer: None });
        first.push(rate(&marks[..tenths]));
        last.push(rate(&marks[marks.len() - tenths..]));
    }
    let [first, last] = [first, last].map(|rates| median(rates).unwrap_or_default());
    Ok(Figure {
        name: "placement",
        peer: "none is driven".to_owned(),
        rows: vec![
            Row::new(format!("{QUEUED} builds onto {WORKERS} workers"), Unit::PerSecond, pairs)
                // Ten times what Kubernetes asks of its own scheduler.
                .goal(Goal::Value(8_100.0)),
        ],
        times: Vec::new(),
        history: "every build was placed, no placement was refused, and the state's invariants held".to_owned(),
        notes: vec![format!("the first tenth at {first:.0}/s, the last at {last:.0}/s")],
    })
}

fn rate(marks: &[(usize, Duration)]) -> f64 {
    let count: usize = marks.iter().map(|(count, _)| *count).sum();
    per_second(count as u64, marks.iter().map(|(_, time)| *time).sum())
}

/// Places all; how many in each batch and how long it took.
fn fill(mut state: State, liveness: &Liveness) -> anyhow::Result<Vec<(usize, Duration)>> {
    let mut marks = Vec::new();
    let in_flight = InFlight::default();
    loop {
        let started = Instant::now();
        let commands = schedule::schedule(&state, &in_flight, liveness, NOW, BATCH);
        if commands.is_empty() {
            break;
        }
        apply(&mut state, &commands)?;
        marks.push((commands.len(), started.elapsed()));
    }
    let placed: usize = marks.iter().map(|(count, _)| *count).sum();
    ensure!(placed == QUEUED, "{placed} of {QUEUED} were placed");
    if let Err(why) = invariants::check(&state) {
        anyhow::bail!("an invariant is broken: {why}");
    }
    Ok(marks)
}

fn apply(state: &mut State, commands: &[Command]) -> anyhow::Result<()> {
    let mut out = Applied::default();
    for command in commands {
        let reply = state.apply(NOW, command, &mut out);
        ensure!(!matches!(reply, Reply::Rejected(_)), "{command:?}: {reply:?}");
    }
    state.finish_entry(&mut out);
    Ok(())
}

fn zone(number: usize) -> BTreeMap<String, String> {
    BTreeMap::from([("zone".to_owned(), format!("z{}", number % ZONES))])
}

fn world() -> anyhow::Result<(State, Liveness)> {
    let (mut state, mut liveness) = (State::default(), Liveness::default());
    let platforms = BTreeSet::from([Platform::new("linux/amd64")?]);
    for number in 0..WORKERS {
        let (worker, instance) = (WorkerName::new(&format!("w{number}"))?, Instance::new("data1.boot1")?);
        let offer = WorkerOffer {
            capacity: SLOTS,
            platforms: platforms.clone(),
            labels: zone(number),
            executors: BTreeSet::from([Executor::Exec]),
            allows_job_commands: true,
            ..WorkerOffer::default()
        };
        liveness.workers.insert(worker.clone(), WorkerLiveness::opened(instance.clone(), NOW));
        apply(&mut state, &[Command::RegisterWorker(RegisterWorker { worker, instance, offer })])?;
    }
    for number in 0..QUEUED {
        let requires = if number % 2 == 0 { BTreeMap::new() } else { zone(number / 2) };
        let spec = BuildSpec { executor: Some(Executor::Exec), requires, ..no_op() };
        let submit = SubmitBuild {
            build: BuildId::new(&format!("b{number}"))?,
            spec_digest: Digest([0; 32]),
            spec: Arc::new(spec),
            submitted_by: "client/bench".to_owned(),
            retry_of: None,
        };
        apply(&mut state, &[Command::SubmitBuild(submit)])?;
    }
    Ok((state, liveness))
}
