//! The `[podman]` section: how this host builds images. All of it is the owner's; no build can change any of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use helix_model::Platform;
use serde::{Deserialize, Serialize};

use super::ConfigWrong;

/// See [`super::Config::podman`].
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodmanConfig {
    /// Whether podman builds are offered, if a trial shows that podman works here.
    pub enabled: bool,
    /// The program; a name is looked up in `exec.path`.
    pub podman_path: String,
    /// Images, layers and build containers; empty means `podman/storage` in `data_dir`.
    pub root: PathBuf,
    /// What of them lasts until the next boot; empty means `podman/run` in `data_dir`.
    pub runroot: PathBuf,
    /// The container runtime; empty means the first that works of runc and crun.
    pub runtime: String,
    /// A containers.conf instead of the one that the agent writes.
    pub containers_conf: Option<PathBuf>,
    /// podman's storage driver; empty for podman's choice.
    pub storage_driver: String,
    /// podman's storage options.
    pub storage_options: Vec<String>,
    /// What `RUN` steps see of the network: `none`, `host`, or empty for podman's default.
    pub network: String,
    /// More arguments before `build`, `push` and all else.
    pub arguments: Vec<String>,
    /// More arguments of `build`.
    pub build_arguments: Vec<String>,
    /// podman's own environment, such as proxies. Of these, `RUN` steps see proxies alone.
    pub env: BTreeMap<String, String>,
    /// Whether layers are kept for later builds.
    pub layers: bool,
    /// A repository with layers of earlier builds; empty for none.
    pub cache_from: String,
    /// A repository that gets the layers; empty for none.
    pub cache_to: String,
    /// Credentials of registries, as `podman login --authfile` writes them.
    pub auth_file: Option<PathBuf>,
    /// Whether registries must prove who they are.
    pub tls_verify: bool,
    /// Seconds that pushing an image may take, tries and pauses included.
    pub push_limit_s: u64,
    /// Platforms that podman builds beside the worker's own, because the host emulates them.
    pub emulated: Vec<String>,
}

impl Default for PodmanConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            podman_path: "podman".to_owned(),
            root: PathBuf::new(),
            runroot: PathBuf::new(),
            runtime: String::new(),
            containers_conf: None,
            storage_driver: String::new(),
            storage_options: Vec::new(),
            network: String::new(),
            arguments: Vec::new(),
            build_arguments: Vec::new(),
            env: BTreeMap::new(),
            layers: true,
            cache_from: String::new(),
            cache_to: String::new(),
            auth_file: None,
            tls_verify: true,
            push_limit_s: 1800,
            emulated: Vec::new(),
        }
    }
}

impl PodmanConfig {
    /// Checks the values and makes paths absolute.
    pub(super) fn check(&mut self, directory: &Path, data_dir: &Path) -> Result<(), ConfigWrong> {
        let wrong = |key, why: String| Err(ConfigWrong { key, why });
        for (path, default) in [(&mut self.root, "podman/storage"), (&mut self.runroot, "podman/run")] {
            *path = if path.as_os_str().is_empty() { data_dir.join(default) } else { directory.join(&*path) };
        }
        for path in [&mut self.auth_file, &mut self.containers_conf].into_iter().flatten() {
            *path = directory.join(&*path);
        }
        if self.podman_path.is_empty() {
            return wrong("podman.podman_path", "is empty: set `podman.enabled = false` to build no images".to_owned());
        }
        if !["", "none", "host"].contains(&self.network.as_str()) {
            let why = format!("{:?} is neither none nor host; leave it out for podman's default", self.network);
            return wrong("podman.network", why);
        }
        if self.runtime.contains(['"', '\\', '\n']) {
            return wrong("podman.runtime", "is a name or a path without quotes and backslashes".to_owned());
        }
        for platform in &self.emulated {
            Platform::new(platform).map_err(|invalid| ConfigWrong { key: "podman.emulated", why: invalid.why })?;
        }
        if self.push_limit_s == 0 {
            return wrong("podman.push_limit_s", "is 0: no push could ever succeed".to_owned());
        }
        Ok(())
    }
}
