//! Why the registry did not do what it was asked. What a proposal's error says about its outcome is exact.

use helix_model::NodeId;

/// Why a proposal has no reply.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Not committed: nobody could take it in time.
    #[error("no leader took the proposal in time")]
    NoLeader {
        /// Where clients dial the leader, if one is known.
        hint: Option<String>,
    },
    /// It may have been committed or not. Repeating it is harmless.
    #[error("the proposal may or may not have been committed")]
    OutcomeUnknown,
    /// Not committed: a member could not read it, and would stop.
    #[error(
        "coordinator {node} runs version {version:?}, which knows command format {known}, and this needs {needed}: upgrade it \
         first"
    )]
    UpgradePending {
        /// The oldest member.
        node: NodeId,
        /// Its version; empty when it is not known.
        version: String,
        /// The highest format it knows.
        known: u32,
        /// The format that the commands have.
        needed: u32,
    },
    /// Not committed: this node is stopping.
    #[error("this node is stopping")]
    ShuttingDown,
    /// Not committed by this node, which is broken.
    #[error("storage: {0}")]
    Storage(String),
}

/// Why a read is not possible now.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed itself in time.
    #[error("no leader confirmed itself in time")]
    NoLeader {
        /// Where clients dial the leader, if one is known.
        hint: Option<String>,
    },
    /// This node is stopping.
    #[error("this node is stopping")]
    ShuttingDown,
}

/// Why membership did not change.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MembershipError {
    /// Ask the leader.
    #[error("only the leader changes membership")]
    NotLeader {
        /// Where clients dial it.
        hint: Option<String>,
    },
    /// It was refused, and nothing changed.
    #[error("{0}")]
    Refused(String),
    /// The change before it is not committed yet.
    #[error("another change of the members is under way")]
    Busy,
    /// It may happen yet, or not.
    #[error("whether the members change is unknown")]
    OutcomeUnknown,
    /// This node is stopping.
    #[error("this node is stopping")]
    ShuttingDown,
}

/// The store cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the store cannot be read: {0}")]
pub struct StoreError(pub String);
