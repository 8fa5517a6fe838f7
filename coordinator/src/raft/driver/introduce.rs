//! How a node makes itself known to the registry; the first one of a new cluster gives it its policy before.

use std::time::Duration;

use helix_core::command::{RegisterNode, SetPolicy};
use helix_core::{Command, Policy, Rejection, Reply};
use tokio_util::sync::CancellationToken;

use super::Options;
use crate::registry::{Consistency, ProposeError, Registry};

/// Between two tries: nobody leads yet, or this node is no member yet.
const AGAIN: Duration = Duration::from_millis(500);

/// Makes this node known to the registry, and again when it changed.
pub(super) async fn introduce(registry: Registry, options: Options, stop: CancellationToken) {
    let all = async {
        // Each node before it makes itself known: whoever is known has seen to it.
        while !first_policy(&registry).await {
            tokio::time::sleep(AGAIN).await;
        }
        while !register(&registry, &options).await {
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = all => {}
    }
}

/// Gives a newborn cluster its policy. Whether that is settled: a cluster that knows of any node is older, or has it.
async fn first_policy(registry: &Registry) -> bool {
    let is_new = || registry.with_state(|state| state.nodes().next().is_none());
    if !is_new() {
        return true;
    }
    // One that joins knows as little until it has heard of what is committed.
    if let Err(error) = registry.barrier(Consistency::Linearizable).await {
        tracing::debug!(%error, "whether this cluster is new is not known yet");
        return false;
    }
    if !is_new() {
        return true;
    }
    // An operator may have been faster with other keys.
    let before = registry.policy();
    if before.copies != Policy::default().copies {
        return true;
    }
    let policy = Policy { copies: Policy::of_new_clusters().copies, ..before.clone() };
    let command = SetPolicy { policy, expected: Some(before) };
    match registry.propose(Command::SetPolicy(command)).await {
        Ok(Reply::Rejected(Rejection::PolicyChanged)) => false,
        // Where older members would not understand it, theirs stays.
        Ok(_) | Err(ProposeError::UpgradePending { .. }) => true,
        Err(error) => {
            tracing::debug!(%error, "the first policy is not set yet");
            false
        }
    }
}

/// Whether this node is known as what it is, or cannot be.
async fn register(registry: &Registry, options: &Options) -> bool {
    let command = RegisterNode {
        node: registry.node(),
        epoch: registry.epoch(),
        grpc: options.grpc.clone(),
        version: options.version.clone(),
        format: options.command_format,
    };
    let known = registry.with_state(|state| {
        state.node(command.node).is_some_and(|node| {
            (node.epoch, &node.grpc, &node.version, node.format)
                == (command.epoch, &command.grpc, &command.version, command.format)
        })
    });
    if known {
        return true;
    }
    match registry.propose(Command::RegisterNode(command)).await {
        Ok(Reply::Rejected(why)) => {
            tracing::error!(?why, "the registry refuses this node");
            true
        }
        Ok(_) => true,
        Err(error) => {
            tracing::debug!(%error, "this node is not registered yet");
            false
        }
    }
}
