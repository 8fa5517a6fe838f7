//! The registry's decisions, and nothing else: no task, socket, clock, randomness, file, log line or
//! hash-ordered map is visible from here.
//!
//! Three verbs: [`state::State::apply`] changes the registry; [`schedule::schedule`] and [`due::due`] propose
//! what the leader should commit next. The invariants they keep are in [`invariants`].

#![warn(clippy::wildcard_enum_match_arm, clippy::iter_over_hash_type)]

pub mod apply;
pub mod command;
pub mod due;
pub mod effect;
pub mod explain;
pub mod invariants;
pub mod liveness;
pub mod policy;
pub mod record;
pub mod reply;
pub mod retention;
pub mod schedule;
pub mod state;

pub use command::Command;
pub use effect::Effect;
pub use liveness::{Brake, Claim, InFlight, Liveness, SessionState, WorkerLiveness};
pub use record::{Applied, Policy, Row, RowChange, RowKey};
pub use reply::{Rejection, Reply, Unfit};
pub use state::{Known, LoadError, State, Totals};
