//! Stable error codes and the shape of a complaint about a field.

use std::fmt;

/// A field's value is malformed: which field, and why, in words that say what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InvalidField {
    /// The field's name on the wire.
    pub field: &'static str,
    /// What is wrong with the value.
    pub why: String,
}

impl InvalidField {
    /// A complaint about `field`.
    #[must_use]
    pub fn new(field: &'static str, why: impl Into<String>) -> Self {
        Self { field, why: why.into() }
    }
}

impl fmt::Display for InvalidField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.why)
    }
}

impl std::error::Error for InvalidField {}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $word:literal;)*) => {
        /// The stable word of an error, carried as `reason` in `google.rpc.ErrorInfo` (domain `helix.build`).
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum ErrorCode { $($(#[$doc])* $variant,)* }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word itself.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

codes! {
    /// A field is malformed. INVALID_ARGUMENT.
    InvalidField = "invalid_field";
    /// The spec is larger than the limit. INVALID_ARGUMENT.
    SpecTooLarge = "spec_too_large";
    /// No worker could ever run it. FAILED_PRECONDITION.
    Unsatisfiable = "unsatisfiable";
    /// No such build. NOT_FOUND.
    BuildUnknown = "build_unknown";
    /// A short id fits several builds. INVALID_ARGUMENT.
    BuildAmbiguous = "build_ambiguous";
    /// The build was purged. NOT_FOUND.
    BuildPurged = "build_purged";
    /// The build is known; what is asked for of it was not kept as long. FAILED_PRECONDITION.
    Expired = "expired";
    /// No such worker. NOT_FOUND.
    WorkerUnknown = "worker_unknown";
    /// No such artifact, or blob. NOT_FOUND.
    ArtifactUnknown = "artifact_unknown";
    /// No such log. NOT_FOUND.
    LogUnknown = "log_unknown";
    /// The id is taken by a build with another spec. ALREADY_EXISTS.
    IdTaken = "id_taken";
    /// The queue holds as many builds as policy allows. RESOURCE_EXHAUSTED.
    QueueFull = "queue_full";
    /// A coordinator's disk is below its reserve. RESOURCE_EXHAUSTED.
    DiskReserve = "disk_reserve";
    /// A blob is larger than policy allows. RESOURCE_EXHAUSTED, before the first byte.
    BlobTooLarge = "blob_too_large";
    /// The bytes do not have the digest or size they were announced with. INVALID_ARGUMENT.
    DigestMismatch = "digest_mismatch";
    /// The build's state does not allow it. FAILED_PRECONDITION.
    WrongState = "wrong_state";
    /// The policy is not what the caller expected it to be. FAILED_PRECONDITION.
    PolicyChanged = "policy_changed";
    /// The attempt is not current: another has its place. FAILED_PRECONDITION.
    StaleAttempt = "stale_attempt";
    /// No leader is known. UNAVAILABLE.
    NoLeader = "no_leader";
    /// This node is not the leader; metadata `leader` has the endpoint. UNAVAILABLE.
    NotLeader = "not_leader";
    /// The peer that should serve this cannot be reached. UNAVAILABLE.
    PeerUnreachable = "peer_unreachable";
    /// The bucket that large blobs go to does not answer. UNAVAILABLE.
    BucketUnreachable = "bucket_unreachable";
    /// The bucket answers, and will not do: there is none of that name, access is denied, or it is another's. FAILED_PRECONDITION.
    BucketRefused = "bucket_refused";
    /// The certificate's role may not call this. PERMISSION_DENIED.
    RoleNotAllowed = "role_not_allowed";
    /// The caller may do this to its own only. PERMISSION_DENIED.
    NotOwner = "not_owner";
    /// The certificate carries no identity of this cluster. UNAUTHENTICATED.
    IdentityInvalid = "identity_invalid";
    /// Committed or not: unknown. ABORTED; repeat with the same id.
    OutcomeUnknown = "outcome_unknown";
    /// Another live instance has this worker's name. ALREADY_EXISTS.
    WorkerNameTaken = "worker_name_taken";
    /// The versions cannot work together. FAILED_PRECONDITION; both are named.
    VersionSkew = "version_skew";
    /// Another cluster's, or another node's under this id. FAILED_PRECONDITION.
    WrongCluster = "wrong_cluster";
    /// The node is a member already, or has another member's address. ALREADY_EXISTS.
    MemberExists = "member_exists";
    /// No such member. NOT_FOUND.
    MemberUnknown = "member_unknown";
    /// The member, or who is to become one, does not answer. FAILED_PRECONDITION.
    MemberUnreachable = "member_unreachable";
    /// The node id was used before. ALREADY_EXISTS.
    NodeIdUsed = "node_id_used";
    /// The node was removed from the cluster. FAILED_PRECONDITION.
    NodeRemoved = "node_removed";
    /// Too few voters would be left that answer. FAILED_PRECONDITION.
    QuorumUnsafe = "quorum_unsafe";
    /// It is the only voter. FAILED_PRECONDITION.
    LastMember = "last_member";
    /// The node holds the last copy of something. FAILED_PRECONDITION.
    LastCopy = "last_copy";
    /// Another change of the members is under way. FAILED_PRECONDITION.
    MembershipBusy = "membership_busy";
    /// The file is no backup, or it is cut short or damaged. INVALID_ARGUMENT.
    SnapshotInvalid = "snapshot_invalid";
    /// Some blobs that a backup names could not be fetched. UNAVAILABLE; repeat, which goes on.
    BackupIncomplete = "backup_incomplete";
    /// The others may be alive: making this node a cluster of its own would make two of one. FAILED_PRECONDITION.
    QuorumMayLive = "quorum_may_live";
    /// A coordinator is too old for this; it is named. FAILED_PRECONDITION; upgrade it, and repeat.
    UpgradePending = "upgrade_pending";
    /// The node is stopping. UNAVAILABLE.
    ShuttingDown = "shutting_down";
    /// A fault of ours. INTERNAL.
    Internal = "internal";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
