//! `helix status`: builds in detail; and how a build is shown, for every other verb.

use std::fmt::Write;

use clap::Args;
use helix_proto::v1;
use serde_json::{Value, json};

use crate::connection::Connection;
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Format, Item, Output, size_text, text_json, time_json, time_text};
use crate::verb::explain;

/// `helix status`.
#[derive(Args)]
pub(crate) struct StatusArguments {
    /// Build ids, unique prefixes of them, or `last`
    #[arg(required = true, value_name = "ID")]
    builds: Vec<String>,
    /// Answer from what the coordinator at hand knows, without asking the leader
    #[arg(long)]
    stale: bool,
}

pub(crate) async fn run(
    arguments: StatusArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let mut items = Vec::new();
    let mut text = String::new();
    let mut code = Code::SUCCESS;
    for build in &arguments.builds {
        let asked = async {
            let id = connection.resolve_as(build, arguments.stale).await?;
            connection.status(&id, arguments.stale).await
        };
        let status = match asked.await {
            Ok(status) => status,
            Err(failure) => {
                code = output.one_of_several(build, &failure, code);
                continue;
            }
        };
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&detail(&status));
        if output.format == Format::Table && !arguments.stale && waits(&status) {
            // It may have begun meanwhile; then there is nothing to tell.
            let explained = explain::ask(&connection, &status.build_id).await?;
            explain::waits(&explained).iter().for_each(|why| text.push_str(&format!("{:<12} {why}\n", "why")));
        }
        items.push(item(&status));
    }
    match output.format {
        Format::Table if !text.is_empty() => output.line(text.trim_end()),
        Format::Table => {}
        _ => output.asked_for(arguments.builds.len(), &items),
    }
    Ok(code)
}

/// Whether a task of it waits for a worker.
fn waits(status: &v1::BuildStatus) -> bool {
    matches!(status.state.as_str(), "queued" | "running") && status.tasks.iter().any(|task| task.state == "queued")
}

/// A build in every format; its cells are those of [`crate::verb::list::HEADER`].
pub(crate) fn item(status: &v1::BuildStatus) -> Item {
    let source = match (status.repo_url.as_str(), status.r#ref.as_str()) {
        (url, "") => url.to_owned(),
        (url, git_ref) => format!("{url}@{git_ref}"),
    };
    Item {
        name: status.build_id.clone(),
        cells: vec![
            status.build_id.clone(),
            if status.pinned { format!("{} (pinned)", status.state) } else { status.state.clone() },
            reason_text(status),
            status.worker.clone(),
            crate::output::age_text(status.created_at_ms),
            status.submitted_by.clone(),
            source,
        ],
        json: to_json(status),
    }
}

/// The reason with the number that explains it.
pub(crate) fn reason_text(status: &v1::BuildStatus) -> String {
    let mut text = status.reason.clone();
    match (status.reason.as_str(), status.exit_code, status.signal) {
        ("exit", Some(code), _) => text = format!("exit {code}"),
        ("signal", _, Some(signal)) => text = format!("signal {signal}"),
        _ => {}
    }
    if !status.verified && matches!(status.state.as_str(), "cancelled" | "failed") {
        text.push_str(" (unverified)");
    }
    let waits = |task: &v1::TaskStatus| task.state == "queued" && task.attempt > 0;
    if status.state == "running"
        && !status.tasks.iter().any(|task| task.state == "running")
        && let Some(task) = status.tasks.iter().find(|task| waits(task))
    {
        let before = task.attempts.last().map_or("", |attempt| attempt.reason.as_str());
        text = format!("waits for attempt {} ({before})", task.attempt + 1);
    }
    if status.cancel_requested && status.state == "running" {
        text = "cancelling".to_owned();
    }
    text
}

/// The object that interface and scripts know.
pub(crate) fn to_json(status: &v1::BuildStatus) -> Value {
    json!({
        "build_id": status.build_id,
        "state": status.state,
        "executor": status.executor,
        "repo_url": status.repo_url,
        "ref": status.r#ref,
        "commit": text_json(&status.commit),
        "image_tag": text_json(&status.image_tag),
        "image_id": text_json(&status.image_id),
        "digest": text_json(&status.digest),
        "size": status.size,
        "manifest": text_json(&status.manifest),
        "exit_code": status.exit_code,
        "signal": status.signal,
        "reason": text_json(&status.reason),
        "message": text_json(&status.message),
        "verified": status.verified,
        "worker": text_json(&status.worker),
        "attempt": status.attempt,
        "submitted_by": status.submitted_by,
        "labels": status.labels,
        "retry_of": text_json(&status.retry_of),
        "cancel_requested": status.cancel_requested,
        "cancel_reason": text_json(&status.cancel_reason),
        "pinned": status.pinned,
        "created_at": time_json(status.created_at_ms),
        "started_at": time_json(status.started_at_ms),
        "completed_at": time_json(status.completed_at_ms),
        "tasks": status.tasks.iter().map(task_json).collect::<Vec<_>>(),
        "artifacts": status.artifacts.iter().map(|artifact| artifact_json(artifact, platform_of_artifact(artifact, &status.tasks))).collect::<Vec<_>>(),
    })
}

fn task_json(task: &v1::TaskStatus) -> Value {
    let attempts: Vec<Value> = task
        .attempts
        .iter()
        .map(|attempt| {
            json!({
                "attempt": attempt.number,
                "worker": attempt.worker,
                "assigned_at": time_json(attempt.assigned_at_ms),
                "ended_at": time_json(attempt.ended_at_ms),
                "reason": text_json(&attempt.reason),
                "message": text_json(&attempt.message),
                "exit_code": attempt.exit_code,
                "signal": attempt.signal,
                "verified": !attempt.unverified,
            })
        })
        .collect();
    json!({
        "platform": text_json(&task.platform),
        "state": task.state,
        "worker": text_json(&task.worker),
        "attempt": task.attempt,
        "digest": text_json(&task.digest),
        "size": task.size,
        "image_tag": text_json(&task.image_tag),
        "image_id": text_json(&task.image_id),
        "exit_code": task.exit_code,
        "signal": task.signal,
        "reason": text_json(&task.reason),
        "attempts": attempts,
    })
}

/// An artifact as scripts see it.
pub(crate) fn artifact_json(artifact: &v1::ArtifactInfo, platform: &str) -> Value {
    json!({ "name": artifact.name, "digest": artifact.digest, "size": artifact.size, "task": text_json(platform) })
}

/// The platform of the task that made an artifact; empty for what a client registered.
pub(crate) fn platform_of_artifact<'a>(artifact: &v1::ArtifactInfo, tasks: &'a [v1::TaskStatus]) -> &'a str {
    let made_by = usize::try_from(artifact.task).ok().filter(|_| !artifact.registered);
    made_by.and_then(|index| tasks.get(index)).map_or("", |task| &task.platform)
}

/// The index of a build's task for this platform.
pub(crate) fn task_of(id: &str, tasks: &[v1::TaskStatus], platform: &str) -> Result<usize, Failure> {
    tasks.iter().position(|task| task.platform == platform).ok_or_else(|| {
        let known: Vec<_> = tasks.iter().map(|task| task.platform.as_str()).collect();
        let known = known.join(", ");
        let advice = if known.is_empty() {
            "it names no platform and has one task: leave out --task".to_owned()
        } else {
            format!("it has {known}")
        };
        Failure::usage(format!("build {id} has no task {platform}; {advice}"))
    })
}

/// How the only attempt of a task failed, in its agent's words; several have a line each.
fn words(task: &v1::TaskStatus) -> &str {
    match task.attempts.as_slice() {
        [only] => &only.message,
        _ => "",
    }
}

fn digest_text(digest: &str) -> String {
    if digest.is_empty() { String::new() } else { format!("sha256:{digest}") }
}

/// A build for people, a line per fact that is known.
fn detail(status: &v1::BuildStatus) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:<12} {value}");
        }
    };
    line("build", &status.build_id);
    line("state", &status.state);
    line("reason", &reason_text(status));
    line("message", &status.message);
    let ended = matches!(status.state.as_str(), "cancelled" | "failed");
    line("unverified", if ended && !status.verified { "a process of it may still run on its worker" } else { "" });
    line("cancel", &status.cancel_reason);
    line("executor", &status.executor);
    line("repository", &status.repo_url);
    line("ref", &status.r#ref);
    line("commit", &status.commit);
    line("worker", &status.worker);
    line("attempt", &if status.attempt > 0 { status.attempt.to_string() } else { String::new() });
    line("submitted by", &status.submitted_by);
    line("retry of", &status.retry_of);
    let labels: Vec<String> = status.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    line("labels", &labels.join(" "));
    line("pinned", if status.pinned { "yes" } else { "" });
    line("created", &time_text(status.created_at_ms));
    line("started", &time_text(status.started_at_ms));
    line("completed", &time_text(status.completed_at_ms));
    line("image tag", &status.image_tag);
    line("image id", &status.image_id);
    line("digest", &digest_text(&status.digest));
    line("size", &if status.digest.is_empty() { String::new() } else { size_text(status.size) });
    for task in status.tasks.iter().filter(|_| status.tasks.len() > 1) {
        let result = if task.digest.is_empty() { task.reason.clone() } else { digest_text(&task.digest) };
        line("task", &format!("{} {} {} {result} {}", task.platform, task.state, task.worker, words(task)));
        if !task.image_id.is_empty() {
            line("", &format!("image {}, id {}, {}", task.image_tag, task.image_id, size_text(task.size)));
        }
    }
    for task in &status.tasks {
        for attempt in task.attempts.iter().filter(|_| task.attempts.len() > 1) {
            let how = if attempt.ended_at_ms == 0 {
                "running"
            } else if attempt.reason.is_empty() {
                "succeeded"
            } else {
                &attempt.reason
            };
            let unseen = if attempt.unverified { " (not seen dead)" } else { "" };
            line("", &format!("attempt {} on {}: {how} {}{unseen}", attempt.number, attempt.worker, attempt.message));
        }
    }
    for artifact in &status.artifacts {
        line("artifact", &format!("{} sha256:{} {}", artifact.name, artifact.digest, size_text(artifact.size)));
    }
    out
}
