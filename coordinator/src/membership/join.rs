//! What a node does about its own membership: it asks the others, now and then, whether it still belongs, and at its own address whether
//! another process is there in its place.
//!
//! A node that was removed while nobody could tell it hears no leader, and a learner never asks for votes: without this it
//! would wait for ever.

use std::time::Duration;

use helix_model::NodeId;
use helix_proto::peer;
use helix_proto::peer::member_service_client::MemberServiceClient;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::INTRODUCTION;
use crate::peers::Peers;
use crate::registry::Registry;

const ASK_EVERY: Duration = Duration::from_secs(5);

/// Asks until `stop`, one other member at a time. The answer, if it is that this node was removed, or is a copy, is a failure of the node.
pub async fn belong(registry: Registry, peers: Peers, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(ASK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = NodeId(0);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            _ = async { tokio::join!(peers.expect_alone(), expect_member(&registry, &peers, &mut last)) } => {}
        }
    }
}

/// Asks the next of the others whether this node still belongs; a leader knows.
async fn expect_member(registry: &Registry, peers: &Peers, last: &mut NodeId) {
    if registry.leadership().borrow().is_leader {
        return;
    }
    let others = peers.ids();
    let mut others = others.iter().filter(|node| **node != peers.own());
    let next = others.clone().find(|node| **node > *last).or_else(|| others.next());
    let Some(next) = next.copied() else { return };
    *last = next;
    let Ok(channel) = peers.control(next) else { return };
    let request = peer::IntroduceRequest { caller: Some(peers.caller(next)) };
    let mut client = MemberServiceClient::new(channel);
    if let Ok(Err(refusal)) = tokio::time::timeout(INTRODUCTION, client.introduce(request)).await {
        peers.heed(next, &refusal);
    }
}
