//! `helix list`.

use std::collections::BTreeMap;

use clap::Args;
use helix_model::BuildState;
use helix_proto::v1;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::Output;
use crate::verb::status;
use crate::verb::submit::key_value;

/// The columns of a build.
pub(crate) const HEADER: [&str; 7] = ["build", "state", "reason", "worker", "age", "by", "source"];

/// `helix list`.
#[derive(Args)]
pub(crate) struct ListArguments {
    /// Only builds in this state; may be repeated
    #[arg(long, value_name = "S", value_parser = state)]
    state: Vec<String>,
    /// Only builds of this repository
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    repo: String,
    /// Only builds with this label; may be repeated
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    label: Vec<(String, String)>,
    /// Only what I submitted
    #[arg(long)]
    mine: bool,
    /// All there are, not only the first 100
    #[arg(long)]
    all: bool,
    /// At most so many [default: 100; with --all no limit]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: u64,
    /// Answer from what the coordinator at hand knows, without asking the leader
    #[arg(long)]
    stale: bool,
}

fn state(text: &str) -> Result<String, String> {
    text.parse::<BuildState>().map(|state| state.as_str().to_owned()).map_err(|e| e.why)
}

pub(crate) async fn run(arguments: ListArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let request = v1::ListBuildsRequest {
        states: arguments.state,
        repo_url: arguments.repo,
        labels: arguments.label.into_iter().collect::<BTreeMap<_, _>>(),
        mine: arguments.mine,
        all: arguments.all,
        limit: arguments.limit,
        stale: arguments.stale,
    };
    let items: Vec<_> = ask(&connection, &request).await?.iter().map(status::item).collect();
    output.items(&HEADER, &items);
    Ok(Code::SUCCESS)
}

/// The builds that are asked for, however long they take to come.
pub(super) async fn ask(
    connection: &Connection,
    request: &v1::ListBuildsRequest,
) -> Result<Vec<v1::BuildStatus>, Failure> {
    loop {
        let call = |channel| {
            let request = request.clone();
            async move { builds(channel).list_builds(request).await }
        };
        let mut stream = connection.call(call).await?.into_inner();
        let mut found = Vec::new();
        let broken = loop {
            match stream.message().await {
                Ok(Some(status)) => found.push(status),
                Ok(None) => {
                    connection.succeeded();
                    return Ok(found);
                }
                Err(status) => break status,
            }
        };
        // Somebody else lists them from the beginning: what was read is of another moment.
        connection.pause_or_fail(broken).await?;
    }
}
