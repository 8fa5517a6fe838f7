//! `helix version`: of this command and, where one answers, of the cluster.

use clap::Args;
use helix_proto::v1;
use serde_json::json;

use crate::connection::{Connection, cluster};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output};

/// `helix version`.
#[derive(Args)]
pub(crate) struct VersionArguments {
    /// Do not ask the cluster
    #[arg(long)]
    client: bool,
}

pub(crate) async fn run(
    arguments: &VersionArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let mut members = Vec::new();
    if !arguments.client && context.load().is_ok() {
        let connection = Connection::open(context)?;
        let request = v1::GetClusterStatusRequest { stale: true };
        let call = |channel| async move { cluster(channel).get_cluster_status(request).await };
        members = connection.call(call).await?.into_inner().members;
    }
    let mut text = format!("helix {own}\n");
    for member in &members {
        text.push_str(&format!("coordinator {} {}\n", member.id, member.version));
    }
    let coordinators: Vec<_> =
        members.iter().map(|member| json!({ "id": member.id, "version": member.version })).collect();
    let json = json!({ "helix": own, "coordinators": coordinators });
    output.item(&Item { name: own.to_owned(), cells: Vec::new(), json }, &text);
    Ok(Code::SUCCESS)
}
