//! What every attempt of this agent uses.

use std::path::PathBuf;
use std::sync::Arc;

use helix_common::tls::TlsStore;

use crate::allowed::Allowed;
use crate::config::Config;
use crate::data_dir::DataDir;
use crate::disk::Disks;
use crate::executor::podman::Podman;
use crate::isolation::Isolated;
use crate::limits::Limiter;
use crate::secrets::Secrets;
use crate::source::git::Mirrors;
use crate::starter::Starter;
use crate::stores::Stores;
use crate::stores::live::LiveLogs;

/// Shared by all attempts; nothing in it belongs to one.
#[derive(Debug)]
pub struct Services {
    /// Checked; as it was when the agent started.
    pub config: Config,
    /// The same with the newest policy and secrets.
    pub allowed: Allowed,
    /// The cluster's name.
    pub cluster: String,
    /// Who the agent is.
    pub tls: Arc<TlsStore>,
    /// The spool.
    pub data: DataDir,
    /// Where workdirs are made.
    pub work_root: PathBuf,
    /// Room for them.
    pub disks: Disks,
    /// What limits attempts on this host.
    pub limiter: Limiter,
    /// How exec builds are kept apart.
    pub isolated: Isolated,
    /// Starts runners.
    pub starter: Starter,
    /// Repositories.
    pub mirrors: Mirrors,
    /// Where secrets are laid out.
    pub secrets: Secrets,
    /// Images.
    pub podman: Podman,
    /// Blobs.
    pub stores: Stores,
    /// Live logs.
    pub live: LiveLogs,
}
