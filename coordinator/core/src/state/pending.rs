//! What must be sent to workers, derived from the registry alone: by a new leader, and whenever a session is
//! reconciled with what its agent says it runs.

use helix_model::{AttemptKey, Instance, Reason, WorkerName};

use crate::effect::Effect;

use super::State;

/// What to tell an agent about an attempt that it says it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Offered {
    /// It runs by right: go on.
    Current,
    /// It is to be stopped, and proven dead.
    Stop(Reason),
    /// It has ended or another has its place: whatever of it lives must die.
    Superseded {
        /// Whether its log is still wanted ([`crate::command::SealLog`]); if not, all of it may be forgotten.
        log_wanted: bool,
    },
}

impl State {
    /// Everything a leader must send, in no particular order of importance; agents take repeats.
    #[must_use]
    pub fn pending_effects(&self) -> Vec<Effect> {
        self.index.running.keys().flat_map(|worker| self.pending_effects_for(worker)).collect()
    }

    /// What a leader must send to one worker: a stop for what is to stop, the assignment for the rest.
    #[must_use]
    pub fn pending_effects_for(&self, worker: &WorkerName) -> Vec<Effect> {
        let effect = |key: &AttemptKey| {
            let attempt = self.running_attempt(key)?;
            let (key, worker) = (key.clone(), attempt.worker.clone());
            Some(match &attempt.stop {
                Some(stop) => Effect::SendStop { key, worker, reason: stop.reason },
                None => Effect::SendAssignment { key, worker, instance: attempt.instance.clone() },
            })
        };
        self.running_on(worker).filter_map(effect).collect()
    }

    /// What to tell an agent that says it has the attempt `key`.
    #[must_use]
    pub fn offered(&self, key: &AttemptKey, worker: &WorkerName, instance: &Instance) -> Offered {
        let running = self.running_attempt(key);
        match running.filter(|attempt| attempt.worker == *worker && attempt.instance == *instance) {
            Some(attempt) => attempt.stop.as_ref().map_or(Offered::Current, |stop| Offered::Stop(stop.reason)),
            None => Offered::Superseded { log_wanted: self.wants_log(key, worker) },
        }
    }
}
