//! The agent's state and its one verb.
//!
//! Not here: how anything is done. A command says what is to be done, and an event later says what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_model::{AttemptKey, Death, Reason};

use crate::attempt::{Attempt, Found, Phase, StopCause};
use crate::event::{Command, Event, ExitKind, Order, SessionNumber};
use crate::message::{Assignment, Image, Message, PlatformImage, Report, SealedLog, Verdict};

/// Attempts that are remembered as removed without proof, at most. One needs a runner that was killed.
const UNPROVEN_MAX: usize = 1_024;

/// What the agent is up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It takes work.
    Working,
    /// It goes when what it has is done and reported.
    Draining,
    /// As draining, and everything was told to stop.
    Stopping,
    /// It goes as soon as the leader knows.
    Detaching,
}

/// Everything the agent decides from.
#[derive(Clone, PartialEq, Debug)]
pub struct Agent {
    attempts: BTreeMap<AttemptKey, Attempt>,
    /// Removed, and not proven dead: who asks is not told that they are.
    unproven: BTreeSet<AttemptKey>,
    session: Option<SessionNumber>,
    /// Since when there is no session: since the last one, or since the first tick of this agent.
    cut_off_since_ms: Option<u64>,
    cut_off_limit_ms: u64,
    mode: Mode,
    exited: bool,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            attempts: BTreeMap::new(),
            unproven: BTreeSet::new(),
            session: None,
            cut_off_since_ms: None,
            cut_off_limit_ms: 0,
            mode: Mode::Working,
            exited: false,
        }
    }
}

impl Agent {
    /// All attempts, by key.
    pub fn attempts(&self) -> impl Iterator<Item = (&AttemptKey, &Attempt)> {
        self.attempts.iter()
    }

    /// What is offered in a Hello: each attempt, and whether its report follows. What is being removed is not offered,
    /// so that the leader asks about it if it still cares.
    pub fn offered(&self) -> impl Iterator<Item = (&AttemptKey, bool)> {
        let wanted = self.attempts.iter().filter(|(_, attempt)| !matches!(attempt.phase, Phase::Removing { .. }));
        wanted.map(|(key, attempt)| (key, attempt.has_ended()))
    }

    /// What the agent is up to.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes what happened and pushes what is to be done. Total: late, repeated and absurd events change nothing.
    pub fn on(&mut self, now_ms: u64, event: Event, out: &mut Vec<Command>) {
        match event {
            Event::AttemptFound(key, found) => self.attempt_found(key, found, out),
            Event::SessionOpened(session) => self.session_opened(now_ms, session, out),
            Event::SessionClosed(session) => self.session_closed(now_ms, session),
            Event::CutOffLimitSet(limit_ms) => self.cut_off_limit_ms = limit_ms,
            Event::Said(session, order) => {
                if self.session == Some(session) {
                    self.said(now_ms, order, out);
                }
            }
            Event::SourceResolved(key, commit) => self.source_resolved(now_ms, key, commit, out),
            Event::CommandStarted(key) => self.move_to(&key, Phase::Building),
            Event::CommandEnded(key) => self.move_to(&key, Phase::Uploading),
            Event::ImagePushed(key, image) => self.image_pushed(now_ms, key, image, out),
            Event::AttemptEnded(key, report) => self.attempt_ended(now_ms, key, *report, out),
            Event::LogSealed(key, log) => self.log_sealed(now_ms, &key, log, out),
            Event::StoredAgain(key, report) => self.stored_again(now_ms, &key, *report, out),
            Event::AttemptRemoved(key, death) => self.attempt_removed(key, death, out),
            Event::DrainAsked => self.drain_asked(out),
            Event::StopAllAsked => self.stop_all_asked(out),
            Event::DetachAsked => self.detach_asked(out),
            Event::DetachTimedOut => self.exit_if(Mode::Detaching, ExitKind::DetachedUnheard, out),
            Event::StopAllTimedOut => self.exit_if(Mode::Stopping, ExitKind::Done, out),
            Event::Ticked => {
                self.stop_if_cut_off(now_ms, out);
                self.say_what_is_owed(now_ms, out);
            }
        }
        self.exit_when_done(out);
    }

    fn said(&mut self, now_ms: u64, order: Order, out: &mut Vec<Command>) {
        match order {
            Order::Assign(assignment) => self.assigned(now_ms, assignment, out),
            Order::Commit(key, commit) => self.commit_given(&key, commit, out),
            Order::Images(key, images) => self.images_given(&key, images, out),
            Order::Stop(key, reason) => self.stop_asked(now_ms, key, StopCause::Registry(reason), out),
            Order::Forget(key) => self.forgotten(&key, out),
            Order::StoreAgain(key) => self.store_again(&key, out),
            Order::DetachAck => self.exit_if(Mode::Detaching, ExitKind::Detached, out),
        }
    }

    fn attempt_found(&mut self, key: AttemptKey, found: Found, out: &mut Vec<Command>) {
        let phase = match found {
            Found::Unstarted => Phase::Preparing,
            Found::Started => Phase::Building,
            Found::Reported(report) => Phase::Ended { report: Arc::new(*report), late_log: None, storing_again: false },
        };
        out.push(Command::Resume(key.clone()));
        self.attempts.insert(key, Attempt::new(phase));
    }

    fn session_opened(&mut self, now_ms: u64, session: SessionNumber, out: &mut Vec<Command>) {
        (self.session, self.cut_off_since_ms) = (Some(session), None);
        for attempt in self.attempts.values_mut() {
            attempt.said_at_ms = None;
        }
        match self.mode {
            Mode::Working => {}
            Mode::Draining | Mode::Stopping => out.push(Command::Send(Message::Leaving)),
            Mode::Detaching => out.push(Command::Send(Message::Detaching)),
        }
        self.say_what_is_owed(now_ms, out);
    }

    fn session_closed(&mut self, now_ms: u64, session: SessionNumber) {
        if self.session == Some(session) {
            (self.session, self.cut_off_since_ms) = (None, Some(now_ms));
        }
    }

    /// What runs here may run elsewhere by now, and nobody can stop it. An agent that goes for an upgrade leaves it to the next
    /// one, which counts anew.
    fn stop_if_cut_off(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        if self.session.is_some() {
            return;
        }
        let since_ms = *self.cut_off_since_ms.get_or_insert(now_ms);
        let limit_ms = self.cut_off_limit_ms;
        let is_over = limit_ms > 0 && now_ms.saturating_sub(since_ms) >= limit_ms;
        if is_over && self.mode != Mode::Detaching {
            self.stop_all(StopCause::CutOff { limit_ms }, out);
        }
    }

    /// A task has one current attempt: an earlier one that still runs here is stale, and a later one makes this stale. What an earlier one
    /// left is the registry's to let go: its log may be wanted.
    fn assigned(&mut self, now_ms: u64, assignment: Box<Assignment>, out: &mut Vec<Command>) {
        let key = assignment.key.clone();
        if let Some(attempt) = self.attempts.get_mut(&key) {
            if let Phase::Removing { owes_proof } = &mut attempt.phase {
                // Whoever wants it again has to know that it is gone.
                *owes_proof = true;
            }
            // The leader does not know yet how far it is.
            self.say_again(now_ms, &key, out);
            return;
        }
        let same_task = |other: &AttemptKey| other.build == key.build && other.task == key.task;
        if self.attempts.keys().any(|other| same_task(other) && other.attempt > key.attempt) {
            return;
        }
        let running = self.attempts.iter().filter(|(other, attempt)| same_task(other) && !attempt.has_ended());
        for stale in running.map(|(earlier, _)| earlier.clone()).collect::<Vec<_>>() {
            self.stop_asked(now_ms, stale, StopCause::Registry(Reason::WorkerLost), out);
        }
        let mut attempt = Attempt::new(Phase::Preparing);
        out.push(Command::Start(assignment));
        if self.mode == Mode::Stopping {
            // It crossed our Leaving: it is reported as drained at once, and runs elsewhere.
            attempt.stop = Some(StopCause::Drained);
            out.push(Command::Stop(key.clone(), StopCause::Drained));
        }
        self.attempts.insert(key, attempt);
    }

    fn commit_given(&mut self, key: &AttemptKey, commit: String, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if let Phase::AwaitingCommit { .. } = attempt.phase {
            attempt.phase = Phase::Preparing;
            out.push(Command::GiveCommit(key.clone(), commit));
        }
    }

    fn images_given(&mut self, key: &AttemptKey, images: Vec<PlatformImage>, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if let Phase::AwaitingImages { .. } = attempt.phase {
            attempt.phase = Phase::Uploading;
            out.push(Command::GiveImages(key.clone(), images));
        }
    }

    fn stop_asked(&mut self, now_ms: u64, key: AttemptKey, cause: StopCause, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(&key) else {
            out.push(Command::Send(self.gone(key)));
            return;
        };
        match &mut attempt.phase {
            Phase::Ended { .. } => self.say_again(now_ms, &key, out),
            Phase::Removing { owes_proof } => *owes_proof = true,
            Phase::Preparing
            | Phase::AwaitingCommit { .. }
            | Phase::Building
            | Phase::Uploading
            | Phase::AwaitingImages { .. } => {
                if attempt.stop.is_none() {
                    attempt.stop = Some(cause);
                    out.push(Command::Stop(key, cause));
                }
            }
        }
    }

    fn forgotten(&mut self, key: &AttemptKey, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if !matches!(attempt.phase, Phase::Removing { .. }) {
            attempt.phase = Phase::Removing { owes_proof: false };
            out.push(Command::Remove(key.clone()));
        }
    }

    fn store_again(&mut self, key: &AttemptKey, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if let Phase::Ended { report, storing_again, late_log } = &mut attempt.phase
            && !*storing_again
        {
            *storing_again = true;
            let mut whole = Arc::clone(report);
            if late_log.is_some() {
                Arc::make_mut(&mut whole).log.clone_from(late_log);
            }
            out.push(Command::StoreAgain(key.clone(), whole));
        }
    }

    fn source_resolved(&mut self, now_ms: u64, key: AttemptKey, commit: String, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        if attempt.phase == Phase::Preparing {
            attempt.phase = Phase::AwaitingCommit { commit };
            self.say_again(now_ms, &key, out);
        }
    }

    fn image_pushed(&mut self, now_ms: u64, key: AttemptKey, image: Image, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        if attempt.phase == Phase::Uploading {
            attempt.phase = Phase::AwaitingImages { image };
            self.say_again(now_ms, &key, out);
        }
    }

    /// Phases only go forward; one that ended or is being removed stays so.
    fn move_to(&mut self, key: &AttemptKey, next: Phase) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if !matches!(attempt.phase, Phase::Ended { .. } | Phase::Removing { .. }) {
            attempt.phase = next;
        }
    }

    fn attempt_ended(&mut self, now_ms: u64, key: AttemptKey, report: Report, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get(&key) else { return };
        if !matches!(attempt.phase, Phase::Ended { .. } | Phase::Removing { .. }) {
            let ended = Phase::Ended { report: Arc::new(report), late_log: None, storing_again: false };
            self.move_to(&key, ended);
            self.say_again(now_ms, &key, out);
        }
    }

    fn log_sealed(&mut self, now_ms: u64, key: &AttemptKey, log: SealedLog, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if let Phase::Ended { late_log, .. } = &mut attempt.phase {
            *late_log = Some(log);
            self.say_again(now_ms, key, out);
        }
    }

    fn stored_again(&mut self, now_ms: u64, key: &AttemptKey, mut stored: Report, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get_mut(key) else { return };
        if let Phase::Ended { report, storing_again, late_log } = &mut attempt.phase {
            *storing_again = false;
            // A late log that came while other bytes were stored stays as it is.
            if let Some(late) = late_log
                && let Some(log) = stored.log.take()
            {
                *late = log;
            }
            *report = Arc::new(stored);
            self.say_again(now_ms, key, out);
        }
    }

    fn attempt_removed(&mut self, key: AttemptKey, death: Death, out: &mut Vec<Command>) {
        let Some(attempt) = self.attempts.get(&key) else { return };
        if let Phase::Removing { owes_proof } = attempt.phase {
            self.attempts.remove(&key);
            if death == Death::Unproven {
                if self.unproven.len() >= UNPROVEN_MAX {
                    self.unproven.pop_first();
                }
                self.unproven.insert(key.clone());
            }
            if owes_proof && self.session.is_some() {
                out.push(Command::Send(self.gone(key)));
            }
        }
    }

    /// What is said of an attempt of which nothing is left to do.
    fn gone(&self, key: AttemptKey) -> Message {
        if self.unproven.contains(&key) {
            let report = Report { death: Death::Unproven, ..Report::bare(Verdict::Stopped) };
            return Message::Finished { key, report: Arc::new(report) };
        }
        Message::ProvenDead { key }
    }

    fn drain_asked(&mut self, out: &mut Vec<Command>) {
        if self.mode == Mode::Working {
            self.mode = Mode::Draining;
            if self.session.is_some() {
                out.push(Command::Send(Message::Leaving));
            }
        }
    }

    fn stop_all_asked(&mut self, out: &mut Vec<Command>) {
        if matches!(self.mode, Mode::Stopping | Mode::Detaching) {
            return;
        }
        self.drain_asked(out);
        self.mode = Mode::Stopping;
        self.stop_all(StopCause::Drained, out);
    }

    fn stop_all(&mut self, cause: StopCause, out: &mut Vec<Command>) {
        for (key, attempt) in &mut self.attempts {
            if attempt.stop.is_none() && !matches!(attempt.phase, Phase::Ended { .. } | Phase::Removing { .. }) {
                attempt.stop = Some(cause);
                out.push(Command::Stop(key.clone(), cause));
            }
        }
    }

    fn detach_asked(&mut self, out: &mut Vec<Command>) {
        if self.mode == Mode::Stopping {
            return;
        }
        self.mode = Mode::Detaching;
        if self.session.is_some() {
            out.push(Command::Send(Message::Detaching));
        }
    }

    fn say_again(&mut self, now_ms: u64, key: &AttemptKey, out: &mut Vec<Command>) {
        if let Some(attempt) = self.attempts.get_mut(key) {
            attempt.said_at_ms = None;
            if self.session.is_some() {
                attempt.say(now_ms, key, out);
            }
        }
    }

    fn say_what_is_owed(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        if self.session.is_some() {
            for (key, attempt) in &mut self.attempts {
                attempt.say(now_ms, key, out);
            }
        }
    }

    fn exit_if(&mut self, mode: Mode, kind: ExitKind, out: &mut Vec<Command>) {
        if self.mode == mode && !self.exited {
            self.exited = true;
            out.push(Command::Exit(kind));
        }
    }

    fn exit_when_done(&mut self, out: &mut Vec<Command>) {
        if self.attempts.is_empty() {
            self.exit_if(Mode::Draining, ExitKind::Done, out);
            self.exit_if(Mode::Stopping, ExitKind::Done, out);
        }
    }
}

#[cfg(test)]
mod tests;
