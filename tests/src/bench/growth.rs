//! What more of everything costs: builds a second with few and with many finished builds in the registry, and with few and with
//! many queued ones; and the memory that each takes.
//!
//! Of a pair the right side is ours, too: a cluster with the fewest. Finished builds are cancelled ones, queued ones ask for a label
//! that no worker has.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use futures::stream::{StreamExt as _, TryStreamExt as _};
use helix_common::channel::Traffic;
use helix_model::BuildSpec;
use helix_proto::convert::submit_of_spec;
use helix_proto::v1::CancelBuildRequest;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::Settings;
use super::drive::{DEADLINE, new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Unit, median, per_second};
use super::footprint::resident_kib;
use super::ours::{Ours, no_op};
use crate::cluster::Shape;

/// How many there are: the fewest first.
const FINISHED: [u64; 3] = [10, 1_000, 100_000];
const QUEUED: [u64; 3] = [1, 50_000, 500_000];
/// As many of a quick run.
const FINISHED_QUICK: [u64; 3] = [10, 1_000, 10_000];
const QUEUED_QUICK: [u64; 3] = [1, 5_000, 50_000];

/// Cancels under way at once.
const CANCELS: usize = 256;

/// How much slower it may become.
const KEPT: f64 = 0.8;

/// What there is to be more and more of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Finished,
    Queued,
}

/// Measures.
///
/// # Errors
/// When a build does not succeed, or what was asked for is not there.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let (finished, queued) = if settings.quick { (FINISHED_QUICK, QUEUED_QUICK) } else { (FINISHED, QUEUED) };
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for (kind, levels) in [(Kind::Finished, finished), (Kind::Queued, queued)] {
        let (more, note) = grow(&runtime, settings, kind, levels)?;
        rows.extend(more);
        notes.push(note);
    }
    notes.push("each turn has a cluster of its own; ratios are to the turn with the fewest, right before".to_owned());
    Ok(Figure {
        name: "growth",
        peer: "itself, with the fewest".to_owned(),
        rows,
        times: Vec::new(),
        history: "each turn began with as many finished or queued builds as it says, and all of its own succeeded"
            .to_owned(),
        notes,
    })
}

fn grow(runtime: &Runtime, settings: &Settings, kind: Kind, levels: [u64; 3]) -> anyhow::Result<(Vec<Row>, String)> {
    let word = if kind == Kind::Finished { "finished" } else { "queued" };
    let [few, levels @ ..] = levels;
    let mut rows = levels.map(|level| {
        let what = format!("builds, with {level} {word} beside {few}");
        Row::new(what, Unit::PerSecond, Vec::new()).goal(Goal::Ratio(KEPT))
    });
    let mut bytes = Vec::new();
    for _ in 0..settings.rounds(5, 2) {
        let (young, _) = turn(runtime, settings, kind, few)?;
        for (row, level) in rows.iter_mut().zip(levels) {
            let (rate, memory) = turn(runtime, settings, kind, level)?;
            row.pairs.push(Pair { ours: rate, peer: Some(young) });
            if level == levels[1] {
                bytes.push(memory / level as f64);
            }
        }
    }
    let bytes = median(bytes).unwrap_or_default();
    let note = format!("memory of the leader for each {word} build: {bytes:.0} bytes, of {} of them", levels[1]);
    Ok((rows.to_vec(), note))
}

/// Builds a second on a new cluster that has so many others, and the memory in bytes that those took of the leader.
fn turn(runtime: &Runtime, settings: &Settings, kind: Kind, others: u64) -> anyhow::Result<(f64, f64)> {
    let ours = Ours::start(&Shape { capacity: 8, ..Shape::default() })?;
    // Nothing is purged meanwhile.
    ours.set_policy(&["retain_builds=10000000"])?;
    let leader = ours.cluster.leader();
    let endpoint = leader.grpc.context("a coordinator has an endpoint")?;
    let channel = ours.channel(&endpoint, Traffic::Bulk)?;
    let memory = || leader.pid.and_then(resident_kib).context("the leader runs").map(|kib| kib * 1024.0);
    let empty = memory()?;
    runtime.block_on(add(&channel, kind, others))?;
    let taken = memory()? - empty;
    // What so many at once left to be done is not what having them costs.
    ours.until_quiet()?;
    let (count, waiting) = (settings.rounds(2_000, 300), if kind == Kind::Queued { others } else { 0 });
    let rate = runtime.block_on(run(&channel, count, waiting))?;
    let succeeded = ours.count("succeeded")?;
    ensure!(succeeded == count, "{succeeded} of {count} succeeded");
    Ok((rate, taken))
}

/// Submits so many that nobody can run, and cancels them, if they are to be finished.
pub(super) async fn add(channel: &Channel, kind: Kind, count: u64) -> anyhow::Result<()> {
    let requires = BTreeMap::from([("zone".to_owned(), "nowhere".to_owned())]);
    let spec = BuildSpec { requires, park: true, ..no_op() };
    let keys: Vec<String> = (0..count).map(|_| new_key()).collect();
    submit(channel, keys.clone(), &spec).await?;
    if kind == Kind::Finished {
        let cancels = keys.into_iter().map(|build_id| {
            let mut client = BuildServiceClient::new(channel.clone());
            async move {
                let request = CancelBuildRequest { build_id, reason: String::new() };
                let said = client.cancel_build(request).await?.into_inner();
                ensure!(said.cancelled, "{said:?}");
                Ok(())
            }
        });
        futures::stream::iter(cancels).buffer_unordered(CANCELS).try_collect::<()>().await?;
    }
    let totals = Ours::totals(channel.clone()).await?;
    let queued = if kind == Kind::Queued { count } else { 0 };
    ensure!(totals.queued == queued, "{} are queued, and {queued} are to be", totals.queued);
    Ok(())
}

/// Runs so many builds while so many others wait; how many a second.
async fn run(channel: &Channel, count: usize, waiting: u64) -> anyhow::Result<f64> {
    let started = Instant::now();
    submit(channel, (0..count).map(|_| new_key()).collect(), &no_op()).await?;
    let end = started + DEADLINE * 5;
    loop {
        let totals = Ours::totals(channel.clone()).await?;
        if totals.queued + totals.running == waiting {
            return Ok(per_second(count as u64, started.elapsed()));
        }
        ensure!(Instant::now() < end, "builds do not end: {totals:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

pub(super) async fn submit(channel: &Channel, keys: Vec<String>, spec: &BuildSpec) -> anyhow::Result<()> {
    let spec = spec.clone();
    let count = keys.len();
    let requests = keys.into_iter().map(move |key| submit_of_spec(&spec, &key));
    let stream = tokio_stream::iter(requests);
    let mut answers = BuildServiceClient::new(channel.clone()).submit_builds(stream).await?.into_inner();
    let mut accepted = 0;
    while let Some(answer) = answers.message().await? {
        ensure!(answer.error.is_none(), "{answer:?}");
        accepted += 1;
    }
    ensure!(accepted == count, "{accepted} of {count} were answered");
    Ok(())
}
