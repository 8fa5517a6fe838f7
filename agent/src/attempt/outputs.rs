//! Finding what a build promised to leave behind, however it arranged its workdir.
//!
//! Paths are walked from the workdir one component at a time, never through a link. What is opened is looked at through the
//! descriptor, so that nothing can be swapped in between.
//! Invariant: an [`Output`] lies in the workdir, and is a regular file no name of which lies outside, or a directory.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat};
use rustix::io::Errno;

/// An output, open.
#[derive(Debug)]
pub enum Output {
    /// A regular file.
    File {
        /// For reading.
        fd: OwnedFd,
        /// Its size when it was opened.
        size: u64,
    },
    /// A directory; it becomes a tar.
    Directory(OwnedFd),
}

/// An output that is not there or may not be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Unusable {
    /// The path as the build promised it.
    pub path: String,
    /// What is wrong with it.
    pub why: Why,
}

/// What can be wrong with an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing is there.
    Missing,
    /// It, or a directory on the way, is a symbolic link.
    Symlink,
    /// On the way is something else than a directory.
    NotDirectory,
    /// It is a FIFO, a socket or a device.
    Special,
    /// It has another name outside of the workdir.
    LinkedOutside,
    /// It changed while it was read.
    Changed,
    /// It is larger than the cluster stores.
    TooLarge(u64),
    /// The system refused.
    System(String),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.why {
            Why::Missing => write!(f, "the output {path:?} does not exist"),
            Why::Symlink => write!(f, "the output {path:?} is, or lies behind, a symbolic link"),
            Why::NotDirectory => write!(f, "the output {path:?} lies behind something that is no directory"),
            Why::Special => write!(f, "the output {path:?} is neither a regular file nor a directory"),
            Why::LinkedOutside => write!(f, "the output {path:?} is a hard link to a file outside of the workdir"),
            Why::Changed => write!(f, "the output {path:?} changed while it was read"),
            Why::TooLarge(limit) => write!(f, "the output {path:?} is larger than the {limit} bytes that are allowed"),
            Why::System(error) => write!(f, "the output {path:?} cannot be read: {error}"),
        }
    }
}

/// Opens an output beneath the workdir.
///
/// # Errors
/// What is wrong with it.
pub fn open(workdir: &Path, path: &str) -> Result<Output, Unusable> {
    let unusable = |why| Unusable { path: path.to_owned(), why };
    let top = openat(CWD, workdir, DIRECTORY, Mode::empty()).map_err(|error| unusable(system(error)))?;
    open_beneath(&top, path).map_err(unusable)
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn open_beneath(top: &OwnedFd, path: &str) -> Result<Output, Why> {
    let mut at: Option<OwnedFd> = None;
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        if matches!(part, "" | "." | "..") || part.contains('\0') {
            return Err(Why::Missing);
        }
        let dir = at.as_ref().unwrap_or(top);
        if parts.peek().is_none() {
            return open_last(top, dir, part);
        }
        at = Some(openat(dir, part, DIRECTORY, Mode::empty()).map_err(|error| on_the_way(dir, part, error))?);
    }
    Err(Why::Missing)
}

fn open_last(top: &OwnedFd, dir: &OwnedFd, name: &str) -> Result<Output, Why> {
    // Not to wait for a FIFO's other end; no meaning for what is wanted.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let before = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?;
    match FileType::from_raw_mode(before.st_mode) {
        FileType::Symlink => return Err(Why::Symlink),
        FileType::RegularFile | FileType::Directory => {}
        // Opening a device has effects of its own.
        _ => return Err(Why::Special),
    }
    let fd = openat(dir, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP => Why::Symlink,
        Errno::NXIO => Why::Special,
        other => missing(other),
    })?;
    let stat = fstat(&fd).map_err(system)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(Output::Directory(fd)),
        FileType::RegularFile => {
            if stat.st_nlink > 1 && names_inside(top, &stat)? < u64::from(stat.st_nlink as u32) {
                return Err(Why::LinkedOutside);
            }
            Ok(Output::File { fd, size: u64::try_from(stat.st_size).unwrap_or(0) })
        }
        _ => Err(Why::Special),
    }
}

fn on_the_way(dir: &OwnedFd, name: &str, error: Errno) -> Why {
    match error {
        Errno::NOTDIR | Errno::LOOP => match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => Why::Symlink,
            _ => Why::NotDirectory,
        },
        other => missing(other),
    }
}

fn missing(error: Errno) -> Why {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => Why::Missing,
        other => system(other),
    }
}

fn system(error: Errno) -> Why {
    Why::System(std::io::Error::from(error).to_string())
}

/// How many names beneath `top` the file has.
fn names_inside(top: &OwnedFd, of: &Stat) -> Result<u64, Why> {
    let mut found = 0;
    walk(top, &mut |_, stat| {
        if (stat.st_dev, stat.st_ino) == (of.st_dev, of.st_ino) {
            found += 1;
        }
        Ok(())
    })?;
    Ok(found)
}

/// Directories that a walk may have open at once: deeper trees are refused.
const DEPTH_MAX: usize = 128;

/// Visits everything beneath a directory, names sorted, directories before what is in them. Links are not followed.
///
/// # Errors
/// The visitor's, and what the system refuses.
pub fn walk(top: &OwnedFd, visit: &mut dyn FnMut(&Entry<'_>, &Stat) -> Result<(), Why>) -> Result<(), Why> {
    descend(top, &mut Vec::new(), 0, visit)
}

/// What a walk visits.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The directory it lies in.
    pub dir: &'a OwnedFd,
    /// Its name there.
    pub name: &'a CStr,
    /// Its path from the top, which need not be UTF-8.
    pub path: &'a [u8],
}

fn descend(
    dir: &OwnedFd,
    path: &mut Vec<u8>,
    depth: usize,
    visit: &mut dyn FnMut(&Entry<'_>, &Stat) -> Result<(), Why>,
) -> Result<(), Why> {
    if depth > DEPTH_MAX {
        return Err(Why::System(format!("directories are nested deeper than {DEPTH_MAX}")));
    }
    let mut names = Vec::new();
    for entry in Dir::read_from(dir.as_fd()).map_err(system)? {
        let entry = entry.map_err(system)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    for name in names {
        let stat = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(system)?;
        let before = path.len();
        if before > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name.to_bytes());
        visit(&Entry { dir, name: &name, path }, &stat)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let inner = openat(dir, &name, DIRECTORY, Mode::empty()).map_err(system)?;
            descend(&inner, path, depth + 1, visit)?;
        }
        path.truncate(before);
    }
    Ok(())
}

/// How often each file with several names was met; a directory's files may share bytes only among themselves and with the
/// rest of the workdir.
///
/// # Errors
/// [`Why::LinkedOutside`] when a file beneath `dir` has a name outside of `workdir`.
pub fn check_links(workdir: &Path, dir: &OwnedFd) -> Result<(), Why> {
    let mut shared: HashMap<(u64, u64), u64> = HashMap::new();
    walk(dir, &mut |_, stat| {
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink > 1 {
            shared.insert((stat.st_dev, stat.st_ino), u64::from(stat.st_nlink as u32));
        }
        Ok(())
    })?;
    if shared.is_empty() {
        return Ok(());
    }
    let top = openat(CWD, workdir, DIRECTORY, Mode::empty()).map_err(system)?;
    walk(&top, &mut |_, stat| {
        if let Some(left) = shared.get_mut(&(stat.st_dev, stat.st_ino)) {
            *left = left.saturating_sub(1);
        }
        Ok(())
    })?;
    if shared.values().all(|left| *left == 0) { Ok(()) } else { Err(Why::LinkedOutside) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_what_really_lies_in_the_workdir_is_an_output() {
        let base = tempfile::tempdir().unwrap();
        let work = base.path().join("work");
        fs::create_dir_all(work.join("dir/sub")).unwrap();
        fs::write(base.path().join("secret"), "key").unwrap();
        fs::write(work.join("file"), "12345").unwrap();
        fs::write(work.join("dir/sub/file"), "x").unwrap();
        fs::hard_link(work.join("file"), work.join("dir/twin")).unwrap();
        fs::hard_link(base.path().join("secret"), work.join("stolen")).unwrap();
        symlink(base.path().join("secret"), work.join("link")).unwrap();
        symlink(base.path(), work.join("out")).unwrap();
        symlink("dir", work.join("inner")).unwrap();
        rustix::fs::mknodat(CWD, work.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(work.join("socket")).unwrap();

        let why = |path| open(&work, path).map(|_| ()).unwrap_err().why;
        assert_eq!(why("nothing"), Why::Missing);
        assert_eq!(why("dir/nothing"), Why::Missing);
        assert_eq!(why("nothing/file"), Why::Missing);
        assert_eq!(why("file/below"), Why::NotDirectory);
        assert_eq!(why("link"), Why::Symlink);
        assert_eq!(why("out/secret"), Why::Symlink);
        assert_eq!(why("inner/sub/file"), Why::Symlink);
        assert_eq!(why("inner"), Why::Symlink);
        assert_eq!(why("stolen"), Why::LinkedOutside);
        assert_eq!(why("fifo"), Why::Special);
        assert_eq!(why("socket"), Why::Special);
        for escape in ["..", "../secret", "dir/../../secret", "/etc/passwd", ".", "", "dir//sub", "a\0b"] {
            assert_eq!(why(escape), Why::Missing, "{escape:?}");
        }
        assert!(matches!(open(&work, "file").unwrap(), Output::File { size: 5, .. }));
        assert!(matches!(open(&work, "dir/twin").unwrap(), Output::File { .. }));
        assert!(matches!(open(&work, "dir").unwrap(), Output::Directory(_)));
        let text = open(&work, "link").unwrap_err().to_string();
        assert_eq!(text, "the output \"link\" is, or lies behind, a symbolic link");
    }

    #[test]
    fn files_of_a_directory_may_share_bytes_only_inside() {
        let base = tempfile::tempdir().unwrap();
        let work = base.path().join("work");
        fs::create_dir_all(work.join("dir")).unwrap();
        fs::write(work.join("a"), "x").unwrap();
        fs::hard_link(work.join("a"), work.join("dir/b")).unwrap();
        let Output::Directory(dir) = open(&work, "dir").unwrap() else { panic!() };
        assert_eq!(check_links(&work, &dir), Ok(()));
        fs::write(base.path().join("secret"), "x").unwrap();
        fs::hard_link(base.path().join("secret"), work.join("dir/c")).unwrap();
        assert_eq!(check_links(&work, &dir), Err(Why::LinkedOutside));
    }
}
