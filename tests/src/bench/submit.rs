//! Durable submits, beside etcd's puts of as many bytes: one client's latency, and the rate of 256.
//!
//! Each turn has a fresh cluster that is alone on the machine, so that neither pays for the other's idling or growth.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_proto::convert::submit_of_spec;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tokio::runtime::Runtime;

use super::Settings;
use super::drive::{Target, new_key, runtime};
use super::etcd::{self, Etcd};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, per_second};
use super::limits;
use super::ours::{Ours, no_op};
use crate::cluster::Shape;

/// Clients that each wait for an answer before they write again.
const CLIENTS: usize = 256;

/// Connections that they share.
const CONNECTIONS: usize = 8;

/// Streams of a batch.
const STREAMS: usize = 4;

/// Writes before a client's latency counts.
const WARM_UP: usize = 100;

/// What a turn measured, and how many writes were acknowledged in it.
struct Turn {
    times: Times,
    rate: f64,
}

fn shape() -> Shape {
    Shape { agents: 0, ..Shape::default() }
}

/// Ours with clients upon its leader; afterwards everything acknowledged must be queued.
fn ours(runtime: &Runtime, what: &str, drive: impl Fn(&Target) -> anyhow::Result<(Turn, u64)>) -> anyhow::Result<Turn> {
    let ours = Ours::start(&shape())?;
    let target = ours.leader(CONNECTIONS)?;
    let (turn, acknowledged) = drive(&target).with_context(|| format!("ours: {what}"))?;
    let totals = runtime.block_on(Ours::totals(target.channel(0)))?;
    ensure!(totals.queued == acknowledged, "{acknowledged} were acknowledged, {} are queued", totals.queued);
    Ok(turn)
}

fn peer(runtime: &Runtime, drive: impl Fn(&Target) -> anyhow::Result<(Turn, u64)>) -> anyhow::Result<Turn> {
    let etcd = Etcd::start(runtime)?;
    let (turn, acknowledged) = drive(&etcd.leader(runtime, CONNECTIONS)?).context("etcd")?;
    let count = etcd.count(runtime)?;
    ensure!(count == acknowledged, "etcd acknowledged {acknowledged}, {count} are there");
    Ok(turn)
}

/// Both in turns; who begins changes each time.
fn in_turns(
    rounds: usize,
    mut ours: impl FnMut() -> anyhow::Result<Turn>,
    mut peer: impl FnMut() -> anyhow::Result<Turn>,
) -> anyhow::Result<Vec<(Turn, Option<Turn>)>> {
    let mut turns = Vec::new();
    for round in 0..rounds {
        turns.push(if etcd::describe().is_err() {
            (ours()?, None)
        } else if round % 2 == 0 {
            let own = ours()?;
            (own, Some(peer()?))
        } else {
            let other = peer()?;
            (ours()?, Some(other))
        });
    }
    Ok(turns)
}

fn pairs(turns: &[(Turn, Option<Turn>)], value: impl Fn(&Turn) -> f64) -> Vec<Pair> {
    turns.iter().map(|(ours, peer)| Pair { ours: value(ours), peer: peer.as_ref().map(&value) }).collect()
}

fn all_times(turns: &[(Turn, Option<Turn>)]) -> Vec<Times> {
    let mut all = vec![Times::new("ours, all rounds")];
    turns.iter().for_each(|(ours, _)| all[0].merge(&ours.times));
    if turns.iter().any(|(_, peer)| peer.is_some()) {
        let mut peers = Times::new("etcd, all rounds");
        turns.iter().filter_map(|(_, peer)| peer.as_ref()).for_each(|peer| peers.merge(&peer.times));
        all.push(peers);
    }
    all
}

const HISTORY: &str = "after each turn, everything acknowledged was there, and nothing else";

/// One client.
///
/// # Errors
/// When a write fails or is not there afterwards.
pub fn latency(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let count = settings.rounds(2000, 500);
    let drive = |target: &Target| {
        runtime.block_on(async {
            let (mut times, channel) = (Times::new("one client"), target.channel(0));
            let began = Instant::now();
            for round in 0..count + WARM_UP {
                let (key, started) = (new_key(), Instant::now());
                target.writer.write(channel.clone(), &key).await?;
                if round >= WARM_UP {
                    times.add(started.elapsed());
                }
            }
            let all = (count + WARM_UP) as u64;
            Ok((Turn { times, rate: per_second(all, began.elapsed()) }, all))
        })
    };
    let turns = in_turns(settings.rounds(5, 3), || ours(&runtime, "one client", drive), || peer(&runtime, drive))?;
    let limit = limits::sync_ms(&std::env::temp_dir())? + limits::round_trip_ms()?;
    let row = |what, percentile| {
        let row = Row::new(what, Unit::Ms, pairs(&turns, |turn| turn.times.ms(percentile))).goal(Goal::Ratio(0.5));
        row.limit(limit, "one sync and one loopback round trip")
    };
    Ok(Figure {
        name: "submit-latency",
        peer: etcd::describe().unwrap_or_else(|absent| absent),
        rows: vec![row("p50 of one client", 50.0), row("p99 of one client", 99.0)],
        times: all_times(&turns),
        history: HISTORY.to_owned(),
        notes: Vec::new(),
    })
}

/// Many clients; and ours by batch streams beside etcd's single puts: it has transactions of many puts, all or none of which are
/// made, but no stream of independent ones.
///
/// # Errors
/// As [`latency`].
pub fn rate(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let window = Duration::from_secs(if settings.quick { 3 } else { 8 });
    let unary = |target: &Target| runtime.block_on(many(target, window));
    let mut batch_rates = Vec::new();
    let ours = || {
        let single = ours(&runtime, "many clients", unary)?;
        batch_rates.push(batch(&runtime, window)?);
        Ok(single)
    };
    let turns = in_turns(settings.rounds(5, 3), ours, || peer(&runtime, unary))?;
    let peers = turns.iter().map(|(_, peer)| peer.as_ref().map(|peer| peer.rate));
    let batches = batch_rates.into_iter().zip(peers).map(|(ours, peer)| Pair { ours, peer }).collect();
    let limit = limits::round_trips_per_second()?;
    let words = "exchanges of one byte over loopback on all cores: no answers can be more";
    let single =
        Row::new(format!("{CLIENTS} clients"), Unit::PerSecond, pairs(&turns, |turn| turn.rate)).goal(Goal::Ratio(2.0));
    let batch = Row::new("by batch stream, beside single puts", Unit::PerSecond, batches).goal(Goal::Ratio(8.0));
    Ok(Figure {
        name: "submit-rate",
        peer: etcd::describe().unwrap_or_else(|absent| absent),
        rows: vec![single.limit(limit, words), batch],
        times: all_times(&turns),
        history: HISTORY.to_owned(),
        notes: vec![
            format!("{CLIENTS} clients over {CONNECTIONS} connections to the leader, {STREAMS} streams by batch"),
            "a turn by batch has a cluster of its own, right after ours of single submits".to_owned(),
        ],
    })
}

async fn many(target: &Target, window: Duration) -> anyhow::Result<(Turn, u64)> {
    let started = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (writer, channel) = (target.writer, target.channel(client));
            tokio::spawn(async move {
                let mut times = Vec::new();
                while started.elapsed() < window {
                    let (key, begun) = (new_key(), Instant::now());
                    writer.write(channel.clone(), &key).await?;
                    times.push(begun.elapsed());
                }
                Ok::<_, tonic::Status>(times)
            })
        })
        .collect();
    let mut all = Times::new("many clients");
    for client in clients {
        client.await??.into_iter().for_each(|time| all.add(time));
    }
    let rate = per_second(all.count(), started.elapsed());
    let count = all.count();
    Ok((Turn { times: all, rate }, count))
}

/// Submits a second by batch streams, on a cluster of its own.
fn batch(runtime: &Runtime, window: Duration) -> anyhow::Result<f64> {
    let ours = Ours::start(&shape())?;
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let done = Arc::new(AtomicU64::new(0));
    let elapsed = runtime.block_on(async {
        let started = Instant::now();
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let (channel, done) = (ours.channel(&leader, Traffic::Bulk)?, Arc::clone(&done));
            streams.push(tokio::spawn(stream(channel, started, window, done)));
        }
        for stream in streams {
            stream.await??;
        }
        Ok::<_, anyhow::Error>(started.elapsed())
    })?;
    let done = done.load(Ordering::Relaxed);
    let channel = ours.channel(&leader, Traffic::Control)?;
    let totals = runtime.block_on(Ours::totals(channel))?;
    ensure!(totals.queued == done, "{done} were acknowledged by batch, {} are queued", totals.queued);
    Ok(per_second(done, elapsed))
}

async fn stream(
    channel: tonic::transport::Channel,
    started: Instant,
    window: Duration,
    done: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let requests = std::iter::repeat_with(|| submit_of_spec(&no_op(), &new_key()));
    let requests = tokio_stream::iter(requests.take_while(move |_| started.elapsed() < window));
    let mut answers = BuildServiceClient::new(channel).submit_builds(requests).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        ensure!(answer.error.is_none(), "{answer:?}");
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
