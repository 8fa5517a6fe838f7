//! The directories a build works in, and their removal however the build left them.
//!
//! An attempt has one directory under the base, mode 0700, with `work` (the source), `home` and `tmp` in it.
//! Invariants of removal: no link is followed, nothing outside is touched, and no depth or permission stops it.

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use helix_failpoint::{self as failpoint, Point};
use helix_model::AttemptKey;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, chmodat, openat, renameat, unlinkat};
use rustix::io::Errno;

use crate::data_dir::make_private;
use crate::disk::wall;

/// An attempt's directories. Naming them touches nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workdir {
    root: PathBuf,
}

impl Workdir {
    /// The directories of an attempt: always the same ones, so that an agent that starts again finds them.
    #[must_use]
    pub fn new(base: &Path, key: &AttemptKey) -> Self {
        Self { root: base.join(key.to_string()) }
    }

    /// What holds all of it.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the source lies and the command starts.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// The build's `HOME`.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        self.root.join("home")
    }

    /// The build's `TMPDIR`.
    #[must_use]
    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Makes them, empty, whatever was there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&self) -> io::Result<()> {
        match std::fs::symlink_metadata(&self.root) {
            Ok(_) => self.remove()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        for path in [&self.root, &self.work(), &self.home(), &self.tmp()] {
            make_private(path)?;
        }
        failpoint::hit(Point::WorkdirMade)
    }

    /// Removes everything; that nothing is there is fine.
    ///
    /// # Errors
    /// Those of the file system, such as an immutable file.
    pub fn remove(&self) -> io::Result<()> {
        remove_whole(&self.root)
    }

    /// Moves the directories where they stay until `until_ms` (Unix); see [`remove_expired`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep(&self, base: &Path, until_ms: u64) -> io::Result<PathBuf> {
        make_private(&kept_dir(base))?;
        let to = self.kept(base, until_ms);
        std::fs::rename(&self.root, &to)?;
        failpoint::hit(Point::WorkdirKept).map(|()| to)
    }

    /// Where [`Self::keep`] moves them.
    #[must_use]
    pub fn kept(&self, base: &Path, until_ms: u64) -> PathBuf {
        let name = self.root.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        kept_dir(base).join(format!("{name}@{until_ms}"))
    }
}

/// Where they stay.
pub(crate) fn kept_dir(base: &Path) -> PathBuf {
    // No attempt's name begins with a dot.
    base.join(".kept")
}

/// Removes kept directories whose time is over. Returns how many.
///
/// # Errors
/// Those of the file system.
pub fn remove_expired(base: &Path, now_ms: u64) -> io::Result<usize> {
    let entries = match std::fs::read_dir(kept_dir(base)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let until = name.to_str().and_then(|name| name.rsplit_once('@')).and_then(|(_, until)| until.parse().ok());
        if until.is_none_or(|until: u64| until <= now_ms) {
            remove_whole(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Removes a workdir, wherever it was moved to, with the walls around its parts; that nothing is there is fine.
///
/// # Errors
/// Those of the file system, such as an immutable file.
pub fn remove_whole(root: &Path) -> io::Result<()> {
    failpoint::hit(Point::WorkdirRemove)?;
    let project = wall::take_down(root);
    remove_tree(root)?;
    failpoint::pass(Point::WorkdirRemoved);
    project.map_or(Ok(()), wall::Project::release)
}

/// Removes a directory and all in it. Directories found on the way are first moved up to the top, so that depth costs
/// neither stack nor descriptors, and made accessible, so that their own modes do not matter.
///
/// # Errors
/// Those of the file system; what could not be removed stays.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(Errno::NOTDIR) => return Ok(unlinkat(CWD, path, AtFlags::empty())?),
        Err(error) => return Err(error.into()),
    }
    let _ = chmodat(CWD, path, Mode::RWXU, AtFlags::empty());
    let top = open_dir(CWD, path)?;
    let mut moved = Moved::default();
    empty(&top, &top, &mut moved)?;
    while let Some(name) = moved.pending.pop() {
        let inner = open_dir(&top, &name)?;
        empty(&inner, &top, &mut moved)?;
        unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
    }
    failpoint::hit(Point::TreeEmptied)?;
    Ok(unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

fn open_dir(at: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Directories that were moved up, by their new names.
#[derive(Default)]
struct Moved {
    /// Not yet emptied.
    pending: Vec<CString>,
    /// All of them: what is left alone when the top itself is emptied.
    names: HashSet<CString>,
}

/// Unlinks all in `dir`; directories that are not empty become children of `top`.
fn empty(dir: &OwnedFd, top: &OwnedFd, moved: &mut Moved) -> io::Result<()> {
    loop {
        // Read anew until nothing is left: entries must not move under a directory stream.
        // What was moved lies in the top; the same names elsewhere are the build's.
        let moved_here = std::ptr::eq(dir, top).then_some(&moved.names);
        let names = entries(dir, moved_here)?;
        if names.is_empty() {
            return Ok(());
        }
        for (name, kind) in names {
            let is_dir = match kind {
                FileType::Unknown => !matches!(unlinkat(dir, &name, AtFlags::empty()), Ok(())),
                FileType::Directory => true,
                _ => {
                    unlinkat(dir, &name, AtFlags::empty())?;
                    false
                }
            };
            if !is_dir || unlinkat(dir, &name, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            // Moving a directory writes its `..`, so its own mode counts.
            let _ = chmodat(dir, &name, Mode::RWXU, AtFlags::empty());
            let fresh = moved.fresh_name(top);
            renameat(dir, &name, top, &fresh)?;
            moved.names.insert(fresh.clone());
            moved.pending.push(fresh);
        }
    }
}

impl Moved {
    fn fresh_name(&self, top: &OwnedFd) -> CString {
        let mut number = self.names.len();
        loop {
            number += 1;
            let name = CString::new(format!(".helix-removing-{number}")).unwrap_or_default();
            // The build may have taken any name.
            if let Err(Errno::NOENT) = rustix::fs::statat(top, &name, AtFlags::SYMLINK_NOFOLLOW) {
                return name;
            }
        }
    }
}

/// What is in a directory, apart from what was moved there.
fn entries(dir: &OwnedFd, moved: Option<&HashSet<CString>>) -> io::Result<Vec<(CString, FileType)>> {
    const AT_ONCE_MAX: usize = 4096;
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." || moved.is_some_and(|moved| moved.contains(name)) {
            continue;
        }
        names.push((name.to_owned(), entry.file_type()));
        if names.len() == AT_ONCE_MAX {
            break;
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn workdir(base: &Path) -> Workdir {
        Workdir::new(base, &"b.0.1".parse().unwrap())
    }

    #[test]
    fn made_private_and_fresh() {
        let base = tempfile::tempdir().unwrap();
        let dir = workdir(base.path());
        dir.create().unwrap();
        fs::write(dir.work().join("old"), "x").unwrap();
        dir.create().unwrap();
        assert_eq!(fs::read_dir(dir.work()).unwrap().count(), 0);
        for path in [&dir.root, &dir.home(), &dir.tmp()] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        }
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_are_not_followed_and_modes_do_not_stop_it() {
        let base = tempfile::tempdir().unwrap();
        let outside = base.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let dir = workdir(base.path());
        dir.create().unwrap();
        symlink(&outside, dir.work().join("link")).unwrap();
        symlink("/does/not/exist", dir.work().join("dangling")).unwrap();
        let locked = dir.work().join("locked/inner");
        fs::create_dir_all(&locked).unwrap();
        fs::write(locked.join("f"), "x").unwrap();
        fs::create_dir(dir.work().join(".helix-removing-1")).unwrap();
        fs::write(dir.work().join(".helix-removing-1/f"), "x").unwrap();
        rustix::fs::mknodat(CWD, dir.work().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
        fs::set_permissions(dir.work(), fs::Permissions::from_mode(0o000)).unwrap();
        dir.remove().unwrap();
        assert!(outside.join("precious").exists() && !dir.root.exists());
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_removed_itself() {
        let base = tempfile::tempdir().unwrap();
        let outside = base.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let dir = workdir(base.path());
        symlink(&outside, &dir.root).unwrap();
        dir.remove().unwrap();
        assert!(outside.join("precious").exists() && fs::symlink_metadata(&dir.root).is_err());
    }

    #[test]
    fn very_deep_and_very_wide_trees_go() {
        let base = tempfile::tempdir().unwrap();
        let dir = workdir(base.path());
        dir.create().unwrap();
        let mut at = rustix::fs::open(dir.work(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deeper", Mode::RWXU).unwrap();
            at = open_dir(&at, "deeper").unwrap();
        }
        for number in 0..5000 {
            fs::write(dir.tmp().join(number.to_string()), "").unwrap();
        }
        dir.remove().unwrap();
        assert!(!dir.root.exists());
    }

    #[test]
    fn kept_ones_go_when_their_time_is_over() {
        let base = tempfile::tempdir().unwrap();
        let dir = workdir(base.path());
        dir.create().unwrap();
        let kept = dir.keep(base.path(), 100).unwrap();
        assert_eq!(remove_expired(base.path(), 99).unwrap(), 0);
        assert!(kept.join("work").is_dir() && !dir.root.exists());
        assert_eq!(remove_expired(base.path(), 100).unwrap(), 1);
        assert!(!kept.exists());
    }
}
