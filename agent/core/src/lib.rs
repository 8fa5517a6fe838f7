//! What an agent decides: which attempts it has, in which phase, what to do about what a coordinator says, and which
//! report is still owed. Nothing else: no task, process, file, socket or clock is visible from here.
//!
//! One verb: [`Agent::on`] takes an [`Event`] and pushes the [`Command`]s that follow from it; the shell performs them
//! and feeds back what came of it. Times are milliseconds of a clock that never goes back.
//!
//! Invariants: an attempt has one report, which never changes once made, except for who holds its bytes; an
//! attempt that its task's later attempt has replaced reports nothing; what a closed session still says is ignored; an
//! attempt is forgotten only when the registry says so.

#![warn(clippy::wildcard_enum_match_arm, clippy::iter_over_hash_type)]

mod agent;
mod attempt;
mod event;
mod message;

pub use agent::{Agent, Mode};
pub use attempt::{Attempt, Found, Phase, RESEND_MS, StopCause};
pub use event::{Command, Event, ExitKind, Order, SessionNumber};
pub use helix_model::Death;
pub use message::{Artifact, Assignment, Blob, Image, Message, PlatformImage, Report, SealedLog, Verdict};
