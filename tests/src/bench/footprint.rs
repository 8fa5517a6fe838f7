//! What a cluster takes while nothing happens, memory and processor time, beside etcd's; and what finished builds leave on disk.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_proto::convert::submit_of_spec;
use helix_proto::v1::build_service_client::BuildServiceClient;
use tokio::runtime::Runtime;

use super::Settings;
use super::drive::{new_key, runtime};
use super::etcd::{self, Etcd};
use super::figure::{Figure, Goal, Pair, Row, Unit};
use super::ours::{Ours, no_op, until_idle};
use crate::cluster::Shape;

/// Windows in which everybody idles, at the same time on both sides.
const WINDOWS: usize = 5;

/// Measures.
///
/// # Errors
/// When a build does not succeed.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let ours = Ours::start(&Shape::default())?;
    let described = etcd::describe();
    let peer = match &described {
        Ok(_) => Some(Etcd::start(&runtime)?),
        Err(_) => None,
    };
    let window = Duration::from_secs(if settings.quick { 2 } else { 10 });
    // What starting took is not idling.
    std::thread::sleep(window);
    let pids = |role: &str| ours.cluster.all(role).iter().filter_map(|member| member.pid).collect::<Vec<_>>();
    let (coordinators, agents) = (pids("coordinator"), pids("agent"));
    let members = peer.as_ref().map(Etcd::pids).unwrap_or_default();
    let groups = [&coordinators, &agents, &members];
    let mut rows = [
        Row::new("memory of a coordinator, idle, beside an etcd member", Unit::Mebibytes, Vec::new())
            .goal(Goal::Value(40.0)),
        Row::new("memory of an agent, idle", Unit::Mebibytes, Vec::new()).goal(Goal::Value(12.0)),
        Row::new("processor time of a coordinator, idle, beside an etcd member", Unit::PercentOfCore, Vec::new())
            .goal(Goal::Value(0.2)),
        Row::new("processor time of an agent, idle", Unit::PercentOfCore, Vec::new()).goal(Goal::Value(0.2)),
    ];
    for _ in 0..WINDOWS {
        let before = groups.map(|group| mean(group, busy_ns));
        let started = Instant::now();
        std::thread::sleep(window);
        let percent = |(after, before): (f64, f64)| (after - before) / started.elapsed().as_nanos() as f64 * 100.0;
        let after = groups.map(|group| mean(group, busy_ns));
        let busy: Vec<f64> = after.into_iter().zip(before).map(percent).collect();
        let memory = groups.map(|group| mean(group, |pid| resident_kib(pid).map(|kib| kib / 1024.0)));
        let other = |value: f64| (!members.is_empty()).then_some(value);
        rows[0].pairs.push(Pair { ours: memory[0], peer: other(memory[2]) });
        rows[1].pairs.push(Pair { ours: memory[1], peer: None });
        rows[2].pairs.push(Pair { ours: busy[0], peer: other(busy[2]) });
        rows[3].pairs.push(Pair { ours: busy[1], peer: None });
    }
    drop(peer);
    let (count, disk) = disk_of_builds(&runtime, &ours, settings.rounds(2000, 300))?;
    let mut rows = rows.to_vec();
    rows.push(Row::new("disk of a finished build, on each coordinator", Unit::Bytes, disk).goal(Goal::Value(1536.0)));
    let after = mean(&coordinators, |pid| resident_kib(pid).map(|kib| kib / 1024.0));
    Ok(Figure {
        name: "footprint",
        peer: described.unwrap_or_else(|absent| absent),
        rows,
        times: Vec::new(),
        history: format!("all {count} builds succeeded"),
        notes: vec![
            "a pair is the mean of a role's processes in one window; both sides idled at the same time".to_owned(),
            format!("memory of a coordinator after {count} builds: {after:.1} MiB"),
            "disk counts blocks of the data directory before and after, the log that is yet to be purged with it"
                .to_owned(),
        ],
    })
}

/// Runs builds; what each added to the data of a coordinator, in bytes.
fn disk_of_builds(runtime: &Runtime, ours: &Ours, count: usize) -> anyhow::Result<(usize, Vec<Pair>)> {
    let coordinators = ours.cluster.all("coordinator");
    let sizes = || coordinators.iter().map(|member| disk_bytes(&member.data_dir)).collect::<Vec<_>>();
    let before = sizes();
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    runtime.block_on(async {
        let requests: Vec<_> = (0..count).map(|_| submit_of_spec(&no_op(), &new_key())).collect();
        let mut client = BuildServiceClient::new(ours.channel(&leader, Traffic::Bulk)?);
        let mut answers = client.submit_builds(tokio_stream::iter(requests)).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            ensure!(answer.error.is_none(), "{answer:?}");
        }
        until_idle(&ours.channel(&leader, Traffic::Control)?).await
    })?;
    let succeeded = ours.count("succeeded")?;
    ensure!(succeeded == count, "{succeeded} of {count} succeeded");
    let grown = sizes().into_iter().zip(before).map(|(after, before)| (after - before) / count as f64);
    Ok((count, grown.map(|ours| Pair { ours, peer: None }).collect()))
}

fn mean(pids: &[i32], value: impl Fn(i32) -> Option<f64>) -> f64 {
    let values: Vec<f64> = pids.iter().filter_map(|pid| value(*pid)).collect();
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Time on a processor of all threads of a process so far, in nanoseconds: ticks are too coarse for an idle one.
fn busy_ns(pid: i32) -> Option<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let time = |thread: fs::DirEntry| {
        fs::read_to_string(thread.path().join("schedstat")).ok()?.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some(threads.filter_map(time).sum())
}

/// Memory of a process that is in core, in KiB.
pub(super) fn resident_kib(pid: i32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find(|line| line.starts_with("VmRSS:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// Blocks that a directory takes, in bytes.
pub(super) fn disk_bytes(directory: &Path) -> f64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => disk_bytes(&entry.path()),
        Ok(found) => found.blocks() as f64 * 512.0,
        Err(_) => 0.0,
    };
    entries.map(size).sum()
}
