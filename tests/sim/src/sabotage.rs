//! Planted bugs that change a command on its way to the log, as a mistake in the shell around the core would.

use helix_core::command::{Command, Outcome};
use helix_core::{Known, Reply};
use helix_model::{BuildId, Reason};

use super::Bug;
use super::client::Answered;
use super::registry::Origin;
use super::world::World;

/// How long a forgetful leader keeps a cancel to itself.
const FORGETFUL_MS: u64 = 1_500;

impl World {
    /// Makes the mistake that was planted, if the command is where it is made.
    pub(super) fn sabotage(&self, command: &mut Command, origin: &Origin) {
        match (self.bug, command) {
            (Some(Bug::StaleResult), Command::FinishAttempt(c)) => {
                let Some(Known::Open(build)) = self.registry.state().and_then(|state| state.build(&c.key.build)) else {
                    return;
                };
                if let Some(attempt) = build.task(c.key.task).and_then(|task| task.running()) {
                    c.key.attempt = attempt.number;
                    (c.worker, c.instance) = (attempt.worker.clone(), attempt.instance.clone());
                }
            }
            (Some(Bug::RetriedUserFailure), Command::FinishAttempt(c)) => {
                if let Outcome::Failed { reason, .. } = &mut c.outcome
                    && *reason == Reason::Exit
                {
                    *reason = Reason::Internal;
                }
            }
            (Some(Bug::DuplicateSubmit), Command::SubmitBuild(c)) => {
                let Origin::Request { client, request } = origin else { return };
                if self.clients[*client].was_sent_before(*request, self.leading.since)
                    && let Ok(id) = BuildId::new(&format!("{}-again", c.build))
                {
                    c.build = id;
                }
            }
            (Some(Bug::IdAlone), Command::SubmitBuild(c)) => {
                let known = self.registry.state().and_then(|state| state.build(&c.build));
                let known = known.map(|known| match known {
                    Known::Open(build) => build.spec_digest,
                    Known::Finished(build) => build.spec_digest,
                    Known::Purged(tombstone) => tombstone.spec_digest,
                });
                c.spec_digest = known.unwrap_or(c.spec_digest);
            }
            _ => {}
        }
    }

    /// Whether a leader that acknowledges what it has not committed has done so; what is left to propose then comes later.
    pub(super) fn acknowledged_early(&mut self, client: usize, request: u64, command: &Command) -> bool {
        match (self.bug, command) {
            (Some(Bug::AckBeforeCommit), Command::SubmitBuild(_)) => {
                self.answer_client(client, request, Answered::Reply(Reply::Submitted));
                false
            }
            (Some(Bug::ForgottenCancel), Command::CancelBuild(c)) => {
                let open =
                    self.registry.state().is_some_and(|state| matches!(state.build(&c.build), Some(Known::Open(_))));
                if open {
                    self.answer_client(client, request, Answered::Reply(Reply::Done));
                    let (term, command) = (self.registry.term, command.clone());
                    self.after(FORGETFUL_MS, super::world::Event::Remembered { term, command: Box::new(command) });
                }
                open
            }
            _ => false,
        }
    }
}
