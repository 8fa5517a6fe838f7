//! Effects of applied commands, turned into messages on sessions. Each looks its facts up in the state as it is
//! now: an assignment that was overtaken is not sent.

use helix_core::Effect;
use helix_core::state::State;
use helix_failpoint::{self as failpoint, Point};
use helix_model::WorkerName;
use helix_proto::agent::coordinator_message::Message;

use super::leading::Leading;
use super::wire;

/// What effects mean for the loop, beside the messages sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Noticed {
    /// There may be new work or new room.
    pub(crate) schedule: bool,
    /// A coordinator's row or the membership changed.
    pub(crate) nodes: bool,
}

impl Leading {
    /// Sends what the effects ask for.
    pub(crate) fn on_effects(&mut self, state: &State, effects: &[Effect]) -> Noticed {
        let mut noticed = Noticed::default();
        if effects.iter().any(|effect| matches!(effect, Effect::SendAssignment { .. })) {
            // Before the assignments: they are run under the policy that was in force when they were made.
            self.update_settings(state);
        }
        for effect in effects {
            match effect {
                Effect::BuildChanged(_) => noticed.schedule = true,
                Effect::WorkerChanged(worker) => {
                    noticed.schedule = true;
                    self.check_worker(state, worker);
                }
                Effect::NodeChanged => noticed.nodes = true,
                Effect::LogSealed(_) | Effect::BuildPurged(_) | Effect::LogsExpired(_) => {}
                Effect::SendAssignment { .. }
                | Effect::SendCommit { .. }
                | Effect::SendImages { .. }
                | Effect::SendStop { .. }
                | Effect::SendForget { .. } => {
                    if let Some((worker, message)) = self.message(state, effect) {
                        let assigns = matches!(message, Message::Assign(_));
                        if assigns {
                            failpoint::pass(Point::AssignSend);
                        }
                        self.send(worker, message);
                        if assigns {
                            failpoint::pass(Point::AssignSent);
                        }
                    }
                }
            }
        }
        noticed
    }

    fn message<'a>(&self, state: &State, effect: &'a Effect) -> Option<(&'a WorkerName, Message)> {
        let (worker, message) = match effect {
            Effect::SendAssignment { key, worker, instance } => {
                let session = self.sessions.get(worker).filter(|session| session.ready)?;
                if session.instance != *instance {
                    return None;
                }
                (worker, wire::assign(state, key)?)
            }
            Effect::SendCommit { key, worker, commit } => (worker, wire::commit(key, commit.clone())),
            Effect::SendImages { key, worker, images } => (worker, wire::images(key, images)),
            Effect::SendStop { key, worker, reason } => (worker, wire::stop(key, *reason)),
            Effect::SendForget { key, worker } => (worker, wire::forget(key)),
            Effect::BuildChanged(_)
            | Effect::LogSealed(_)
            | Effect::BuildPurged(_)
            | Effect::LogsExpired(_)
            | Effect::WorkerChanged(_)
            | Effect::NodeChanged => return None,
        };
        self.sessions.is_ready(worker).then_some((worker, message))
    }
}
