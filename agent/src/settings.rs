//! What the cluster tells its agents, as the newest Welcome or Settings said it.

use std::time::Duration;

use helix_model::NodeId;
use helix_proto::agent;

/// See [`agent::Settings`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// How often to send a heartbeat.
    pub heartbeat_interval: Duration,
    /// How long the leader trusts a silent agent.
    pub worker_lease: Duration,
    /// Where logs and blobs can be put.
    pub coordinators: Vec<(NodeId, String)>,
    /// How many coordinators must hold a blob.
    pub copies: u32,
    /// How long storing may take before a build fails over it.
    pub store_deadline: Duration,
    /// A blob's bytes, at most.
    pub blob_bytes_max: u64,
    /// A log's bytes, at most.
    pub log_bytes_max: u64,
    /// The wall-clock limit of builds that name none; 0 for none.
    pub timeout_default_ms: u64,
}

/// A log's bytes, at most, where nobody said how many: far more than an attempt says of which no order was written.
pub const LOG_BYTES_MAX_DEFAULT: u64 = 1 << 30;

/// The shortest heartbeat interval that is obeyed.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

impl From<agent::Settings> for Settings {
    fn from(wire: agent::Settings) -> Self {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        Self {
            heartbeat_interval: Duration::from_millis(or(wire.heartbeat_interval_ms, 1000)).max(HEARTBEAT_MIN),
            worker_lease: Duration::from_millis(or(wire.worker_lease_ms, 15_000)),
            coordinators: wire.coordinators.into_iter().map(|node| (NodeId(node.id), node.grpc)).collect(),
            copies: wire.copies.max(1),
            store_deadline: Duration::from_millis(or(wire.store_deadline_ms, 600_000)),
            blob_bytes_max: or(wire.blob_bytes_max, u64::MAX),
            log_bytes_max: or(wire.log_bytes_max, LOG_BYTES_MAX_DEFAULT),
            timeout_default_ms: wire.timeout_default_ms,
        }
    }
}
