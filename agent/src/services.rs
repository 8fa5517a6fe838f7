//! What every attempt of this agent uses.

use std::path::PathBuf;

use helix_model::AttemptKey;

use crate::config::Config;
use crate::data_dir::DataDir;
use crate::source::git::Mirrors;
use crate::starter::Starter;
use crate::stores::Stores;
use crate::stores::live::LiveLogs;

/// Shared by all attempts; nothing in it belongs to one.
#[derive(Debug)]
pub struct Services {
    /// Checked.
    pub config: Config,
    /// The spool.
    pub data: DataDir,
    /// Where workdirs are made.
    pub work_root: PathBuf,
    /// Where attempts' cgroups are made, if they can be.
    pub cgroup_base: Option<PathBuf>,
    /// Starts runners.
    pub starter: Starter,
    /// Repositories.
    pub mirrors: Mirrors,
    /// Blobs.
    pub stores: Stores,
    /// Live logs.
    pub live: LiveLogs,
}

impl Services {
    /// An attempt's cgroup.
    #[must_use]
    pub fn cgroup(&self, key: &AttemptKey) -> Option<PathBuf> {
        self.cgroup_base.as_ref().map(|base| base.join(format!("helix-{key}")))
    }
}
