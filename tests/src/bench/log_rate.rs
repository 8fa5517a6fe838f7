//! One build's log, from its command to a reader that follows it: how many bytes a second beside Buildbot, and how late a line is.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_model::{BuildSpec, Command, Outputs};
use helix_proto::convert::submit_of_spec;
use helix_proto::v1;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tonic::Code;
use tonic::transport::Channel;

use super::Settings;
use super::buildbot::Buildbot;
use super::drive::{DEADLINE, new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit};
use super::limits;
use super::ours::Ours;
use crate::cluster::Shape;

/// What a line says, without its end.
const LINE: &str = "0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 012";

/// Lines that tell when they were printed.
const DATED: usize = 500;

/// Measures.
///
/// # Errors
/// When a line is missing, twice, or not as it was printed.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let ours = Ours::start(&Shape { agents: 1, capacity: 1, ..Shape::default() })?;
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let channel = ours.channel(&leader, Traffic::Bulk)?;
    let lines = settings.rounds(2_000_000, 100_000);
    // It is slow: so many take longer than all of ours.
    let (peer, few) = (Buildbot::find(), settings.rounds(475_000, 50_000));
    let mut pairs = Vec::new();
    for _ in 0..settings.rounds(5, 2) {
        // A moment for the reader to be there first.
        let script = format!("sleep 1; yes '{LINE}' | head -n {lines}");
        let (mut first, mut count) = (None, 0);
        runtime.block_on(follow(&channel, &script, |line| {
            first.get_or_insert_with(Instant::now);
            count += 1;
            ensure!(line == LINE.as_bytes(), "line {count} is {:?}", String::from_utf8_lossy(line));
            Ok(())
        }))?;
        ensure!(count == lines, "{count} lines of {lines} came");
        let bytes = (lines * (LINE.len() + 1)) as f64;
        let took = first.context("a line came")?.elapsed();
        let other = peer.as_ref().ok().map(|peer| peer.log(few, LINE)).transpose()?;
        pairs.push(Pair { ours: bytes / took.as_secs_f64() / 1e6, peer: other });
    }
    let mut late = Times::new("line printed to line read");
    let script = format!("sleep 1; for i in $(seq {DATED}); do date +%s%N; sleep 0.01; done");
    runtime.block_on(follow(&channel, &script, |line| {
        let printed: u64 = std::str::from_utf8(line)?.parse()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        late.add(now.saturating_sub(Duration::from_nanos(printed)));
        Ok(())
    }))?;
    ensure!(late.count() == DATED as u64, "{} dated lines of {DATED} came", late.count());
    let row = |what, percentile| Row::new(what, Unit::Ms, vec![Pair { ours: late.ms(percentile), peer: None }]);
    let trip = limits::round_trip_ms()?;
    let disk = limits::disk_megabytes_per_second(&std::env::temp_dir())?;
    let rate = Row::new("lines of 80 characters, printed to read", Unit::MegabytesPerSecond, pairs);
    Ok(Figure {
        name: "log-rate",
        peer: peer.map_or_else(|absent| absent, |peer| peer.describe()),
        rows: vec![
            rate.limit(disk, "written one after the other to this disk, and synced")
                .goal(Goal::Value(150.0))
                .goal(Goal::Ratio(35.0)),
            row("line to reader, p50", 50.0).limit(trip, "one loopback round trip"),
            row("line to reader, p99", 99.0).limit(trip, "one loopback round trip").goal(Goal::Value(50.0)),
        ],
        times: vec![late],
        history: "every line came once, in order and as it was printed; Buildbot's were counted".to_owned(),
        notes: vec![
            format!("{lines} lines a turn, from the first line that was read to the log's end"),
            format!("Buildbot: {few} lines a turn, until the master's database has the last"),
        ],
    })
}

/// Submits a script and follows its log to the end; checks that lines are numbered from 1 without a hole.
async fn follow(
    channel: &Channel,
    script: &str,
    mut each: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let command = Some(Command::Shell(script.to_owned()));
    let spec = BuildSpec { command, outputs: Outputs::None, ..BuildSpec::default() };
    let id = new_key();
    let mut client = BuildServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    client.submit_build(submit_of_spec(&spec, &id)).await?;
    let request = v1::ReadLogRequest { build_id: id.clone(), follow: true, ..Default::default() };
    let end = Instant::now() + DEADLINE;
    let mut chunks = loop {
        match client.read_log(request.clone()).await {
            Ok(chunks) => break chunks.into_inner(),
            // Nothing runs yet.
            Err(status) if status.code() != Code::InvalidArgument && Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(status) => return Err(status.into()),
        }
    };
    let mut last = 0;
    while let Some(chunk) = chunks.message().await? {
        for record in chunk.records {
            ensure!(record.seq == last + 1, "line {} came after line {last}", record.seq);
            last = record.seq;
            let system = record.stream == i32::from(v1::LogStream::System);
            if !system {
                each(&record.data)?;
            }
        }
    }
    let status = Ours::status(channel.clone(), &id).await?;
    ensure!(matches!(status.state.as_str(), "succeeded" | "running"), "{status:?}");
    Ok(())
}
