//! Identity, refusal, revocation, reload and retries over real sockets on loopback.

// All of this crate is tests, also the functions that are not marked so.
#![allow(clippy::unwrap_used)]

mod cluster;
mod endpoints;
mod refusals;
mod reload;
