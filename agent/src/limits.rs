//! What builds may use on this host: what they ask for, within what the agent's owner allows, by the means that are there.

use std::path::{Path, PathBuf};

use helix_model::{AttemptKey, Resources, Room};
use helix_runner::cgroup::{Controller, Host, Wanted};
use helix_runner::limits::{DiskLimit, Limits, is_at_wall, is_full};

use crate::attempt::workdir::Workdir;
use crate::config::LimitsConfig;
use crate::disk::wall::Walls;

/// How often and how long a cgroup that is still dying is waited for when the agent starts.
const PUT_AWAY_TRIES: u32 = 50;
const PUT_AWAY_RETRY: std::time::Duration = std::time::Duration::from_millis(2);

/// Limits attempts.
#[derive(Debug)]
pub struct Limiter {
    host: Host,
    config: LimitsConfig,
    /// What the names of this agent's cgroups begin with.
    prefix: String,
    walls: Walls,
}

/// Cgroups that limit the processes of whatever is forked in them, for one attempt after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slots {
    base: PathBuf,
    prefix: String,
    processes: u64,
}

/// The forker and a runner are in there with the build.
const OURS_IN_A_SLOT: u64 = 2;

impl Slots {
    /// A slot's directory.
    #[must_use]
    pub fn path(&self, index: usize) -> PathBuf {
        self.base.join(format!("{}{index}", self.prefix))
    }

    /// Removes slots that nobody is in, of this agent and of others that died: the kernel keeps those that are used, and who loses
    /// one just before it is used makes it again.
    pub fn remove_unused(&self) {
        for entry in std::fs::read_dir(&self.base).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("helix-") && name.contains(".slot-") {
                let _ = std::fs::remove_dir(entry.path());
            }
        }
    }

    /// Makes it, if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(&self, path: &Path) -> std::io::Result<()> {
        match std::fs::create_dir(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        std::fs::write(path.join("pids.max"), (self.processes + OURS_IN_A_SLOT).to_string())
    }
}

/// What one attempt may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Amounts {
    /// What cgroups or resource limits see to.
    pub wanted: Wanted,
    /// Bytes of disk; `None`: what is free.
    pub disk_bytes: Option<u64>,
}

impl Limiter {
    /// Finds out what this host can enforce. `id` tells this agent's cgroups from another's.
    #[must_use]
    pub fn take(id: &str, config: LimitsConfig) -> Self {
        let host = Host::take();
        if host.unified.is_none() {
            tracing::info!("no writable cgroup v2: runners go without");
        }
        Self { host, config, prefix: format!("helix-{id}-"), walls: Walls::none() }
    }

    /// Finds out how disk can be limited where workdirs are made. Blocks.
    ///
    /// # Errors
    /// When the configuration asks for what cannot be had there.
    pub fn wall_in(&mut self, work_root: &Path) -> anyhow::Result<()> {
        self.walls = Walls::choose(&self.config.disk, work_root)?;
        Ok(())
    }

    /// Where runners are started so that their processes are limited; `None` where each attempt's own cgroup does that.
    #[must_use]
    pub fn slots(&self) -> Option<Slots> {
        let base = self.host.own_tree(Controller::Pids)?.to_owned();
        // Not the prefix of attempts' cgroups, which are put away when their attempt is no more.
        let prefix = format!("{}.slot-", self.prefix.trim_end_matches('-'));
        (self.config.processes > 0).then_some(Slots { base, prefix, processes: self.config.processes })
    }

    /// Which limits are enforced how, for people.
    #[must_use]
    pub fn words(&self) -> String {
        let word = |controller| self.host.enforcement(controller).as_str();
        format!(
            "cpu {}, memory {}, processes {}, disk {}",
            word(Controller::Cpu),
            word(Controller::Memory),
            word(Controller::Pids),
            self.walls.as_str()
        )
    }

    /// Puts a wall around a workdir that was just made, if there are to be one and a limit. Blocks.
    ///
    /// # Errors
    /// Those of the system.
    pub fn wall(&self, workdir: &Workdir, key: &AttemptKey, amounts: Amounts) -> std::io::Result<()> {
        let Some(bytes) = amounts.disk_bytes else { return Ok(()) };
        self.walls.raise(workdir, key, bytes, some(self.config.files))
    }

    /// Whose room it was that the agent itself found full while it prepared a workdir.
    #[must_use]
    pub fn full(&self, workdir: &Workdir) -> Room {
        let around = workdir.root().parent().is_some_and(is_full);
        let inside = self.walls.look_at(workdir).is_some_and(|path| is_at_wall(&path));
        if inside && !around { Room::Own } else { Room::Host }
    }

    /// What a build that asks for so much may use.
    ///
    /// # Errors
    /// When it asks for more than the agent's owner gives a build, in words.
    pub fn amounts(&self, asked: &Resources) -> Result<Amounts, String> {
        let config = &self.config;
        let amount = |name: &str, key: &str, asked: u64, default: u64, most: u64| match (asked, default, most) {
            (asked, _, most) if most > 0 && asked > most => {
                Err(format!("the build asks for {name} {asked}; on this agent it may have {most} ({key})"))
            }
            (0, 0, most) => Ok((most > 0).then_some(most)),
            (0, default, _) => Ok(Some(default)),
            (asked, _, _) => Ok(Some(asked)),
        };
        let cpu_milli =
            amount("cpu_milli", "limits.cpu_milli_max", asked.cpu_milli, config.cpu_milli, config.cpu_milli_max)?;
        // All of the host is no limit; and a cgroup may not be given more than those above it have.
        let cpu_milli = cpu_milli.filter(|milli| *milli < crate::host::cpu_milli());
        let memory_bytes = amount(
            "memory_bytes",
            "limits.memory_bytes_max",
            asked.memory_bytes,
            config.memory_bytes,
            config.memory_bytes_max,
        )?;
        let disk_bytes =
            amount("disk_bytes", "limits.disk_bytes_max", asked.disk_bytes, config.disk_bytes, config.disk_bytes_max)?;
        let wanted = Wanted { cpu_milli, memory_bytes, processes: some(config.processes) };
        Ok(Amounts { wanted, disk_bytes })
    }

    /// An attempt's limits, for its order. Where its workdir is, so many bytes are left.
    #[must_use]
    pub fn limits(&self, key: &AttemptKey, amounts: Amounts, workdir: &Workdir, left_bytes: u64) -> Limits {
        let mut wanted = amounts.wanted;
        if self.host.own_tree(Controller::Pids).is_some() {
            // Its slot sees to them.
            wanted.processes = None;
        }
        let limits = self.host.limits(&self.name(key), &wanted);
        let wall = amounts.disk_bytes.and_then(|_| self.walls.look_at(workdir));
        let disk = Some(DiskLimit {
            root: workdir.root().to_owned(),
            bytes: amounts.disk_bytes.unwrap_or(left_bytes),
            files: some(self.config.files).unwrap_or(u64::MAX),
            room: if amounts.disk_bytes.is_some() { Room::Own } else { Room::Host },
            wall: wall.clone(),
        });
        // Between two looks one file grows no further than all of them may.
        let file_bytes = amounts.disk_bytes.filter(|_| wall.is_none());
        Limits { open_files: some(self.config.open_files), file_bytes, disk, ..limits }
    }

    /// The cgroup that holds an attempt together, where there can be one.
    #[must_use]
    pub fn cgroup(&self, key: &AttemptKey) -> Option<PathBuf> {
        self.host.unified.as_ref().map(|base| base.join(self.name(key)))
    }

    /// Where those cgroups are made.
    #[must_use]
    pub fn unified(&self) -> Option<&Path> {
        self.host.unified.as_deref()
    }

    /// What the names of this agent's cgroups begin with; the attempt follows.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    fn name(&self, key: &AttemptKey) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Kills and removes what is left in cgroups of attempts that are not here any more. Blocks.
    pub fn put_away(&self, is_here: impl Fn(&AttemptKey) -> bool) {
        let wanted = |name: &str| {
            let key = name.strip_prefix(&self.prefix).and_then(|key| key.parse().ok());
            key.is_some_and(|key| is_here(&key))
        };
        for tries in 0..PUT_AWAY_TRIES {
            let (found, gone) = self.host.remove_stale(&self.prefix, wanted);
            if tries == 0 && !found.is_empty() {
                tracing::warn!(?found, "cgroups of attempts that are no more were put away");
            }
            if gone {
                return;
            }
            std::thread::sleep(PUT_AWAY_RETRY);
        }
        tracing::error!("a cgroup of an attempt that is no more cannot be removed; trying again later");
    }
}

fn some(amount: u64) -> Option<u64> {
    (amount > 0).then_some(amount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_wins_within_what_is_allowed() {
        let config = LimitsConfig {
            memory_bytes: 100,
            memory_bytes_max: 1000,
            disk_bytes_max: 50,
            processes: 0,
            ..LimitsConfig::default()
        };
        let limiter = Limiter { host: Host::default(), config, prefix: "helix-x-".to_owned(), walls: Walls::none() };
        let ask = |memory_bytes, disk_bytes| Resources { cpu_milli: 0, memory_bytes, disk_bytes };
        let given = |asked| {
            limiter.amounts(&asked).map(|amounts| (amounts.wanted.memory_bytes, amounts.disk_bytes)).map_err(drop)
        };
        assert_eq!(given(ask(0, 0)), Ok((Some(100), Some(50))));
        assert_eq!(given(ask(700, 20)), Ok((Some(700), Some(20))));
        assert_eq!(given(ask(1001, 0)), Err(()));
        let why = limiter.amounts(&ask(0, 51)).unwrap_err();
        assert!(why.contains("limits.disk_bytes_max"), "{why}");
        let all = Resources { cpu_milli: u64::MAX, ..ask(0, 0) };
        assert_eq!(limiter.amounts(&all).unwrap().wanted, Wanted { memory_bytes: Some(100), ..Wanted::default() });
    }
}
