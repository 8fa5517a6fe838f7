//! Counting what a build wrote, beside everything else that the runner does: a few hundred files at a time, with one open
//! directory and a few bytes for each level, however deep and wide the tree is, and whatever the build does to it meanwhile.
//!
//! What is counted is a lower bound: files that come while others are counted wait for the next walk. Where a wall stands,
//! nothing is counted: the file system knows whether it is full.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use helix_model::Room;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Stat, openat, seek, statat};

use crate::limits::{DiskLimit, is_at_wall, is_full};

/// Before the first look: most builds are over by then.
const FIRST_LOOK: Duration = Duration::from_millis(300);
/// Between two walks, at least; and so many times as long as a walk took, so that large trees cost a small share of a processor.
const PAUSE_MIN: Duration = Duration::from_millis(300);
const PAUSE_FACTOR: u32 = 4;
/// Between two steps of a walk, and how long a step may take, but for a disk that hangs.
const STEP_PAUSE: Duration = Duration::from_millis(8);
const STEP_MAX: Duration = Duration::from_millis(2);
/// Files between two looks at the clock.
const FILES_A_LOOK: u32 = 32;
/// The last look, after the end, takes no longer than this.
const LAST_LOOK_MAX: Duration = Duration::from_secs(2);
/// Room for directory entries; the longest name fits many times.
const ENTRIES_BYTES: usize = 8 * 1024;

const FULL: &str = "the host's disk is full";

/// What a step found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Usage {
    /// Nothing to complain about, as far as was counted.
    Within,
    /// More than is allowed, or than there is: whose room that was, and in words.
    Over(Room, String),
}

/// Watches one attempt's directories.
#[derive(Debug)]
pub struct DiskWatch {
    limit: DiskLimit,
    walk: Option<Walk>,
    next_step: Instant,
}

impl DiskWatch {
    /// A watch that has seen nothing yet.
    #[must_use]
    pub fn new(limit: DiskLimit) -> Self {
        Self { limit, walk: None, next_step: Instant::now() + FIRST_LOOK }
    }

    /// When the next step is due.
    #[must_use]
    pub fn next_step(&self) -> Instant {
        self.next_step
    }

    /// Counts on for a moment, if it is time.
    pub fn step(&mut self) -> Usage {
        if Instant::now() < self.next_step {
            return Usage::Within;
        }
        if self.limit.wall.is_some() {
            self.next_step = Instant::now() + PAUSE_MIN;
            return self.at_wall();
        }
        self.count_for(STEP_MAX)
    }

    /// Whether the wall was reached, and whether that is for the host's want of room.
    fn at_wall(&self) -> Usage {
        match &self.limit.wall {
            Some(wall) if is_at_wall(wall) && host_is_full(&self.limit) => Usage::Over(Room::Host, FULL.to_owned()),
            Some(wall) if is_at_wall(wall) => Usage::Over(
                Room::Own,
                format!("the build filled all of the disk that it may fill: its limit is {} bytes", self.limit.bytes),
            ),
            Some(_) | None => Usage::Within,
        }
    }

    /// Counts everything once more, when nobody writes any longer. A disk that is full is over as well, whoever filled it.
    pub fn last_look(&mut self) -> Usage {
        // Before the host: behind a wall there may be room of its own.
        let at_wall = self.at_wall();
        if at_wall != Usage::Within {
            return at_wall;
        }
        if host_is_full(&self.limit) {
            return Usage::Over(Room::Host, FULL.to_owned());
        }
        if self.limit.wall.is_some() {
            return Usage::Within;
        }
        self.walk = None;
        self.count_for(LAST_LOOK_MAX)
    }

    fn count_for(&mut self, time: Duration) -> Usage {
        let started = Instant::now();
        let mut walk = match self.walk.take().map_or_else(|| Walk::start(&self.limit.root), Ok) {
            Ok(walk) => walk,
            // The directory is gone or closed to us: whoever did that has to answer for it.
            Err(_) => {
                self.next_step = started + PAUSE_MIN;
                return Usage::Within;
            }
        };
        let over = loop {
            match walk.advance() {
                // What was moved while it was counted is counted by the next walk.
                Ok(false) | Err(_) => {
                    self.next_step = Instant::now() + PAUSE_MIN.max(walk.started.elapsed() * PAUSE_FACTOR);
                    // Where nothing was left for others, its limit is out of reach; it need not be the one to fail for that.
                    if walk.bytes >= self.limit.bytes / 2 && host_is_full(&self.limit) {
                        let what = format!("{FULL}, and {} bytes are the build's", walk.bytes);
                        return Usage::Over(Room::Host, what);
                    }
                    return walk.verdict(&self.limit);
                }
                Ok(true) => {}
            }
            let verdict = walk.verdict(&self.limit);
            if verdict != Usage::Within {
                break verdict;
            }
            if started.elapsed() >= time {
                self.walk = Some(walk);
                break Usage::Within;
            }
        };
        self.next_step = Instant::now() + STEP_PAUSE;
        over
    }
}

/// What is in a directory: allocated bytes, and files and directories. As far as it can be counted in this time.
///
/// # Errors
/// Those of the file system.
pub fn measure(root: &Path, time: Duration) -> io::Result<(u64, u64)> {
    let mut walk = Walk::start(root)?;
    while walk.started.elapsed() < time && walk.advance()? {}
    Ok((walk.bytes, walk.files))
}

/// A directory on the way down: which, and where its reading stopped.
#[derive(Clone, Copy, Debug)]
struct Level {
    inode: u64,
    cookie: u64,
}

#[derive(Debug)]
struct Walk {
    started: Instant,
    device: u64,
    /// Where the reading is, and its position.
    here: OwnedFd,
    at: Level,
    above: Vec<Level>,
    bytes: u64,
    files: u64,
}

impl Walk {
    fn start(root: &Path) -> io::Result<Self> {
        let here = open(CWD, root)?;
        let stat = rustix::fs::fstat(&here)?;
        let at = Level { inode: stat.st_ino, cookie: 0 };
        Ok(Self { started: Instant::now(), device: stat.st_dev, here, at, above: Vec::new(), bytes: 0, files: 0 })
    }

    fn verdict(&self, limit: &DiskLimit) -> Usage {
        // Reached is over: a file that grew to the limit of its size went no further.
        if self.bytes >= limit.bytes {
            let whose = if limit.room == Room::Own { "its limit is" } else { "all that the host had left were" };
            let what = format!("the build fills {} bytes of disk and more; {whose} {} bytes", self.bytes, limit.bytes);
            return Usage::Over(limit.room, what);
        }
        if self.files > limit.files {
            let what = format!("the build made more than {} files and directories, its limit", limit.files);
            return Usage::Over(Room::Own, what);
        }
        Usage::Within
    }

    /// Counts a few more. False when all is counted.
    fn advance(&mut self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); ENTRIES_BYTES];
        seek(&self.here, SeekFrom::Start(self.at.cookie))?;
        let mut entries = RawDir::new(&self.here, &mut buffer);
        let mut counted = 0;
        let mut down: Option<CString> = None;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            self.at.cookie = entry.next_entry_cookie();
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            // It may be gone again.
            let Ok(stat) = statat(&self.here, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            self.files += 1;
            self.bytes = self.bytes.saturating_add(share(&stat));
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && stat.st_dev == self.device {
                down = Some(name.to_owned());
                break;
            }
            counted += 1;
            if counted == FILES_A_LOOK {
                return Ok(true);
            }
        }
        match down {
            Some(name) => {
                self.descend(&name);
                Ok(true)
            }
            None => self.ascend(),
        }
    }

    /// Into a directory; one that cannot be entered, or is another by now, is passed over.
    fn descend(&mut self, name: &CString) {
        if let Ok(below) = open(&self.here, name)
            && let Ok(stat) = rustix::fs::fstat(&below)
            && stat.st_dev == self.device
        {
            self.above.push(self.at);
            self.at = Level { inode: stat.st_ino, cookie: 0 };
            self.here = below;
        }
    }

    /// Back to where this directory was found. False at the top.
    fn ascend(&mut self) -> io::Result<bool> {
        let Some(above) = self.above.pop() else { return Ok(false) };
        let parent = open(&self.here, "..")?;
        let stat = rustix::fs::fstat(&parent)?;
        if (stat.st_dev, stat.st_ino) != (self.device, above.inode) {
            return Err(io::Error::other("a directory was moved while its files were counted"));
        }
        (self.here, self.at) = (parent, above);
        Ok(true)
    }
}

/// Beside the build's own directory, which a wall may be around.
fn host_is_full(limit: &DiskLimit) -> bool {
    is_full(limit.root.parent().unwrap_or(&limit.root))
}

fn open(at: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// The bytes of disk that a name stands for: of a file with several names each has its share.
fn share(stat: &Stat) -> u64 {
    let names = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory { 1 } else { stat.st_nlink.max(1) };
    // Widths and signs differ between architectures.
    #[allow(clippy::useless_conversion)]
    let (blocks, names) = (u64::try_from(stat.st_blocks).unwrap_or(0), u64::try_from(names).unwrap_or(1));
    (blocks * 512).div_ceil(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn limit(root: &Path) -> DiskLimit {
        DiskLimit { root: root.to_owned(), bytes: u64::MAX, files: u64::MAX, room: Room::Own, wall: None }
    }

    fn count(root: &Path) -> (u64, u64) {
        let mut walk = Walk::start(root).unwrap();
        while walk.advance().unwrap() {}
        (walk.files, walk.bytes)
    }

    #[test]
    fn counts_each_file_once_however_deep_and_wide() {
        let root = tempfile::tempdir().unwrap();
        let mut at = OwnedFd::from(fs::File::open(root.path()).unwrap());
        for _ in 0..2000 {
            rustix::fs::mkdirat(&at, "deeper", Mode::RWXU).unwrap();
            at = open(&at, "deeper").unwrap();
        }
        for number in 0..3000 {
            fs::write(root.path().join(number.to_string()), "").unwrap();
        }
        fs::create_dir(root.path().join("twice")).unwrap();
        fs::write(root.path().join("twice/a"), vec![7; 100_000]).unwrap();
        fs::hard_link(root.path().join("twice/a"), root.path().join("twice/b")).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("twice/root")).unwrap();
        let (files, bytes) = count(root.path());
        assert_eq!(files, 2000 + 3000 + 1 + 3);
        let directories = 2001 * 4096;
        assert!((100_000..300_000 + directories).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_tree_that_moves_meanwhile_ends_the_walk_and_not_the_watch() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b/c")).unwrap();
        fs::create_dir(root.path().join("z")).unwrap();
        let mut walk = Walk::start(root.path()).unwrap();
        while walk.above.len() < 2 {
            walk.advance().unwrap();
        }
        fs::rename(root.path().join("a/b"), root.path().join("z/b")).unwrap();
        let mut ended = Ok(true);
        while let Ok(true) = ended {
            ended = walk.advance();
        }
        assert!(ended.is_err());
        let mut watch = DiskWatch::new(DiskLimit { files: 4, ..limit(root.path()) });
        assert_eq!(watch.last_look(), Usage::Within);
        fs::write(root.path().join("one too many"), "").unwrap();
        assert!(matches!(watch.last_look(), Usage::Over(Room::Own, _)));
        fs::remove_dir_all(root.path()).unwrap();
        assert_eq!(watch.last_look(), Usage::Within);
    }
}
