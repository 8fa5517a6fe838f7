//! `helix retry`: a finished build's spec as a new build.

use clap::Args;
use helix_proto::v1;

use crate::connection::{Connection, builds, new_build_id};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output};

/// `helix retry`.
#[derive(Args)]
pub(crate) struct RetryArguments {
    /// A build id, a unique prefix of it, or `last`
    #[arg(value_name = "ID")]
    build: String,
}

pub(crate) async fn run(arguments: RetryArguments, context: &ContextOptions, output: &Output) -> Result<Code, Failure> {
    let connection = Connection::open(context)?;
    let id = connection.resolve(&arguments.build).await?;
    let request = v1::RetryBuildRequest { build_id: id.clone(), new_build_id: new_build_id() };
    let response = connection
        .call(|channel| {
            let request = request.clone();
            async move { builds(channel).retry_build(request).await.map(tonic::Response::into_inner) }
        })
        .await?;
    let json = serde_json::json!({ "build_id": response.build_id, "retry_of": id, "queued": response.queued });
    let item = Item { name: response.build_id.clone(), cells: Vec::new(), json };
    output.item(&item, &response.build_id);
    Ok(Code::SUCCESS)
}
