//! What becomes of each report of an agent: the command that it is, and what the agent is told when its fate is known.

use helix_agent_core::{Message, Order};
use helix_core::command::{self as cmd, Command};
use helix_core::state::Offered;
use helix_core::{Rejection, Reply};
use helix_model::{AttemptKey, Reason};

use super::{Down, Subject, drain, subject, unwanted};
use crate::leader::Follow;
use crate::registry::Origin;
use crate::wire;
use crate::world::World;

impl World {
    pub(super) fn take_report(&mut self, agent: usize, message: Message) {
        let Some((state, open)) = self.registry.state().zip(self.leading.sessions.get(&agent)) else { return };
        let (who, session) = (open.who.clone(), open.number);
        let subject = subject(&message);
        let (command, follow) = match message {
            Message::SourceResolved { key, commit } => {
                let c = cmd::PinSource { key: key.clone(), worker: who.worker, commit };
                (Command::PinSource(c), Follow::Unwanted(subject, key))
            }
            Message::ImagePushed { key, image } => {
                let image = wire::image(&image);
                let c = cmd::RecordImage { key: key.clone(), worker: who.worker, instance: who.instance, image };
                (Command::RecordImage(c), Follow::Unwanted(subject, key))
            }
            Message::Finished { key, report } => {
                let c = wire::finished(&who, &key, &report);
                (Command::FinishAttempt(c.clone()), Follow::Finished(subject, Box::new(c)))
            }
            Message::LogSealed { key, log } => {
                let c = cmd::SealLog { key: key.clone(), worker: who.worker, log: wire::sealed(&log) };
                (Command::SealLog(c), Follow::Sealed(subject, key))
            }
            Message::ProvenDead { key } => {
                let held = state.worker(&who.worker).is_some_and(|worker| worker.held.contains(&key));
                if !held {
                    return self.proven_dead(agent, subject, &key);
                }
                let (worker, instance) = (who.worker, who.instance);
                let c = cmd::ReleaseHold { worker, instance, key: key.clone() };
                (Command::ReleaseHold(c), Follow::Released(subject, key))
            }
            Message::Detaching => {
                let c = cmd::DetachWorker { worker: who.worker, instance: who.instance };
                (Command::DetachWorker(c), Follow::Detached(subject))
            }
            Message::Leaving => (drain(&who), Follow::Left(subject)),
        };
        self.propose(vec![(command, Origin::Report { agent, session, follow })]);
    }

    /// Proof of death: of one that is to stop, or of one that nobody asks for any more.
    fn proven_dead(&mut self, agent: usize, subject: Subject, key: &AttemptKey) {
        let Some((state, open)) = self.registry.state().zip(self.leading.sessions.get_mut(&agent)) else { return };
        let (who, session) = (open.who.clone(), open.number);
        let c = match state.offered(key, &who.worker, &who.instance) {
            Offered::Stop(_) => wire::stopped(&who, key),
            Offered::Current => {
                let message = "the agent lost the attempt".to_owned();
                let lost = cmd::Outcome::Failed { reason: Reason::Internal, message };
                cmd::FinishAttempt { outcome: lost, ..wire::stopped(&who, key) }
            }
            Offered::Superseded { log_wanted } => {
                open.busy.remove(&subject);
                if !log_wanted {
                    self.send_down(agent, session, Down::Order(Order::Forget(key.clone())));
                }
                return;
            }
        };
        let follow = Follow::Finished(subject, Box::new(c.clone()));
        self.propose(vec![(Command::FinishAttempt(c), Origin::Report { agent, session, follow })]);
    }

    /// What the agent is told when the fate of its report is known.
    pub(crate) fn follow(&mut self, agent: usize, session: u64, follow: Follow, reply: &Reply) {
        let Some(state) = self.registry.state() else { return };
        let Some(open) = self.leading.sessions.get_mut(&agent).filter(|open| open.number == session) else { return };
        let who = open.who.clone();
        let mut tell = None;
        let subject = match (follow, reply) {
            (Follow::Unwanted(subject, _), Reply::Rejected(Rejection::CommitInvalid)) => subject,
            (Follow::Unwanted(subject, key), reply) => {
                let rejected = matches!(reply, Reply::Rejected(_));
                tell = if rejected { unwanted(state, &who, &key) } else { None };
                subject
            }
            (Follow::Finished(subject, c), Reply::Rejected(Rejection::ReportInvalid(why))) => {
                let c = wire::invalid(*c, why);
                let follow = Follow::Finished(subject, Box::new(c.clone()));
                return self.propose(vec![(Command::FinishAttempt(c), Origin::Report { agent, session, follow })]);
            }
            (Follow::Finished(subject, c), Reply::Rejected(Rejection::TooFewHolders { .. })) => {
                tell = Some(Order::StoreAgain(c.key));
                subject
            }
            (Follow::Finished(subject, c), _) => {
                if let Some(log) = c.log.filter(|_| state.wants_log(&c.key, &who.worker)) {
                    let seal = cmd::SealLog { key: c.key.clone(), worker: who.worker, log };
                    let follow = Follow::Sealed(subject, c.key);
                    return self.propose(vec![(Command::SealLog(seal), Origin::Report { agent, session, follow })]);
                }
                subject
            }
            (Follow::Sealed(subject, key), Reply::Rejected(rejection)) => {
                tell = match rejection {
                    Rejection::TooFewHolders { .. } => Some(Order::StoreAgain(key)),
                    Rejection::AttemptRunning(_) => None,
                    _ => Some(Order::Forget(key)),
                };
                subject
            }
            (Follow::Released(..) | Follow::Detached(_) | Follow::Left(_), Reply::Rejected(_)) => {
                return self.end_session(agent, session);
            }
            (Follow::Released(subject, key), _) => return self.proven_dead(agent, subject, &key),
            (Follow::Detached(subject), _) => {
                tell = Some(Order::DetachAck);
                subject
            }
            (Follow::Sealed(subject, _) | Follow::Left(subject), _) => subject,
        };
        open.busy.remove(&subject);
        if let Some(order) = tell {
            self.send_down(agent, session, Down::Order(order));
        }
    }
}
