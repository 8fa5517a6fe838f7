//! `helix cluster add`, `remove` and `transfer-leader`: who the coordinators are.
//!
//! A change is one call that tells how far it is. When it breaks off it is made again, and goes on from where it was: only
//! the first call may find that there is nothing to do.

use helix_common::status::error_code;
use helix_model::ErrorCode;
use helix_proto::v1;
use serde_json::json;
use tonic::{Code, Response, Status, Streaming};

use crate::connection::{Connection, cluster};
use crate::exit::Code as Exit;
use crate::failure::Failure;
use crate::output::{Item, Output};

/// What is to become of a coordinator.
pub(crate) enum Change {
    Add { id: u64, address: String },
    Remove { id: u64, lose_last_copies: bool },
}

pub(crate) async fn change(change: &Change, connection: &Connection, output: &Output) -> Result<Exit, Failure> {
    let mut again = false;
    let mut said = String::new();
    loop {
        let begun = begin(change, again, connection).await;
        let status = match begun {
            Ok(response) => match follow(response.into_inner(), connection, output, &mut said).await {
                Ok(()) => return finish(change, connection, output).await,
                Err(status) => status,
            },
            Err(status) => status,
        };
        // Only a refusal is certain not to have changed anything.
        again |= error_code(&status) != Some(ErrorCode::NotLeader) || !said.is_empty();
        if status.code() == Code::Cancelled {
            connection.pause_or_fail(Status::unavailable(status.message())).await?;
        } else {
            connection.pause_or_fail(status).await?;
        }
    }
}

async fn begin(
    change: &Change,
    again: bool,
    connection: &Connection,
) -> Result<Response<Streaming<v1::MemberProgress>>, Status> {
    match change {
        Change::Add { id, address } => {
            let request = v1::AddMemberRequest { id: *id, address: address.clone(), again };
            connection.once(|channel| async move { cluster(channel).add_member(request).await }).await
        }
        Change::Remove { id, lose_last_copies } => {
            let request = v1::RemoveMemberRequest { id: *id, again, lose_last_copies: *lose_last_copies };
            connection.once(|channel| async move { cluster(channel).remove_member(request).await }).await
        }
    }
}

/// Tells people of each step once; an end without "done" is a break.
async fn follow(
    mut progress: Streaming<v1::MemberProgress>,
    connection: &Connection,
    output: &Output,
    said: &mut String,
) -> Result<(), Status> {
    while let Some(v1::MemberProgress { change, note }) = progress.message().await? {
        connection.succeeded();
        if !note.is_empty() {
            output.say(&note);
        }
        let Some(change) = change else { continue };
        if change.step == "done" {
            return Ok(());
        }
        if *said != change.step {
            output.say(&text(&change));
            said.clone_from(&change.step);
        }
    }
    Err(Status::unavailable("the coordinator ended the call before the change was done"))
}

/// A change in one line.
pub(crate) fn text(change: &v1::MemberChange) -> String {
    let doing = if change.kind == "add" { "adding" } else { "removing" };
    let count = match (change.done, change.total) {
        (0, 0) => String::new(),
        (done, 0) => format!(", {done} so far"),
        (done, total) => format!(", {done} of {total}"),
    };
    format!("{doing} node {}: {}{count}", change.id, change.step.replace('_', " "))
}

async fn finish(change: &Change, connection: &Connection, output: &Output) -> Result<Exit, Failure> {
    let request = v1::GetClusterStatusRequest { stale: false };
    let status = connection.call(|channel| async move { cluster(channel).get_cluster_status(request).await });
    let status = status.await?.into_inner();
    let voters: Vec<u64> = status.members.iter().filter(|it| it.role != "learner").map(|it| it.id).collect();
    let list = voters.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let (id, text) = match change {
        Change::Add { id, .. } => {
            let grpc = status.members.iter().find(|it| it.id == *id).map_or("", |it| it.grpc.as_str());
            let hint = format!("add {grpc} to the endpoints of contexts and to the coordinators of agents");
            (*id, format!("node {id} is a voter; voters: {list}\n{hint}\n"))
        }
        Change::Remove { id, .. } => (*id, format!("node {id} is removed, its id is spent; voters: {list}\n")),
    };
    output.item(&Item { name: id.to_string(), cells: Vec::new(), json: json!({ "id": id, "voters": voters }) }, &text);
    Ok(Exit::SUCCESS)
}

pub(crate) async fn transfer(to: Option<u64>, connection: &Connection, output: &Output) -> Result<Exit, Failure> {
    let request = v1::TransferLeaderRequest { to: to.unwrap_or(0) };
    let call = |channel| async move { cluster(channel).transfer_leader(request).await };
    let leader = connection.call(call).await?.into_inner().leader;
    let item = Item { name: leader.to_string(), cells: Vec::new(), json: json!({ "leader": leader }) };
    output.item(&item, &format!("node {leader} leads\n"));
    Ok(Exit::SUCCESS)
}
