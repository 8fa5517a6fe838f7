//! A new node's directory while it is filled from a backup, and an old one's while its registry is given to a new cluster.
//!
//! Invariant: whatever ends either in the middle, the directory is then no node that starts, or still the old one; the
//! same command, repeated, begins anew or goes on.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use helix_common::files::{Durability, sync_directory, write_atomic};
use helix_common::wall;

use super::{IDENTITY, LOCK, NodeDir, NodeDirError, NodeIdentity, RECOVERY, lock, write_sealed};

/// Stands in a directory that is being filled: what else is there is of no worth.
const UNFINISHED: &str = "unfinished";

/// In the recovery's directory: what is to take the old one's place, and the name of where that goes.
const NEW: &str = "new";
pub(super) const READY: &str = "ready";

/// What takes the place of the old one's, in this order.
const REPLACED: &[&str] = &["log", "log.made", "registry", "snapshots"];

fn at(path: &Path) -> impl Fn(std::io::Error) -> NodeDirError {
    let path = path.to_owned();
    move |source| NodeDirError::Io { path: path.clone(), source }
}

/// A directory that becomes a node by [`Self::finish`]; dropped before, it is as empty or absent as it was.
#[derive(Debug)]
pub struct Filling {
    path: PathBuf,
    made: bool,
    done: bool,
    _lock: File,
}

impl Filling {
    /// Begins in an empty or absent directory, or in one where an earlier attempt was cut short. Blocks, as all here does.
    ///
    /// # Errors
    /// [`NodeDirError`]; then nothing was changed.
    pub fn begin(path: &Path) -> Result<Self, NodeDirError> {
        let made = !path.exists();
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))?;
        let lock = lock(path)?;
        let names = names(path)?;
        let unfinished = names.iter().any(|name| name == UNFINISHED) && !names.iter().any(|name| name == IDENTITY);
        if !unfinished && names.iter().any(|name| name != LOCK) {
            return Err(NodeDirError::NotEmpty(path.to_owned()));
        }
        let filling = Self { path: path.to_owned(), made, done: false, _lock: lock };
        filling.clear(&[LOCK, UNFINISHED]);
        write_atomic(&path.join(UNFINISHED), b"", 0o600, Durability::Synced).map_err(at(path))?;
        Ok(filling)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it a node. Everything else in it must be durable by now.
    ///
    /// # Errors
    /// The failing write.
    pub fn finish(mut self, identity: &NodeIdentity) -> Result<(), NodeDirError> {
        sync_directory(&self.path).map_err(at(&self.path))?;
        write_sealed(&self.path.join(IDENTITY), identity)?;
        self.done = true;
        // The order matters: the directory is a node with or without it, once there is an identity.
        std::fs::remove_file(self.path.join(UNFINISHED)).map_err(at(&self.path))
    }

    fn clear(&self, keep: &[&str]) {
        for name in names(&self.path).unwrap_or_default().into_iter().filter(|name| !keep.contains(&name.as_str())) {
            remove(&self.path.join(name));
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if !self.done {
            // The marker last: what cannot be removed is swept by the next attempt.
            self.clear(&[UNFINISHED]);
            self.clear(&[]);
            if self.made {
                let _ = std::fs::remove_dir(&self.path);
            }
        }
    }
}

fn names(path: &Path) -> Result<Vec<String>, NodeDirError> {
    let entries = std::fs::read_dir(path).map_err(at(path))?;
    entries.map(|entry| Ok(entry.map_err(at(path))?.file_name().to_string_lossy().into_owned())).collect()
}

/// Best effort: who needs it gone looks again.
fn remove(path: &Path) {
    let is_directory = std::fs::symlink_metadata(path).is_ok_and(|there| there.is_dir());
    let _ = if is_directory { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}

/// A node's directory, locked, whose registry is to get new members.
#[derive(Debug)]
pub struct Replacing {
    dir: NodeDir,
    recovery: PathBuf,
    done: bool,
}

/// What [`Replacing::begin`] found.
#[derive(Debug)]
pub enum Begun {
    /// Nothing has been replaced yet.
    Anew(Replacing),
    /// An earlier attempt had everything in place but the switch, which is done now. What was there before lies here.
    Completed(PathBuf),
}

impl Replacing {
    /// Locks a node's directory. An attempt that was cut short before its switch is forgotten, one after it completed.
    ///
    /// # Errors
    /// [`NodeDirError`].
    pub fn begin(path: &Path) -> Result<Begun, NodeDirError> {
        let recovery = path.join(RECOVERY);
        if recovery.join(READY).exists() {
            let _lock = lock(path)?;
            return switch(path).map(Begun::Completed);
        }
        let dir = NodeDir::open(path)?;
        remove(&recovery);
        DirBuilder::new().recursive(true).mode(0o700).create(recovery.join(NEW)).map_err(at(&recovery))?;
        Ok(Begun::Anew(Self { dir, recovery, done: false }))
    }

    /// The node that is there.
    #[must_use]
    pub fn dir(&self) -> &NodeDir {
        &self.dir
    }

    /// A directory for whatever is needed on the way; it goes.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.recovery.join("scratch")
    }

    /// Where the new log, registry and snapshots are to be made.
    #[must_use]
    pub fn new_data(&self) -> PathBuf {
        self.recovery.join(NEW)
    }

    /// Puts what was made into place, and the node under its new identity. Gives where the old data lies.
    ///
    /// # Errors
    /// The failing write: the node then does not start until the command was repeated.
    pub fn finish(mut self, identity: &NodeIdentity) -> Result<PathBuf, NodeDirError> {
        let new = self.new_data();
        write_sealed(&new.join(IDENTITY), identity)?;
        sync_directory(&new).map_err(at(&new))?;
        let aside = format!("before-recovery-{}", wall::now_ms());
        write_atomic(&self.recovery.join(READY), aside.as_bytes(), 0o600, Durability::Synced)
            .map_err(at(&self.recovery))?;
        sync_directory(self.dir.path()).map_err(at(self.dir.path()))?;
        self.done = true;
        switch(self.dir.path())
    }
}

impl Drop for Replacing {
    fn drop(&mut self) {
        if !self.done {
            remove(&self.recovery);
        }
    }
}

/// Every step may have been done before.
fn switch(path: &Path) -> Result<PathBuf, NodeDirError> {
    let recovery = path.join(RECOVERY);
    let aside = std::fs::read_to_string(recovery.join(READY)).map_err(at(&recovery))?;
    let aside = path.join(aside);
    DirBuilder::new().recursive(true).mode(0o700).create(&aside).map_err(at(&aside))?;
    for name in REPLACED {
        let (new, old, kept) = (recovery.join(NEW).join(name), path.join(name), aside.join(name));
        if new.exists() {
            if old.exists() {
                std::fs::rename(&old, &kept).map_err(at(&old))?;
            }
            std::fs::rename(&new, &old).map_err(at(&new))?;
        }
    }
    // Who the node is comes last, and is never absent.
    let (new, old) = (recovery.join(NEW).join(IDENTITY), path.join(IDENTITY));
    if new.exists() {
        std::fs::copy(&old, aside.join(IDENTITY)).map_err(at(&aside))?;
        std::fs::rename(&new, &old).map_err(at(&new))?;
    }
    sync_directory(&aside).map_err(at(&aside))?;
    sync_directory(path).map_err(at(path))?;
    std::fs::remove_file(recovery.join(READY)).map_err(at(&recovery))?;
    sync_directory(&recovery).map_err(at(&recovery))?;
    remove(&recovery);
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use helix_model::NodeId;

    use super::*;

    fn identity(epoch: u64) -> NodeIdentity {
        NodeIdentity { cluster: "demo".to_owned(), node: 4, epoch, members: BTreeMap::new() }
    }

    #[test]
    fn a_directory_that_was_not_filled_is_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let (absent, empty, taken) = (root.path().join("absent"), root.path().join("empty"), root.path().join("taken"));
        std::fs::create_dir(&empty).unwrap();
        std::fs::create_dir(&taken).unwrap();
        std::fs::write(taken.join("letter"), "x").unwrap();
        for path in [&absent, &empty] {
            let filling = Filling::begin(path).unwrap();
            std::fs::create_dir(filling.path().join("log")).unwrap();
            drop(filling);
        }
        assert!(!absent.exists() && names(&empty).unwrap().is_empty());
        assert!(matches!(Filling::begin(&taken), Err(NodeDirError::NotEmpty(_))));
        assert_eq!(std::fs::read_to_string(taken.join("letter")).unwrap(), "x");
    }

    #[test]
    fn one_that_was_cut_short_is_no_node_and_is_filled_anew() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("data");
        let filling = Filling::begin(&path).unwrap();
        std::fs::write(path.join("half"), "x").unwrap();
        // As a kill leaves it.
        let mut filling = std::mem::ManuallyDrop::new(filling);
        filling._lock = File::open(&path).unwrap();
        assert!(matches!(NodeDir::open(&path), Err(NodeDirError::Empty(_))));
        let filling = Filling::begin(&path).unwrap();
        assert!(!path.join("half").exists());
        filling.finish(&identity(7)).unwrap();
        assert_eq!(NodeDir::open(&path).unwrap().identity().epoch, 7);
        assert!(matches!(Filling::begin(&path), Err(NodeDirError::NotEmpty(_))));
    }

    fn old_node(path: &Path) {
        let members = BTreeMap::from([(NodeId(4), "127.0.0.1:1".to_owned())]);
        super::super::init(path, "demo", NodeId(4), &members).unwrap();
        for name in REPLACED {
            std::fs::write(path.join(name), "old").unwrap();
        }
    }

    fn prepared(path: &Path) -> Replacing {
        let Begun::Anew(replacing) = Replacing::begin(path).unwrap() else { panic!("nothing is there to complete") };
        for name in REPLACED {
            std::fs::write(replacing.new_data().join(name), "new").unwrap();
        }
        replacing
    }

    fn all(path: &Path, text: &str) {
        for name in REPLACED {
            assert_eq!(std::fs::read_to_string(path.join(name)).unwrap(), text, "{name}");
        }
    }

    #[test]
    fn a_switch_is_whole_wherever_it_was_cut_short() {
        // How many renames were done before the cut: of each file two.
        for cut in 0..=2 * REPLACED.len() + 1 {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("data");
            old_node(&path);
            let replacing = prepared(&path);
            write_sealed(&replacing.new_data().join(IDENTITY), &identity(9)).unwrap();
            std::fs::write(replacing.recovery.join(READY), "aside").unwrap();
            std::fs::create_dir(path.join("aside")).unwrap();
            let new = replacing.new_data();
            let mut renames: Vec<(PathBuf, PathBuf)> = Vec::new();
            for name in REPLACED {
                renames.push((path.join(name), path.join("aside").join(name)));
                renames.push((new.join(name), path.join(name)));
            }
            renames.push((new.join(IDENTITY), path.join(IDENTITY)));
            std::fs::copy(path.join(IDENTITY), path.join("aside").join(IDENTITY)).unwrap();
            renames[..cut].iter().for_each(|(from, to)| std::fs::rename(from, to).unwrap());
            replacing.dir.release();
            let _ = std::mem::ManuallyDrop::new(replacing);
            let error = NodeDir::open(&path).unwrap_err().to_string();
            assert!(error.contains("recover"), "{cut}: {error}");
            let Begun::Completed(aside) = Replacing::begin(&path).unwrap() else { panic!("{cut}: it begins anew") };
            all(&path, "new");
            all(&aside, "old");
            assert_eq!(NodeDir::open(&path).unwrap().identity().epoch, 9);
            assert!(!path.join(RECOVERY).exists());
        }
    }

    #[test]
    fn a_recovery_that_was_refused_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("data");
        old_node(&path);
        let before = std::fs::read(path.join(IDENTITY)).unwrap();
        drop(prepared(&path));
        all(&path, "old");
        assert!(!path.join(RECOVERY).exists());
        assert_eq!(std::fs::read(path.join(IDENTITY)).unwrap(), before);
        let aside = prepared(&path).finish(&identity(9)).unwrap();
        all(&path, "new");
        all(&aside, "old");
        assert_eq!(std::fs::read(aside.join(IDENTITY)).unwrap(), before);
    }
}
