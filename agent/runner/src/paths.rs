//! Where the files of an attempt are: one directory an attempt, mode 0700, made by the agent.

use std::fmt;
use std::path::{Path, PathBuf};

/// An attempt's directory and the names in it.
///
/// | name | written by | holds |
/// |---|---|---|
/// | `order` | agent, once, before the runner starts | what to run ([`crate::Order`]) |
/// | `log.spool`, `log.tail`, `log.tail.old` | agent, then runner, then agent | the log ([`crate::SpoolWriter`]) |
/// | `pid` | runner | that a runner took the order, its pid and its command's; locked as long as it lives |
/// | `control` | runner | its socket |
/// | `result` | runner, its last act | how it ended ([`crate::Outcome`]) |
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

    /// What the runner is to do.
    #[must_use]
    pub fn order(&self) -> PathBuf {
        self.root.join("order")
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

    /// Proof that a runner took the order, and that it lives while it is locked.
    #[must_use]
    pub fn pid(&self) -> PathBuf {
        self.root.join("pid")
    }

    /// The runner's socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.root.join("control")
    }

    /// How it ended.
    #[must_use]
    pub fn result(&self) -> PathBuf {
        self.root.join("result")
    }

    /// Where a file is written before it is renamed to `name`.
    #[must_use]
    pub fn temporary(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.new"))
    }
}

impl fmt::Display for AttemptDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.display().fmt(f)
    }
}
