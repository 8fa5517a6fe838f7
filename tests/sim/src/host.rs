//! A build host as it really is, whatever agents and coordinators believe: which processes live on it, and how those
//! ended that do not.

use std::collections::{BTreeMap, BTreeSet};

use helix_model::{AttemptKey, BuildId};

use super::random::Random;

/// The most memory that a host has, or a build asks for.
pub(super) const MEMORY_MAX: u64 = 4;

/// What a process will do if nobody kills it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Succeeds,
    Fails,
    /// The host's fault.
    Breaks,
    Hangs,
}

/// How a process ended, as its runner wrote it down, or as the runner's absence tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    Exited(Fate),
    Killed,
    RunnerLost,
}

/// A host: its boots and its processes.
#[derive(Debug, Default)]
pub(super) struct Host {
    /// Counts boots.
    pub(super) boot: u64,
    /// Living processes, the fate of each, and when it began.
    pub(super) processes: BTreeMap<AttemptKey, (Fate, u64)>,
    /// What runners left in their attempts' directories.
    pub(super) ended: BTreeMap<AttemptKey, Ended>,
    /// Whether what a dead runner leaves is killed and known.
    pub(super) cgroups: bool,
    /// Attempts whose runners died here without one, in this boot: nobody can prove them dead.
    pub(super) unproven: BTreeSet<AttemptKey>,
    /// Those of them that hid, and that nobody kills.
    pub(super) hidden: BTreeSet<AttemptKey>,
    /// Its memory, in units of the simulation; 0 where the agent does not tell.
    pub(super) memory: u64,
}

impl Host {
    /// The first can run everything.
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        let memory = if number == 0 { MEMORY_MAX } else { random.between(0, MEMORY_MAX) };
        Self { cgroups: random.chance(50), memory, ..Self::default() }
    }

    /// It boots: no process survives that, and everything is seen to be dead.
    pub(super) fn boots(&mut self) {
        self.boot += 1;
        self.processes.clear();
        self.ended.clear();
        self.unproven.clear();
        self.hidden.clear();
    }

    /// Whether something lives that its agent finds and can kill.
    pub(super) fn can_kill(&self, key: &AttemptKey) -> bool {
        self.processes.contains_key(key) && !self.hidden.contains(key)
    }

    pub(super) fn runs_any_of(&self, build: &BuildId) -> Option<&AttemptKey> {
        self.processes.keys().find(|key| key.build == *build)
    }
}
