//! `helix submit`: one build from flags, or many from a file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use helix_model::{BuildId, BuildSpec, Command, Executor, OnWorkerLoss, Outputs, Platform, Resources};
use helix_proto::{convert, v1};
use serde_json::json;

use crate::connection::{Connection, builds, new_build_id};
use crate::context::{ContextOptions, duration, size};
use crate::exit::{self, Code};
use crate::failure::Failure;
use crate::output::{Format, Item, Output, text_json};
use crate::upload;
use crate::verb::{batch, logs, status, wait};

/// What a batch's lines say themselves.
const BATCH_HAS_ITS_OWN: [&str; 28] = [
    "repo",
    "git_ref",
    "source",
    "executor",
    "dockerfile",
    "target",
    "build_arg",
    "platform",
    "output",
    "no_output",
    "env",
    "label",
    "require",
    "secret",
    "timeout",
    "silence_timeout",
    "priority",
    "cpu",
    "memory",
    "disk",
    "park",
    "retries",
    "on_worker_loss",
    "push",
    "keep_workdir",
    "id",
    "follow",
    "command",
];

/// `helix submit`.
#[derive(Args)]
#[command(
    after_help = "After -- one argument is a line for the agent's shell, several are a program and its arguments."
)]
pub(crate) struct SubmitArguments {
    /// Git repository to build
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    repo: String,
    /// Branch, tag or commit
    #[arg(long = "ref", value_name = "REF", default_value = "", hide_default_value = true)]
    git_ref: String,
    /// Upload this directory as the source
    #[arg(long, value_name = "DIR", conflicts_with = "repo")]
    source: Option<PathBuf>,
    /// How it is run [default: exec with a command; else podman, with -f or where a worker offers it; else exec]
    #[arg(long, value_name = "exec|podman", value_parser = ["exec", "podman"])]
    executor: Option<String>,
    /// Dockerfile, relative to the source
    #[arg(short = 'f', long = "file", value_name = "FILE", default_value = "", hide_default_value = true)]
    dockerfile: String,
    /// Stage of the Dockerfile to build
    #[arg(long, value_name = "T", default_value = "", hide_default_value = true)]
    target: String,
    /// Build argument; a variable of an exec build. May be repeated
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    build_arg: Vec<(String, String)>,
    /// Platform to build for, e.g. linux/arm64. May be repeated: a task each
    #[arg(long, value_name = "P", value_parser = platform)]
    platform: Vec<Platform>,
    /// File or directory that must exist at the end, relative to the workdir. May be repeated
    #[arg(long, value_name = "PATH")]
    output: Vec<String>,
    /// The build makes nothing: exit 0 alone is a success
    #[arg(long, conflicts_with = "output")]
    no_output: bool,
    /// Environment variable. May be repeated
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// Label of the build. May be repeated
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    label: Vec<(String, String)>,
    /// Label that the worker must have. May be repeated
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    require: Vec<(String, String)>,
    /// Secret configured on the agent. May be repeated
    #[arg(long, value_name = "id=NAME", value_parser = secret)]
    secret: Vec<String>,
    /// Wall-clock limit
    #[arg(long, value_name = "DUR", value_parser = duration)]
    timeout: Option<Duration>,
    /// Longest time without output
    #[arg(long, value_name = "DUR", value_parser = duration)]
    silence_timeout: Option<Duration>,
    /// Higher goes first
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// CPUs it needs, e.g. 2 or 0.5
    #[arg(long, value_name = "N", value_parser = cpu_milli)]
    cpu: Option<u64>,
    /// Memory it needs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Disk it needs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: Option<u64>,
    /// Wait even if no worker could run it today
    #[arg(long)]
    park: bool,
    /// Retries after failures that are the build's own
    #[arg(long, value_name = "N", default_value_t = 0)]
    retries: u32,
    /// What a lost worker means
    #[arg(long, value_enum, default_value = "rerun")]
    on_worker_loss: WorkerLoss,
    /// Push the image there
    #[arg(long, value_name = "REF", default_value = "", hide_default_value = true)]
    push: String,
    /// Keep a failed build's workdir so long
    #[arg(long, value_name = "DUR", value_parser = duration)]
    keep_workdir: Option<Duration>,
    /// Id of the build, chosen by you: the same submit twice is one build
    #[arg(long, value_name = "ID", value_parser = build_id)]
    id: Option<String>,
    /// Wait for the end; exit with the build's code
    #[arg(long)]
    wait: bool,
    /// Show the log until the end; exit with the build's code
    #[arg(long)]
    follow: bool,
    /// Submit many: one JSON spec a line, from a file or - for standard input
    #[arg(long, value_name = "FILE|-", conflicts_with_all = BATCH_HAS_ITS_OWN)]
    batch: Option<PathBuf>,
    /// What to run
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum WorkerLoss {
    /// The task runs again elsewhere
    Rerun,
    /// The task fails
    Fail,
}

/// `K=V` as flags take it.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not K=V"))?;
    if key.is_empty() { Err(format!("{text:?} has no key")) } else { Ok((key.to_owned(), value.to_owned())) }
}

fn build_id(text: &str) -> Result<String, String> {
    BuildId::new(text).map(|id| id.as_str().to_owned()).map_err(|e| e.why)
}

fn platform(text: &str) -> Result<Platform, String> {
    Platform::new(text).map_err(|e| e.why)
}

fn secret(text: &str) -> Result<String, String> {
    text.strip_prefix("id=").map(str::to_owned).ok_or_else(|| format!("{text:?} is not id=NAME"))
}

/// CPUs with up to three decimals, in thousandths.
pub(crate) fn cpu_milli(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a number of CPUs such as 2 or 0.5");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let part: u64 = format!("{part:0<3}").parse().map_err(|_| wrong())?;
    whole.checked_mul(1000).and_then(|milli| milli.checked_add(part)).ok_or_else(wrong)
}

/// What follows `--`: one argument is a shell line, several are a vector.
fn command(words: Vec<String>) -> Option<Command> {
    match words.len() {
        0 => None,
        1 => words.into_iter().next().map(Command::Shell),
        _ => Some(Command::Argv(words)),
    }
}

fn millis(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

pub(crate) async fn run(
    mut arguments: SubmitArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    if let Some(file) = &arguments.batch {
        return batch::run(file, arguments.wait, context, output).await;
    }
    let connection = Connection::open(context)?;
    let (wait, follow) = (arguments.wait, arguments.follow);
    let id = arguments.id.take().unwrap_or_else(new_build_id);
    let source = arguments.source.take();
    let mut spec = spec(arguments)?;
    if let Some(directory) = &source {
        spec.source = Some(upload::directory(&connection, directory, output).await?);
    }
    let response = submit(&connection, &convert::submit_of_spec(&spec, &id)).await?;
    if !response.purged_state.is_empty() {
        output.say(&format!("build {id} had {} and was purged", response.purged_state));
    }
    if !response.purged_state.is_empty() && (wait || follow) {
        // There is nothing to wait for, and no more is known of how it ended.
        output.item(&submitted(&response), &response.build_id);
        return Ok(exit::of_build(&v1::BuildStatus { state: response.purged_state, ..v1::BuildStatus::default() }));
    }
    if !wait && !follow {
        output.item(&submitted(&response), &response.build_id);
        return Ok(Code::SUCCESS);
    }
    match output.format {
        Format::Quiet => output.line(&response.build_id),
        _ => output.say(&format!("build {}", response.build_id)),
    }
    // The exit code is the build's, whoever reads the log.
    output.outlive_reader();
    let id = &response.build_id;
    let watching = async {
        if follow {
            logs::follow(&connection, id, output).await?;
        }
        wait::until_ended(&connection, id).await
    };
    let ended = logs::interruptible(&connection, id, output, watching).await?;
    match output.format {
        Format::Table => output.say(&wait::verdict(&ended)),
        Format::Json | Format::Jsonl => output.item(&status::item(&ended), ""),
        Format::Quiet => {}
    }
    Ok(exit::of_build(&ended))
}

/// Sends one submit; safe through fail-overs, since the id is chosen here.
async fn submit(connection: &Connection, request: &v1::SubmitBuildRequest) -> Result<v1::SubmitBuildResponse, Failure> {
    connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).submit_build(request).await.map(tonic::Response::into_inner) }
        })
        .await
}

/// An accepted submit in every format.
pub(crate) fn submitted(response: &v1::SubmitBuildResponse) -> Item {
    Item {
        name: response.build_id.clone(),
        cells: vec![response.build_id.clone()],
        json: json!({
            "build_id": response.build_id,
            "queued": response.queued,
            "existed": response.existed,
            "purged_state": text_json(&response.purged_state),
        }),
    }
}

fn spec(arguments: SubmitArguments) -> Result<BuildSpec, Failure> {
    let outputs = match (arguments.no_output, arguments.output.is_empty()) {
        (true, _) => Outputs::None,
        (false, true) => Outputs::Default,
        (false, false) => Outputs::Named(arguments.output),
    };
    Ok(BuildSpec {
        repo_url: arguments.repo,
        git_ref: arguments.git_ref,
        source: None,
        executor: arguments.executor.as_deref().map(Executor::parse).transpose()?,
        dockerfile_path: arguments.dockerfile,
        target: arguments.target,
        build_args: arguments.build_arg.into_iter().collect::<BTreeMap<_, _>>(),
        platforms: arguments.platform,
        outputs,
        env: arguments.env.into_iter().collect(),
        labels: arguments.label.into_iter().collect(),
        requires: arguments.require.into_iter().collect(),
        secrets: arguments.secret.into_iter().collect(),
        timeout_ms: millis(arguments.timeout),
        silence_timeout_ms: millis(arguments.silence_timeout),
        priority: arguments.priority,
        resources: Resources {
            cpu_milli: arguments.cpu.unwrap_or(0),
            memory_bytes: arguments.memory.unwrap_or(0),
            disk_bytes: arguments.disk.unwrap_or(0),
        },
        park: arguments.park,
        retries: arguments.retries,
        on_worker_loss: match arguments.on_worker_loss {
            WorkerLoss::Rerun => OnWorkerLoss::Rerun,
            WorkerLoss::Fail => OnWorkerLoss::Fail,
        },
        push: arguments.push,
        keep_workdir_ms: millis(arguments.keep_workdir),
        command: command(arguments.command),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_argument_is_a_line_and_several_are_a_vector() {
        assert_eq!(command(vec![]), None);
        assert_eq!(command(vec!["a b".into()]), Some(Command::Shell("a b".into())));
        assert_eq!(command(vec!["a".into(), "b".into()]), Some(Command::Argv(vec!["a".into(), "b".into()])));
    }

    #[test]
    fn cpus_are_thousandths() {
        assert_eq!(cpu_milli("2"), Ok(2000));
        assert_eq!(cpu_milli("0.5"), Ok(500));
        assert_eq!(cpu_milli("1.025"), Ok(1025));
        for bad in ["", "x", "-1", "1.0001", "1.x", "99999999999999999999"] {
            assert!(cpu_milli(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pairs_and_secrets() {
        assert_eq!(key_value("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(key_value("A").is_err() && key_value("=b").is_err());
        assert_eq!(secret("id=x"), Ok("x".into()));
        assert!(secret("x").is_err());
    }
}
