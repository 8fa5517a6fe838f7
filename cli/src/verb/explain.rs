//! `helix explain`: why a build waits, or where it ran.

use std::fmt::Write;

use clap::Args;
use helix_proto::v1;
use serde_json::json;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output, text_json, time_json, time_text};
use crate::verb::{status, wait};

/// `helix explain`.
#[derive(Args)]
pub(crate) struct ExplainArguments {
    /// A build id, a unique prefix of it, or `last`
    #[arg(value_name = "ID")]
    build: String,
}

pub(crate) async fn run(
    arguments: ExplainArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let id = connection.resolve(&arguments.build).await?;
    let explained = ask(&connection, &id).await?;
    let build = explained.status.unwrap_or_default();
    let item = Item {
        name: build.build_id.clone(),
        cells: Vec::new(),
        json: json!({ "build": status::to_json(&build), "tasks": explained.tasks.iter().map(task_json).collect::<Vec<_>>() }),
    };
    output.item(&item, &text(&build, &explained.tasks));
    Ok(Code::SUCCESS)
}

/// What the cluster says of a build, and why.
pub(crate) async fn ask(connection: &Connection, id: &str) -> Result<v1::ExplainBuildResponse, Failure> {
    let request = v1::ExplainBuildRequest { build_id: id.to_owned() };
    let call = |channel| {
        let request = request.clone();
        async move { builds(channel).explain_build(request).await.map(tonic::Response::into_inner) }
    };
    connection.call(call).await
}

/// Why a task waits, in a line each.
pub(crate) fn waits(explained: &v1::ExplainBuildResponse) -> Vec<&str> {
    let waiting = explained.tasks.iter().filter(|task| task.state == "queued");
    waiting.map(|task| task.summary.as_str()).collect()
}

fn task_json(task: &v1::TaskExplanation) -> serde_json::Value {
    let verdicts: Vec<_> = task
        .verdicts
        .iter()
        .map(|verdict| json!({ "worker": verdict.worker, "fits": verdict.fits, "why": text_json(&verdict.why) }))
        .collect();
    json!({
        "platform": text_json(&task.platform),
        "state": task.state,
        "summary": task.summary,
        "ahead": task.ahead,
        "not_before": time_json(task.not_before_ms),
        "verdicts": verdicts,
    })
}

fn text(build: &v1::BuildStatus, tasks: &[v1::TaskExplanation]) -> String {
    let mut out = format!("{}\n", wait::verdict(build));
    for task in tasks {
        let platform = if task.platform.is_empty() { "task" } else { &task.platform };
        let summary = task.summary.strip_prefix(&format!("{platform}: ")).unwrap_or(&task.summary);
        let _ = writeln!(out, "{platform}: {summary} ({})", task.state);
        if task.not_before_ms != 0 {
            let _ = writeln!(out, "  backs off until {}", time_text(task.not_before_ms));
        }
        if task.state == "queued" || task.state == "waiting" {
            let _ = writeln!(out, "  {} ahead of it in the queue", task.ahead);
        }
        for verdict in &task.verdicts {
            let word = if verdict.fits { "could take it" } else { &verdict.why };
            let _ = writeln!(out, "  {:<24} {word}", verdict.worker);
        }
    }
    out
}
