//! What an isolated command sees: a small file system of its own as the root, the parts of the host that the order names
//! bound into it, and nothing else, because the host's root is then let go of.
//!
//! Runs in the init of the attempt's namespaces, which has the right to mount there. Everything of the host is opened
//! before anything is mounted, and every target is walked to without leaving the new root, so that no link and no mount
//! on the way leads elsewhere. Set-user-id bits and devices mean nothing on what is bound.

#![allow(unsafe_code)] // mount_setattr: libc only.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use helix_runner::isolation::{Absence, Access, Entry, HOST_NAME_INSIDE, Isolation, USER_INSIDE};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, mknodat, openat, openat2, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::path::Arg;

/// Room for the directories that lead to what is bound, and a few small files.
const ROOT_BYTES: &str = "4m";
const ROOT_FILES: &str = "8192";
/// Room in `/dev/shm`, as containers have it.
pub(super) const SHARED_MEMORY_BYTES: u32 = 64 * 1024 * 1024;

/// Where the host's root lies between the change of the root and letting go of it: any directory that every root has.
const OLD_ROOT: &str = "run";

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// What could not be done, and why.
pub(super) type Failed = (String, io::Error);

pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(Errno) -> Failed {
    move |error| (what.into(), error.into())
}

/// Makes it this process's root; the host's lies in it until [`let_go`]. `home` is what the user names tell of the
/// command's home.
pub(super) fn build(isolation: &Isolation, home: &OsStr) -> Result<(), Failed> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("cannot leave the host's mounts"))?;
    let sources = sources(isolation)?;
    let devices: Vec<(&str, OwnedFd)> = DEVICES
        .iter()
        .map(|name| {
            let path = format!("/dev/{name}");
            let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            Ok((*name, clone(Path::new(&path), attributes).map_err(failed(format!("cannot show {path}")))?))
        })
        .collect::<Result<_, Failed>>()?;
    let root = new_root().map_err(failed("cannot make a root"))?;
    skeleton(&root, home).map_err(failed("cannot furnish the root"))?;
    for (name, device) in devices {
        let place = || -> rustix::io::Result<()> {
            let name = format!("dev/{name}");
            mknodat(&root, &name, FileType::RegularFile, Mode::from(0o666), 0)?;
            attach_at(&device, &root, name)
        };
        place().map_err(failed(format!("cannot show /dev/{name}")))?;
    }
    special(&root)?;
    let mut targets = Targets { root: root.as_fd(), parent: None };
    for source in &sources {
        source.place(&mut targets)?;
    }
    enter(&root)
}

/// An entry of the view. A part of the host is open, unless it is not there and can be done without.
pub(super) struct Source<'a> {
    pub(super) opened: Option<OwnedFd>,
    entry: &'a Entry,
}

pub(super) fn sources(isolation: &Isolation) -> Result<Vec<Source<'_>>, Failed> {
    let mut sources = Vec::with_capacity(isolation.view.len());
    for entry in &isolation.view {
        let opened = match entry {
            Entry::Link { .. } => None,
            Entry::Bind { source, access, absence, .. } => {
                let attributes = match access {
                    Access::Read => MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV,
                    Access::Write => MountAttrFlags::MOUNT_ATTR_NODEV,
                };
                match clone(source, attributes) {
                    Ok(opened) => Some(opened),
                    Err(Errno::NOENT) if *absence == Absence::Ignored => None,
                    Err(error) => return Err(failed(format!("cannot show {}", source.display()))(error)),
                }
            }
        };
        sources.push(Source { opened, entry });
    }
    Ok(sources)
}

/// A copy of what is mounted at and below a path, mounted nowhere yet.
fn clone(path: &Path, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let opened = open_tree(CWD, path, flags)?;
    set_attributes(&opened, attributes | MountAttrFlags::MOUNT_ATTR_NOSUID, libc::AT_RECURSIVE)?;
    Ok(opened)
}

fn set_attributes(mount: &OwnedFd, attributes: MountAttrFlags, flags: libc::c_int) -> rustix::io::Result<()> {
    let wanted = libc::mount_attr { attr_set: u64::from(attributes.bits()), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = flags | libc::AT_EMPTY_PATH;
    // SAFETY: the path ends in NUL and the struct has the size that is told; both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const wanted,
            size_of_val(&wanted),
        )
    };
    if done == 0 { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

pub(super) fn attach(mount: &OwnedFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// Mounts it on something that is no link and that a path of ours leads to.
fn attach_at(mount: &OwnedFd, directory: impl AsFd, name: impl Arg) -> rustix::io::Result<()> {
    move_mount(mount, "", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

pub(super) fn is_directory(opened: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(opened)?.st_mode) == FileType::Directory)
}

/// A file system of our own, mounted over this process's directory until it becomes the root.
fn new_root() -> rustix::io::Result<OwnedFd> {
    let root = filesystem("tmpfs", &[("mode", "0755"), ("size", ROOT_BYTES), ("nr_inodes", ROOT_FILES)])?;
    move_mount(&root, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(root)
}

pub(super) fn filesystem(kind: &str, options: &[(&str, &str)]) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        fsconfig_set_string(context.as_fd(), *name, *value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    // A devpts whose devices do not open would be none.
    let attributes = if kind == "devpts" { MountAttrFlags::MOUNT_ATTR_NOSUID } else { attributes };
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Directories, links and files that every root has.
fn skeleton(root: &OwnedFd, home: &OsStr) -> rustix::io::Result<()> {
    for directory in ["dev", "dev/pts", "dev/shm", "etc", "proc", "run", "tmp", "var", "var/lib", "var/cache"] {
        mkdirat(root, directory, Mode::from(0o755))?;
    }
    let links = [
        ("dev/ptmx", "pts/ptmx"),
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "/proc/self/fd/0"),
        ("dev/stdout", "/proc/self/fd/1"),
        ("dev/stderr", "/proc/self/fd/2"),
        ("etc/mtab", "/proc/self/mounts"),
        ("var/run", "/run"),
        ("var/tmp", "/tmp"),
    ];
    for (at, to) in links {
        symlinkat(to, root, at)?;
    }
    let (users, groups) = user_files(home);
    for (name, text) in [("passwd", users), ("group", groups), ("hostname", format!("{HOST_NAME_INSIDE}\n"))] {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(root, format!("etc/{name}"), flags, Mode::from(0o644))?;
        rustix::io::write(&file, text.as_bytes())?;
    }
    Ok(())
}

/// The users and groups that a command finds: root, itself and nobody.
pub(super) fn user_files(home: &OsStr) -> (String, String) {
    let (uid, gid) = (USER_INSIDE.uid, USER_INSIDE.gid);
    // Neither a colon nor a newline may come into such a file; a home with one is left out.
    let home = home.to_str().filter(|home| !home.contains([':', '\n'])).unwrap_or("/");
    let users = format!(
        "root:x:0:0:root:/root:/bin/sh\nbuild:x:{uid}:{gid}:build:{home}:/bin/sh\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    );
    let groups = format!("root:x:0:\ntty:x:5:\nbuild:x:{gid}:\nnogroup:x:65534:\n");
    (users, groups)
}

/// Processes, terminals and shared memory: those of these namespaces.
fn special(root: &OwnedFd) -> Result<(), Failed> {
    let bytes = SHARED_MEMORY_BYTES.to_string();
    let memory: &[_] = &[("mode", "1777"), ("size", &bytes)];
    let terminals: &[_] = &[("ptmxmode", "0666"), ("mode", "0620")];
    for (kind, options, target) in
        [("proc", &[] as &[_], "proc"), ("tmpfs", memory, "dev/shm"), ("devpts", terminals, "dev/pts")]
    {
        let mount = || {
            let made = filesystem(kind, options)?;
            attach_at(&made, root, target)
        };
        mount().map_err(failed(format!("cannot mount /{target}")))?;
    }
    Ok(())
}

impl Source<'_> {
    fn place(&self, targets: &mut Targets<'_>) -> Result<(), Failed> {
        match self.entry {
            Entry::Link { target, to } => {
                let mut link = || match symlinkat(to, targets.parent(target)?, name_of(target)?) {
                    Err(Errno::EXIST) => Ok(()),
                    other => other,
                };
                link().map_err(failed(format!("cannot make the link {}", target.display())))
            }
            Entry::Bind { source, target, .. } => {
                let Some(opened) = &self.opened else { return Ok(()) };
                let bound = targets.bind(opened, target);
                bound.map_err(failed(format!("cannot show {} as {}", source.display(), target.display())))
            }
        }
    }
}

/// Where in the new root things are put. Most have the directory of the one before.
struct Targets<'a> {
    root: BorrowedFd<'a>,
    /// The directory that was used last.
    parent: Option<(PathBuf, OwnedFd)>,
}

impl Targets<'_> {
    /// Mounts on a path, which is made if it is not there.
    fn bind(&mut self, opened: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
        let (parent, name) = (self.parent(target)?, name_of(target)?);
        let made = if is_directory(opened)? {
            mkdirat(parent, name, Mode::from(0o755))
        } else {
            mknodat(parent, name, FileType::RegularFile, Mode::from(0o644), 0)
        };
        match made {
            Ok(()) => attach_at(opened, parent, name)?,
            // Whatever it is, a link or a mount's root, it is walked to.
            Err(Errno::EXIST) => attach(opened, beneath(self.root, target)?)?,
            // Within a part of the host that is shown already, nothing is made, and what is there is found.
            Err(error) => attach(opened, beneath(self.root, target).map_err(|_| error)?)?,
        }
        if self.parent.as_ref().is_some_and(|(parent, _)| parent.starts_with(target)) {
            self.parent = None;
        }
        Ok(())
    }

    /// The directory that a path's last name is to be in, made if it is not there.
    fn parent(&mut self, target: &Path) -> rustix::io::Result<BorrowedFd<'_>> {
        let parent = target.parent().unwrap_or(Path::new("/"));
        if self.parent.as_ref().is_none_or(|(path, _)| path != parent) {
            self.parent = Some((parent.to_owned(), self.directory(parent)?));
        }
        self.parent.as_ref().map(|(_, directory)| directory.as_fd()).ok_or(Errno::NOENT)
    }

    fn directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        if let Ok(there) = beneath(self.root, path) {
            return Ok(there);
        }
        let mut so_far = PathBuf::from("/");
        let mut at = beneath(self.root, &so_far)?;
        for part in path.components() {
            let Component::Normal(part) = part else { continue };
            so_far.push(part);
            at = match beneath(self.root, &so_far) {
                Err(Errno::NOENT) => {
                    mkdirat(&at, part, Mode::from(0o755))?;
                    beneath(self.root, &so_far)?
                }
                other => other?,
            };
        }
        Ok(at)
    }
}

fn name_of(path: &Path) -> rustix::io::Result<&OsStr> {
    path.file_name().ok_or(Errno::INVAL)
}

/// Opens what a path means to somebody whose root this is.
fn beneath(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

/// Makes it the root, read-only.
fn enter(root: &OwnedFd) -> Result<(), Failed> {
    set_attributes(root, MountAttrFlags::MOUNT_ATTR_RDONLY, 0).map_err(failed("cannot protect the root"))?;
    rustix::process::fchdir(root).map_err(failed("cannot enter the root"))?;
    // Not on top of the new root: to the kernel we would be chrooted then, and not make user namespaces.
    rustix::process::pivot_root(".", OLD_ROOT).map_err(failed("cannot change the root"))
}

/// Takes the host's root off, for everybody in the namespace. Nobody who is not to see it may run before. Waits until no
/// processor uses it any longer, which is time for something else.
pub(super) fn let_go() -> Result<(), Failed> {
    rustix::process::chdir("/").map_err(failed("cannot enter the root"))?;
    unmount(OLD_ROOT, UnmountFlags::DETACH).map_err(failed("cannot let go of the host's root"))?;
    // A last look: what is not to be seen is not there.
    match rustix::fs::statat(CWD, "/proc/self/root/proc", AtFlags::empty()) {
        Ok(_) => Ok(()),
        Err(error) => Err(failed("the new root is not whole")(error)),
    }
}
