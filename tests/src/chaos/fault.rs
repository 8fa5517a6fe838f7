//! What can be done to a cluster, and the order in which it comes.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

/// What can be done to a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Fault {
    /// SIGKILL of the leader.
    KillLeader,
    /// SIGKILL of another coordinator.
    KillFollower,
    /// SIGKILL of all coordinators at once.
    KillAll,
    /// SIGSTOP of the leader, for longer than an election takes.
    PauseLeader,
    /// SIGSTOP of another coordinator.
    PauseFollower,
    /// The leader reaches nobody, and nobody reaches it.
    IsolateLeader,
    /// The leader reaches the other coordinators no longer, for longer than an agent's lease; clients and agents still reach it.
    SplitLeader,
    /// What the leader says to one other coordinator is lost; the other way it is heard.
    OneWay,
    /// Another coordinator is cut off.
    IsolateFollower,
    /// A third of all frames is lost, everywhere.
    Loss,
    /// Everything takes long, and overtakes each other, and some arrives twice.
    Delay,
    /// SIGKILL of an agent, which returns at once.
    KillAgent,
    /// SIGKILL of an agent, which returns after its lease.
    LoseAgent,
    /// SIGSTOP of an agent for longer than its lease.
    PauseAgent,
    /// An agent is cut off for longer than its lease.
    IsolateAgent,
    /// SIGKILL of a runner.
    KillRunner,
    /// SIGKILL of a coordinator, whose registry is removed before it returns.
    LoseRegistry,
    /// The leader's disk is filled to its last block.
    FillLeader,
    /// Another coordinator's disk is filled below what it keeps in reserve.
    FillFollower,
    /// An agent's disk is filled.
    FillAgent,
    /// The leader's disk fails (EIO), and loses what was not synced.
    FailLeaderDisk,
    /// Another coordinator's disk fails so.
    FailFollowerDisk,
    /// The kernel makes a coordinator's disk read-only, and loses what was not synced.
    ReadOnlyDisk,
    /// An agent's disk fails; what was written is there when it is back, since its host did not go down.
    FailAgentDisk,
    /// The leader's disk hangs.
    HangLeaderDisk,
    /// All coordinators' disks hang again and again for a moment.
    SlowDisks,
    /// The leader's clock goes back by an hour: before the day its certificates begin.
    ClockBackLeader,
    /// The leader's clock goes a year ahead.
    ClockAheadLeader,
    /// Another coordinator's clock goes a year ahead.
    ClockAheadFollower,
    /// An agent's clock jumps, back or ahead.
    ClockAgent,
    /// A coordinator joins.
    AddMember,
    /// A coordinator is removed, the leader perhaps.
    RemoveMember,
    /// A coordinator joins or is removed, and the leader is killed in the middle.
    KillLeaderInChange,
    /// Another coordinator is asked to lead.
    TransferLeadership,
    /// All coordinators are ended in order and started again, one after the other, as for an upgrade.
    RollingRestart,
    /// An agent is detached while it runs a build, and started again.
    DetachAgent,
}

impl Fault {
    /// All there are.
    pub(super) const ALL: [Self; 36] = [
        Self::KillLeader,
        Self::KillFollower,
        Self::KillAll,
        Self::PauseLeader,
        Self::PauseFollower,
        Self::IsolateLeader,
        Self::SplitLeader,
        Self::OneWay,
        Self::IsolateFollower,
        Self::Loss,
        Self::Delay,
        Self::KillAgent,
        Self::LoseAgent,
        Self::PauseAgent,
        Self::IsolateAgent,
        Self::KillRunner,
        Self::LoseRegistry,
        Self::FillLeader,
        Self::FillFollower,
        Self::FillAgent,
        Self::FailLeaderDisk,
        Self::FailFollowerDisk,
        Self::ReadOnlyDisk,
        Self::FailAgentDisk,
        Self::HangLeaderDisk,
        Self::SlowDisks,
        Self::ClockBackLeader,
        Self::ClockAheadLeader,
        Self::ClockAheadFollower,
        Self::ClockAgent,
        Self::AddMember,
        Self::RemoveMember,
        Self::KillLeaderInChange,
        Self::TransferLeadership,
        Self::RollingRestart,
        Self::DetachAgent,
    ];

    /// Whether it may leave no majority of coordinators that can work together, so that nobody can be served meanwhile.
    pub(super) fn takes_majority(self) -> bool {
        matches!(self, Self::KillAll | Self::Loss | Self::Delay | Self::SlowDisks)
    }

    /// Whether a build that runs must be none the worse for it: nothing happens to its agent that is not meant for upgrades.
    pub(super) fn spares_builds(self) -> bool {
        matches!(
            self,
            Self::KillLeader | Self::SplitLeader | Self::TransferLeadership | Self::RollingRestart | Self::DetachAgent
        )
    }
}

/// Faults in the order in which they come: each once, shuffled, then all again in another order.
pub(super) struct Deck {
    random: StdRng,
    all: Vec<Fault>,
    left: Vec<Fault>,
    /// How often each was drawn, and how often it met something.
    tally: BTreeMap<Fault, (u32, u32)>,
}

impl Deck {
    /// Of these.
    pub(super) fn new(random: StdRng, all: Vec<Fault>) -> Self {
        Self { random, all, left: Vec::new(), tally: BTreeMap::new() }
    }

    /// The next one.
    pub(super) fn draw(&mut self) -> Fault {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
            self.left.shuffle(&mut self.random);
        }
        let fault = self.left.pop().unwrap_or(Fault::KillLeader);
        self.tally.entry(fault).or_default().0 += 1;
        fault
    }

    /// One that has met nothing so far, if there is any.
    pub(super) fn draw_unmet(&mut self) -> Option<Fault> {
        let mut unmet = self.unmet();
        unmet.shuffle(&mut self.random);
        let fault = unmet.pop()?;
        self.tally.entry(fault).or_default().0 += 1;
        Some(fault)
    }

    /// It met something.
    pub(super) fn met(&mut self, fault: Fault) {
        self.tally.entry(fault).or_default().1 += 1;
    }

    /// Those that met nothing so far.
    pub(super) fn unmet(&self) -> Vec<Fault> {
        let met = |fault: &Fault| self.tally.get(fault).is_some_and(|(_, met)| *met > 0);
        self.all.iter().copied().filter(|fault| !met(fault)).collect()
    }

    /// Of those that were drawn at all.
    pub(super) fn drawn_unmet(&self) -> Vec<Fault> {
        self.tally.iter().filter(|(_, (_, met))| *met == 0).map(|(fault, _)| *fault).collect()
    }

    /// How often each was made, of which it met something so often.
    pub(super) fn tally(&self) -> &BTreeMap<Fault, (u32, u32)> {
        &self.tally
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn every_fault_comes_once_before_any_comes_twice() {
        let mut deck = Deck::new(StdRng::seed_from_u64(7), Fault::ALL.to_vec());
        let rounds: Vec<Vec<Fault>> = (0..2).map(|_| Fault::ALL.iter().map(|_| deck.draw()).collect()).collect();
        for round in &rounds {
            assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), Fault::ALL.len());
        }
        assert_ne!(rounds[0], rounds[1]);
    }

    #[test]
    fn what_met_nothing_is_known_and_comes_again() {
        let mut deck = Deck::new(StdRng::seed_from_u64(7), Fault::ALL.to_vec());
        for fault in Fault::ALL.into_iter().filter(|fault| *fault != Fault::KillRunner) {
            deck.met(fault);
        }
        assert_eq!(deck.unmet(), [Fault::KillRunner]);
        assert_eq!(deck.draw_unmet(), Some(Fault::KillRunner));
        deck.met(Fault::KillRunner);
        assert_eq!(deck.draw_unmet(), None);
    }
}
