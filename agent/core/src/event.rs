//! What happens to the agent, and what it wants done: all that goes into its one verb, and all that comes out.

use std::sync::Arc;

use helix_model::{AttemptKey, Death, Reason};

use crate::attempt::{Found, StopCause};
use crate::message::{Assignment, Image, Message, PlatformImage, Report, SealedLog};

/// Which session speaks. Each connection gets the next number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SessionNumber(pub u64);

/// Something happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// At start: an attempt lies in the spool.
    AttemptFound(AttemptKey, Found),
    /// A leader welcomed us.
    SessionOpened(SessionNumber),
    /// The session is over, for whatever reason. Builds go on: what comes of them is fenced off by number, not by silence;
    /// how long they do without any leader is the owner's to say.
    SessionClosed(SessionNumber),
    /// How long there may be no session before all attempts are stopped, in milliseconds, counts from now on; 0: for ever.
    CutOffLimitSet(u64),
    /// The leader said something.
    Said(SessionNumber, Order),
    /// An attempt's ref was resolved.
    SourceResolved(AttemptKey, String),
    /// An attempt's command runs.
    CommandStarted(AttemptKey),
    /// An attempt's command ended well, and its outputs are being stored.
    CommandEnded(AttemptKey),
    /// An attempt pushed its image, and is one of several platforms of its build.
    ImagePushed(AttemptKey, Image),
    /// An attempt ended: no process and no workdir of it is left, and its report is on disk.
    AttemptEnded(AttemptKey, Box<Report>),
    /// The log of an ended attempt was sealed and stored.
    LogSealed(AttemptKey, SealedLog),
    /// The bytes of an ended attempt were stored once more; the report names the new holders.
    StoredAgain(AttemptKey, Box<Report>),
    /// Nothing of an attempt is left on this host, as far as can be seen.
    AttemptRemoved(AttemptKey, Death),
    /// The operator wants the agent to take no more work, and to go when what it has is done.
    DrainAsked,
    /// The operator cannot wait: everything is stopped.
    StopAllAsked,
    /// The operator puts another agent in this one's place.
    DetachAsked,
    /// The time that a detach may take is over.
    DetachTimedOut,
    /// The time that stopping everything may take is over.
    StopAllTimedOut,
    /// Time passes.
    Ticked,
}

/// What a leader says on a session.
#[derive(Clone, PartialEq, Debug)]
pub enum Order {
    /// Run this.
    Assign(Box<Assignment>),
    /// Build this commit.
    Commit(AttemptKey, String),
    /// Push the index of these images; of none: go on without.
    Images(AttemptKey, Vec<PlatformImage>),
    /// Kill it, see it dead, report.
    Stop(AttemptKey, Reason),
    /// The registry needs no more of it.
    Forget(AttemptKey),
    /// Too few coordinators hold its bytes.
    StoreAgain(AttemptKey),
    /// The detach is known.
    DetachAck,
}

/// How the process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitKind {
    /// Nothing is left to do.
    Done,
    /// Runners live on, for the agent that comes next, and the leader waits for it.
    Detached,
    /// Runners live on, and no leader knows that another agent will come: it has the lease of one that is silent, no more.
    DetachedUnheard,
}

/// Something is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// Begin a new attempt.
    Start(Box<Assignment>),
    /// Go on with an attempt that was found.
    Resume(AttemptKey),
    /// Tell an attempt which commit to build.
    GiveCommit(AttemptKey, String),
    /// Tell an attempt of which images it pushes the index; of none, if somebody else does.
    GiveImages(AttemptKey, Vec<PlatformImage>),
    /// Stop an attempt, and let it report.
    Stop(AttemptKey, StopCause),
    /// Kill whatever runs of an attempt and remove all of it; no report is wanted.
    Remove(AttemptKey),
    /// Store the bytes that a report names once more; a late log stands in the report here.
    StoreAgain(AttemptKey, Arc<Report>),
    /// Say something on the session. Loss is harmless: it is repeated.
    Send(Message),
    /// End the process.
    Exit(ExitKind),
}
