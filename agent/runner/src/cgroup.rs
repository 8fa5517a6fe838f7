//! Cgroups of an attempt. In the unified tree one write kills everything in a cgroup, and it knows when nothing is left;
//! controllers, there or in trees of their own, limit what is in it. They also clear up after a runner that died.
//! Without any of them everything works, with less proof and weaker limits.

mod groups;
mod host;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use groups::Groups;
pub use host::{Controller, Enforcement, Host, Wanted};

/// Where attempts' cgroups may be made: below this process's own cgroup v2, if a directory can be made there and it
/// has `cgroup.kill` (Linux 5.14). On hybrid hosts that is the unified tree. `None`: go without.
#[must_use]
pub fn base() -> Option<PathBuf> {
    Host::find().unified
}

/// An attempt's cgroup in the unified tree.
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

    /// How often the kernel killed in here for want of memory: the limit may be one of the cgroups above.
    #[must_use]
    pub fn memory_kills(&self) -> u64 {
        groups::memory_kills(&self.path)
    }

    /// Removes it and the ones that the build made below.
    ///
    /// # Errors
    /// Those of the file system; not when it is gone already.
    pub fn remove(&self) -> io::Result<()> {
        remove(&self.path)
    }
}

/// Removes a cgroup and those below; that there is none is fine.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => remove_below(path, 0),
        Ok(()) => Ok(()),
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
