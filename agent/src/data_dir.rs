//! The agent's data directory: who it belongs to, and where things are in it.
//!
//! Invariant: one agent at a time, and one instance id for as long as directory and boot last.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use helix_common::files::{Durability, remove_temporaries, write_atomic};
use helix_model::{AttemptKey, Instance};
use helix_runner::AttemptDir;
use rustix::fs::{FlockOperation, flock};

/// How long another agent's lock is waited for: one that was killed may hold it until the last of its threads is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A data directory that this process holds.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    instance: Instance,
    /// Its lock is the directory's.
    _lock: File,
}

impl DataDir {
    /// Takes the directory, and makes what is missing in it.
    ///
    /// # Errors
    /// When another agent has it, or it cannot be read and written.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        make_private(root).with_context(|| format!("cannot make the data directory {}", root.display()))?;
        let lock_path = root.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&lock_path);
        let lock = lock.with_context(|| format!("cannot open {}", lock_path.display()))?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if Instant::now() >= deadline {
                bail!("another agent uses {}: give each agent its own data_dir", root.display());
            }
            std::thread::sleep(LOCK_RETRY);
        }
        for part in ["attempts", "mirrors"] {
            make_private(&root.join(part)).with_context(|| format!("cannot make {part} in {}", root.display()))?;
        }
        for part in [root.to_owned(), root.join("mirrors")] {
            remove_temporaries(&part).with_context(|| format!("cannot clear up {}", part.display()))?;
        }
        let instance = instance(root)?;
        Ok(Self { root: root.to_owned(), instance, _lock: lock })
    }

    /// This life of the worker.
    #[must_use]
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// An attempt's directory.
    #[must_use]
    pub fn attempt(&self, key: &AttemptKey) -> AttemptDir {
        AttemptDir::new(self.root.join("attempts").join(key.to_string()))
    }

    /// The attempts that have a directory, and names that are none of ours.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn attempts(&self) -> io::Result<(Vec<AttemptKey>, Vec<PathBuf>)> {
        let (mut keys, mut strangers) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(self.root.join("attempts"))? {
            let entry = entry?;
            match entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                Some(key) => keys.push(key),
                None => strangers.push(entry.path()),
            }
        }
        keys.sort();
        Ok((keys, strangers))
    }

    /// Repositories' mirrors.
    #[must_use]
    pub fn mirrors(&self) -> PathBuf {
        self.root.join("mirrors")
    }

    /// The socket of `helix-agent detach`.
    #[must_use]
    pub fn control_socket(root: &Path) -> PathBuf {
        root.join("control.sock")
    }
}

/// Makes a directory that nobody else may enter; one that exists is fine.
///
/// # Errors
/// Those of the file system.
pub fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn instance(root: &Path) -> anyhow::Result<Instance> {
    let path = root.join("instance");
    let id = match fs::read_to_string(&path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = uuid::Uuid::new_v4().simple().to_string();
            write_atomic(&path, id.as_bytes(), 0o600, Durability::Synced)
                .with_context(|| format!("cannot write {}", path.display()))?;
            id
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let whole = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !whole {
        bail!("{} is damaged: remove it if no build of this agent runs any more", path.display());
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the kernel's boot id")?;
    Ok(Instance::new(&format!("{id}.{}", boot.trim()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_at_a_time_and_the_same_instance_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        let error = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another agent"), "{error}");
        let instance = first.instance().clone();
        drop(first);
        assert_eq!(DataDir::open(dir.path()).unwrap().instance(), &instance);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(DataDir::open(other.path()).unwrap().instance(), &instance);
        assert_eq!(instance.boot_id(), fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    }

    #[test]
    fn a_damaged_instance_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("instance"), "12").unwrap();
        assert!(DataDir::open(dir.path()).unwrap_err().to_string().contains("damaged"));
    }
}
