//! A host lost with the build that ran on it, until that build runs elsewhere, with a lease of two seconds.
//!
//! Lost means: its agent, its runners and what they run are killed by SIGKILL, all at once. Running elsewhere means: the
//! registry says so, and the process is there.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_proto::convert::submit_of_spec;
use helix_proto::v1::build_service_client::BuildServiceClient;
use rustix::process::Signal;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::Settings;
use super::drive::{DEADLINE, new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, ms};
use super::ours::{Ours, exec};
use crate::cluster::{Member, Shape, signal, wait_for};

/// How long a silent worker is waited for; the default of 15 s protects long builds from short troubles.
const LEASE: Duration = Duration::from_secs(2);

/// How long after its build's start a host is lost, at most: longer than the time between two heartbeats.
const LATEST: Duration = Duration::from_secs(1);

/// How often it is looked whether the build runs.
const LOOK: Duration = Duration::from_millis(5);

/// Measures.
///
/// # Errors
/// When a build does not run again, or ran twice at a time.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let ours = Ours::start(&Shape { agents: 2, capacity: 1, ..Shape::default() })?;
    let lease = format!("worker_lease_ms={}", LEASE.as_millis());
    // Hosts that are lost as often as these here would be quarantined, and builds would wait for the end of that.
    ours.set_policy(&[&lease, "quarantine_after=0"])?;
    let channel = ours.leader(1)?.channel(0);
    let mut times = Times::new("ours: host killed to its build running elsewhere");
    let mut pairs = Vec::new();
    for round in 0..settings.rounds(30, 5) {
        let time = lose_one(&runtime, &ours, &channel).with_context(|| format!("round {round}"))?;
        times.add(time);
        pairs.push(Pair { ours: ms(time), peer: None });
    }
    let row = Row::new("host killed to its build running elsewhere", Unit::Ms, pairs).goal(Goal::Value(3000.0));
    Ok(Figure {
        name: "worker-loss",
        peer: "none is driven: those that there are wait for 10 s and more by default, and were not measured here"
            .to_owned(),
        rows: vec![row.limit(ms(LEASE), "the lease, counted from the last heartbeat")],
        times: vec![times],
        history:
            "each build ran again as attempt 2 on the other host, with one process of it anywhere, and was cancelled"
                .to_owned(),
        notes: vec![
            "no quarantine: hosts do not fail this often in a row".to_owned(),
            "the second attempt waits for `retry_backoff_ms`, a second, behind the loss".to_owned(),
        ],
    })
}

fn lose_one(runtime: &Runtime, ours: &Ours, channel: &Channel) -> anyhow::Result<Duration> {
    let id = new_key();
    // An argument that no other process has.
    let argument = format!("10000.{}", u32::from_str_radix(&id[..7], 16)?);
    let request = submit_of_spec(&exec(&["/bin/sleep", &argument]), &id);
    runtime.block_on(BuildServiceClient::new(channel.clone()).submit_build(request))?;
    let first = running(runtime, channel, &id, 1, &argument)?;
    // Hosts do not wait for a build's start to die, which is when their agent was heard last.
    std::thread::sleep(rand::random_range(Duration::ZERO..LATEST));
    let host = ours.cluster.member("agent", &first);
    let killed = kill_host(&host, &argument)?;
    let second = running(runtime, channel, &id, 2, &argument)?;
    let time = killed.elapsed();
    ensure!(second != first, "the build runs on {first} again");
    let count = processes(&argument).len();
    ensure!(count == 1, "{count} processes of one build");
    let said = ours.cluster.helix(&["cancel", &id]);
    ours.cluster.wait_state(&id, "cancelled");
    ensure!(processes(&argument).is_empty(), "the build was cancelled and runs: {}", said.stderr);
    ours.cluster.kill(&host);
    ours.cluster.start_again(&host);
    wait_for("the lost host to be back", DEADLINE, || {
        let said = ours.cluster.helix(&["workers", "list", "-o", "json"]);
        let all: serde_json::Value = serde_json::from_str(&said.stdout).ok()?;
        let well = |worker: &serde_json::Value| worker["healthy"] == true && worker["held"] == false;
        let all = all.as_array().or_else(|| all["workers"].as_array())?;
        (all.len() == 2 && all.iter().all(well)).then_some(())
    });
    Ok(time)
}

/// Waits until the registry has such an attempt, and its process is there; where.
fn running(runtime: &Runtime, channel: &Channel, id: &str, attempt: u32, argument: &str) -> anyhow::Result<String> {
    let end = Instant::now() + DEADLINE;
    loop {
        let status = runtime.block_on(Ours::status(channel.clone(), id))?;
        if status.attempt == attempt && !status.worker.is_empty() && !processes(argument).is_empty() {
            return Ok(status.worker);
        }
        ensure!(Instant::now() < end, "attempt {attempt} does not run: {status:?}");
        std::thread::sleep(LOOK);
    }
}

/// Kills an agent, whatever it started itself, and the build with this argument with the runners above it; when.
fn kill_host(host: &Member, argument: &str) -> anyhow::Result<Instant> {
    let agent = host.pid.context("the agent runs")?;
    let mut lost = vec![agent];
    lost.extend(commands().map(|(pid, _)| pid).filter(|pid| parent(*pid) == Some(agent)));
    for build in processes(argument) {
        let mut next = Some(build);
        while let Some(pid) = next {
            lost.push(pid);
            next = parent(pid).filter(|pid| is_runner(*pid));
        }
    }
    let runners = lost.iter().filter(|pid| is_runner(**pid)).count();
    ensure!(runners > 0, "no runner is above the build: {lost:?}");
    let at = Instant::now();
    lost.iter().for_each(|pid| signal(*pid, Signal::KILL));
    Ok(at)
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

fn is_runner(pid: i32) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("helix-runner"))
}

/// The processes that have this argument, whichever host they are of.
fn processes(argument: &str) -> Vec<i32> {
    let has = |(pid, words): (i32, Vec<String>)| {
        let sleeps = words.first().is_some_and(|program| program == "/bin/sleep");
        (sleeps && words.iter().any(|word| word == argument)).then_some(pid)
    };
    commands().filter_map(has).collect()
}

fn commands() -> impl Iterator<Item = (i32, Vec<String>)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        Some((pid, words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()))
    })
}
