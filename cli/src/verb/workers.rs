//! `helix workers ls|show|drain|undrain|remove`.

use std::fmt::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use helix_model::Measure;
use helix_proto::v1;
use serde_json::json;

use crate::connection::{Connection, workers};
use crate::context::{ContextOptions, duration};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output, age_text, text_json, time_json, time_text};

/// The columns of a worker.
pub(super) const HEADER: [&str; 8] =
    ["worker", "standing", "load", "platforms", "executors", "labels", "seen", "version"];

/// `helix workers`.
#[derive(Args)]
pub(crate) struct WorkersArguments {
    #[command(subcommand)]
    verb: WorkersVerb,
}

#[derive(Subcommand)]
enum WorkersVerb {
    /// All workers
    #[command(alias = "list")]
    Ls,
    /// One worker in detail
    Show { name: String },
    /// Give a worker no new work
    Drain {
        name: String,
        /// After this time put elsewhere what still runs
        #[arg(long, value_name = "DUR", value_parser = duration)]
        deadline: Option<Duration>,
    },
    /// Give a worker work again: ends a drain or a quarantine
    Undrain { name: String },
    /// Forget a worker whose agent has gone; what it ran is lost
    Remove {
        name: String,
        /// Also while its agent is connected, which then registers it anew
        #[arg(long)]
        force: bool,
    },
}

pub(crate) async fn run(
    arguments: WorkersArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    match arguments.verb {
        WorkersVerb::Ls => {
            let call = |channel| async move { workers(channel).list_workers(v1::ListWorkersRequest {}).await };
            let found = connection.call(call).await?.into_inner().workers;
            output.items(&HEADER, &found.iter().map(item).collect::<Vec<_>>());
        }
        WorkersVerb::Show { name } => {
            let request = v1::GetWorkerRequest { name };
            let call = |channel| {
                let request = request.clone();
                async move { workers(channel).get_worker(request).await }
            };
            show(&connection.call(call).await?.into_inner(), output);
        }
        WorkersVerb::Drain { name, deadline } => {
            let deadline_ms = deadline.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
            let request = v1::DrainWorkerRequest { name, deadline_ms };
            let call = |channel| {
                let request = request.clone();
                async move { workers(channel).drain_worker(request).await }
            };
            show(&connection.call(call).await?.into_inner(), output);
        }
        WorkersVerb::Undrain { name } => {
            let request = v1::UndrainWorkerRequest { name };
            let call = |channel| {
                let request = request.clone();
                async move { workers(channel).undrain_worker(request).await }
            };
            show(&connection.call(call).await?.into_inner(), output);
        }
        WorkersVerb::Remove { name, force } => {
            let request = v1::RemoveWorkerRequest { name: name.clone(), force };
            let call = |channel| {
                let request = request.clone();
                async move { workers(channel).remove_worker(request).await }
            };
            connection.call(call).await?;
            let json = json!({ "name": name, "removed": true });
            output.item(&Item { name: name.clone(), cells: Vec::new(), json }, &format!("{name} removed"));
        }
    }
    Ok(Code::SUCCESS)
}

fn show(worker: &v1::WorkerStatus, output: &Output) {
    output.item(&item(worker), &detail(worker));
}

/// What stands between a worker and new work, in a word.
pub(super) fn standing(worker: &v1::WorkerStatus) -> &str {
    match worker {
        worker if worker.held => "held",
        worker if worker.draining => "draining",
        worker if worker.standing != "present" => &worker.standing,
        worker if worker.quarantined_until_ms != 0 => "quarantined",
        worker if !worker.healthy => "silent",
        worker if !worker.pressure.is_empty() => "pressed",
        worker if worker.probing => "probing",
        _ => "healthy",
    }
}

/// What the worker tells of itself: what it has, and what its attempts leave. CPU is in thousandths.
fn resources(worker: &v1::WorkerStatus) -> Vec<(Measure, u64, u64)> {
    let all = [
        (Measure::Cpu, worker.cpu_milli, worker.cpu_milli_left),
        (Measure::Memory, worker.memory_bytes, worker.memory_bytes_left),
        (Measure::Disk, worker.disk_bytes, worker.disk_bytes_left),
    ];
    all.into_iter().filter(|(_, has, _)| *has > 0).collect()
}

/// A worker in every format; its cells are those of [`HEADER`].
pub(super) fn item(worker: &v1::WorkerStatus) -> Item {
    let labels: Vec<String> = worker.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    Item {
        name: worker.name.clone(),
        cells: vec![
            worker.name.clone(),
            standing(worker).to_owned(),
            format!("{}/{}", worker.load, worker.capacity),
            worker.platforms.join(" "),
            worker.executors.join(" "),
            labels.join(" "),
            age_text(worker.last_seen_ms),
            worker.version.clone(),
        ],
        json: json!({
            "name": worker.name,
            "instance": worker.instance,
            "address": worker.address,
            "healthy": worker.healthy,
            "draining": worker.draining,
            "held": worker.held,
            "held_by": worker.held_by,
            "standing": worker.standing,
            "capacity": worker.capacity,
            "load": worker.load,
            "platforms": worker.platforms,
            "labels": worker.labels,
            "executors": worker.executors,
            "isolation": worker.isolation,
            "limits": text_json(&worker.limits),
            "podman": text_json(&worker.podman),
            "emulated": worker.emulated,
            "secrets": worker.secrets,
            "restricted_secrets": worker.restricted_secrets,
            "last_seen": time_json(worker.last_seen_ms),
            "version": worker.version,
            "certificate_not_after": time_json(worker.certificate_not_after_ms),
            "pressure": text_json(&worker.pressure),
            "resources": resources(worker).iter().map(|(what, has, left)| {
                (what.as_str().to_owned(), json!({ "has": has, "left": left }))
            }).collect::<serde_json::Map<_, _>>(),
            "quarantined_until": time_json(worker.quarantined_until_ms),
            "probing": worker.probing,
            "failed_builds": worker.failed_builds,
            "attempts": worker.attempts,
        }),
    }
}

fn detail(worker: &v1::WorkerStatus) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:<10} {value}");
        }
    };
    let labels: Vec<String> = worker.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    line("worker", &worker.name);
    line("standing", standing(worker));
    line("load", &format!("{} of {}", worker.load, worker.capacity));
    for (what, has, left) in resources(worker) {
        line(what.as_str(), &format!("{} left of {}", what.text(left), what.text(has)));
    }
    line("platforms", &worker.platforms.join(" "));
    line("executors", &worker.executors.join(" "));
    line("labels", &labels.join(" "));
    line("isolation", &worker.isolation);
    line("limits", &worker.limits);
    line("podman", &worker.podman);
    line("emulated", &worker.emulated.join(" "));
    let restricted = worker.restricted_secrets.iter().map(|name| format!("{name} (certain repositories)"));
    line("secrets", &worker.secrets.iter().cloned().chain(restricted).collect::<Vec<_>>().join(", "));
    if !worker.pressure.is_empty() {
        line("pressure", &format!("{}: no new work until there is room again", worker.pressure));
    }
    if worker.quarantined_until_ms != 0 {
        let until = time_text(worker.quarantined_until_ms);
        line("quarantine", &format!("until {until}, after failures of its own; `helix workers undrain` ends it"));
    }
    if worker.probing {
        line("quarantine", "over: tried with one attempt at a time until one goes well");
    }
    line("failures", &worker.failed_builds.join(" "));
    line("address", &worker.address);
    line("instance", &worker.instance);
    line("version", &worker.version);
    if worker.certificate_not_after_ms != 0 {
        line("valid", &format!("until {}, its certificate", time_text(worker.certificate_not_after_ms)));
    }
    line("seen", &age_text(worker.last_seen_ms));
    line("held by", &worker.held_by.join(" "));
    if worker.held {
        line("", "not seen dead there: no new work until its host was started anew, or the worker is removed");
    }
    line("runs", &worker.attempts.join(" "));
    out
}
