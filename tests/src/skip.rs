//! Tests that cannot run everywhere. Where they cannot, they say so; where skips are forbidden, as in CI, they fail.
//!
//! Other crates' tests take this file in by its path, since nobody depends on this crate.

use std::io::Write as _;

/// Says that a test, or a part of it, does not run here.
///
/// # Panics
/// Where `CI` or `HELIX_FORBID_SKIPS` is set.
pub fn skip(test: &str, why: impl std::fmt::Display) {
    let forbidden = ["CI", "HELIX_FORBID_SKIPS"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(!forbidden, "{test} must not be skipped here: {why}");
    // Not by the macro: what that prints, the harness shows of failed tests alone.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
