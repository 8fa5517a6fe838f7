//! The agent's configuration: its keys, their defaults, and what makes a set of values usable.
//!
//! Loading (flag over environment over file over default) is `helix_common::config`'s. A [`Config`] that passed
//! [`Config::check`] has absolute paths and values the rest of the program need not doubt.

mod host;
mod podman;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use helix_common::channel::canonical_endpoint;
use helix_common::telemetry;
use helix_common::tls::TlsFiles;
use helix_model::limits::{OUTPUT_NAME_DEFAULT, WORKER_CAPACITY_MAX};
use helix_model::{BuildSpec, Outputs, Platform, WorkerName};
use serde::{Deserialize, Serialize};

pub use self::podman::PodmanConfig;

pub use host::{DiskConfig, LimitsConfig};

use crate::isolation::{Bind, UserSetting, Wish};
use crate::policy::PolicyConfig;
use crate::secrets::{self, SecretConfig};

/// What the configuration file holds.
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The worker's name: the NAME in the agent's certificate.
    #[serde(default)]
    pub name: String,
    /// Coordinators, `https://HOST:PORT`; one that answers is enough.
    #[serde(default)]
    pub coordinators: Vec<String>,
    /// Concurrent attempts; 0 means one per processor.
    #[serde(default)]
    pub capacity: u32,
    /// Platforms it builds for; empty means the host's own.
    #[serde(default)]
    pub platforms: Vec<String>,
    /// Labels that builds may require.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Where the agent runs, for people; empty means the host's name.
    #[serde(default)]
    pub address: String,
    /// Spool, mirrors and, unless `exec.base_dir` says otherwise, workdirs.
    #[serde(default)]
    pub data_dir: PathBuf,
    /// How exec builds are kept apart from the host: `none`, `namespaces`, `bubblewrap`; empty for namespaces where they
    /// work, else none.
    #[serde(default)]
    pub isolation: String,
    /// `helix-runner`; empty means the one beside this program.
    #[serde(default)]
    pub runner_path: PathBuf,
    /// Who we are.
    pub tls: TlsFiles,
    /// Log lines of the agent itself.
    #[serde(default)]
    pub log: LogConfig,
    /// Exec builds.
    #[serde(default)]
    pub exec: ExecConfig,
    /// Repositories.
    #[serde(default)]
    pub source: SourceConfig,
    /// What a build may use.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// What is offered beside slots.
    #[serde(default)]
    pub resources: ResourcesConfig,
    /// Room on the host's disks.
    #[serde(default)]
    pub disk: DiskConfig,
    /// Container builds.
    #[serde(default)]
    pub podman: PodmanConfig,
    /// What this host's owner allows.
    #[serde(default)]
    pub policy: PolicyConfig,
    /// Secrets that builds may name.
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretConfig>,
}

/// See [`Config::log`].
#[derive(Clone, PartialEq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Such as `info` or `info,helix_agent=debug`; empty for the default.
    pub filter: String,
    /// `text` or `json`.
    pub format: telemetry::Format,
}

/// See [`Config::exec`].
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecConfig {
    /// Runs command lines, as `SHELL -c LINE`.
    pub shell: String,
    /// The line for builds that bring no command; empty for none.
    pub command: String,
    /// The default output, relative to the workdir.
    pub output_name: String,
    /// Where workdirs are made; empty means `work` in `data_dir`.
    pub base_dir: PathBuf,
    /// Variables that every build sees.
    pub env: BTreeMap<String, String>,
    /// `PATH` of builds.
    pub path: String,
    /// Host paths that isolated builds see besides the usual, `SRC:DST:ro`.
    pub bind: Vec<String>,
    /// What isolated builds reach: `host` or `none`.
    pub network: String,
    /// Whom isolated builds run as, if the agent is root; empty for a user of its own for each.
    pub user: String,
    /// The program `bwrap`.
    pub bubblewrap: PathBuf,
    /// Whether builds may bring their own command.
    pub allow_job_commands: bool,
}

impl Default for ExecConfig {
    fn default() -> Self {
        Self {
            shell: "sh".to_owned(),
            command: String::new(),
            output_name: OUTPUT_NAME_DEFAULT.to_owned(),
            base_dir: PathBuf::new(),
            env: BTreeMap::new(),
            path: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            bind: Vec::new(),
            network: "host".to_owned(),
            user: String::new(),
            bubblewrap: "bwrap".into(),
            allow_job_commands: false,
        }
    }
}

/// See [`Config::source`].
#[derive(Clone, PartialEq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceConfig {
    /// Private key for ssh URLs.
    pub ssh_key: Option<PathBuf>,
    /// Host keys that are trusted; without it ssh's own files count.
    pub known_hosts: Option<PathBuf>,
    /// git's `credential.helper` for https URLs; empty for none.
    pub credential_helper: String,
    /// Whether `file://` URLs may be built.
    pub allow_file_urls: bool,
}

/// See [`Config::resources`]. 0 means what the host has; more than that is never offered.
#[derive(Clone, PartialEq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResourcesConfig {
    /// Thousandths of a processor.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of disk for workdirs.
    pub disk_bytes: u64,
}

/// Why a configuration cannot be used: the key, what is wrong, what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{key}`: {why}")]
pub struct ConfigWrong {
    /// The key, dotted.
    pub key: &'static str,
    /// What is wrong.
    pub why: String,
}

fn wrong<T>(key: &'static str, why: impl Into<String>) -> Result<T, ConfigWrong> {
    Err(ConfigWrong { key, why: why.into() })
}

impl Config {
    /// Checks all values, fills in what depends on the host, and makes paths absolute (relative ones in a file are
    /// relative to `directory`, the file's own).
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn check(mut self, directory: &Path) -> Result<Self, ConfigWrong> {
        self.check_identity()?;
        if self.capacity == 0 {
            let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            self.capacity = u32::try_from(processors).unwrap_or(1).min(WORKER_CAPACITY_MAX);
        }
        if self.capacity > WORKER_CAPACITY_MAX {
            return wrong("capacity", format!("{} is more than {WORKER_CAPACITY_MAX}", self.capacity));
        }
        if self.platforms.is_empty() {
            self.platforms.push(crate::host::platform());
        }
        let platforms: Result<BTreeSet<_>, _> = self.platforms.iter().map(|text| Platform::new(text)).collect();
        platforms.map_err(|invalid| ConfigWrong { key: "platforms", why: invalid.why })?;
        if self.address.is_empty() {
            self.address = crate::host::name();
        }
        if !self.log.filter.is_empty() {
            let checked = telemetry::check_filter(&self.log.filter);
            checked.map_err(|error| ConfigWrong { key: "log.filter", why: error.to_string() })?;
        }
        self.check_isolation()?;
        self.resolve_paths(directory)?;
        self.podman.check(directory, &self.data_dir)?;
        self.check_exec()?;
        self.limits.check()?;
        self.check_policy(directory)?;
        Ok(self)
    }

    fn check_identity(&self) -> Result<(), ConfigWrong> {
        if self.name.is_empty() {
            return wrong("name", "is missing: give the NAME of the agent's certificate");
        }
        WorkerName::new(&self.name).map_err(|invalid| ConfigWrong { key: "name", why: invalid.why })?;
        if self.coordinators.is_empty() {
            return wrong("coordinators", "is empty: name at least one, as https://HOST:PORT");
        }
        for endpoint in &self.coordinators {
            canonical_endpoint(endpoint)
                .map_err(|error| ConfigWrong { key: "coordinators", why: error.to_string() })?;
        }
        let spec =
            BuildSpec { labels: self.labels.clone(), repo_url: "https://h/p".to_owned(), ..BuildSpec::default() };
        spec.validate().map_err(|invalid| ConfigWrong { key: "labels", why: invalid.why })
    }

    fn check_policy(&mut self, directory: &Path) -> Result<(), ConfigWrong> {
        self.policy.check()?;
        if !self.platforms.iter().any(|platform| self.policy.allows_platform(platform)) {
            return wrong(
                "policy.platforms",
                format!("allows none of {}: nothing could be built", self.platforms.join(", ")),
            );
        }
        if self.policy.executors.is_empty() {
            return wrong("policy.executors", "is empty: nothing could be built");
        }
        secrets::check(&mut self.secrets, directory)
    }

    fn check_isolation(&self) -> Result<(), ConfigWrong> {
        let Some(wish) = Wish::parse(&self.isolation) else {
            return wrong("isolation", format!("{:?} is none of none, namespaces, bubblewrap", self.isolation));
        };
        if wish == Wish::None && !self.exec.bind.is_empty() {
            return wrong("exec.bind", "needs an isolation: with `none` builds see the host as it is");
        }
        for bind in &self.exec.bind {
            Bind::parse(bind).map_err(|why| ConfigWrong { key: "exec.bind", why })?;
        }
        if !matches!(self.exec.network.as_str(), "host" | "none") {
            return wrong("exec.network", format!("{:?} is neither host nor none", self.exec.network));
        }
        if wish == Wish::None && self.exec.network != "host" {
            return wrong("exec.network", "needs an isolation: with `none` builds reach what the host reaches");
        }
        UserSetting::parse(&self.exec.user).map(drop).map_err(|why| ConfigWrong { key: "exec.user", why })
    }

    fn resolve_paths(&mut self, directory: &Path) -> Result<(), ConfigWrong> {
        if self.data_dir.as_os_str().is_empty() {
            return wrong("data_dir", "is missing: name a directory that survives restarts");
        }
        self.data_dir = directory.join(&self.data_dir);
        self.tls = self.tls.clone().relative_to(directory);
        self.exec.base_dir = if self.exec.base_dir.as_os_str().is_empty() {
            self.data_dir.join("work")
        } else {
            directory.join(&self.exec.base_dir)
        };
        for path in [&mut self.source.ssh_key, &mut self.source.known_hosts].into_iter().flatten() {
            *path = directory.join(&*path);
        }
        if self.runner_path.as_os_str().is_empty() {
            let own = std::env::current_exe().map_err(|error| ConfigWrong {
                key: "runner_path",
                why: format!("cannot find this program: {error}"),
            })?;
            self.runner_path = own.with_file_name("helix-runner");
        } else {
            self.runner_path = directory.join(&self.runner_path);
        }
        for (key, path) in [("source.ssh_key", &self.source.ssh_key), ("source.known_hosts", &self.source.known_hosts)]
        {
            // Both end up in a command line that ssh's caller splits.
            if path.as_ref().is_some_and(|path| path.to_str().is_none_or(|text| text.contains(['\'', '\n', '%']))) {
                return wrong(key, "must be UTF-8 without quotes, per cent signs and newlines");
            }
        }
        Ok(())
    }

    fn check_exec(&self) -> Result<(), ConfigWrong> {
        if self.exec.shell.is_empty() || self.exec.shell.contains(char::is_whitespace) {
            return wrong("exec.shell", "is one program, such as sh or /bin/bash");
        }
        let spec = BuildSpec {
            repo_url: "https://h/p".to_owned(),
            outputs: Outputs::Named(vec![self.exec.output_name.clone()]),
            ..BuildSpec::default()
        };
        spec.validate().map_err(|invalid| ConfigWrong { key: "exec.output_name", why: invalid.why })?;
        let spec = BuildSpec { repo_url: "https://h/p".to_owned(), env: self.exec.env.clone(), ..BuildSpec::default() };
        spec.validate().map_err(|invalid| ConfigWrong { key: "exec.env", why: invalid.why })?;
        if self.source.credential_helper.contains(['\n', '\0']) {
            return wrong("source.credential_helper", "is one line");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_common::config::{load_from, set};

    fn load(file: &str, flags: &[(&str, &str)]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        let tls = "[tls]\nca = 'ca.pem'\ncert = 'cert.pem'\nkey = 'key.pem'\n";
        std::fs::write(&path, format!("{file}\n{tls}")).unwrap();
        let mut overrides = toml::Table::new();
        for (key, value) in flags {
            set::<Config>(&mut overrides, key, value).map_err(|error| error.to_string())?;
        }
        let config: Config = load_from(Some(&path), "HELIX", Vec::<(String, String)>::new(), overrides)
            .map_err(|error| error.to_string())?;
        config.check(Path::new("/etc/helix")).map_err(|error| error.to_string())
    }

    const GOOD: &str = "name = 'w1'\ncoordinators = ['https://a:7420']\ndata_dir = 'data'\n";

    #[test]
    fn defaults_are_filled_in() {
        let config = load(GOOD, &[]).unwrap();
        assert_eq!(config.data_dir, Path::new("/etc/helix/data"));
        assert_eq!(config.exec.base_dir, Path::new("/etc/helix/data/work"));
        assert_eq!(config.tls.ca, Path::new("/etc/helix/ca.pem"));
        assert_eq!(config.platforms, [crate::host::platform()]);
        assert!(config.capacity >= 1 && config.runner_path.ends_with("helix-runner"));
        assert!(!config.exec.allow_job_commands && !config.source.allow_file_urls);
    }

    #[test]
    fn flags_reach_every_table() {
        let flags = [
            ("exec.allow_job_commands", "true"),
            ("capacity", "8"),
            ("labels.zone", "eu"),
            ("source.allow_file_urls", "true"),
        ];
        let config = load(GOOD, &flags).unwrap();
        assert!(config.exec.allow_job_commands && config.source.allow_file_urls);
        assert_eq!((config.capacity, config.labels["zone"].as_str()), (8, "eu"));
    }

    #[test]
    fn mistakes_name_their_key() {
        let table = [
            ("", "name"),
            ("name = 'W'\ncoordinators = ['https://a:1']\ndata_dir = 'd'", "`name`"),
            ("name = 'w'\ndata_dir = 'd'", "`coordinators`"),
            ("name = 'w'\ncoordinators = ['http://a:1']\ndata_dir = 'd'", "`coordinators`"),
            ("name = 'w'\ncoordinators = ['https://a:1']", "`data_dir`"),
            (&format!("{GOOD}capacity = 100000"), "`capacity`"),
            (&format!("{GOOD}platforms = ['Linux']"), "`platforms`"),
            (&format!("{GOOD}isolation = 'jail'"), "`isolation`"),
            (&format!("{GOOD}isolation = 'none'\n[exec]\nbind = ['/a:/a:ro']"), "`exec.bind`"),
            (&format!("{GOOD}[exec]\nbind = ['a:/a:ro']"), "`exec.bind`"),
            (&format!("{GOOD}[exec]\nnetwork = 'some'"), "`exec.network`"),
            (&format!("{GOOD}isolation = 'none'\n[exec]\nnetwork = 'none'"), "`exec.network`"),
            (&format!("{GOOD}[exec]\nuser = 'root'"), "`exec.user`"),
            (&format!("{GOOD}[exec]\noutput_name = '../x'"), "`exec.output_name`"),
            (&format!("{GOOD}[exec]\nenv = {{ LD_PRELOAD = 'x' }}"), "`exec.env`"),
            (&format!("{GOOD}[exec]\nshel = 'x'"), "exec.shell"),
            (&format!("{GOOD}[policy]\nrepositories = ['example.com']"), "`policy.repositories`"),
            (&format!("{GOOD}[policy]\nplatforms = ['plan9/mips']"), "`policy.platforms`"),
            (&format!("{GOOD}[policy]\nexecutors = []"), "`policy.executors`"),
            (&format!("{GOOD}[policy]\nrepos = []"), "policy.repositories"),
            (&format!("{GOOD}[policy]\nstop_cut_off_after_ms = 5000"), "at least 15000, or 0 for never"),
            (&format!("{GOOD}[secrets.a]\nfile = 'x'"), "`secrets`: a: repositories"),
            (&format!("{GOOD}[secrets.a]\nfiel = 'x'"), "fiel"),
            (&format!("{GOOD}[log]\nfilter = 'a=b=c'"), "`log.filter`"),
            (&format!("{GOOD}[limits]\nprocesses = 1"), "`limits.processes`"),
            (&format!("{GOOD}[limits]\ndisk = \"raid\""), "`limits.disk`"),
            (&format!("{GOOD}[limits]\ncpu_milli = 2000\ncpu_milli_max = 1000"), "`limits.cpu_milli`"),
            (&format!("{GOOD}[resources]\nmemory_bytes = 'much'"), "resources.memory_bytes"),
            (&format!("{GOOD}[podman]\nnetwork = 'bridge'"), "`podman.network`"),
            (&format!("{GOOD}[podman]\nemulated = ['arm64']"), "`podman.emulated`"),
            (&format!("{GOOD}[podman]\npodman_path = ''"), "`podman.podman_path`"),
        ];
        for (file, expected) in table {
            let error = load(file, &[]).unwrap_err();
            assert!(error.contains(expected), "{file}: {error}");
        }
    }
}
