//! The store's lock, and making room in it.
//!
//! podman's own prune races with builds. So whoever builds, or uses what was built, holds the store's lock shared, and who
//! removes layers holds it exclusively. A build's share is held by its own processes and lasts as long as they.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::Podman;

/// Between two looks at a lock that somebody else has.
const LOOK: Duration = Duration::from_millis(50);

/// How long removing may take.
const PRUNE_LIMIT: Duration = Duration::from_secs(600);

/// Layers that were made so recently are not dangling yet, but a cache.
const FRESH: &str = "until=24h";

/// A share of the store, or all of it, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// What is removed; each tier removes what the earlier ones do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tier {
    /// Build containers that no build uses.
    Containers,
    /// Images and cached layers without a name, older than a day.
    Dangling,
    /// Everything that no container uses: the whole cache.
    Unused,
}

/// How pruning went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pruned {
    /// Done.
    Done,
    /// A build used the store all the time, or there is no podman here.
    Busy,
}

impl Podman {
    /// The lock's file: beside the store, so that every agent that uses it means the same.
    pub(super) fn lock_path(&self) -> PathBuf {
        let mut name = self.config.podman.root.clone().into_os_string();
        name.push(".lock");
        name.into()
    }

    /// Waits for a share of the store.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn share(&self) -> io::Result<Lock> {
        let file = self.open_lock()?;
        while !try_lock(&file, FlockOperation::NonBlockingLockShared)? {
            tokio::time::sleep(LOOK).await;
        }
        Ok(Lock { _file: file })
    }

    /// Waits for the whole store; `None` when `patience` ends first.
    pub(super) async fn have_alone(&self, patience: Duration) -> io::Result<Option<Lock>> {
        let (file, deadline) = (self.open_lock()?, Instant::now() + patience);
        while !try_lock(&file, FlockOperation::NonBlockingLockExclusive)? {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(Some(Lock { _file: file }))
    }

    /// Makes room in the store, if it is free of builds within `patience`.
    ///
    /// # Errors
    /// When podman cannot be run, or fails.
    pub async fn prune(&self, tier: Tier, patience: Duration) -> io::Result<Pruned> {
        if !self.standing.borrow().works() {
            return Ok(Pruned::Busy);
        }
        let Some(_alone) = self.have_alone(patience).await? else { return Ok(Pruned::Busy) };
        let tracker = TaskTracker::new();
        // Nothing builds now, so nobody uses any of them.
        self.remove_containers(&tracker, |_| true).await?;
        self.remove_lists(&tracker, |_| true).await?;
        let arguments: &[&str] = match tier {
            Tier::Containers => return Ok(Pruned::Done),
            Tier::Dangling => &["image", "prune", "--force", "--filter", FRESH],
            Tier::Unused => &["image", "prune", "--force", "--all"],
        };
        let arguments = arguments.iter().map(Into::into).collect();
        let done = self.run(&tracker, arguments, &self.dir, PRUNE_LIMIT).await?;
        if done.success() { Ok(Pruned::Done) } else { Err(io::Error::other(done.complaint())) }
    }

    /// Takes away the mount that podman makes of its store upon itself, so that the directory can be moved or removed. Refused
    /// by the kernel, rightly, while anything is mounted below. Blocks.
    pub fn unmount(&self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            if std::path::Path::new(mount).parent() == Some(&self.config.podman.root)
                && let Err(error) = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::NOFOLLOW)
            {
                tracing::debug!(mount, %error, "cannot unmount podman's store");
            }
        }
    }

    fn open_lock(&self) -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.lock_path())
    }
}

fn try_lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
