//! `helix cluster`: `status` is here, policy and members are in their own files.

use std::fmt::Write;

use clap::{Args, Subcommand};
use helix_proto::v1;
use serde_json::json;

use crate::connection::{Connection, cluster};
use crate::context::ContextOptions;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output};
use crate::verb::members::{self, Change};
use crate::verb::policy::PolicyArguments;
use crate::verb::snapshot::SnapshotVerb;

/// `helix cluster`.
#[derive(Args)]
pub(crate) struct ClusterArguments {
    #[command(subcommand)]
    verb: ClusterVerb,
}

#[derive(Subcommand)]
enum ClusterVerb {
    /// Coordinators, leader, totals
    Status {
        /// Answer from what the coordinator at hand knows, without asking the leader
        #[arg(long)]
        stale: bool,
    },
    /// Make a coordinator that waits to be added (`helix-coordinator init --join`) a voter
    Add {
        /// Its node id, never used before
        id: u64,
        /// HOST:PORT where the others dial it (port 7421)
        address: String,
    },
    /// Remove a coordinator for ever, after what it alone holds was copied to others
    Remove {
        /// Its node id, which is never used again
        id: u64,
        /// Also when it alone holds something, which is then lost
        #[arg(long)]
        lose_last_copies: bool,
    },
    /// Ask another voter to lead
    TransferLeader {
        /// Its node id; the most advanced one by default
        id: Option<u64>,
    },
    /// The limits and times that hold for the whole cluster
    Policy(PolicyArguments),
    /// Back up a cluster that serves, and make a new one from a backup
    Snapshot {
        #[command(subcommand)]
        verb: SnapshotVerb,
    },
}

pub(crate) async fn run(
    arguments: ClusterArguments,
    context: &ContextOptions,
    output: &Output,
) -> Result<Code, Failure> {
    let verb = match arguments.verb {
        ClusterVerb::Policy(policy) => return super::policy::run(policy, context, output).await,
        ClusterVerb::Snapshot { verb } => return super::snapshot::run(verb, context, output).await,
        verb => verb,
    };
    let connection = Connection::open(context)?;
    let stale = match verb {
        ClusterVerb::Status { stale } => stale,
        ClusterVerb::Policy(_) | ClusterVerb::Snapshot { .. } => false,
        ClusterVerb::Add { id, address } => {
            return members::change(&Change::Add { id, address }, &connection, output).await;
        }
        ClusterVerb::Remove { id, lose_last_copies } => {
            return members::change(&Change::Remove { id, lose_last_copies }, &connection, output).await;
        }
        ClusterVerb::TransferLeader { id } => return members::transfer(id, &connection, output).await,
    };
    let call =
        |channel| async move { cluster(channel).get_cluster_status(v1::GetClusterStatusRequest { stale }).await };
    let status = connection.call(call).await?.into_inner();
    output.item(&item(&status), &text(&status));
    Ok(Code::SUCCESS)
}

pub(super) fn item(status: &v1::ClusterStatus) -> Item {
    let totals = status.totals.unwrap_or_default();
    let members: Vec<_> = status
        .members
        .iter()
        .map(|member| {
            json!({
                "id": member.id,
                "address": member.address,
                "grpc": member.grpc,
                "role": member.role,
                "last_log_index": member.last_log_index,
                "applied_index": member.applied_index,
                "healthy": member.healthy,
                "version": member.version,
            })
        })
        .collect();
    let leader = if status.leader == 0 { json!(null) } else { json!(status.leader) };
    Item {
        name: status.leader.to_string(),
        cells: Vec::new(),
        json: json!({
            "cluster": status.cluster,
            "leader": leader,
            "term": status.term,
            "node": status.node,
            "members": members,
            "change": status.change.as_ref().map(|change| json!({
                "kind": change.kind,
                "id": change.id,
                "step": change.step,
                "done": change.done,
                "total": change.total,
            })),
            "workers": totals.workers,
            "capacity": totals.capacity,
            "load": totals.load,
            "queued": totals.queued,
            "running": totals.running,
            "warnings": status.warnings,
            "blobs": status.blobs.as_ref().map(|blobs| json!({
                "damaged": blobs.damaged,
                "lost": blobs.lost,
                "lost_sha256": blobs.lost_sha256,
            })),
        }),
    }
}

pub(super) fn text(status: &v1::ClusterStatus) -> String {
    let totals = status.totals.unwrap_or_default();
    let leader = if status.leader == 0 { "none".to_owned() } else { status.leader.to_string() };
    let mut out = format!("cluster {}, leader {leader}, term {}\n", status.cluster, status.term);
    for member in &status.members {
        let health = if member.healthy { "healthy" } else { "unreachable" };
        let _ = writeln!(
            out,
            "{:>3}  {:<10} {health:<12} log {:<8} applied {:<8} {} {}",
            member.id, member.role, member.last_log_index, member.applied_index, member.address, member.grpc
        );
    }
    let _ = writeln!(
        out,
        "workers {}, capacity {}, load {}, queued {}, running {}",
        totals.workers, totals.capacity, totals.load, totals.queued, totals.running
    );
    if let Some(change) = &status.change {
        let _ = writeln!(out, "{}", members::text(change));
    }
    for warning in &status.warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    for sha256 in status.blobs.iter().flat_map(|blobs| &blobs.lost_sha256) {
        let _ = writeln!(out, "lost: blob {sha256} has no good copy on any coordinator");
    }
    out
}
