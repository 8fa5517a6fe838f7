//! What becomes of an agent's report: the command it is, and what the agent is told when the reply is known.
//!
//! Most answers travel as effects of the command (`Commit`, `Forget`): what is here is what effects cannot know. An
//! outcome that nobody knows is answered by nothing, because agents repeat their reports until they are answered.

use helix_core::command::{
    DetachWorker, DrainWorker, FinishAttempt, Outcome, PinSource, RecordImage, ReleaseHold, SealLog,
};
use helix_core::record::{DrainedBy, Image, SealedLog};
use helix_core::state::{Offered, State};
use helix_core::{Command, Rejection, Reply};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{AttemptKey, Death, Reason, Room};
use helix_proto::agent;
use helix_proto::agent::coordinator_message::Message;
use tracing::{debug, warn};

use super::consensus::Consensus;
use super::wire::{self, Speaker};
use crate::registry::ProposeError;

/// One report of an agent that becomes a proposal.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Report {
    /// It resolved the build's ref.
    Source { key: AttemptKey, commit: String },
    /// One platform's image of several was pushed.
    Image { key: AttemptKey, image: Image },
    /// An attempt ended.
    Finished(Box<FinishAttempt>),
    /// An ended attempt's log is stored.
    Log { key: AttemptKey, log: SealedLog },
    /// An attempt is dead, or never ran there.
    Dead { key: AttemptKey },
    /// It goes for an upgrade.
    Detaching,
    /// It goes when what runs has ended.
    Leaving,
}

/// What a report is about: while one is under way, its repeats are dropped.
pub(crate) type Subject = (&'static str, Option<AttemptKey>);

/// What to do on the session once a report's fate is known.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Answer {
    /// Nothing: an effect says it, or the agent will repeat.
    Nothing,
    /// Send this.
    Send(Box<Message>),
    /// The registry counts on another life of this worker: the session is over.
    Obsolete,
}

impl Answer {
    fn send(message: Message) -> Self {
        Self::Send(Box::new(message))
    }
}

impl Report {
    pub(crate) fn subject(&self) -> Subject {
        match self {
            Self::Source { key, .. } => ("source", Some(key.clone())),
            Self::Image { key, .. } => ("image", Some(key.clone())),
            Self::Finished(report) => ("finished", Some(report.key.clone())),
            Self::Log { key, .. } => ("log", Some(key.clone())),
            Self::Dead { key } => ("dead", Some(key.clone())),
            Self::Detaching => ("detaching", None),
            Self::Leaving => ("leaving", None),
        }
    }
}

/// Proposes what the report asks for and finds the answer.
pub(crate) async fn carry_out<C: Consensus>(consensus: C, who: Speaker, report: Report) -> Answer {
    let subject = report.subject();
    let outcome = match report {
        Report::Source { key, commit } => pin_source(&consensus, &who, key, commit).await,
        Report::Image { key, image } => record_image(&consensus, &who, key, image).await,
        Report::Finished(report) => finish_attempt(&consensus, &who, *report).await,
        Report::Log { key, log } => seal_log(&consensus, &who, key, log).await,
        Report::Dead { key } => proven_dead(&consensus, &who, key).await,
        Report::Detaching => detach_worker(&consensus, &who).await,
        Report::Leaving => leave(&consensus, &who).await,
    };
    outcome.inspect(|_| failpoint::pass(Point::ReportAnswer)).unwrap_or_else(|error| {
        debug!(worker = %who.worker, report = subject.0, %error, "report not committed for certain; the agent repeats it");
        Answer::Nothing
    })
}

async fn pin_source<C: Consensus>(
    consensus: &C,
    who: &Speaker,
    key: AttemptKey,
    commit: String,
) -> Result<Answer, ProposeError> {
    let command = PinSource { key: key.clone(), worker: who.worker.clone(), commit };
    Ok(match consensus.propose(Command::PinSource(command)).await? {
        // The command's effect tells the commit that counts, each time.
        Reply::SourcePinned(_) => Answer::Nothing,
        Reply::Rejected(Rejection::CommitInvalid) => {
            warn!(worker = %who.worker, attempt = %key, "agent reported a commit that is none");
            Answer::Nothing
        }
        _ => consensus.with_state(|state| unwanted(state, who, &key)),
    })
}

async fn record_image<C: Consensus>(
    consensus: &C,
    who: &Speaker,
    key: AttemptKey,
    image: Image,
) -> Result<Answer, ProposeError> {
    let (worker, instance) = (who.worker.clone(), who.instance.clone());
    let command = RecordImage { key: key.clone(), worker, instance, image };
    Ok(match consensus.propose(Command::RecordImage(command)).await? {
        Reply::Rejected(_) => consensus.with_state(|state| unwanted(state, who, &key)),
        // The effects of this command, or of another that decides it, tell what to do.
        _ => Answer::Nothing,
    })
}

async fn finish_attempt<C: Consensus>(
    consensus: &C,
    who: &Speaker,
    report: FinishAttempt,
) -> Result<Answer, ProposeError> {
    let (key, log) = (report.key.clone(), report.log.clone());
    let reply = match consensus.propose(Command::FinishAttempt(report.clone())).await? {
        // Repeating it would change nothing, and its build would hang: it ends as a fault of ours.
        Reply::Rejected(Rejection::ReportInvalid(why)) => {
            warn!(worker = %who.worker, attempt = %key, why, "agent's report contradicts itself");
            consensus.propose(Command::FinishAttempt(invalid_report(report, why))).await?
        }
        reply => reply,
    };
    if let Reply::Rejected(Rejection::TooFewHolders { .. }) = reply {
        return Ok(Answer::send(wire::store_again(&key)));
    }
    let wanted = consensus.with_state(|state| state.wants_log(&key, &who.worker));
    match log {
        Some(log) if wanted => seal_log(consensus, who, key, log).await,
        // Wanted, but not here: a LogSealed follows. Not wanted: the command's effect said "forget".
        _ => Ok(Answer::Nothing),
    }
}

/// The report that stands for one that cannot be taken as it is.
pub(crate) fn invalid_report(report: FinishAttempt, why: &str) -> FinishAttempt {
    let message = format!("the agent's report cannot be taken: {why}");
    let outcome = Outcome::Failed { reason: Reason::Internal, message };
    FinishAttempt { outcome, artifacts: Vec::new(), image: None, index: None, ..report }
}

async fn seal_log<C: Consensus>(
    consensus: &C,
    who: &Speaker,
    key: AttemptKey,
    log: SealedLog,
) -> Result<Answer, ProposeError> {
    let command = SealLog { key: key.clone(), worker: who.worker.clone(), log };
    Ok(match consensus.propose(Command::SealLog(command)).await? {
        Reply::Rejected(Rejection::TooFewHolders { .. }) => Answer::send(wire::store_again(&key)),
        // Its Finished was lost or is on its way; both are repeated.
        Reply::Rejected(Rejection::AttemptRunning(_)) => Answer::Nothing,
        Reply::Rejected(rejection) => {
            debug!(worker = %who.worker, attempt = %key, ?rejection, "log not wanted");
            Answer::send(wire::forget(&key))
        }
        _ => Answer::Nothing,
    })
}

/// Proof of death: of an attempt given up before, of one that is to stop, or of one that nobody asks for any more.
async fn proven_dead<C: Consensus>(consensus: &C, who: &Speaker, key: AttemptKey) -> Result<Answer, ProposeError> {
    let (held, offered) = consensus.with_state(|state| {
        let held = state.worker(&who.worker).is_some_and(|worker| worker.held.contains(&key));
        (held, state.offered(&key, &who.worker, &who.instance))
    });
    if held {
        let (worker, instance) = (who.worker.clone(), who.instance.clone());
        let reply = consensus.propose(Command::ReleaseHold(ReleaseHold { worker, instance, key: key.clone() })).await?;
        if let Reply::Rejected(Rejection::InstanceStale(_)) = reply {
            return Ok(Answer::Obsolete);
        }
    }
    match offered {
        Offered::Stop(_) => finish_attempt(consensus, who, stopped(who, key)).await,
        Offered::Current => {
            warn!(worker = %who.worker, attempt = %key, "agent proves dead what nobody asked it to stop");
            let lost = Outcome::Failed { reason: Reason::Internal, message: "the agent lost the attempt".to_owned() };
            finish_attempt(consensus, who, FinishAttempt { outcome: lost, ..stopped(who, key) }).await
        }
        // Its log still follows, in a Finished or a LogSealed.
        Offered::Superseded { log_wanted: true } => Ok(Answer::Nothing),
        Offered::Superseded { log_wanted: false } => Ok(Answer::send(wire::forget(&key))),
    }
}

fn stopped(who: &Speaker, key: AttemptKey) -> FinishAttempt {
    FinishAttempt {
        key,
        worker: who.worker.clone(),
        instance: who.instance.clone(),
        outcome: Outcome::Stopped,
        exit_code: None,
        signal: None,
        artifacts: Vec::new(),
        log: None,
        death: Death::Proven,
        image: None,
        index: None,
        room: Room::Host,
    }
}

async fn detach_worker<C: Consensus>(consensus: &C, who: &Speaker) -> Result<Answer, ProposeError> {
    let command = DetachWorker { worker: who.worker.clone(), instance: who.instance.clone() };
    Ok(match consensus.propose(Command::DetachWorker(command)).await? {
        Reply::Rejected(_) => Answer::Obsolete,
        _ => Answer::send(Message::DetachAck(agent::DetachAck {})),
    })
}

async fn leave<C: Consensus>(consensus: &C, who: &Speaker) -> Result<Answer, ProposeError> {
    Ok(match consensus.propose(drain(who)).await? {
        Reply::Rejected(_) => Answer::Obsolete,
        _ => Answer::Nothing,
    })
}

/// The drain that an agent asks for itself.
pub(crate) fn drain(who: &Speaker) -> Command {
    Command::DrainWorker(DrainWorker { worker: who.worker.clone(), deadline: None, by: DrainedBy::Agent })
}

/// What to say of an attempt that an agent works on although the registry does not, or no longer.
pub(crate) fn unwanted(state: &State, who: &Speaker, key: &AttemptKey) -> Answer {
    match state.offered(key, &who.worker, &who.instance) {
        Offered::Current => Answer::Nothing,
        Offered::Stop(reason) => Answer::send(wire::stop(key, reason)),
        Offered::Superseded { log_wanted } => {
            let held = state.worker(&who.worker).is_some_and(|worker| worker.held.contains(key));
            if held || log_wanted {
                // It dies, and tells so: what it printed is wanted, or that it is dead.
                let end = state.attempt(key).and_then(|attempt| attempt.end.as_ref());
                Answer::send(wire::stop(key, end.and_then(|end| end.reason).unwrap_or(Reason::Cancelled)))
            } else {
                Answer::send(wire::forget(key))
            }
        }
    }
}
