//! Adding a coordinator: looked at first, then a member without a vote, then, once it has the log, a voter.

use std::time::{Duration, Instant};

use helix_common::channel::{self, Traffic, canonical_endpoint, certificate_refused};
use helix_common::status::{error_code, invalid, status};
use helix_core::command::RegisterNode;
use helix_core::{Command, Rejection, Reply};
use helix_model::{ErrorCode, InvalidField, NodeId};
use helix_proto::peer;
use tonic::Status;

use super::{Asked, Change, Inner, Listener, Membership};
use crate::registry::{COMMAND_FORMAT, MemberStep};
use crate::rpc::answer;

/// A node this close to the end of the log has caught up: while others write, it is never quite there.
const LAG_MAX: u64 = 200;
/// A node that is silent for so long while it catches up has stopped.
const SILENCE: Duration = Duration::from_secs(10);
/// Meanwhile it is asked so many times who it is.
const ASKED_TIMES: u32 = 3;
/// And one that answers may take so long for one snapshot.
const NO_PROGRESS: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Membership {
    /// Makes a node that waits to be added a voter.
    ///
    /// # Errors
    /// The status to answer with.
    pub async fn add(&self, id: NodeId, address: &str, asked: Asked, listener: &Listener) -> Result<(), Status> {
        let address = checked(id, address)?;
        let inner = &*self.inner;
        let change = inner.begin("add", id, asked, listener).await?;
        let (members, voters) = (inner.registry.members(), inner.registry.voters());
        if voters.contains(&id) && members.get(&id) == Some(&address) && asked == Asked::Again {
            return change.at("done", 0, 0).await;
        }
        inner.expect_addable(id, &address)?;
        let there = inner.newcomer(id, &address).await?;
        inner.hear().await?;
        inner.expect_quorum_with(id)?;
        inner.register(id, &there).await?;
        inner.commit(MemberStep::Admit { node: id, address: address.clone() }).await?;
        change.catch_up(&address, SILENCE).await?;
        change.at("promoting", 0, 0).await?;
        // It took a while: others may have died, or removed the node.
        inner.hear().await?;
        inner.expect_quorum_with(id)?;
        if inner.is_removed(id) {
            return Err(used(id));
        }
        inner.commit(MemberStep::Promote(id)).await?;
        change.at("done", 0, 0).await
    }
}

#[allow(clippy::result_large_err)]
fn checked(id: NodeId, address: &str) -> Result<String, Status> {
    if id.0 == 0 {
        return Err(invalid(&InvalidField::new("id", "is 0: a node's id is at least 1")));
    }
    let endpoint = canonical_endpoint(address).ok().filter(|_| !address.contains("://"));
    let endpoint =
        endpoint.ok_or_else(|| invalid(&InvalidField::new("address", format!("{address:?} is not HOST:PORT"))));
    Ok(endpoint?.trim_start_matches("https://").to_owned())
}

#[allow(clippy::result_large_err)]
impl Inner {
    fn expect_addable(&self, id: NodeId, address: &str) -> Result<(), Status> {
        let (members, voters) = (self.registry.members(), self.registry.voters());
        let taken = |text: String| Err(status(ErrorCode::MemberExists, text));
        match members.get(&id) {
            Some(known) if known != address => {
                return taken(format!("node {id} is a member at {known}: remove it, and add the host under a new id"));
            }
            Some(_) if voters.contains(&id) => {
                return taken(format!("node {id} is a voter already: nothing is to be done"));
            }
            // An earlier attempt came this far.
            Some(_) | None => {}
        }
        if let Some((other, _)) = members.iter().find(|(other, known)| **other != id && *known == address) {
            return taken(format!("node {other} is a member at {address}: is the id wrong, or the address?"));
        }
        if self.is_removed(id) { Err(used(id)) } else { Ok(()) }
    }

    /// Asks the node who it is, and whether it can be reached by all who will have to.
    async fn newcomer(&self, id: NodeId, address: &str) -> Result<peer::IntroduceResponse, Status> {
        let there = self.introduction(id, address).await.map_err(|error| refusal_of(id, address, &error))?;
        let caller = there.caller.clone().unwrap_or_default();
        if caller.cluster != self.registry.cluster() || caller.from != id.0 || caller.from_epoch == 0 {
            let text = format!("{address} is node {} of cluster {:?}", caller.from, caller.cluster);
            return Err(status(ErrorCode::WrongCluster, text));
        }
        let ours = self.registry.members().contains_key(&id);
        if !there.members.is_empty() && !ours {
            let text = format!(
                "node {id} has members of its own, {:?}: it was made with `init --members`; wipe it, and make it with \
                 `init --join`",
                there.members
            );
            return Err(status(ErrorCode::WrongCluster, text));
        }
        if there.format < COMMAND_FORMAT {
            let text = format!(
                "node {id} runs {}, which knows command format {}; this cluster uses {COMMAND_FORMAT}: install {} there",
                there.version,
                there.format,
                env!("CARGO_PKG_VERSION")
            );
            return Err(status(ErrorCode::VersionSkew, text));
        }
        let tls = self.peers.tls();
        let dialled = channel::connect(&there.grpc, tls, tls.expect_node(id), Traffic::Control).await;
        if let Err(error) = dialled {
            let text = format!(
                "node {id} says that clients dial it at {}, which does not lead to it: correct `advertise` in its \
                 configuration ({error})",
                there.grpc
            );
            return Err(status(ErrorCode::MemberUnreachable, text));
        }
        Ok(there)
    }

    fn expect_quorum_with(&self, id: NodeId) -> Result<(), Status> {
        let voters = self.registry.voters();
        let after = voters.len() + 1;
        let needed = after / 2 + 1;
        let answer = 1 + voters.iter().filter(|voter| **voter != id && self.was_heard(**voter)).count();
        if answer >= needed {
            return Ok(());
        }
        let text = format!(
            "with node {id} there are {after} voters, of which {needed} must answer, and {answer} do: bring the others \
             back first, or remove them"
        );
        Err(status(ErrorCode::QuorumUnsafe, text))
    }

    /// Binds the id to the node's data directory, for ever.
    async fn register(&self, id: NodeId, there: &peer::IntroduceResponse) -> Result<(), Status> {
        let command = Command::RegisterNode(RegisterNode {
            node: id,
            epoch: there.caller.as_ref().map_or(0, |caller| caller.from_epoch),
            grpc: there.grpc.clone(),
            version: there.version.clone(),
            format: there.format,
        });
        match self.registry.propose(command).await.map_err(|error| answer::of_propose(&error))? {
            Reply::Rejected(Rejection::NodeEpochTaken { .. } | Rejection::NodeRemoved { .. }) => Err(used(id)),
            reply => answer::expect_done(&reply),
        }
    }
}

fn used(id: NodeId) -> Status {
    let text = format!(
        "node id {id} was used before, and ids are never used again: make the node under a new one (`init --join --id N`, \
         with a certificate for it)"
    );
    status(ErrorCode::NodeIdUsed, text)
}

fn refusal_of(id: NodeId, address: &str, error: &Status) -> Status {
    if error_code(error).is_some() {
        let text = format!("node {id} at {address}: {}", error.message());
        // What it says is final, whatever its code says of calls in general.
        return status(
            error_code(error).filter(|code| *code == ErrorCode::VersionSkew).unwrap_or(ErrorCode::WrongCluster),
            text,
        );
    }
    if let Some(why) = certificate_refused(error) {
        let text = format!(
            "{address} is not node {id} of this cluster ({why}): it needs a certificate for coordinator {id} of this \
             cluster's authority"
        );
        return status(ErrorCode::WrongCluster, text);
    }
    let text = format!(
        "nothing answers as node {id} at {address}: is helix-coordinator running there, and the port reachable from \
         here? ({})",
        error.message()
    );
    status(ErrorCode::MemberUnreachable, text)
}

impl Change<'_> {
    /// Waits until the node has the log. It has stopped when it is not heard for as long as `silence`.
    pub(super) async fn catch_up(&self, address: &str, silence: Duration) -> Result<(), Status> {
        let began = Instant::now();
        let (mut best, mut progressed, mut heard, mut asked) = (0, began, began, began);
        loop {
            self.inner.expect_leader()?;
            let own = self.inner.registry.status().last_log_index;
            let member = self.inner.member_status(self.id);
            let (at, healthy) = member.map_or((0, false), |member| (member.last_log_index, member.healthy));
            self.at("catching_up", at, own).await?;
            if healthy && at > 0 && at + LAG_MAX >= own {
                return Ok(());
            }
            if at > best {
                (best, progressed) = (at, Instant::now());
            }
            if healthy {
                heard = Instant::now();
            } else if asked.elapsed() >= silence / ASKED_TIMES {
                asked = Instant::now();
                // While it puts a snapshot in the place of its registry its consensus answers nothing, and it does.
                if self.inner.introduction(self.id, address).await.is_ok() {
                    heard = Instant::now();
                }
            }
            let what = if heard.elapsed() >= silence {
                "stopped answering while it caught up"
            } else if progressed.elapsed() >= NO_PROGRESS {
                "answers, and is no further than ten minutes ago (its log says if it has no room, and a large snapshot may take longer)"
            } else {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            };
            let text = format!(
                "node {} {what}, at entry {at} of {own}: it stays a learner, without a vote; see to it and repeat the command, \
                 or remove it",
                self.id
            );
            return Err(status(ErrorCode::MemberUnreachable, text));
        }
    }
}
