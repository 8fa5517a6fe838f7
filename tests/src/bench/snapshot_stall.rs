//! What clients feel of a snapshot that the leader writes while they submit: the longest submit with one beside the longest without.
//!
//! The registry is full of finished builds. One client submits at a fixed pace, and each of its times counts from when it was due: who
//! waits is late for the next, too.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_proto::v1;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use helix_proto::v1::save_snapshot_response::Part;
use tokio::sync::watch;
use tonic::transport::Channel;

use super::Settings;
use super::drive::{Writer, new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, median};
use super::growth::{Kind, add};
use super::ours::Ours;
use crate::cluster::Shape;

/// Finished builds in the registry.
const FINISHED: u64 = 1_000_000;
const FINISHED_QUICK: u64 = 20_000;

/// Between two submits.
const PACE: Duration = Duration::from_millis(5);

/// How long the client is watched without a snapshot.
const WITHOUT: Duration = Duration::from_secs(10);

/// Measures.
///
/// # Errors
/// When a submit or a snapshot fails.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let finished = if settings.quick { FINISHED_QUICK } else { FINISHED };
    // Nobody runs what is submitted.
    let ours = Ours::start(&Shape { agents: 0, ..Shape::default() })?;
    ours.set_policy(&["retain_builds=10000000"])?;
    let leader = ours.cluster.leader();
    let endpoint = leader.grpc.context("a coordinator has an endpoint")?;
    let bulk = ours.channel(&endpoint, Traffic::Bulk)?;
    let control = ours.channel(&endpoint, Traffic::Control)?;
    runtime.block_on(add(&bulk, Kind::Finished, finished))?;
    let (mut pairs, mut bytes, mut took, mut submitted) = (Vec::new(), 0, Vec::new(), 0);
    let mut all = [Times::new("submits during a snapshot"), Times::new("submits without")];
    for _ in 0..settings.rounds(5, 2) {
        let (without, ()) = runtime.block_on(submits(control.clone(), async {
            tokio::time::sleep(WITHOUT).await;
            Ok(())
        }))?;
        let (with, (elapsed, size)) = runtime.block_on(submits(control.clone(), snapshot(bulk.clone())))?;
        submitted += without.count() + with.count();
        pairs.push(Pair { ours: with.ms(100.0), peer: Some(without.ms(100.0)) });
        all[0].merge(&with);
        all[1].merge(&without);
        (bytes, _) = (size, took.push(elapsed.as_secs_f64()));
    }
    let totals = runtime.block_on(Ours::totals(control))?;
    ensure!(totals.queued == submitted, "{submitted} were acknowledged, {} are queued", totals.queued);
    let seconds = median(took).unwrap_or_default();
    Ok(Figure {
        name: "snapshot-stall",
        peer: "itself, while it writes no snapshot".to_owned(),
        rows: vec![Row::new("longest submit during a snapshot", Unit::Ms, pairs).goal(Goal::Value(20.0))],
        times: all.to_vec(),
        history: format!("all {submitted} submits were queued at the end"),
        notes: vec![format!(
            "{finished} finished builds; a snapshot has {bytes} bytes and took {seconds:.1} s (median); one submit is due every {PACE:?}"
        )],
    })
}

/// Submits at the pace for as long as `meanwhile` takes.
async fn submits<T>(
    channel: Channel,
    meanwhile: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<(Times, T)> {
    let (stop, stopped) = watch::channel(false);
    let client = tokio::spawn(async move {
        let mut times = Times::new("submits");
        let mut due = Instant::now();
        while !*stopped.borrow() {
            tokio::time::sleep_until(due.into()).await;
            Writer::Ours.write(channel.clone(), &new_key()).await?;
            times.add(due.elapsed());
            due += PACE;
        }
        Ok::<_, tonic::Status>(times)
    });
    let done = meanwhile.await;
    stop.send_replace(true);
    Ok((client.await??, done?))
}

/// Has the leader write a snapshot; how long that took and how large it is.
async fn snapshot(channel: Channel) -> anyhow::Result<(Duration, u64)> {
    let began = Instant::now();
    let request = v1::SaveSnapshotRequest::default();
    let mut stream = ClusterServiceClient::new(channel).save_snapshot(request).await?.into_inner();
    let first = stream.message().await?.and_then(|message| message.part);
    // The header comes when the file is whole; what is in it is of no interest.
    let Some(Part::Header(header)) = first else { anyhow::bail!("a snapshot begins with {first:?}") };
    Ok((began.elapsed(), header.bytes))
}
