//! Getting a build's source into its workdir: from a repository, by way of a mirror, or from an uploaded archive.
//!
//! Invariant: nothing that a build or a repository says becomes an option of git, a command, a hook, a prompt, or a path
//! outside of the workdir.

pub mod archive;
pub mod git;
mod process;

use helix_model::Reason;

/// Why a source could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// Whose fault it is.
    pub reason: Reason,
    /// One line for people.
    pub message: String,
}

impl SourceError {
    /// The build's fault, or the repository's.
    #[must_use]
    pub fn source(message: impl Into<String>) -> Self {
        Self { reason: Reason::Source, message: message.into() }
    }

    /// The owner of the agent does not allow it.
    #[must_use]
    pub fn policy(message: impl Into<String>) -> Self {
        Self { reason: Reason::Policy, message: message.into() }
    }

    /// This host's fault.
    #[must_use]
    pub fn host(what: &str, error: &std::io::Error) -> Self {
        Self { reason: reason_of(error), message: format!("{what}: {error}") }
    }
}

/// The reason for a failure of this host's own files.
#[must_use]
pub fn reason_of(error: &std::io::Error) -> Reason {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Reason::DiskFull,
        _ => Reason::Internal,
    }
}
