//! The vocabulary every other crate shares: ids, specs, platforms, digests, limits, reasons, error codes.
//!
//! Pure data and its validation; only `std` is visible from here. No clock, no randomness, no I/O.
//! Invariant: a value of one of these types is well-formed, because its constructor is the only way in.

#![warn(clippy::wildcard_enum_match_arm, clippy::iter_over_hash_type)]

pub mod death;
pub mod digest;
pub mod error;
pub mod ids;
pub mod limits;
pub mod parse;
pub mod placement;
pub mod platform;
pub mod reason;
pub mod room;
pub mod spec;
pub mod state;
pub mod time;

pub use death::Death;
pub use digest::Digest;
pub use error::{ErrorCode, InvalidField};
pub use ids::{AttemptKey, AttemptNumber, BuildId, Instance, NodeId, TaskIndex, WorkerName};
pub use platform::Platform;
pub use reason::{Fault, Reason};
pub use room::Room;
pub use spec::{BuildSpec, Command, Executor, Measure, OnWorkerLoss, Outputs, Resources, Source};
pub use state::BuildState;
pub use time::LogTime;
