//! `helix purge`, `pin`, `unpin`.

use clap::Args;
use helix_model::parse;
use helix_proto::v1;
use jiff::Timestamp;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output};

/// `helix purge`.
#[derive(Args)]
pub(crate) struct PurgeArguments {
    /// Builds completed at or before this time (ISO 8601) or so long ago (e.g. 7d)
    #[arg(long, value_name = "TIME_OR_AGE", value_parser = cutoff_ms)]
    before: i64,
    /// Only builds that ended in this state
    #[arg(long, value_name = "S", value_parser = ["succeeded", "failed", "cancelled"])]
    state: Option<String>,
}

/// A moment as Unix milliseconds: ISO 8601, or an age.
fn cutoff_ms(text: &str) -> Result<i64, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time.as_millisecond());
    }
    let age = parse::duration_ms("before", text)
        .map_err(|_| format!("{text:?} is neither ISO 8601 nor an age such as 7d"))?;
    Ok(Timestamp::now().as_millisecond() - i64::try_from(age).unwrap_or(i64::MAX))
}

pub(crate) async fn run(arguments: PurgeArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let request = v1::PurgeBuildsRequest { before_ms: arguments.before, state: arguments.state.unwrap_or_default() };
    let call = |channel| {
        let request = request.clone();
        async move { builds(channel).purge_builds(request).await }
    };
    let response = connection.call(call).await?.into_inner();
    let v1::PurgeBuildsResponse { purged, pinned } = response;
    let json = serde_json::json!({ "purged": purged, "pinned": pinned });
    let passed_over = if pinned > 0 { format!(", {pinned} passed over: pinned") } else { String::new() };
    let item = Item { name: purged.to_string(), cells: Vec::new(), json };
    output.item(&item, &format!("{purged} purged{passed_over}"));
    Ok(Code::SUCCESS)
}

/// `helix pin` and `helix unpin`.
#[derive(Args)]
pub(crate) struct PinArguments {
    /// A build id, a unique prefix of it, or `last`
    #[arg(value_name = "ID")]
    build: String,
}

pub(crate) async fn run_pin(
    arguments: PinArguments,
    pinned: bool,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let id = connection.resolve(&arguments.build).await?;
    let request = v1::PinBuildRequest { build_id: id.clone(), pinned };
    connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).pin_build(request).await }
        })
        .await?;
    let json = serde_json::json!({ "build_id": id, "pinned": pinned });
    let word = if pinned { "pinned" } else { "not pinned" };
    output.item(&Item { name: id.clone(), cells: Vec::new(), json }, &format!("{id} {word}"));
    Ok(Code::SUCCESS)
}
