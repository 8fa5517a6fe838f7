//! Where the files of an attempt are: one directory an attempt, mode 0700, made by the agent.

use std::fmt;
use std::path::{Path, PathBuf};

/// An attempt's directory and the names in it.
///
/// | name | written by | holds |
/// |---|---|---|
/// | `journal` | agent, then runner, then agent | all that is known of it ([`crate::journal`]); locked as long as the runner lives |
/// | `log.spool`, `log.tail`, `log.tail.old` | agent, then runner, then agent | the log ([`crate::SpoolWriter`]) |
/// | `control` | runner | its socket, once nobody is connected who was from the start |
///
/// The agent may keep files of its own beside these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttemptDir {
    root: PathBuf,
}

impl AttemptDir {
    /// Names an attempt's directory; looks at nothing.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is known of it.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// The log from its beginning.
    #[must_use]
    pub fn log_head(&self) -> PathBuf {
        self.root.join("log.spool")
    }

    /// The newest lines of a log that passed its limit.
    #[must_use]
    pub fn log_tail(&self) -> PathBuf {
        self.root.join("log.tail")
    }

    /// The lines just before [`Self::log_tail`].
    #[must_use]
    pub fn log_tail_old(&self) -> PathBuf {
        self.root.join("log.tail.old")
    }

    /// The runner's socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.root.join("control")
    }
}

impl fmt::Display for AttemptDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.display().fmt(f)
    }
}
