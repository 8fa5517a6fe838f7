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
}

/// `helix.agent.v1`: the agent's session and live logs.
pub use generated::agent::v1 as agent;
/// `helix.v1`: builds, blobs, workers, cluster.
pub use generated::v1;
