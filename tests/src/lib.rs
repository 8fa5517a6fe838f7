//! What tests, demos and developer commands share. Nobody depends on this crate.

#![allow(clippy::expect_used, clippy::print_stderr, clippy::missing_panics_doc, clippy::must_use_candidate)]

pub mod bench;
pub mod chaos;
pub mod cluster;
pub mod joining;
pub mod skip;
