//! The same surroundings by way of `bwrap`, for whoever trusts that program more than this one.
//!
//! Everything it is told comes in a file in memory, so that neither its command line nor its environment is the build's.
//! It is never run with root's rights: an agent that is root opens what the build sees in a mount namespace of its own,
//! where the build's user can reach it, and then becomes that user.

#![allow(unsafe_code)] // unshare, and flags of descriptors: libc only.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use helix_runner::Order;
use helix_runner::isolation::{Absence, Access, Entry, HOST_NAME_INSIDE, Isolation, Network, Tool, USER_INSIDE};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SeekFrom, memfd_create, mkdirat, openat, seek};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, mount_change, move_mount};

use super::super::command::Image;
use super::view::{self, Failed};
use super::{done, seccomp, step};

/// Where root lays out what the build sees for `bwrap` to find; nobody else sees it there.
const LAID_OUT: &str = "/tmp";

/// A `bwrap` that is ready to be run.
pub(crate) struct Bubblewrap {
    image: Image,
    /// Files that its arguments name by number.
    kept: Vec<OwnedFd>,
}

/// Makes what it needs; `None` where another tool is ordered.
pub(crate) fn prepare(order: &Order) -> io::Result<Option<Bubblewrap>> {
    let Some(isolation) = &order.isolation else { return Ok(None) };
    let Tool::Bubblewrap(program) = &isolation.tool else { return Ok(None) };
    let filter = memory(&seccomp::bytes(&seccomp::program()?))?;
    let (users, groups) = view::user_files(order.variable("HOME").unwrap_or_default());
    let (users, groups) = (memory(users.as_bytes())?, memory(groups.as_bytes())?);
    let words = words(order, isolation, [&filter, &users, &groups]);
    let mut text = Vec::new();
    for word in words {
        text.extend_from_slice(word.as_bytes());
        text.push(0);
    }
    let told = memory(&text)?;
    let mut argv = vec![program.clone().into_os_string(), "--args".into(), told.as_raw_fd().to_string().into()];
    argv.push("--".into());
    argv.extend(order.argv.iter().cloned());
    let image = Image::bare(&argv, vec![program.as_os_str().as_bytes().to_vec()])?;
    Ok(Some(Bubblewrap { image, kept: vec![filter, users, groups, told] }))
}

fn memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = memfd_create("helix", MemfdFlags::CLOEXEC)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&file, rest)?..];
    }
    seek(&file, SeekFrom::Start(0))?;
    Ok(file)
}

fn words(order: &Order, isolation: &Isolation, [filter, users, groups]: [&OwnedFd; 3]) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    let mut say = |some: &[&OsStr]| words.extend(some.iter().map(|word| (*word).to_owned()));
    let number = |value: u32| OsString::from(value.to_string());
    let descriptor = |file: &OwnedFd| OsString::from(file.as_raw_fd().to_string());
    for word in ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--die-with-parent"] {
        say(&[word.as_ref()]);
    }
    if isolation.network == Network::None {
        say(&["--unshare-net".as_ref()]);
    }
    say(&["--new-session".as_ref(), "--cap-drop".as_ref(), "ALL".as_ref()]);
    say(&["--uid".as_ref(), &number(USER_INSIDE.uid), "--gid".as_ref(), &number(USER_INSIDE.gid)]);
    say(&["--hostname".as_ref(), HOST_NAME_INSIDE.as_ref()]);
    say(&["--proc".as_ref(), "/proc".as_ref(), "--dev".as_ref(), "/dev".as_ref()]);
    let memory = view::SHARED_MEMORY_BYTES.to_string();
    say(&["--perms".as_ref(), "1777".as_ref(), "--size".as_ref(), memory.as_ref()]);
    say(&["--tmpfs".as_ref(), "/dev/shm".as_ref(), "--remount-ro".as_ref(), "/dev".as_ref()]);
    for (file, at) in [(users, "/etc/passwd"), (groups, "/etc/group")] {
        say(&["--perms".as_ref(), "0644".as_ref(), "--file".as_ref(), &descriptor(file), at.as_ref()]);
    }
    for directory in ["/run", "/tmp", "/var", "/var/lib", "/var/cache"] {
        say(&["--dir".as_ref(), directory.as_ref()]);
    }
    for (to, at) in [("/run", "/var/run"), ("/tmp", "/var/tmp"), ("/proc/self/mounts", "/etc/mtab")] {
        say(&["--symlink".as_ref(), to.as_ref(), at.as_ref()]);
    }
    for (index, entry) in isolation.view.iter().enumerate() {
        match entry {
            Entry::Link { target, to } => say(&["--symlink".as_ref(), to.as_ref(), target.as_ref()]),
            Entry::Bind { source, target, access, absence } => {
                let verb = match (access, absence) {
                    (Access::Read, Absence::Fails) => "--ro-bind",
                    (Access::Read, Absence::Ignored) => "--ro-bind-try",
                    (Access::Write, Absence::Fails) => "--bind",
                    (Access::Write, Absence::Ignored) => "--bind-try",
                };
                let source = if order.user.is_some() { laid_out(index) } else { source.clone() };
                say(&[verb.as_ref(), source.as_ref(), target.as_ref()]);
            }
        }
    }
    say(&["--remount-ro".as_ref(), "/".as_ref(), "--chdir".as_ref(), order.workdir.as_ref()]);
    say(&["--clearenv".as_ref()]);
    for (name, value) in &order.environment {
        say(&["--setenv".as_ref(), name, value]);
    }
    say(&["--seccomp".as_ref(), &descriptor(filter)]);
    words
}

fn laid_out(index: usize) -> PathBuf {
    Path::new(LAID_OUT).join(index.to_string())
}

impl Bubblewrap {
    /// In the child, with root's rights: lays out what the build sees. Nothing to do for anybody else.
    pub(crate) fn lay_out(&self, order: &Order) -> Result<(), Failed> {
        let (Some(isolation), Some(_)) = (&order.isolation, order.user) else { return Ok(()) };
        // SAFETY: a plain call with an integer; one thread.
        step("cannot make a mount namespace", done(unsafe { libc::unshare(libc::CLONE_NEWNS) }))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(view::failed("cannot leave the host's mounts"))?;
        let sources = view::sources(isolation)?;
        let place = view::filesystem("tmpfs", &[("mode", "0755"), ("size", "4m")])
            .and_then(|place| {
                move_mount(&place, "", CWD, LAID_OUT, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
                Ok(place)
            })
            .map_err(view::failed("cannot make room for what the build sees"))?;
        for (index, source) in sources.iter().enumerate() {
            let Some(opened) = &source.opened else { continue };
            let name = index.to_string();
            let lay = || {
                if view::is_directory(opened)? {
                    mkdirat(&place, &name, Mode::from(0o755))?;
                } else {
                    drop(openat(&place, &name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from(0o644))?);
                }
                view::attach(opened, openat(&place, &name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
            };
            lay().map_err(view::failed("cannot lay out what the build sees"))?;
        }
        Ok(())
    }

    /// In the child, after all other descriptors were marked to close: becomes it. Returns what could not be done.
    pub(crate) fn run(&self) -> Failed {
        // SAFETY: plain calls on descriptors that are open.
        let keep = |file: &OwnedFd| done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) });
        if let Err(error) = self.kept.iter().try_for_each(keep) {
            return ("cannot hand files to bwrap".to_owned(), error);
        }
        ("cannot start bwrap".to_owned(), self.image.exec())
    }
}
