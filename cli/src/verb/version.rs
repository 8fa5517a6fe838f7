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
    let asked = if arguments.client || context.load().is_err() { Ok(Vec::new()) } else { members(context).await };
    // Its own version is known whatever the cluster says.
    let (members, failure) = match asked {
        Ok(members) => (members, None),
        Err(failure) => (Vec::new(), Some(failure)),
    };
    let mut text = format!("helix {own}\n");
    for member in &members {
        text.push_str(&format!("coordinator {} {}\n", member.id, member.version));
    }
    let coordinators: Vec<_> =
        members.iter().map(|member| json!({ "id": member.id, "version": member.version })).collect();
    let json = json!({ "helix": own, "coordinators": coordinators });
    output.item(&Item { name: own.to_owned(), cells: Vec::new(), json }, &text);
    failure.map_or(Ok(Code::SUCCESS), Err)
}

async fn members(context: &ContextOptions) -> Result<Vec<v1::Member>, Failure> {
    let connection = Connection::open(context)?;
    let request = v1::GetClusterStatusRequest { stale: true };
    let call = |channel| async move { cluster(channel).get_cluster_status(request).await };
    Ok(connection.call(call).await?.into_inner().members)
}
