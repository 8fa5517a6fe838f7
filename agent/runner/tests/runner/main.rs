//! The runner as a real process with real commands. Every test waits on what it expects, with a deadline.

#![allow(unreachable_pub, clippy::unwrap_used)] // One crate of tests; the modules share what they need.

mod control;
mod ending;
mod environment;
mod forker;
mod isolation;
mod limits;
mod masking;
mod output;
#[path = "../../../../tests/src/skip.rs"]
mod skip;
mod spool;
mod support;
mod survivors;
