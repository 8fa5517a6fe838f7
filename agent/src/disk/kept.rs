//! Workdirs of failed builds that somebody wants to look at: kept for their time, within what the agent's owner allows, and the
//! first thing to go when there is no room.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::attempt::workdir::{kept_dir, remove_whole};

/// Kept workdirs, the one that was kept first at the beginning.
///
/// # Errors
/// Those of the file system.
pub fn list(base: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(kept_dir(base)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // Moving it there changed it last. It may be gone again.
        if let Ok(data) = entry.metadata() {
            found.push(((data.ctime(), data.ctime_nsec()), entry.path()));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Removes the oldest until there are at most so many. Gives how many were removed.
///
/// # Errors
/// Those of the file system.
pub fn trim(base: &Path, most: usize) -> io::Result<usize> {
    let kept = list(base)?;
    let too_many = kept.len().saturating_sub(most);
    for path in &kept[..too_many] {
        remove_whole(path)?;
    }
    Ok(too_many)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::workdir::Workdir;

    #[test]
    fn the_oldest_go_first() {
        let base = tempfile::tempdir().unwrap();
        assert_eq!(trim(base.path(), 0).unwrap(), 0);
        // Their names and times to live say nothing about their age.
        let kept: Vec<PathBuf> = [("z", 900), ("a", 1000), ("m", 100)]
            .into_iter()
            .map(|(name, until)| {
                let workdir = Workdir::new(base.path(), &format!("{name}.0.1").parse().unwrap());
                workdir.create().unwrap();
                workdir.keep(base.path(), until).unwrap()
            })
            .collect();
        assert_eq!(list(base.path()).unwrap(), kept);
        assert_eq!(trim(base.path(), 2).unwrap(), 1);
        assert_eq!(list(base.path()).unwrap(), kept[1..]);
    }
}
