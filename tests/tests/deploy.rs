//! What `deploy/` promises: the runbook is carried out for real, its lists are whole, and what it installs is valid.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::print_stderr)]

#[path = "deploy/disasters.rs"]
mod disasters;
#[path = "deploy/examples.rs"]
mod examples;
#[path = "deploy/hosts.rs"]
mod hosts;
#[path = "deploy/lists.rs"]
mod lists;
#[path = "deploy/runbook.rs"]
mod runbook;
#[path = "deploy/walk.rs"]
mod walk;

use std::path::{Path, PathBuf};

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A file of `deploy/`.
fn read(name: &str) -> String {
    let path = root().join("deploy").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
