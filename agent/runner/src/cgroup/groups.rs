//! The cgroups that limit one attempt: made before its command starts, asked about memory after its end, removed.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::process::Signal;

use super::{Cgroup, remove};
use crate::limits::Group;
use crate::processes::{Process, signal};

/// Cgroups that limit an attempt.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    paths: Vec<PathBuf>,
    /// Where cgroup v1 notes that memory ran out.
    notices: Vec<Rc<OwnedFd>>,
}

impl Groups {
    /// Makes and sets them. `held` exists already and is only set. All or none.
    ///
    /// # Errors
    /// Those of the file system: a limit that cannot be set is not silently left out.
    pub fn create<'a>(groups: impl IntoIterator<Item = &'a Group>, held: Option<&Cgroup>) -> io::Result<Self> {
        let mut made = Self::default();
        for group in groups {
            if let Err(error) = made.add(group, held) {
                let _ = made.remove();
                let text = format!("cannot limit it by {}: {error}", group.path.display());
                return Err(io::Error::new(error.kind(), text));
            }
        }
        Ok(made)
    }

    fn add(&mut self, group: &Group, held: Option<&Cgroup>) -> io::Result<()> {
        // Who is in `held` is born there; and whoever has it asks it and removes it.
        if held.is_none_or(|held| held.path() != group.path) {
            fs::create_dir(&group.path)?;
            self.paths.push(group.path.clone());
        }
        for (file, value) in &group.settings {
            // Not a write that would make a file: where there is none, the controller is not there.
            let mut file = fs::OpenOptions::new().write(true).open(group.path.join(file))?;
            io::Write::write_all(&mut file, value.as_bytes())?;
        }
        // Without a notice the counts remain, which know less.
        self.notices.extend(notice(&group.path).ok().map(Rc::new));
        Ok(())
    }

    /// Names those that exist.
    #[must_use]
    pub fn existing(groups: &[Group]) -> Self {
        let there = |path: &&PathBuf| path.join("cgroup.procs").exists();
        Self { paths: groups.iter().map(|group| &group.path).filter(there).cloned().collect(), notices: Vec::new() }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Where a process puts itself in, by writing `0` to each.
    pub fn procs(&self) -> impl Iterator<Item = PathBuf> {
        self.paths.iter().map(|path| path.join("cgroup.procs"))
    }

    /// The live processes in them. One that a build with root's rights moved elsewhere is not among them.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn members(&self) -> io::Result<Vec<Process>> {
        let mut members = Vec::new();
        for path in &self.paths {
            let text = match fs::read_to_string(path.join("cgroup.procs")) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let pids = text.lines().filter_map(|line| line.parse().ok());
            members.extend(pids.filter_map(Process::read).filter(|process| !process.zombie));
        }
        Ok(members)
    }

    /// How often the kernel killed in them for want of memory. Asked before they are removed, of which there are notices too.
    #[must_use]
    pub fn memory_kills(&self) -> u64 {
        let noticed = self.notices.iter().map(|notice| {
            let mut count = [0; size_of::<u64>()];
            // Not yet written to: nothing happened.
            rustix::io::read(notice.as_ref(), &mut count).map_or(0, |_| u64::from_ne_bytes(count))
        });
        self.paths.iter().map(|path| memory_kills(path)).chain(noticed).sum()
    }

    /// Removes them; those that are gone already are fine.
    ///
    /// # Errors
    /// Those of the file system, when all have been tried.
    pub fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for path in &self.paths {
            if let Err(error) = remove(path) {
                result = Err(error);
            }
        }
        result
    }
}

/// Has cgroup v1 say when memory runs out in a cgroup, or in one below it whose own count goes with it: those of cgroup v2 count
/// for all below.
fn notice(path: &Path) -> io::Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    let control = fs::OpenOptions::new().write(true).open(path.join("cgroup.event_control"))?;
    let subject = fs::File::open(path.join("memory.oom_control"))?;
    let notice = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let request = format!("{} {}", notice.as_raw_fd(), subject.as_raw_fd());
    io::Write::write_all(&mut &control, request.as_bytes())?;
    Ok(notice)
}

/// How often the kernel killed in a cgroup for want of memory; 0 where it has no memory controller.
pub(super) fn memory_kills(path: &Path) -> u64 {
    // The first file is of cgroup v2, the second of v1.
    let text = ["memory.events", "memory.oom_control"].iter().find_map(|file| fs::read_to_string(path.join(file)).ok());
    let count = |text: String| text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok();
    text.and_then(count).unwrap_or(0)
}

/// Kills whoever is in a cgroup of any version that nobody owns any more, and removes it. False when somebody is still dying.
pub(super) fn put_away(path: &Path) -> io::Result<bool> {
    let group = Groups { paths: vec![path.to_owned()], notices: Vec::new() };
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        for process in group.members()? {
            // It may be gone by now.
            let _ = signal(process.id, Signal::KILL);
        }
    }
    match group.remove() {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(error) => Err(error),
    }
}
