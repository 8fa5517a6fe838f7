//! The services of a coordinator as clients meet them: a real node in this process, real certificates, real sockets.

// Helpers of tests may unwrap as tests do; clippy knows only `#[test]` functions.
#![allow(clippy::unwrap_used)]

mod builds;
mod changing;
mod copies;
mod listing;
mod node;
mod pages;
mod policy;
mod refused;
mod roles;
mod workers;
