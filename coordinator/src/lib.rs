//! A coordinator: the replicated registry, the leader's decisions, bytes, and the services in front of them.

pub mod blobs;
pub mod clock;
pub mod codec;
pub mod config;
pub mod disk;
pub mod http;
pub mod leader;
pub mod logs;
pub mod membership;
pub mod metrics;
pub mod node_dir;
pub mod peers;
pub mod plane;
pub mod program;
pub mod raft;
pub mod registry;
pub mod repair;
pub mod rpc;
