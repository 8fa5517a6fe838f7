//! `helix wait`, and waiting as other verbs do it.

use clap::Args;
use helix_proto::v1;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::{self, Code};
use crate::failure::Failure;
use crate::output::{Format, Output};
use crate::verb::status;

/// `helix wait`.
#[derive(Args)]
pub(crate) struct WaitArguments {
    /// Build ids, unique prefixes of them, or `last`
    #[arg(required = true, value_name = "ID")]
    builds: Vec<String>,
}

pub(crate) async fn run(arguments: WaitArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let mut ids = Vec::new();
    let mut worst = Code::SUCCESS;
    for build in &arguments.builds {
        match connection.resolve(build).await {
            Ok(id) => ids.push(id),
            Err(failure) => worst = output.one_of_several(build, &failure, worst),
        }
    }
    let look = async |id: &str| until_ended(&connection, id).await;
    for ended in show_each(arguments.builds.len(), &ids, &mut worst, look, output).await {
        if worst == Code::SUCCESS {
            worst = exit::of_build(&ended);
        }
    }
    Ok(worst)
}

/// Shows builds, of so many asked for, as each is when it is looked at. What one cannot be shown for is said, and is the code if nothing was wrong before.
pub(crate) async fn show_each(
    asked: usize,
    ids: &[String],
    code: &mut Code,
    look: impl AsyncFn(&str) -> Result<v1::BuildStatus, Failure>,
    output: &Output,
) -> Vec<v1::BuildStatus> {
    let mut shown = Vec::new();
    for id in ids {
        match look(id).await {
            Ok(status) => {
                if output.format == Format::Table {
                    output.say(&verdict(&status));
                }
                shown.push(status);
            }
            Err(failure) => {
                *code = output.one_of_several(id, &failure, *code);
                if failure.code == Code::UNREACHABLE {
                    // Nor would anybody answer for the others.
                    break;
                }
            }
        }
    }
    output.asked_for(asked, &shown.iter().map(status::item).collect::<Vec<_>>());
    shown
}

/// Waits for a build's end, through fail-overs.
pub(crate) async fn until_ended(connection: &Connection, id: &str) -> Result<v1::BuildStatus, Failure> {
    loop {
        let request = v1::WaitBuildRequest { build_id: id.to_owned(), timeout_ms: connection.round_ms() };
        let call = |channel| {
            let request = request.clone();
            async move { builds(channel).wait_build(request).await.map(tonic::Response::into_inner) }
        };
        let status = connection.call(call).await?;
        if matches!(status.state.as_str(), "succeeded" | "failed" | "cancelled") {
            return Ok(status);
        }
    }
}

/// One line on how a build ended.
pub(crate) fn verdict(status: &v1::BuildStatus) -> String {
    let reason = status::reason_text(status);
    let mut text = format!("build {} {}", status.build_id, status.state);
    if !reason.is_empty() {
        text.push_str(&format!(": {reason}"));
    }
    for words in [&status.message, &status.cancel_reason].into_iter().filter(|words| !words.is_empty()) {
        text.push_str(&format!(": {words}"));
    }
    text
}
