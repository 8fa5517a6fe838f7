//! Mirrors that go when there is no room: the least recently used first, and never one that anybody uses.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use rustix::fs::{FlockOperation, flock};

use super::{COMPLETE, LOCK, Mirror, Mirrors};
use crate::attempt::workdir::remove_tree;
use crate::blocking::blocking;

/// A mirror that somebody uses.
#[derive(Debug)]
pub struct Lease {
    _mirror: Arc<Mirror>,
}

/// What a mirror's name begins with when it is being removed.
const REMOVING: &str = ".removing-";

impl Mirrors {
    /// Keeps a repository's mirror from being collected for as long as it is held.
    #[must_use]
    pub fn lease(&self, url: &str) -> Lease {
        Lease { _mirror: self.mirror(url) }
    }

    /// Removes the mirror that was not used for the longest time, of those that nobody uses. False when there is none.
    pub async fn remove_least_used(&self) -> bool {
        let Ok(names) = by_last_use(&self.root) else { return false };
        for name in names {
            match self.set_aside(&name) {
                Ok(Some(path)) => {
                    let removed = blocking(move || remove_tree(&path)).await;
                    if let Err(error) = &removed {
                        tracing::warn!(mirror = name, %error, "a mirror cannot be removed");
                    }
                    return removed.is_ok();
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(mirror = name, %error, "a mirror cannot be removed"),
            }
        }
        false
    }

    /// Moves a mirror away that nobody uses, so that whoever wants it from now on makes a new one.
    fn set_aside(&self, name: &str) -> io::Result<Option<PathBuf>> {
        let path = self.root.join(format!("{name}.git"));
        // Nobody can take the mirror while this is held. Nothing panics while holding it.
        let mut mirrors = self.mirrors.lock().unwrap_or_else(PoisonError::into_inner);
        if mirrors.get(name).is_some_and(|mirror| Arc::strong_count(mirror) > 1) {
            return Ok(None);
        }
        // A git of an agent that died may still write.
        if let Ok(lock) = File::open(path.join(LOCK))
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
        {
            return Ok(None);
        }
        let aside = self.root.join(format!("{REMOVING}{name}"));
        fs::rename(&path, &aside)?;
        mirrors.remove(name);
        Ok(Some(aside))
    }
}

/// Removes what an earlier agent was removing.
pub(super) fn remove_set_aside(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(REMOVING)
            && let Err(error) = remove_tree(&entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "a mirror cannot be removed");
        }
    }
}

/// Mirrors by the time of their last use, the oldest first.
fn by_last_use(root: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".git"));
        if let Some(name) = name {
            // One that was never complete goes first.
            let used = fs::metadata(path.join(COMPLETE)).and_then(|data| data.modified()).ok();
            found.push((used, name.to_owned()));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}
