//! Walls by loop device: a file system in a file without a name.
//!
//! All of the file is allocated beforehand: what a build may fill cannot be missing later, and cannot be taken from its
//! neighbours. The file system has no journal, since nobody wants it after a crash; and it is told to forget what it
//! has not written yet when its build is over.

#![allow(unsafe_code)] // ioctls of loop devices and of ext4: libc only.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, fallocate, open, openat, statvfs};

const PROGRAMS: [&str; 3] = ["/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/bin/mke2fs"];

/// Of each inode in its table.
const INODE_BYTES: u64 = 256;
/// A build's files have so many bytes on average, at least, where nothing limits their number.
const BYTES_A_FILE: u64 = 8192;
/// The file system's own needs, and what it keeps back: so much, and a share of the whole.
const OWN_BYTES: u64 = 1 << 20;
const OWN_SHARE: u64 = 16;
const OWN_SHARE_MAX: u64 = 64 << 20;
const BLOCK_BYTES: u64 = 4096;

/// Others may take the device that was found free.
const ATTACH_TRIES: u32 = 64;
const GET_FREE: u64 = 0x4c82;
const CONFIGURE: u64 = 0x4c0a;
/// The device goes when nobody uses it; and pages are not kept twice.
const AUTO_CLEAR: u32 = 4;
const DIRECT: u32 = 16;
const LOOP_MAJOR: u32 = 7;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    numbers: [u64; 5],
    number: u32,
    encrypt: [u32; 2],
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    file: u32,
    block_bytes: u32,
    info: Info,
    reserved: [u64; 8],
}

/// What makes file systems.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Formatter(PathBuf);

/// The file that one lies in.
pub(super) struct File {
    opened: OwnedFd,
    inodes: u64,
}

/// The device that shows it, as long as this or a mount is there.
pub(super) struct Device {
    path: String,
    _opened: OwnedFd,
}

impl Formatter {
    pub(super) fn find() -> anyhow::Result<Self> {
        let found = PROGRAMS.iter().map(PathBuf::from).find(|path| path.is_file());
        found.map(Self).context("mke2fs (e2fsprogs) is not installed")
    }

    pub(super) fn format(&self, file: &File) -> io::Result<()> {
        let mut command = Command::new(&self.0);
        command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256"]);
        command.args(["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard"]);
        command.arg("-N").arg(file.inodes.to_string());
        command.arg(format!("/proc/{}/fd/{}", std::process::id(), file.opened.as_raw_fd()));
        let said = command.env_clear().stdin(Stdio::null()).output()?;
        if said.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&said.stderr);
        Err(io::Error::other(format!("mke2fs: {}", words.lines().last().unwrap_or("it said nothing"))))
    }
}

impl File {
    /// Allocates room for so much of a build's, in a directory's file system.
    pub(super) fn make(directory: &Path, bytes: u64, files: Option<u64>) -> io::Result<Self> {
        let most = bytes / BYTES_A_FILE + 256;
        let inodes = files.map_or(most, |files| most.min(files.saturating_add(64)));
        let size = bytes
            .saturating_add(inodes * INODE_BYTES)
            .saturating_add((bytes / OWN_SHARE).min(OWN_SHARE_MAX) + OWN_BYTES);
        let size = size.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
        // Refused beforehand: allocating takes all there is before it fails, and others write there, too.
        let room = statvfs(directory)?;
        if room.f_bavail.saturating_mul(room.f_frsize) < size {
            return Err(io::Error::new(io::ErrorKind::StorageFull, format!("there are no {size} bytes for it")));
        }
        let opened = openat(CWD, directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
        fallocate(&opened, FallocateFlags::empty(), 0, size)?;
        Ok(Self { opened, inodes })
    }

    pub(super) fn attach(&self) -> io::Result<Device> {
        let control = open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        for _ in 0..ATTACH_TRIES {
            // SAFETY: takes nothing.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE as _) };
            if number == -1 {
                return Err(io::Error::last_os_error());
            }
            let path = format!("/dev/loop{number}");
            let device = open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
            // SAFETY: all zeros is a valid value.
            let mut config: Config = unsafe { std::mem::zeroed() };
            config.file = self.opened.as_raw_fd().cast_unsigned();
            config.info.flags = AUTO_CLEAR | DIRECT;
            // SAFETY: the struct is of the form that the call reads, and outlives it.
            if unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE as _, &raw const config) } == 0 {
                return Ok(Device { path, _opened: device });
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error);
            }
        }
        Err(io::Error::other("every loop device that is free is taken before we have it"))
    }
}

impl Device {
    pub(super) fn path(&self) -> &str {
        &self.path
    }
}

/// Has the file system behind these parts forget what is not written yet: it is about to go, and to write all of it would take
/// as long as the build wrote.
pub(super) fn discard(root: &Path, parts: &[&str]) {
    let Ok(around) = fs::symlink_metadata(root) else { return };
    for part in parts {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(part) = open(root.join(part), flags, Mode::empty()) else { continue };
        let Ok(stat) = rustix::fs::fstat(&part) else { continue };
        // Nothing but a loop device's own, and never what the workdir itself lies on.
        if stat.st_dev != around.dev() && rustix::fs::major(stat.st_dev) == LOOP_MAJOR {
            const SHUT_DOWN: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(b'X', 125);
            let without_log: u32 = 2;
            // SAFETY: the call reads a number, which outlives it. Where it is not known, all is written.
            let _ = unsafe { libc::ioctl(part.as_raw_fd(), SHUT_DOWN as _, &raw const without_log) };
            return;
        }
    }
}
