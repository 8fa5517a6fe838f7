//! The wire: code generated from `proto/proto/`, and conversions to and from the domain types.
//!
//! Nothing is decided here. A conversion from the wire checks form; whether a spec makes sense is `helix_model`'s to say.

pub mod convert;

/// Every .proto file compiled, for reflection and for tests that walk all RPCs.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Version of the agents' session protocol; Hello and Welcome carry it.
pub const AGENT_PROTOCOL: u32 = 1;

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod generated {
    pub mod v1 {
        tonic::include_proto!("helix.v1");
    }
    pub mod agent {
        pub mod v1 {
            tonic::include_proto!("helix.agent.v1");
        }
    }
    pub mod store {
        pub mod v1 {
            tonic::include_proto!("helix.store.v1");
        }
    }
    pub mod raft {
        pub mod v1 {
            tonic::include_proto!("helix.raft.v1");
        }
    }
    pub mod peer {
        pub mod v1 {
            tonic::include_proto!("helix.peer.v1");
        }
    }
}

/// `helix.agent.v1`: the agent's session and live logs.
pub use generated::agent::v1 as agent;
/// `helix.peer.v1`: what coordinators ask each other beside consensus.
pub use generated::peer::v1 as peer;
/// `helix.raft.v1`: consensus among coordinators.
pub use generated::raft::v1 as raft;
/// `helix.store.v1`: the durable form of commands and rows.
pub use generated::store::v1 as store;
/// `helix.v1`: builds, blobs, workers, cluster.
pub use generated::v1;
