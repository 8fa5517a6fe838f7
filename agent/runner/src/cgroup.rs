//! A cgroup per attempt, where cgroup v2 is there and writable: one write kills everything in it, and it knows when
//! nothing is left. It also clears up after a runner that died. Without one everything works, with less proof.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where attempts' cgroups may be made: below this process's own cgroup v2, if a directory can be made there and it
/// has `cgroup.kill` (Linux 5.14). On hybrid hosts that is the unified tree. `None`: go without.
#[must_use]
pub fn base() -> Option<PathBuf> {
    let mount = mount_point(&fs::read_to_string("/proc/self/mountinfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let base = mount.join(own_path(&groups)?.trim_start_matches('/'));
    let probe = base.join(format!("helix-probe-{}", std::process::id()));
    fs::create_dir(&probe).ok()?;
    let usable = probe.join("cgroup.kill").exists();
    fs::remove_dir(&probe).ok()?;
    usable.then_some(base)
}

/// The mount point of the cgroup2 file system.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    };
    mountinfo.lines().find_map(of_line)
}

/// This process's cgroup v2.
fn own_path(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// An attempt's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes it. One that exists already is refused: whoever is in there is not ours.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        fs::create_dir(path)?;
        Ok(Self { path: path.to_owned() })
    }

    /// Names one that exists; `None` when it does not.
    #[must_use]
    pub fn existing(path: &Path) -> Option<Self> {
        path.join("cgroup.procs").exists().then(|| Self { path: path.to_owned() })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a process puts itself in, by writing `0`.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Kills everything in it and below, forks in flight included.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Whether a live process is in it or below.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn populated(&self) -> io::Result<bool> {
        let events = fs::read_to_string(self.path.join("cgroup.events"))?;
        Ok(!events.lines().any(|line| line == "populated 0"))
    }

    /// How often the kernel killed in here for want of memory; `None` without a memory controller.
    #[must_use]
    pub fn memory_kills(&self) -> Option<u64> {
        let events = fs::read_to_string(self.path.join("memory.events")).ok()?;
        events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok()
    }

    /// Removes it and the ones that the build made below.
    ///
    /// # Errors
    /// Those of the file system; not when it is gone already.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(_) => remove_below(&self.path, 0),
            Ok(()) => Ok(()),
        }
    }
}

/// The depth to which cgroups are removed; a build that nests deeper leaves empty ones.
const DEPTH_MAX: u32 = 64;

fn remove_below(path: &Path, depth: u32) -> io::Result<()> {
    if depth < DEPTH_MAX {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove_below(&entry.path(), depth + 1)?;
            }
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_unified_tree_among_others() {
        let hybrid = "30 29 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 29 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 29 0:26 / /x rw - cgroup cgroup rw\n"), None);
        assert_eq!(own_path("4:memory:/a\n0::/b/c\n"), Some("/b/c"));
    }
}
