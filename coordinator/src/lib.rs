//! A coordinator: the replicated registry, the leader's decisions, bytes, and the services in front of them.

pub mod clock;
pub mod leader;
pub mod node_dir;
pub mod peers;
pub mod registry;
