//! Builds that do nothing, from submit to a terminal state: how many a second beside HyperQueue and Slurm, and how long one takes
//! beside `srun`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_proto::convert::submit_of_spec;
use helix_proto::v1;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tokio::runtime::Runtime;

use super::Settings;
use super::drive::{new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, per_second};
use super::hyperqueue::HyperQueue;
use super::limits;
use super::ours::{Ours, no_op, until_idle};
use super::slurm::{self, Slurm};
use crate::cluster::Shape;

/// Agents, and slots of each; the peer has one worker with as many slots as they together.
const AGENTS: u16 = 2;
const SLOTS: u32 = 8;

/// What a turn came to: builds a second, and milliseconds of processor time a build over all processes.
pub(super) struct Turn {
    pub(super) rate: f64,
    pub(super) cpu_ms: f64,
}

/// Builds a second.
///
/// # Errors
/// When a build does not succeed.
pub fn rate(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let count = settings.rounds(5000, 1000);
    let peer = HyperQueue::find();
    let described = slurm::describe();
    let slots = u32::from(AGENTS) * SLOTS;
    // It is slow: so many take as long as all of ours.
    let few = settings.rounds(200, 50);
    let (mut rates, mut slow, mut costs, mut syncs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..settings.rounds(5, 3) {
        let other = |turn: bool| match &peer {
            Ok(peer) if turn => peer.run(count, slots).map(Some),
            _ => Ok(None),
        };
        let early = other(round % 2 == 1)?;
        let (own, synced) = ours(&runtime, count)?;
        let late = other(round % 2 == 0)?;
        let other = early.or(late);
        let slurm = described.is_ok().then(|| Slurm::start(slots)?.batch(few)).transpose()?;
        slow.push(Pair { ours: own.rate, peer: slurm });
        rates.push(Pair { ours: own.rate, peer: other.as_ref().map(|turn| turn.rate) });
        costs.push(Pair { ours: own.cpu_ms, peer: other.as_ref().map(|turn| turn.cpu_ms) });
        syncs.push(synced);
    }
    let limit = limits::starts_per_second()?;
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let syncs = super::figure::median(syncs).unwrap_or_default();
    let rate = Row::new("builds", Unit::PerSecond, rates)
        .limit(limit, "/bin/true started and waited for, on all cores")
        .goal(Goal::Ratio(2.0));
    let cost = Row::new("processor time a build, all processes", Unit::Ms, costs);
    Ok(Figure {
        name: "no-op-rate",
        peer: [peer.map_or_else(|absent| absent, |peer| peer.describe()), described.unwrap_or_else(|absent| absent)]
            .join("; "),
        rows: vec![
            rate,
            Row::new("builds, beside Slurm", Unit::PerSecond, slow).goal(Goal::Ratio(30.0)),
            cost.limit(1000.0 * cores / limit, "that of one /bin/true, started and waited for"),
        ],
        times: Vec::new(),
        history: format!(
            "all {count} builds of each turn succeeded, here and at HyperQueue; each of Slurm's left its output"
        ),
        notes: vec![
            format!("{AGENTS} agents of {SLOTS} slots; a peer has one worker with as many as both"),
            format!("Slurm: an array of {few}, from its submit until its queue is empty"),
            format!("{syncs:.2} log syncs a build over all our coordinators"),
        ],
    })
}

/// Submits all by one batch stream and waits until none is left; gives syncs of the log a build as well.
fn ours(runtime: &Runtime, count: usize) -> anyhow::Result<(Turn, f64)> {
    let ours = Ours::start(&Shape { agents: AGENTS, capacity: SLOTS, ..Shape::default() })?;
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let (syncs, cpu) = (ours.metric("helix_fsync_seconds_count"), ours.cpu_seconds());
    let started = Instant::now();
    let elapsed = runtime.block_on(async {
        let requests: Vec<_> = (0..count).map(|_| submit_of_spec(&no_op(), &new_key())).collect();
        let channel = ours.channel(&leader, Traffic::Bulk)?;
        let stream = tokio_stream::iter(requests);
        let mut answers = BuildServiceClient::new(channel).submit_builds(stream).await?.into_inner();
        let mut accepted = 0;
        while let Some(answer) = answers.message().await? {
            ensure!(answer.error.is_none(), "{answer:?}");
            accepted += 1;
        }
        ensure!(accepted == count, "{accepted} of {count} were answered");
        until_idle(&ours.channel(&leader, Traffic::Control)?).await?;
        Ok::<Duration, anyhow::Error>(started.elapsed())
    })?;
    let builds = count as f64;
    let (syncs, cpu) = (ours.metric("helix_fsync_seconds_count") - syncs, ours.cpu_seconds() - cpu);
    let succeeded = ours.count("succeeded")?;
    ensure!(succeeded == count, "{succeeded} of {count} succeeded");
    Ok((Turn { rate: per_second(count as u64, elapsed), cpu_ms: cpu * 1000.0 / builds }, syncs / builds))
}

/// One build at a time, until its result is known to who submitted it.
///
/// # Errors
/// When a build does not succeed.
pub fn latency(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let ours = Ours::start(&Shape::default())?;
    let described = slurm::describe();
    let peer = described.is_ok().then(|| Slurm::start(u32::from(AGENTS) * SLOTS)).transpose()?;
    let (mut times, mut theirs) = (Times::new("ours: submit to result known"), Times::new("srun: start to end"));
    let target = ours.leader(1)?;
    let mut client = BuildServiceClient::new(target.channel(0));
    for round in 0..settings.rounds(500, 100) {
        let id = new_key();
        let started = Instant::now();
        let ended = runtime.block_on(async {
            client.submit_build(submit_of_spec(&no_op(), &id)).await?;
            let wait = v1::WaitBuildRequest { build_id: id, timeout_ms: 30_000 };
            Ok::<_, tonic::Status>(client.wait_build(wait).await?.into_inner())
        })?;
        times.add(started.elapsed());
        ensure!(ended.state == "succeeded", "{ended:?}");
        // One in five, for it takes long.
        if let Some(peer) = peer.as_ref().filter(|_| round % 5 == 0) {
            theirs.add(peer.one()?);
        }
    }
    let limit = limits::start_ms()? + 2.0 * (limits::sync_ms(&std::env::temp_dir())? + limits::round_trip_ms()?);
    let row = |what, percentile| {
        let other = peer.as_ref().map(|_| theirs.ms(percentile));
        let row = Row::new(what, Unit::Ms, vec![Pair { ours: times.ms(percentile), peer: other }]);
        row.limit(limit, "/bin/true started and waited for, and two syncs with a round trip each")
    };
    Ok(Figure {
        name: "no-op-latency",
        rows: vec![row("p50", 50.0).goal(Goal::Value(5.0)), row("p99", 99.0)],
        times: std::iter::once(times).chain(peer.is_some().then_some(theirs)).collect(),
        peer: described.map_or_else(|absent| absent, |slurm| format!("srun of {slurm}")),
        history: "every build succeeded, and every srun exited with 0".to_owned(),
        notes: vec!["a pair is of the percentiles of all; ours are calls on an open connection, and after each fifth comes an srun, \
             which is a process, as its users run it"
                .to_owned()],
    })
}
