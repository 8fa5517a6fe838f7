//! Which voters have not answered, and for how long, as the leader saw it. No clock and no question in here: whoever asks says
//! what came of it.
//!
//! A voter that does not answer may be back soon, with all it holds. One that has not answered for a while counts as one that
//! holds nothing, until it answers again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use helix_model::NodeId;
use tokio::time::Instant;

/// Voters that do not answer, or did not a moment ago.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// When each was first asked in vain, since it last answered steadily.
    since: BTreeMap<NodeId, Instant>,
    /// Since when it has answered each time, of those that do.
    answers: BTreeMap<NodeId, Instant>,
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

/// For how long one has to answer each time to be counted on again: one that dies again and again is of no more use than a dead one.
fn steady(patience: Duration) -> Duration {
    patience / 10
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
        // Of one that has no vote any more there is nothing to say.
        self.since.retain(|node, _| voters.contains(node));
        self.left_out.retain(|node| voters.contains(node));
        self.answers.retain(|node, _| voters.contains(node) && answered.contains(node));
        let mut turns = Vec::new();
        for node in answered.iter().filter(|node| self.since.contains_key(node)).copied().collect::<Vec<_>>() {
            let since = *self.answers.entry(node).or_insert(asked);
            if asked.saturating_duration_since(since) >= steady(patience) {
                self.since.remove(&node);
                self.answers.remove(&node);
                turns.extend(self.left_out.remove(&node).then_some(Turn::Back(node)));
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
        let silent = |node: &NodeId| !self.answers.contains_key(node) && !self.left_out.contains(node);
        self.since.keys().copied().find(silent)
    }
}
