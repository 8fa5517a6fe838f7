//! Walls by project quota: files below a directory count towards a number, and the file system lets that grow no further.
//!
//! A build cannot leave its project, because the kernel lets nobody in a user namespace change one. An agent that is root and
//! isolates nothing (`isolation = "none"`) runs builds that could.

#![allow(unsafe_code)] // quotactl_fd, and ioctls about projects: libc only.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use helix_model::AttemptKey;
use rustix::ioctl::opcode;

use crate::isolation::number_of;

const PROJECT_QUOTA: u32 = 2;
const SET_LIMITS: u32 = 0x80_0008;
const XFS_STATE: u32 = (b'X' as u32) << 8 | 5;
/// In that state: limits of projects are enforced, not only counted.
const PROJECTS_ENFORCED: u16 = 1 << 5;
const BLOCKS_AND_INODES: u32 = 1 | 4;
/// What is made in a directory belongs to its project.
const INHERIT: u32 = 0x200;
/// The unit of the limit.
const BLOCK_BYTES: u64 = 1024;
/// Numbers nobody gives by hand, and the same range as that of builds' users.
const FIRST: u32 = 0x7000_0000;
const COUNT: u32 = 0x0800_0000;

/// `struct if_dqblk`.
#[repr(C)]
#[derive(Default)]
struct Limits {
    blocks_hard: u64,
    blocks_soft: u64,
    space: u64,
    inodes_hard: u64,
    inodes_soft: u64,
    inodes: u64,
    blocks_time: u64,
    inodes_time: u64,
    valid: u32,
}

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_extent_size: u32,
    unused: [u8; 8],
}

/// `struct fs_quota_stat`, of which the flags are read; the rest is room for what the kernel writes.
#[repr(C)]
struct State {
    version: i8,
    flags: u16,
    rest: [u64; 32],
}

/// A number that files are counted under.
#[derive(Debug)]
#[must_use]
pub struct Project {
    id: u32,
    directory: PathBuf,
}

/// Lets what is below these empty directories grow to so much together.
pub(super) fn limit(directories: &[PathBuf], key: &AttemptKey, bytes: u64, files: Option<u64>) -> io::Result<()> {
    let id = FIRST + number_of(key) % COUNT;
    let Some(first) = directories.first() else { return Ok(()) };
    let on = File::open(first)?;
    if !is_enforced(&on)? {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the file system enforces no limits of projects"));
    }
    set(&on, id, bytes.div_ceil(BLOCK_BYTES), files.unwrap_or(0))?;
    for directory in directories {
        let directory = File::open(directory)?;
        let mut attributes = get(&directory)?;
        attributes.project = id;
        attributes.flags |= INHERIT;
        const CODE: rustix::ioctl::Opcode = opcode::write::<Attributes>(b'X', 32);
        // SAFETY: the struct is of the form that the code names, and outlives the call, which reads it.
        done(unsafe { libc::ioctl(directory.as_raw_fd(), CODE as _, &raw const attributes) })?;
    }
    Ok(())
}

impl Project {
    /// The project of a directory that was walled in.
    pub(super) fn of(directory: &Path) -> Option<Self> {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW;
        let opened =
            rustix::fs::open(directory, flags | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty()).ok()?;
        let attributes = get(&File::from(opened)).ok()?;
        let ours = attributes.flags & INHERIT != 0 && (FIRST..FIRST + COUNT).contains(&attributes.project);
        let above = directory.parent()?.parent()?;
        ours.then(|| Self { id: attributes.project, directory: above.to_owned() })
    }

    /// Forgets its limit, once nothing is in it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn release(self) -> io::Result<()> {
        set(&File::open(&self.directory)?, self.id, 0, 0)
    }
}

fn is_enforced(on: &File) -> io::Result<bool> {
    let mut state = State { version: 1, flags: 0, rest: [0; 32] };
    control(on, XFS_STATE, 0, (&raw mut state).cast())?;
    Ok(state.flags & PROJECTS_ENFORCED != 0)
}

fn set(on: &File, id: u32, blocks: u64, inodes: u64) -> io::Result<()> {
    let mut limits = Limits { blocks_hard: blocks, inodes_hard: inodes, valid: BLOCKS_AND_INODES, ..Limits::default() };
    control(on, SET_LIMITS, id, (&raw mut limits).cast())
}

fn control(on: &File, what: u32, id: u32, address: *mut libc::c_void) -> io::Result<()> {
    let command = what << 8 | PROJECT_QUOTA;
    // SAFETY: the callers give the struct that `what` is about, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_quotactl_fd, on.as_raw_fd(), command, id, address) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get(directory: &File) -> io::Result<Attributes> {
    const CODE: rustix::ioctl::Opcode = opcode::read::<Attributes>(b'X', 31);
    let mut attributes = Attributes::default();
    // SAFETY: the struct is of the form that the code names, and outlives the call, which fills it.
    done(unsafe { libc::ioctl(directory.as_raw_fd(), CODE as _, &raw mut attributes) })?;
    Ok(attributes)
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
