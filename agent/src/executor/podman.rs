//! Building images with podman: what runs, in which store, and whether it can work here at all.
//!
//! The build itself is an attempt's command like any other: the runner owns it. What comes after it (looking at the image,
//! pushing or exporting it) are steps of the agent's own. Everything happens in the store of this agent's configuration.
//! Invariants: nothing a build says becomes an option of podman; builds and steps hold the store's lock shared, pruning
//! holds it exclusively; a build container carries its attempt's name in its cgroup, and outlives it nowhere.

pub mod build;
pub mod context;
pub mod failure;
pub mod guard;
mod probe;
mod process;
mod store;
mod sweep;
mod usage;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_model::{AttemptKey, Platform};
use helix_runner::cgroup::Wanted;
use helix_runner::limits::Limits;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

pub use self::process::Finished;
pub use self::store::{Lock, Pruned, Tier};
pub use self::usage::Usage;
use crate::blocking::blocking;
use crate::config::Config;
use crate::data_dir::make_private;

/// Whether podman works here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nobody has tried yet.
    Untried,
    /// The owner wants no podman builds.
    Disabled,
    /// It does not, and why.
    Broken(String),
    /// It does, in this way.
    Works(Facts),
}

/// What a trial found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// podman's version.
    pub version: String,
    /// The container runtime that works.
    pub runtime: String,
    /// The storage driver.
    pub driver: String,
    /// Whether build containers can be put into a cgroup of their attempt's.
    pub cgroups: Cgroups,
}

/// Where build containers run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cgroups {
    /// Below their attempt's cgroup.
    OfAttempt,
    /// Where the runtime puts them.
    OfRuntime,
}

impl Standing {
    /// Whether podman builds are offered.
    #[must_use]
    pub fn works(&self) -> bool {
        matches!(self, Self::Works(_))
    }

    /// For people.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Untried => "being tried".to_owned(),
            Self::Disabled => "disabled (podman.enabled)".to_owned(),
            Self::Broken(why) => format!("does not work: {why}"),
            Self::Works(facts) => {
                format!("{}, {}, {}", facts.version, facts.runtime, facts.driver)
            }
        }
    }
}

/// podman on this host.
#[derive(Debug)]
pub struct Podman {
    config: Config,
    /// Where the agent keeps what podman needs besides the store.
    dir: PathBuf,
    /// Where attempts' cgroups are in the hierarchy, without a slash at the end, and what their names begin with.
    cgroups: (String, String),
    standing: watch::Sender<Standing>,
}

impl Podman {
    /// Makes what podman needs to be called at all. Attempts' cgroups are directories of the base, with names that begin so.
    /// Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(config: &Config, cgroup_base: Option<&Path>, cgroup_prefix: &str) -> io::Result<Self> {
        let dir = config.data_dir.join("podman");
        let standing = if config.podman.enabled { Standing::Untried } else { Standing::Disabled };
        let cgroups = (sweep::in_hierarchy(cgroup_base), cgroup_prefix.to_owned());
        let podman = Self { config: config.clone(), dir, cgroups, standing: watch::Sender::new(standing) };
        if config.podman.enabled {
            podman.lay_out()?;
        }
        Ok(podman)
    }

    /// Whether it works, as it was last seen.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    fn lay_out(&self) -> io::Result<()> {
        for path in [&self.dir, &self.home(), &self.runtime_dir(), &self.config.podman.root] {
            make_private(path)?;
        }
        self.forget_earlier_boots()?;
        make_private(&self.config.podman.runroot)?;
        if self.config.podman.containers_conf.is_none() {
            let text = containers_conf(probe::may_raise_limits());
            std::fs::write(self.own_containers_conf(), text)?;
        }
        self.write_image_policy()
    }

    /// What lasts until the next boot must not outlive it: it says what is mounted.
    fn forget_earlier_boots(&self) -> io::Result<()> {
        let now = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let path = self.dir.join("boot");
        if std::fs::read_to_string(&path).ok().as_ref() != Some(&now) {
            if self.config.podman.runroot.exists() {
                crate::attempt::workdir::remove_tree(&self.config.podman.runroot)?;
            }
            std::fs::write(&path, now)?;
        }
        Ok(())
    }

    fn home(&self) -> PathBuf {
        self.dir.join("home")
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.join("runtime")
    }

    fn own_containers_conf(&self) -> PathBuf {
        self.dir.join("containers.conf")
    }

    /// podman with what precedes every command.
    fn base(&self) -> Vec<OsString> {
        let config = &self.config.podman;
        let mut argv: Vec<OsString> = vec![
            config.podman_path.clone().into(),
            "--root".into(),
            config.root.clone().into(),
            "--runroot".into(),
            config.runroot.clone().into(),
            "--tmpdir".into(),
            config.runroot.join("libpod").into(),
        ];
        if !config.storage_driver.is_empty() {
            argv.extend(["--storage-driver".into(), config.storage_driver.clone().into()]);
        }
        for option in &config.storage_options {
            argv.extend(["--storage-opt".into(), option.into()]);
        }
        argv.extend(config.arguments.iter().map(OsString::from));
        argv
    }

    /// podman's environment: nothing of the agent's own, and nothing of a build's.
    fn environment(&self, tmp: &Path) -> Vec<(OsString, OsString)> {
        let config = &self.config.podman;
        let conf = config.containers_conf.clone().unwrap_or_else(|| self.own_containers_conf());
        let mut variables: Vec<(OsString, OsString)> = vec![
            ("PATH".into(), self.config.exec.path.clone().into()),
            ("HOME".into(), self.home().into()),
            ("XDG_RUNTIME_DIR".into(), self.runtime_dir().into()),
            ("TMPDIR".into(), tmp.into()),
            ("CONTAINERS_CONF".into(), conf.into()),
            ("LANG".into(), "C.UTF-8".into()),
        ];
        if let Some(file) = &config.auth_file {
            variables.push(("REGISTRY_AUTH_FILE".into(), file.into()));
        }
        variables.extend(config.env.iter().map(|(name, value)| (name.into(), value.into())));
        variables
    }

    /// Runs podman to its end. `tmp` is where it puts what it needs meanwhile.
    ///
    /// # Errors
    /// When it cannot be started, or takes longer than `limit`.
    pub async fn run(
        &self,
        tracker: &TaskTracker,
        arguments: Vec<OsString>,
        tmp: &Path,
        limit: Duration,
    ) -> io::Result<Finished> {
        self.run_with(tracker, arguments, tmp, limit, None).await
    }

    /// As [`Self::run`], with a variable more.
    async fn run_with(
        &self,
        tracker: &TaskTracker,
        arguments: Vec<OsString>,
        tmp: &Path,
        limit: Duration,
        variable: Option<(OsString, OsString)>,
    ) -> io::Result<Finished> {
        let mut argv = self.base();
        argv.extend(arguments);
        let mut environment = self.environment(tmp);
        environment.extend(variable);
        process::run(tracker, process::Step { argv, environment, directory: self.dir.clone(), limit }).await
    }

    /// The argument by which registries are trusted.
    #[must_use]
    pub fn tls_verify(&self) -> OsString {
        format!("--tls-verify={}", self.config.podman.tls_verify).into()
    }

    /// How long pushing an image may take in all.
    #[must_use]
    pub fn push_limit(&self) -> Duration {
        Duration::from_secs(self.config.podman.push_limit_s)
    }

    /// Limits what build containers of an attempt may use, where the attempt's own cgroups do not: these move to where they hold
    /// podman and its containers together.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn limit(
        &self,
        key: &AttemptKey,
        facts: &Facts,
        wanted: Wanted,
        mut limits: Limits,
    ) -> io::Result<Limits> {
        // What podman writes is counted, and no single file of it: see [`Self::usage`].
        limits.file_bytes = None;
        let path = self.cgroup_of(key);
        match facts.cgroups {
            Cgroups::OfAttempt => blocking(move || sweep::limit_cgroups(&path, &wanted, limits)).await,
            Cgroups::OfRuntime => Ok(limits),
        }
    }

    /// What marks build containers as an attempt's where their cgroup does not.
    fn mark_of(&self, key: &AttemptKey) -> String {
        format!("id={}{key},src=/dev/null", self.cgroups.1)
    }

    /// The cgroup of an attempt's build containers, as a path in the hierarchy.
    fn cgroup_of(&self, key: &AttemptKey) -> String {
        let (base, prefix) = &self.cgroups;
        format!("{base}/{prefix}{key}/build")
    }
}

/// What podman is told about this host. No operator's file is read besides: what differs belongs into the agent's
/// configuration.
fn containers_conf(limits: probe::Limits) -> String {
    // Not systemd's: the agent's own cgroup is delegated, systemd's bus may not be there.
    let engine = "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n";
    match limits {
        probe::Limits::MayRaise => engine.to_owned(),
        // podman would raise these above what the agent has, and fail.
        probe::Limits::Fixed => {
            format!("[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n{engine}")
        }
    }
}

/// A platform as part of a tag.
#[must_use]
pub fn platform_suffix(platform: &Platform) -> String {
    platform.as_str().replace('/', "-")
}
