//! Real clusters on loopback: what users see, and what must hold when processes die, hang, or lose their disks.
//!
//! Every test starts its own cluster. Conditions are waited for; nothing is timed.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::print_stderr)]

#[path = "cluster/agents.rs"]
mod agents;
#[path = "cluster/backup.rs"]
mod backup;
#[path = "cluster/bucket.rs"]
mod bucket;
#[path = "cluster/coordinators.rs"]
mod coordinators;
#[path = "cluster/disks.rs"]
mod disks;
// The coordinator's own tests use more of it.
#[allow(dead_code)]
#[path = "../../coordinator/src/blobs/tests/endpoint.rs"]
mod endpoint;
#[cfg(debug_assertions)]
#[path = "cluster/failpoints.rs"]
mod failpoints;
#[path = "cluster/floods.rs"]
mod floods;
#[path = "cluster/following.rs"]
mod following;
#[path = "cluster/keeping.rs"]
mod keeping;
#[path = "cluster/members.rs"]
mod members;
#[path = "cluster/placing.rs"]
mod placing;
#[path = "cluster/policy.rs"]
mod policy;
#[path = "cluster/sizes.rs"]
mod sizes;
#[path = "cluster/surface.rs"]
mod surface;
#[path = "cluster/terminal.rs"]
mod terminal;
