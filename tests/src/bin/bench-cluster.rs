//! `cargo bench-cluster [NAME...]`: what a cluster of three on this machine does, with mutual TLS and every
//! acknowledged write synced on a majority. Each name ends with a line `NAME ours=N peer=N ratio=N.NN limit=N`.
//!
//! A peer is driven beside it where one is named; elsewhere `peer` and `ratio` are `-`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use helix_common::endpoints::Endpoints;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_model::{BuildSpec, Command, Outputs};
use helix_proto::convert::submit_of_spec;
use helix_proto::v1;
use helix_proto::v1::build_service_client::BuildServiceClient;
use helix_proto::v1::worker_service_client::WorkerServiceClient;
use helix_tests::cluster::{Cluster, Shape};
use serde::Deserialize;

/// Measures a cluster of three coordinators on this machine.
#[derive(Parser)]
struct Arguments {
    /// submit-latency, submit-rate, no-op-rate, no-op-latency, fail-over, isolation-start [default: all]
    names: Vec<String>,
    /// Fewer rounds
    #[arg(long)]
    quick: bool,
}

const NAMES: [&str; 6] =
    ["submit-latency", "submit-rate", "no-op-rate", "no-op-latency", "fail-over", "isolation-start"];

/// How long any call may take, fail-overs included.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Context {
    endpoints: Vec<String>,
    ca: std::path::PathBuf,
    cert: std::path::PathBuf,
    key: std::path::PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let names: Vec<&str> = match arguments.names.as_slice() {
        [] => NAMES.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    if let Some(unknown) = names.iter().find(|name| !NAMES.contains(name)) {
        eprintln!("{unknown} is none of {}", NAMES.join(", "));
        return ExitCode::from(2);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    for name in names {
        let result = match name {
            "submit-latency" => submit_latency(&runtime, arguments.quick),
            "submit-rate" => submit_rate(&runtime, arguments.quick),
            "no-op-rate" => no_op_rate(&runtime, arguments.quick),
            "no-op-latency" => no_op_latency(&runtime, arguments.quick),
            "isolation-start" => helix_tests::isolation_start::measure(arguments.quick),
            _ => fail_over(&runtime, arguments.quick),
        };
        if let Err(error) = result {
            eprintln!("{name}: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn connect(cluster: &Cluster) -> anyhow::Result<Endpoints> {
    let context: Context = toml::from_str(&fs::read_to_string(cluster.context())?)?;
    let tls = TlsStore::load(TlsFiles { ca: context.ca, cert: context.cert, key: context.key, revoked: None })?;
    Ok(Endpoints::new(&context.endpoints, tls)?)
}

fn no_op() -> BuildSpec {
    let command = Some(Command::Argv(vec!["/bin/true".to_owned()]));
    BuildSpec { command, outputs: Outputs::None, ..BuildSpec::default() }
}

fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

async fn submit(endpoints: &Endpoints, id: &str) -> anyhow::Result<()> {
    let request = submit_of_spec(&no_op(), id);
    let call = |channel| {
        let request = request.clone();
        async move { BuildServiceClient::new(channel).submit_build(request).await }
    };
    endpoints.call(DEADLINE, call).await?;
    Ok(())
}

/// Points the endpoints at the leader, so that no forwarding is measured.
fn to_leader(cluster: &Cluster, endpoints: &Endpoints) -> anyhow::Result<()> {
    let leader = cluster.leader().grpc.context("a coordinator has an endpoint")?;
    for _ in 0..endpoints.list().len() {
        if endpoints.current() != leader {
            endpoints.rotate(&endpoints.current());
        }
    }
    ensure!(endpoints.current() == leader, "the leader is not on the list");
    Ok(())
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let place = ((sorted.len() as f64 - 1.0) * share) as usize;
    sorted.get(place).copied().unwrap_or_default()
}

fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| percentile(&times, share));
    println!(
        "{what}: n {}, p50 {p50:.2?}, p90 {p90:.2?}, p99 {p99:.2?}, worst {:.2?}",
        times.len(),
        percentile(&times, 1.0)
    );
    p50
}

/// The median time of an fdatasync of 256 bytes here and now: the limit of anything durable.
fn sync_time(directory: &std::path::Path) -> anyhow::Result<Duration> {
    let file = fs::File::create(directory.join("sync-probe"))?;
    let mut times = Vec::new();
    for round in 0..200u64 {
        file.write_all_at(&[0; 256], round * 256)?;
        let started = Instant::now();
        file.sync_data()?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(percentile(&times, 0.5))
}

fn submit_latency(runtime: &tokio::runtime::Runtime, quick: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() })?;
    let endpoints = connect(&cluster)?;
    to_leader(&cluster, &endpoints)?;
    let rounds = if quick { 500 } else { 3000 };
    let times = runtime.block_on(async {
        let mut times = Vec::with_capacity(rounds);
        for round in 0..rounds + 100 {
            let id = new_id();
            let started = Instant::now();
            submit(&endpoints, &id).await?;
            if round >= 100 {
                times.push(started.elapsed());
            }
        }
        Ok::<_, anyhow::Error>(times)
    })?;
    let p50 = report("submit, one client", times);
    let limit = sync_time(cluster.root())?;
    println!("submit-latency ours={:.3}ms peer=- ratio=- limit={:.3}ms", ms(p50), ms(limit));
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn submit_rate(runtime: &tokio::runtime::Runtime, quick: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() })?;
    let endpoints = connect(&cluster)?;
    to_leader(&cluster, &endpoints)?;
    let window = Duration::from_secs(if quick { 5 } else { 15 });
    let done = Arc::new(AtomicU64::new(0));
    let elapsed = runtime.block_on(async {
        let started = Instant::now();
        let clients: Vec<_> = (0..256)
            .map(|_| {
                let (endpoints, done) = (endpoints.clone(), Arc::clone(&done));
                tokio::spawn(async move {
                    while started.elapsed() < window {
                        submit(&endpoints, &new_id()).await?;
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok::<_, anyhow::Error>(())
                })
            })
            .collect();
        for client in clients {
            client.await??;
        }
        Ok::<_, anyhow::Error>(started.elapsed())
    })?;
    let rate = per_second(done.load(Ordering::Relaxed), elapsed);
    let said = cluster.json(&["cluster", "status"]);
    ensure!(said["queued"].as_u64() == Some(done.load(Ordering::Relaxed)), "what was acknowledged is queued: {said}");
    println!("submit-rate ours={rate:.0}/s peer=- ratio=- limit=-");
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

/// The sum of a counter over all coordinators.
fn metric(cluster: &Cluster, name: &str) -> f64 {
    let text = fs::read_to_string(cluster.root().join("cluster.json")).unwrap_or_default();
    let all: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap_or_default();
    let pages = all.iter().filter_map(|member| member["http"].as_str()).filter_map(|url| http_get(url, "/metrics"));
    let value = |line: &str| line.strip_prefix(name)?.split_whitespace().last()?.parse::<f64>().ok();
    pages.map(|page| page.lines().filter_map(value).sum::<f64>()).sum()
}

fn http_get(url: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(url.strip_prefix("http://")?).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

/// Processor time of all processes of the cluster so far.
fn cpu_seconds(cluster: &Cluster) -> f64 {
    let ticks: f64 = cluster
        .members()
        .iter()
        .filter_map(|member| fs::read_to_string(format!("/proc/{}/stat", member.pid?)).ok())
        .filter_map(|stat| {
            let fields: Vec<f64> =
                stat.rsplit(')').next()?.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
            // utime, stime and those of waited-for children: fields 14 to 17, counted from the state, which is the third.
            fields.get(11..15).map(|times| times.iter().sum::<f64>())
        })
        .sum();
    ticks / 100.0
}

fn no_op_rate(runtime: &tokio::runtime::Runtime, quick: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(&Shape { capacity: 8, ..Shape::default() })?;
    let endpoints = connect(&cluster)?;
    let count: u64 = if quick { 1000 } else { 5000 };
    let (syncs, cpu) = (metric(&cluster, "helix_fsync_seconds_count"), cpu_seconds(&cluster));
    let started = Instant::now();
    runtime.block_on(async {
        let requests: Vec<_> = (0..count).map(|_| submit_of_spec(&no_op(), &new_id())).collect();
        let (_, channel) = endpoints.channel(helix_common::channel::Traffic::Bulk)?;
        let stream = tokio_stream::iter(requests);
        let mut answers = BuildServiceClient::new(channel).submit_builds(stream).await?.into_inner();
        let mut accepted = 0;
        while let Some(answer) = answers.message().await? {
            ensure!(answer.error.is_none(), "{answer:?}");
            accepted += 1;
        }
        ensure!(accepted == count, "{accepted} of {count} were answered");
        loop {
            let call =
                |channel| async move { WorkerServiceClient::new(channel).get_totals(v1::GetTotalsRequest {}).await };
            let totals = endpoints.call(DEADLINE, call).await?.into_inner();
            if totals.queued + totals.running == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })?;
    let elapsed = started.elapsed();
    let succeeded = cluster.helix(&["list", "--state", "succeeded", "--all", "--limit", "1000000", "-o", "quiet"]);
    let succeeded = succeeded.stdout.lines().count() as u64;
    ensure!(succeeded == count, "{succeeded} of {count} succeeded");
    let rate = per_second(count, elapsed);
    #[allow(clippy::cast_precision_loss)]
    let builds = count as f64;
    let (syncs, cpu) = (metric(&cluster, "helix_fsync_seconds_count") - syncs, cpu_seconds(&cluster) - cpu);
    println!(
        "{count} no-op builds in {elapsed:.2?}: {:.2} log syncs a build over all coordinators, {:.2} ms of processor a build",
        syncs / builds,
        cpu * 1000.0 / builds
    );
    println!("no-op-rate ours={rate:.0}/s peer=- ratio=- limit=-");
    Ok(())
}

fn no_op_latency(runtime: &tokio::runtime::Runtime, quick: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(&Shape::default())?;
    let endpoints = connect(&cluster)?;
    to_leader(&cluster, &endpoints)?;
    let rounds = if quick { 100 } else { 500 };
    let times = runtime.block_on(async {
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let id = new_id();
            let started = Instant::now();
            submit(&endpoints, &id).await?;
            let call = |channel| {
                let request = v1::WaitBuildRequest { build_id: id.clone(), timeout_ms: 30_000 };
                async move { BuildServiceClient::new(channel).wait_build(request).await }
            };
            let ended = endpoints.call(DEADLINE, call).await?.into_inner();
            ensure!(ended.state == "succeeded", "{ended:?}");
            times.push(started.elapsed());
        }
        Ok(times)
    })?;
    let p50 = report("no-op build, submit to result known", times);
    println!("no-op-latency ours={:.2}ms peer=- ratio=- limit=-", ms(p50));
    Ok(())
}

fn fail_over(runtime: &tokio::runtime::Runtime, quick: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(&Shape { agents: 0, ..Shape::default() })?;
    let endpoints = connect(&cluster)?;
    let rounds = if quick { 5 } else { 30 };
    let mut times = Vec::new();
    let mut acknowledged = Vec::new();
    for _ in 0..rounds {
        let leader = cluster.leader();
        let id = new_id();
        runtime.block_on(submit(&endpoints, &id))?;
        acknowledged.push(id);
        let id = new_id();
        let started = Instant::now();
        cluster.kill(&leader);
        // Impatient on purpose: what is measured is the cluster, not a client's back-off.
        runtime.block_on(async {
            loop {
                let request = submit_of_spec(&no_op(), &id);
                let (endpoint, channel) = endpoints.channel(helix_common::channel::Traffic::Control)?;
                match BuildServiceClient::new(channel).submit_build(request).await {
                    Ok(_) => return Ok::<_, anyhow::Error>(()),
                    Err(status) => {
                        endpoints.observe(&endpoint, &status);
                        ensure!(started.elapsed() < DEADLINE, "no leader: {status}");
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            }
        })?;
        times.push(started.elapsed());
        acknowledged.push(id);
        cluster.start_again(&leader);
        helix_tests::cluster::wait_for("all members to be healthy", DEADLINE, || {
            let status = cluster.json(&["cluster", "status"]);
            let members = status["members"].as_array()?;
            members.iter().all(|member| member["healthy"] == true).then_some(())
        });
    }
    for id in &acknowledged {
        ensure!(cluster.helix(&["status", id]).code == 0, "{id} was acknowledged and is lost");
    }
    let p50 = report("leader killed to next acknowledged submit", times);
    println!("fail-over ours={:.0}ms peer=- ratio=- limit=-", ms(p50));
    Ok(())
}
