//! Failpoints: named places around every durable step, where a test makes a process die or a call fail.
//!
//! The variable `HELIX_FAILPOINTS` names a directory that all processes of a cluster share. A test arms a point by putting a
//! file with the point's name there ([`arm`]): what is to happen, and at which passage. Whichever process comes to the point that
//! often first takes the file by renaming it, and acts: so each arming acts once, whoever it is that gets there, and the
//! name that the file has then says which process it was ([`taken`]). Nobody need be started anew to be armed.
//!
//! Only programs with debug assertions have any of this. In a release [`hit`] and [`pass`] are empty, and nothing reads the
//! variable: there is nothing to be switched on. Runners are handed the variable ([`variable`]), builds never are.
//!
//! Without a point, on purpose:
//! - offline recovery and restore (`node_dir/filling.rs`, `raft/offline.rs`): their own tests cut them short at each rename;
//! - what sets a damaged thing aside (blobs, registry, snapshots): nothing is promised of a damaged thing, and who finds it
//!   again where it was sets it aside again;
//! - the way of large blobs to a bucket and back (`blobs/offload.rs`): their own tests drop and open the store between its steps;
//! - removal of blobs that nothing names: it begins a day after the last use; a `.trash` file that is left goes at the next start;
//! - what a session says beside assignments, reports and their answers: it is said again at the next one, and the simulation
//!   loses it in every way;
//! - backups, certificates and revocations that the `helix` command writes: an operator sees the command fail, and repeats it;
//! - secrets (on a tmpfs that goes with the host), cgroups, sockets, locks, probes of the disk: nothing is promised of them;
//! - podman's own store: podman writes it, and what it left is swept by label.

mod arming;
mod point;

#[cfg(debug_assertions)]
mod armed;

use std::ffi::OsString;
use std::io;

pub use self::arming::{Action, Armed, arm, disarm, taken};
pub use self::point::Point;

/// The variable that names the directory where points are armed.
#[cfg(debug_assertions)]
pub const VARIABLE: &str = "HELIX_FAILPOINTS";

/// Passes a point whose step may fail.
///
/// # Errors
/// The one that a test armed it with.
#[cfg(debug_assertions)]
pub fn hit(point: Point) -> io::Result<()> {
    armed::hit(point)
}

/// Passes a point whose step may fail: in a release nothing happens.
///
/// # Errors
/// None.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hit(_point: Point) -> io::Result<()> {
    Ok(())
}

/// Passes a point that only a death can be armed at: there is no error that its step could report.
#[cfg(debug_assertions)]
pub fn pass(point: Point) {
    armed::pass(point);
}

/// Passes a point that only a death can be armed at: in a release nothing happens.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_point: Point) {}

/// The variable as this process has it, for a child that starts with an empty environment and has points of its own.
#[must_use]
pub fn variable() -> Option<(OsString, OsString)> {
    #[cfg(debug_assertions)]
    return Some((VARIABLE.into(), std::env::var_os(VARIABLE)?));
    #[cfg(not(debug_assertions))]
    None
}
