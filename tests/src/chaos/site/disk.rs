//! A disk of a node's own: ext4 in a file behind a loop device, which can be full, hang, fail, or refuse to be written to. All of
//! it is the kernel's doing, and what nodes get are the kernel's own errors.

#![allow(unsafe_code)] // Three ioctls, which no library at hand wraps.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::process::Signal;

use crate::chaos::site::run;
use crate::cluster::signal;

const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;
const EXT4_IOC_SHUTDOWN: libc::Ioctl = 0x8004_587D;

/// How long whoever uses a disk may take to be gone once killed.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);

/// What becomes of what was written and not synced when a disk fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::chaos) enum Unsynced {
    /// It is there when the disk is back.
    Kept = 0,
    /// It is lost, as in a power cut.
    Lost = 2,
}

/// A disk, mounted until [`Disk::detach`].
pub(in crate::chaos) struct Disk {
    image: PathBuf,
    mount: PathBuf,
}

impl Disk {
    /// Makes a file, a file system in it, and mounts that.
    pub(super) fn make(image: PathBuf, mount: PathBuf, bytes: u64) -> anyhow::Result<Self> {
        File::create(&image)?.set_len(bytes)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-J", "size=16"]).arg(&image))?;
        fs::create_dir_all(&mount)?;
        let disk = Self { image, mount };
        disk.attach()?;
        Ok(disk)
    }

    fn attach(&self) -> anyhow::Result<()> {
        run(Command::new("mount").args(["-o", "loop,noatime"]).args([&self.image, &self.mount]))?;
        Ok(())
    }

    /// Whoever uses it still is no reason not to: for the end of a run.
    pub(super) fn detach(&self) {
        let _ = self.thaw();
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.mount));
    }

    fn ioctl(&self, request: libc::Ioctl, argument: u32) -> io::Result<()> {
        let root = File::open(&self.mount)?;
        // SAFETY: the descriptor is open, and each of the three takes a pointer to one u32 or ignores it.
        let said = unsafe { libc::ioctl(root.as_raw_fd(), request, &raw const argument) };
        if said == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Fills it until only so many bytes are left, in blocks that nobody writes.
    pub(in crate::chaos) fn fill(&self, left: u64) -> anyhow::Result<()> {
        let mut filler = File::options().create(true).append(true).open(self.filler())?;
        let (mut end, mut step) = (filler.metadata()?.len(), u64::MAX);
        while step > 4096 {
            let free = helix_common::files::available_bytes(&self.mount)?.saturating_sub(left);
            step = step.min(free);
            if step == 0 || rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), end, step).is_err() {
                step /= 2;
                continue;
            }
            end += step;
        }
        // What is left of the last block and of what others gave back meanwhile.
        for _ in 0..64 {
            if left > 0 || filler.write_all(&[0; 4096]).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Gives back what [`Self::fill`] took.
    pub(in crate::chaos) fn free(&self) -> io::Result<()> {
        fs::remove_file(self.filler())
    }

    fn filler(&self) -> PathBuf {
        self.mount.join("filler")
    }

    /// Everything on it is answered by EIO from now on.
    pub(in crate::chaos) fn fail(&self, unsynced: Unsynced) -> io::Result<()> {
        self.ioctl(EXT4_IOC_SHUTDOWN, unsynced as u32)
    }

    /// What the kernel does of itself when it finds a file system damaged: what was not synced is lost, and nothing can be
    /// written any more.
    pub(in crate::chaos) fn make_read_only(&self) -> anyhow::Result<()> {
        run(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.mount))?;
        Ok(())
    }

    /// Whoever writes waits from now on.
    pub(in crate::chaos) fn freeze(&self) -> io::Result<()> {
        self.ioctl(FIFREEZE, 0)
    }

    /// And goes on.
    pub(in crate::chaos) fn thaw(&self) -> io::Result<()> {
        self.ioctl(FITHAW, 0)
    }

    /// Kills whoever uses it and mounts it anew, upon which it works again.
    pub(in crate::chaos) fn replace(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + LEAVE_LIMIT;
        while run(Command::new("umount").arg(&self.mount)).is_err() {
            let users = self.users();
            ensure!(Instant::now() < deadline, "{} is still in use by {users:?}", self.mount.display());
            for pid in users {
                signal(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.attach()
    }

    /// Processes that work on it or have files of it open.
    fn users(&self) -> Vec<i32> {
        let below = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(&self.mount));
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter(|entry| {
                let open = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
                below(entry.path().join("cwd")) || open.map(|entry| entry.path()).any(below)
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != own)
            .collect()
    }
}
