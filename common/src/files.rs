//! Files that are never seen half-written, and how much room is left.
//!
//! A reader of a path given to [`write_atomic`] sees the old bytes or the new ones, whatever crashes when.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use helix_failpoint::{self as failpoint, Point};

/// Whether a write must survive a power cut before it is reported done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// The file and its directory entry are fsynced.
    Synced,
    /// Survives the process, not the machine.
    Unsynced,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Replaces `path` by a file of these bytes and mode, in one step. Blocks: call it off the async threads
/// where it matters. A temporary file that a crash leaves behind is named `.NAME.PID.N.tmp`.
///
/// # Errors
/// The first failing system call; no temporary file is left, and the path has its old file or, where the directory alone could
/// not be synced, the new one. After a failed fsync the write must be taken as lost: repeating the fsync proves nothing, repeating
/// the whole call does.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32, durability: Durability) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_and_rename(&temporary, path, bytes, mode, durability);
    if written.is_err() {
        // Best effort: the error that matters is the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

pub(crate) fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::other(format!("{} names no file", path.display())))?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_file_name(format!(".{}.{}.{number}.tmp", name.to_string_lossy(), std::process::id())))
}

fn write_and_rename(from: &Path, to: &Path, bytes: &[u8], mode: u32, durability: Durability) -> io::Result<()> {
    // One left by a former process with the same id is ours to replace.
    match std::fs::remove_file(from) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(from)?;
    failpoint::hit(Point::FileWrite)?;
    file.write_all(bytes)?;
    failpoint::hit(Point::FileWritten)?;
    // The order matters: bytes, then name, then the directory that holds the name.
    if durability == Durability::Synced {
        file.sync_all()?;
    }
    drop(file);
    failpoint::hit(Point::FileSynced)?;
    std::fs::rename(from, to)?;
    failpoint::hit(Point::FileRenamed)?;
    if durability == Durability::Synced { sync_directory(directory_of(to)) } else { Ok(()) }
}

/// Removes what calls of [`write_atomic`] that a crash cut short left in a directory. Only for whoever has the directory for
/// itself: another process's call under way would lose its file.
///
/// # Errors
/// Those of the file system.
pub fn remove_temporaries(directory: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_temporary) && entry.file_type()?.is_file() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a name is one that [`temporary_beside`] gives: `.NAME.PID.N.tmp`.
fn is_temporary(name: &str) -> bool {
    let number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u64>().is_ok());
    let Some(inner) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")) else { return false };
    let mut parts = inner.rsplitn(3, '.');
    number(parts.next()) && number(parts.next()) && parts.next().is_some_and(|name| !name.is_empty())
}

/// Fsyncs a directory, so that names made or removed in it survive a power cut.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Bytes an unprivileged process may still write on the file system that holds `path`.
///
/// # Errors
/// When `path` does not exist or its file system does not answer.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Raises this process's limit of open descriptors to what the system allows, and returns it. Programs that are
/// started inherit it; one that must not have it is given the former limit by whoever starts it.
///
/// # Errors
/// When the system refuses.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write_atomic(&path, b"one", 0o600, Durability::Synced).unwrap();
        write_atomic(&path, b"two", 0o600, Durability::Unsynced).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        assert!(write_atomic(&path, b"x", 0o600, Durability::Synced).is_err());
        assert!(path.is_dir());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(write_atomic(Path::new("/"), b"x", 0o600, Durability::Synced).is_err());
    }

    #[test]
    fn what_a_crash_left_goes_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        let left = temporary_beside(&path).unwrap();
        let kept = ["node.json", ".node.json.tmp", ".tmp", ".1.2.tmp", ".node.json.1.x.tmp", "node.json.1.2.tmp"];
        for name in kept {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        std::fs::write(&left, "half").unwrap();
        std::fs::create_dir(directory.path().join(".node.json.1.2.tmp")).unwrap();
        remove_temporaries(directory.path()).unwrap();
        assert!(!left.exists() && kept.iter().all(|name| directory.path().join(name).exists()));
        assert!(directory.path().join(".node.json.1.2.tmp").exists(), "no file of ours");
        assert!(remove_temporaries(&path).is_err());
    }

    #[test]
    fn room_is_measured() {
        assert!(available_bytes(Path::new("/")).unwrap() > 0);
        assert!(available_bytes(Path::new("/does/not/exist")).is_err());
    }
}
