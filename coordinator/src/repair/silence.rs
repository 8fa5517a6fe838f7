//! Which voters have not answered, and for how long, as the leader saw it. No clock and no question in here: whoever asks says
//! what came of it.
//!
//! A voter that does not answer may be back soon, with all it holds. One that has not answered for a while counts as one that
//! holds nothing, until it answers again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use helix_model::NodeId;
use tokio::time::Instant;

/// Voters that do not answer.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// When each was first asked in vain.
    since: BTreeMap<NodeId, Instant>,
    /// Those of them for whom nobody waits any more.
    left_out: BTreeSet<NodeId>,
}

/// What has become of a voter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// Nobody waits for it any more.
    LeftOut(NodeId),
    /// It had been left out and answers.
    Back(NodeId),
}

impl Silence {
    /// At `asked` all voters were asked, and these answered. Whoever has not since `patience` is left out.
    pub(super) fn note(
        &mut self,
        voters: &BTreeSet<NodeId>,
        answered: &BTreeSet<NodeId>,
        asked: Instant,
        patience: Duration,
    ) -> Vec<Turn> {
        let mut turns = Vec::new();
        // Of one that has no vote any more there is nothing to say.
        self.since.retain(|node, _| voters.contains(node) && !answered.contains(node));
        for node in std::mem::take(&mut self.left_out) {
            if self.since.contains_key(&node) {
                self.left_out.insert(node);
            } else if voters.contains(&node) {
                turns.push(Turn::Back(node));
            }
        }
        for node in voters.difference(answered) {
            let since = *self.since.entry(*node).or_insert(asked);
            if asked.saturating_duration_since(since) >= patience && self.left_out.insert(*node) {
                turns.push(Turn::LeftOut(*node));
            }
        }
        turns
    }

    /// Those for whom nobody waits any more.
    pub(super) fn left_out(&self) -> &BTreeSet<NodeId> {
        &self.left_out
    }

    /// One that does not answer and may be back soon.
    pub(super) fn awaited(&self) -> Option<NodeId> {
        self.since.keys().copied().find(|node| !self.left_out.contains(node))
    }
}
