//! What a host can enforce: where cgroups can be made, which controllers they have, and what is left to resource limits.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::groups::put_away;
use crate::limits::{Group, Limits};

/// What cgroups can limit here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Controller {
    /// Processor time.
    Cpu,
    /// Memory, swap included.
    Memory,
    /// Processes and threads.
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    /// The kernel's name.
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }

    /// The file of cgroup v1 that sets the limit.
    fn file_v1(self) -> &'static str {
        match self {
            Self::Cpu => "cpu.cfs_quota_us",
            Self::Memory => "memory.limit_in_bytes",
            Self::Pids => "pids.max",
        }
    }
}

/// How a limit is enforced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Enforcement {
    /// By cgroup v2.
    Cgroup2,
    /// By cgroup v1.
    Cgroup1,
    /// By resource limits of single processes, which is weaker.
    Rlimits,
    /// Not at all.
    None,
}

impl Enforcement {
    /// The word for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroup2 => "cgroup2",
            Self::Cgroup1 => "cgroup1",
            Self::Rlimits => "rlimits",
            Self::None => "none",
        }
    }
}

/// What an attempt may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// Thousandths of a processor.
    pub cpu_milli: Option<u64>,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    /// In the attempt's cgroup of the unified tree.
    Unified,
    /// In a tree of its own, below this directory.
    Own(PathBuf),
}

/// The host's cgroups, as this process may use them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Host {
    /// Where cgroups of the unified tree can be made that can be killed at once.
    pub unified: Option<PathBuf>,
    places: BTreeMap<Controller, Place>,
}

/// The part of a period of processor time that is 1/1000 of a processor, and the period: 100 ms.
const CPU_US_PER_MILLI: u64 = 100;
const CPU_PERIOD_US: u64 = 100_000;

/// The shortest share of a period that the kernel takes.
const CPU_QUOTA_US_MIN: u64 = 1_000;

impl Host {
    /// Looks for what can be used, by making a cgroup in each place and removing it again.
    #[must_use]
    pub fn find() -> Self {
        let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return Self::default() };
        let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return Self::default() };
        let mut host = Self::default();
        if let Some(base) = unified_base(&mounts, &own)
            && let Some(controllers) = probe_unified(&base)
        {
            host.places = controllers.into_iter().map(|controller| (controller, Place::Unified)).collect();
            host.unified = Some(base);
        }
        for controller in Controller::ALL {
            if let Some(base) = v1_base(&mounts, &own, controller.name())
                && !host.places.contains_key(&controller)
                && probe(&base, |probe| is_writable(&probe.join(controller.file_v1()))) == Some(true)
            {
                host.places.insert(controller, Place::Own(base));
            }
        }
        host
    }

    /// As [`Self::find`], for a process that may rearrange its own cgroup: where a service's cgroup is delegated to it, controllers
    /// are enabled for the cgroups below. cgroup v2 wants no processes beside such cgroups, so this process moves into one
    /// of its own first, if it is alone. Call it before anything is started.
    #[must_use]
    pub fn take() -> Self {
        if let (Ok(mounts), Ok(own)) =
            (fs::read_to_string("/proc/self/mountinfo"), fs::read_to_string("/proc/self/cgroup"))
            && let Some(mount) = mount_of(&mounts, |filesystem, _| filesystem == "cgroup2")
            && let Some(path) = own_path(&own, "0::")
        {
            // What cannot be had is gone without.
            let _ = delegate(&mount.directory(path));
        }
        Self::find()
    }

    /// How a limit is enforced here.
    #[must_use]
    pub fn enforcement(&self, controller: Controller) -> Enforcement {
        match (self.places.get(&controller), controller) {
            (Some(Place::Unified), _) => Enforcement::Cgroup2,
            (Some(Place::Own(_)), _) => Enforcement::Cgroup1,
            // Processes of root are not counted.
            (None, Controller::Pids) if rustix::process::geteuid().is_root() => Enforcement::None,
            (None, Controller::Pids | Controller::Memory) => Enforcement::Rlimits,
            (None, Controller::Cpu) => Enforcement::None,
        }
    }

    /// Where a controller's cgroups are made, if it has a tree of its own (cgroup v1).
    #[must_use]
    pub fn own_tree(&self, controller: Controller) -> Option<&Path> {
        match self.places.get(&controller) {
            Some(Place::Own(base)) => Some(base),
            Some(Place::Unified) | None => None,
        }
    }

    /// The limits for an attempt whose cgroups have this name. No cgroup is asked for where nothing is limited.
    #[must_use]
    pub fn limits(&self, name: &str, wanted: &Wanted) -> Limits {
        let mut limits = Limits::default();
        for (controller, amount) in [
            (Controller::Cpu, wanted.cpu_milli),
            (Controller::Memory, wanted.memory_bytes),
            (Controller::Pids, wanted.processes),
        ] {
            let Some(amount) = amount else { continue };
            let (path, settings) = match (self.places.get(&controller), controller) {
                (Some(Place::Unified), _) => {
                    let Some(base) = &self.unified else { continue };
                    (base.join(name), settings_v2(base, controller, amount))
                }
                (Some(Place::Own(base)), _) => (base.join(name), settings_v1(base, controller, amount)),
                (None, Controller::Memory) => {
                    limits.address_space = Some(amount);
                    continue;
                }
                (None, Controller::Pids) => {
                    limits.processes = Some(amount);
                    continue;
                }
                (None, Controller::Cpu) => continue,
            };
            match limits.groups.iter_mut().find(|group| group.path == path) {
                Some(group) => group.settings.extend(settings),
                None => limits.groups.push(Group { path, settings }),
            }
        }
        limits
    }

    /// All cgroups, of every tree, whose name begins so.
    #[must_use]
    pub fn named(&self, prefix: &str) -> Vec<PathBuf> {
        let own = self.places.values().filter_map(|place| match place {
            Place::Own(base) => Some(base),
            Place::Unified => None,
        });
        let entries = own.chain(&self.unified).flat_map(|base| fs::read_dir(base).into_iter().flatten().flatten());
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect()
    }

    /// Kills and removes cgroups whose name begins with `prefix` and that nobody wants any more. Gives those that
    /// were found, and whether all are gone.
    pub fn remove_stale(&self, prefix: &str, wanted: impl Fn(&str) -> bool) -> (Vec<PathBuf>, bool) {
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut found = self.named(prefix);
        found.retain(|path| !wanted(&name(path)));
        let gone = found.iter().fold(true, |gone, path| gone & put_away(path).unwrap_or(false));
        (found, gone)
    }
}

fn settings_v2(base: &Path, controller: Controller, amount: u64) -> Vec<(String, String)> {
    let setting = |file: &str, value: String| (file.to_owned(), value);
    match controller {
        Controller::Cpu => vec![setting("cpu.max", format!("{} {CPU_PERIOD_US}", quota_us(amount)))],
        // One process that is killed for want of memory takes the others along: half a build is none.
        Controller::Memory => {
            let mut settings =
                vec![setting("memory.max", amount.to_string()), setting("memory.oom.group", "1".to_owned())];
            // There only where swap is accounted for.
            if base.join("memory.swap.max").exists() {
                settings.push(setting("memory.swap.max", "0".to_owned()));
            }
            settings
        }
        Controller::Pids => vec![setting("pids.max", amount.to_string())],
    }
}

fn settings_v1(base: &Path, controller: Controller, amount: u64) -> Vec<(String, String)> {
    let setting = |file: &str, value: String| (file.to_owned(), value);
    match controller {
        Controller::Cpu => vec![
            setting("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
            setting("cpu.cfs_quota_us", quota_us(amount).to_string()),
        ],
        Controller::Memory => {
            let mut settings = vec![setting("memory.limit_in_bytes", amount.to_string())];
            // Memory and swap together; there only where swap is accounted for.
            if base.join("memory.memsw.limit_in_bytes").exists() {
                settings.push(setting("memory.memsw.limit_in_bytes", amount.to_string()));
            }
            settings
        }
        Controller::Pids => vec![setting("pids.max", amount.to_string())],
    }
}

fn quota_us(cpu_milli: u64) -> u64 {
    cpu_milli.saturating_mul(CPU_US_PER_MILLI).max(CPU_QUOTA_US_MIN)
}

/// A cgroup file system that is mounted: which part of the tree, and where.
struct Mount {
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// The directory of a cgroup.
    fn directory(&self, cgroup: &str) -> PathBuf {
        let cgroup = Path::new(cgroup);
        let below = cgroup.strip_prefix(&self.root).or_else(|_| cgroup.strip_prefix("/")).unwrap_or(cgroup);
        self.point.join(below)
    }
}

/// The first mount whose file system and options are wanted.
fn mount_of(mountinfo: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<Mount> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        let (kind, options) = (filesystem.next()?, filesystem.nth(1)?);
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        wanted(kind, options).then(|| Mount { root: root.into(), point: point.into() })
    })
}

/// This process's cgroup in the tree whose lines begin so.
fn own_path<'a>(cgroups: &'a str, prefix: &str) -> Option<&'a str> {
    cgroups.lines().find_map(|line| line.strip_prefix(prefix))
}

fn v1_base(mounts: &str, own: &str, controller: &str) -> Option<PathBuf> {
    let has = |options: &str| options.split(',').any(|option| option == controller);
    let mount = mount_of(mounts, |kind, options| kind == "cgroup" && has(options))?;
    let line = own.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        has(controllers).then_some(path)
    })?;
    Some(mount.directory(line))
}

/// Below the own cgroup; beside it, where it is the leaf that [`delegate`] or systemd made for this process.
fn unified_base(mounts: &str, own: &str) -> Option<PathBuf> {
    let mount = mount_of(mounts, |kind, _| kind == "cgroup2")?;
    let own = mount.directory(own_path(own, "0::")?);
    let parent = own.parent().filter(|_| own.file_name().is_some_and(|name| name == LEAF));
    Some(parent.filter(|parent| is_writable(&parent.join("cgroup.procs"))).unwrap_or(&own).to_owned())
}

/// The cgroup that the agent itself is in, below the one that is delegated to it (systemd: `DelegateSubgroup=`).
const LEAF: &str = "agent";

/// Enables controllers for the cgroups beside this process's own.
fn delegate(own: &Path) -> io::Result<()> {
    let base = if own.file_name().is_some_and(|name| name == LEAF) {
        own.parent().unwrap_or(own)
    } else {
        // In a service systemd could not start the next agent while this one's builds run: it has to make the leaf itself.
        let in_service = own.extension().is_some_and(|extension| extension == "service");
        let alone = fs::read_to_string(own.join("cgroup.procs"))?.trim() == std::process::id().to_string();
        let has_controllers = !fs::read_to_string(own.join("cgroup.controllers"))?.trim().is_empty();
        if in_service || !alone || !has_controllers {
            return Ok(());
        }
        let leaf = own.join(LEAF);
        match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => fs::write(leaf.join("cgroup.procs"), "0")?,
        }
        own
    };
    for controller in Controller::ALL {
        // Each for itself: which are there depends on what was delegated.
        let _ = fs::write(base.join("cgroup.subtree_control"), format!("+{}", controller.name()));
    }
    Ok(())
}

/// The controllers of cgroups made here; `None` when none can be made that can be killed at once.
fn probe_unified(base: &Path) -> Option<Vec<Controller>> {
    let found = probe(base, |probe| {
        let files = [(Controller::Cpu, "cpu.max"), (Controller::Memory, "memory.max"), (Controller::Pids, "pids.max")];
        let controllers = files.iter().filter(|(_, file)| is_writable(&probe.join(file))).map(|(of, _)| *of).collect();
        probe.join("cgroup.kill").exists().then_some(controllers)
    });
    found.flatten()
}

/// Makes a cgroup, looks at it, and removes it. Another thread's may be there at the same time.
fn probe<T>(base: &Path, look: impl FnOnce(&Path) -> T) -> Option<T> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = base.join(format!("helix-probe-{}-{number}", std::process::id()));
    fs::create_dir(&path).ok()?;
    let seen = look(&path);
    fs::remove_dir(&path).ok()?;
    Some(seen)
}

fn is_writable(file: &Path) -> bool {
    fs::OpenOptions::new().write(true).open(file).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "30 29 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                          31 29 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n\
                          32 29 0:28 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const OWN: &str = "4:memory:/docker/x/y\n3:cpu,cpuacct:/\n0::/b/c\n";

    #[test]
    fn finds_each_tree_among_others() {
        assert_eq!(unified_base(HYBRID, OWN), Some("/sys/fs/cgroup/unified/b/c".into()));
        assert_eq!(v1_base(HYBRID, OWN, "cpu"), Some("/sys/fs/cgroup/cpu".into()));
        assert_eq!(v1_base(HYBRID, OWN, "memory"), Some("/sys/fs/cgroup/memory/y".into()));
        assert_eq!(v1_base(HYBRID, OWN, "pids"), None);
        assert_eq!(unified_base("30 29 0:26 / /x rw - cgroup cgroup rw\n", OWN), None);
    }

    #[test]
    fn who_looks_at_the_same_time_does_not_meet() {
        let base = tempfile::tempdir().unwrap();
        let look = |look: &dyn Fn() -> bool| probe(base.path(), |path| path.is_dir() && look());
        assert_eq!(look(&|| look(&|| true) == Some(true)), Some(true));
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_what_is_limited_costs_a_cgroup() {
        let own = |path: &str| Place::Own(path.into());
        let places =
            [(Controller::Cpu, own("/cpu")), (Controller::Memory, Place::Unified), (Controller::Pids, Place::Unified)];
        let host = Host { unified: Some("/u".into()), places: places.into() };
        assert_eq!(host.limits("n", &Wanted::default()), Limits::default());
        let wanted = Wanted { cpu_milli: Some(1500), memory_bytes: Some(7), processes: Some(9) };
        let limits = host.limits("n", &wanted);
        let text = |settings: &[(&str, &str)]| -> Vec<(String, String)> {
            settings.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect()
        };
        assert_eq!(limits.groups[0].path, Path::new("/cpu/n"));
        assert_eq!(limits.groups[0].settings, text(&[("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "150000")]));
        assert_eq!(limits.groups[1].path, Path::new("/u/n"));
        assert_eq!(
            limits.groups[1].settings,
            text(&[("memory.max", "7"), ("memory.oom.group", "1"), ("pids.max", "9")])
        );
        let bare = Host::default().limits("n", &wanted);
        assert!(bare.groups.is_empty());
        assert_eq!((bare.address_space, bare.processes), (Some(7), Some(9)));
    }
}
