//! Walls around workdirs: limits of disk that hold, because the file system itself ends there.
//!
//! A project quota where the file system has one; else a file system in a file, whose room is set aside before the build begins;
//! or one in memory, if the agent's owner says so. Where there is no wall the runner counts what is written.
//!
//! What is mounted lies in the workdir under names that are known, and whoever removes a workdir takes down what is there:
//! that needs no memory of having put it up. The image of a file system is a file without a name, and its loop device goes
//! with the last mount, so that an agent or a host that dies leaves nothing else.

mod image;
mod quota;

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use helix_model::AttemptKey;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

use crate::attempt::workdir::Workdir;
use crate::data_dir::make_private;

pub use quota::Project;

/// What a build may write to; each part is bound to the one file system.
const PARTS: [&str; 3] = ["work", "home", "tmp"];
/// Where that file system is mounted until its parts are.
const WHOLE: &str = ".room";
/// Mounts on one directory, at most: an agent that was killed between two steps leaves one.
const LAYERS_MAX: usize = 8;
/// So much stands between a limit and its wall, and with no more left a wall is taken for reached: whoever keeps to the limit
/// is not stopped.
const BEYOND_BYTES: u64 = 2 << 20;
/// What is walled in to find out whether that works.
const TRIAL_BYTES: u64 = 4 << 20;

/// What walls are made of here.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Means {
    Quota,
    Image(image::Formatter),
    Memory,
    None,
}

/// Puts walls up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Walls(Means);

/// The key `limits.disk`, checked.
#[must_use]
pub fn is_known(setting: &str) -> bool {
    matches!(setting, "auto" | "quota" | "loop" | "tmpfs" | "watch")
}

impl Walls {
    /// None at all.
    #[must_use]
    pub const fn none() -> Self {
        Self(Means::None)
    }

    /// Finds out what can be had where workdirs are made, by doing it. Blocks.
    ///
    /// # Errors
    /// When what the owner asked for cannot be had, with the reason.
    pub fn choose(setting: &str, work_root: &Path) -> anyhow::Result<Self> {
        let tried = |means: Means| {
            let walls = Self(means);
            walls.try_out(work_root).map(|()| walls)
        };
        let image = || image::Formatter::find().and_then(|formatter| tried(Means::Image(formatter)));
        match setting {
            "watch" => Ok(Self::none()),
            "quota" => tried(Means::Quota).context("`limits.disk`: no project quota can be used here"),
            "loop" => image().context("`limits.disk`: no loop device can be used here"),
            "tmpfs" => tried(Means::Memory).context("`limits.disk`: no tmpfs can be mounted here"),
            _ => Ok(tried(Means::Quota).or_else(|_| image()).unwrap_or_else(|why| {
                tracing::info!(why = format!("{why:#}"), "no wall around workdirs: what builds write is counted");
                Self::none()
            })),
        }
    }

    /// How a limit of disk is enforced, in a word.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self.0 {
            Means::Quota => "project quota",
            Means::Image(_) => "loop device",
            Means::Memory => "tmpfs",
            Means::None => "watched",
        }
    }

    /// The directory whose file system tells whether a wall was reached; `None` where there are no walls.
    #[must_use]
    pub fn look_at(&self, workdir: &Workdir) -> Option<PathBuf> {
        (self.0 != Means::None).then(|| workdir.work())
    }

    /// Walls in a workdir that was just made. What lies there already is hidden. Blocks.
    ///
    /// # Errors
    /// Those of the system; `StorageFull` when the host has not so much room.
    pub fn raise(&self, workdir: &Workdir, key: &AttemptKey, bytes: u64, files: Option<u64>) -> io::Result<()> {
        let room = bytes.saturating_add(BEYOND_BYTES);
        match &self.0 {
            Means::None => Ok(()),
            Means::Quota => quota::limit(&PARTS.map(|part| workdir.root().join(part)), key, room, files),
            Means::Image(formatter) => {
                let image = image::File::make(workdir.root(), bytes, files)?;
                formatter.format(&image)?;
                let device = image.attach()?;
                mount_parts(workdir, "ext4", &[("source", device.path())])
            }
            Means::Memory => {
                let (size, files) = (room.to_string(), files.unwrap_or(bytes / 4096).max(64).to_string());
                mount_parts(workdir, "tmpfs", &[("size", &size), ("nr_inodes", &files), ("mode", "0700")])
            }
        }
    }

    fn try_out(&self, work_root: &Path) -> anyhow::Result<()> {
        let key: AttemptKey = "probe-disk.0.1".parse()?;
        let workdir = Workdir::new(work_root, &key);
        let tried = workdir.create().and_then(|()| {
            self.raise(&workdir, &key, TRIAL_BYTES, None)?;
            PARTS.iter().map(|part| rustix::fs::statvfs(workdir.root().join(part)).map_err(io::Error::from)).collect()
        });
        let removed = workdir.remove();
        let seen: Vec<rustix::fs::StatVfs> = tried?;
        removed.context("what was tried cannot be taken down")?;
        for part in seen {
            let bytes = part.f_blocks.saturating_mul(part.f_frsize);
            if bytes > 2 * TRIAL_BYTES {
                bail!("a limit of {TRIAL_BYTES} bytes leaves {bytes}");
            }
        }
        Ok(())
    }
}

/// Mounts a file system of its own for the parts of a workdir.
fn mount_parts(workdir: &Workdir, kind: &str, options: &[(&str, &str)]) -> io::Result<()> {
    let whole = workdir.root().join(WHOLE);
    // Nothing above it is made: who removed the workdir meanwhile wants no mount there.
    std::fs::DirBuilder::new().mode(0o700).create(&whole)?;
    let done = mount_at(&whole, workdir, kind, options);
    // Also of a mount that was half made nothing stays.
    let gone = unmount(&whole, UnmountFlags::DETACH);
    done?;
    gone?;
    std::fs::remove_dir(&whole)
}

fn mount_at(whole: &Path, workdir: &Workdir, kind: &str, options: &[(&str, &str)]) -> io::Result<()> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        fsconfig_set_string(&context, *name, *value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let made = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&made, "", CWD, whole, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    for part in PARTS {
        let inside = whole.join(part);
        make_private(&inside)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let bound = open_tree(CWD, &inside, flags)?;
        move_mount(&bound, "", CWD, workdir.root().join(part), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}

/// Takes down what walls in a workdir, before it is removed. Gives what is to be released after that. Blocks.
#[must_use]
pub fn take_down(root: &Path) -> Option<Project> {
    image::discard(root, &PARTS);
    for name in PARTS.iter().chain([&WHOLE]) {
        let path = root.join(name);
        for _ in 0..LAYERS_MAX {
            // None is mounted there, or it is not ours to take off: then removing says what is wrong.
            if unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_err() {
                break;
            }
        }
    }
    Project::of(&root.join(PARTS[0]))
}

#[cfg(test)]
mod tests;
