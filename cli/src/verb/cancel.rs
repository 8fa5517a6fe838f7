//! `helix cancel`: asks for the end and, unless told not to, waits for the proof.

use clap::Args;
use helix_proto::v1;

use crate::connection::{Connection, builds};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::Output;
use crate::verb::wait;

/// `helix cancel`.
#[derive(Args)]
pub(crate) struct CancelArguments {
    /// Build ids, unique prefixes of them, or `last`
    #[arg(required = true, value_name = "ID")]
    builds: Vec<String>,
    /// Why, in your words; kept with the build
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Do not wait until its processes are seen dead
    #[arg(long)]
    no_wait: bool,
}

pub(crate) async fn run(
    arguments: CancelArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let mut ids = Vec::new();
    let mut code = Code::SUCCESS;
    for build in &arguments.builds {
        let asked = async {
            let id = connection.resolve(build).await?;
            request(&connection, &id, &arguments.reason).await?;
            Ok(id)
        };
        match asked.await {
            Ok(id) => ids.push(id),
            Err(failure) => code = output.one_of_several(build, &failure, code),
        }
    }
    let look = async |id: &str| {
        if arguments.no_wait { connection.status(id, false).await } else { wait::until_ended(&connection, id).await }
    };
    wait::show_each(arguments.builds.len(), &ids, &mut code, look, output).await;
    Ok(code)
}

/// Commits the wish that a build end.
pub(crate) async fn request(connection: &Connection, id: &str, reason: &str) -> Result<(), Failure> {
    let request = v1::CancelBuildRequest { build_id: id.to_owned(), reason: reason.to_owned() };
    connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).cancel_build(request).await }
        })
        .await?;
    Ok(())
}
