//! An attempt as the agent knows it, and what the leader has to know of it.

use std::sync::Arc;

use helix_model::{AttemptKey, Reason};

use crate::event::Command;
use crate::message::{Image, Message, Report, SealedLog};

/// What is owed is repeated after so long without an answer: the leader may have changed between saying and committing.
pub const RESEND_MS: u64 = 5_000;

/// Where an attempt is.
#[derive(Clone, PartialEq, Debug)]
pub enum Phase {
    /// Its source is fetched and laid out.
    Preparing,
    /// It reported what its ref stands for, and waits for the registry to say which commit is built.
    AwaitingCommit {
        /// What it reported.
        commit: String,
    },
    /// A runner has it.
    Building,
    /// The command ended well; outputs and log are stored.
    Uploading,
    /// It reported the image that it pushed, and waits for the registry to say who pushes the index of all platforms.
    AwaitingImages {
        /// What it reported.
        image: Image,
    },
    /// It ended and is reported until the registry needs no more of it.
    Ended {
        /// How; repeated until forgotten.
        report: Arc<Report>,
        /// A log that was sealed after the report was made.
        late_log: Option<SealedLog>,
        /// Whether its bytes are being stored once more.
        storing_again: bool,
    },
    /// Nothing of it is wanted: it is killed and removed.
    Removing {
        /// Somebody asked to know when it is dead.
        owes_proof: bool,
    },
}

/// Who wants an attempt's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopCause {
    /// The registry; the reason goes to the runner.
    Registry(Reason),
    /// The agent itself, which has to go now.
    Drained,
    /// The agent itself, which no leader has had a session with for as long as its owner allows.
    CutOff {
        /// How long that is.
        limit_ms: u64,
    },
}

/// What was found of an attempt when the agent started.
#[derive(Clone, PartialEq, Debug)]
pub enum Found {
    /// Assigned, and nothing runs: it is prepared once more.
    Unstarted,
    /// Its runner has it, or had it.
    Started,
    /// Its report was made.
    Reported(Box<Report>),
}

/// An attempt.
#[derive(Clone, PartialEq, Debug)]
pub struct Attempt {
    /// Where it is.
    pub phase: Phase,
    /// Who wants its end, if anybody does.
    pub stop: Option<StopCause>,
    /// When what it owes was last said on this session.
    pub(crate) said_at_ms: Option<u64>,
}

impl Attempt {
    pub(crate) fn new(phase: Phase) -> Self {
        Self { phase, stop: None, said_at_ms: None }
    }

    /// Whether its end is known and is being reported.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }

    /// The word of its phase in heartbeats: preparing, building, uploading, sealing or cancelling.
    #[must_use]
    pub fn phase_word(&self) -> &'static str {
        match (&self.phase, self.stop) {
            (Phase::Ended { .. }, _) => "sealing",
            (Phase::Removing { .. }, _) | (_, Some(_)) => "cancelling",
            (Phase::Preparing | Phase::AwaitingCommit { .. }, None) => "preparing",
            (Phase::Building, None) => "building",
            (Phase::Uploading | Phase::AwaitingImages { .. }, None) => "uploading",
        }
    }

    /// Says what the leader has to know of this attempt, unless it was said a moment ago.
    pub(crate) fn say(&mut self, now_ms: u64, key: &AttemptKey, out: &mut Vec<Command>) {
        if self.said_at_ms.is_some_and(|said| now_ms < said.saturating_add(RESEND_MS)) {
            return;
        }
        match &self.phase {
            Phase::AwaitingCommit { commit } => {
                out.push(Command::Send(Message::SourceResolved { key: key.clone(), commit: commit.clone() }));
            }
            Phase::AwaitingImages { image } => {
                out.push(Command::Send(Message::ImagePushed { key: key.clone(), image: image.clone() }));
            }
            Phase::Ended { storing_again: true, .. } => return,
            Phase::Ended { report, late_log, storing_again: false } => {
                out.push(Command::Send(Message::Finished { key: key.clone(), report: Arc::clone(report) }));
                if let Some(log) = late_log {
                    out.push(Command::Send(Message::LogSealed { key: key.clone(), log: log.clone() }));
                }
            }
            Phase::Preparing | Phase::Building | Phase::Uploading | Phase::Removing { .. } => return,
        }
        self.said_at_ms = Some(now_ms);
    }
}
