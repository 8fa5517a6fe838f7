//! A build host as it really is, whatever agents and coordinators believe: which processes live on it.

use std::collections::BTreeMap;

use helix_model::{AttemptKey, BuildId};

/// What a process will do if nobody kills it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Succeeds,
    Fails,
    /// The host's fault.
    Breaks,
    Hangs,
}

/// A host: its boots and its processes.
#[derive(Debug, Default)]
pub(super) struct Host {
    /// Counts boots.
    pub(super) boot: u64,
    /// Living processes, the fate of each, and when it began.
    pub(super) processes: BTreeMap<AttemptKey, (Fate, u64)>,
}

impl Host {
    pub(super) fn runs_any_of(&self, build: &BuildId) -> Option<&AttemptKey> {
        self.processes.keys().find(|key| key.build == *build)
    }
}
