//! Large blobs: one file each, `blobs/ab/HEX`, and uploads that can be resumed, `uploads/HEX.part`.
//!
//! A file is the blob's bytes, a CRC32 per chunk, and a footer, so that no damaged byte is ever served, wherever a
//! reader begins (`format`). It has its name only when it is whole, hashed and fsynced (`upload`). Everything here blocks.

pub(super) mod format;
pub(super) mod upload;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use helix_model::Digest;
use sha2::{Digest as _, Sha256};

use self::format::LargeFile;
use self::upload::digest_of_part;
use super::BlobError;
use super::health::Health;
use super::leases::Leases;

/// How long an upload that nobody goes on with is kept.
const PART_KEPT_FOR: Duration = Duration::from_secs(86_400);

/// How long a damaged file is kept that nothing has replaced.
const DAMAGED_KEPT_FOR: Duration = Duration::from_secs(30 * 86_400);

/// The store of large blobs.
pub(super) struct Large {
    files: PathBuf,
    uploads: PathBuf,
    damaged: PathBuf,
    index: RwLock<HashMap<Digest, Held>>,
    health: Arc<Health>,
    /// Uploads under way that own the resumable part of their digest, and which of them does.
    owners: Mutex<HashMap<Digest, u64>>,
    next: AtomicU64,
}

#[derive(Clone, Copy)]
struct Held {
    size: u64,
    stored_at: SystemTime,
}

impl Large {
    /// Opens the store beneath `root`, reads the footer of every file, removes stale uploads.
    pub(super) fn open(root: &Path, health: Arc<Health>) -> io::Result<Self> {
        let store = Self {
            files: root.join("blobs"),
            uploads: root.join("uploads"),
            damaged: root.join("damaged"),
            index: RwLock::default(),
            health,
            owners: Mutex::default(),
            next: AtomicU64::new(0),
        };
        for directory in [&store.files, &store.uploads, &store.damaged] {
            std::fs::create_dir_all(directory)?;
        }
        for shelf in std::fs::read_dir(&store.files)? {
            let shelf = shelf?;
            if shelf.file_type()?.is_dir() {
                store.load_shelf(&shelf.path())?;
            }
        }
        // Whatever has a name of its own belongs to a process that is no more; only resumable parts are kept.
        for entry in std::fs::read_dir(&store.uploads)? {
            let path = entry?.path();
            if digest_of_part(&path).is_none() {
                std::fs::remove_file(&path)?;
            }
        }
        store.remove_stale();
        // What was set aside and not replaced before this node ended is still looked for.
        for (digest, _) in store.set_aside_before()? {
            if store.size(&digest).is_none() {
                store.health.suspect(digest);
            }
        }
        Ok(store)
    }

    fn set_aside_before(&self) -> io::Result<Vec<(Digest, PathBuf)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.damaged)? {
            let entry = entry?;
            let digest = entry.file_name().to_str().and_then(|name| Digest::parse(name).ok());
            found.extend(digest.map(|digest| (digest, entry.path())));
        }
        Ok(found)
    }

    fn load_shelf(&self, shelf: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(shelf)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|name| Digest::parse(name).ok()) else { continue };
            match LargeFile::open(&entry.path(), digest) {
                Ok(file) => {
                    let held = Held { size: file.size, stored_at: entry.metadata()?.modified()? };
                    self.write_index().insert(digest, held);
                }
                Err(error) => {
                    tracing::error!(%digest, %error, "a blob's file is damaged and set aside");
                    self.move_aside(digest);
                    self.health.damaged(digest);
                }
            }
        }
        Ok(())
    }

    /// The size of a blob that is here.
    pub(super) fn size(&self, digest: &Digest) -> Option<u64> {
        self.read_index().get(digest).map(|held| held.size)
    }

    /// Blobs whose digests begin with this byte.
    pub(super) fn beginning_with(&self, first: u8) -> Vec<Digest> {
        self.read_index().keys().filter(|digest| digest.0[0] == first).copied().collect()
    }

    /// Blobs and their bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        let index = self.read_index();
        (index.len() as u64, index.values().map(|held| held.size).sum())
    }

    /// Blobs stored at or before `before`.
    pub(super) fn stored_before(&self, before: SystemTime) -> Vec<Digest> {
        let index = self.read_index();
        index.iter().filter(|(_, held)| held.stored_at <= before).map(|(digest, _)| *digest).collect()
    }

    /// Opens a blob for reading; `None` if it is not here. One that is damaged is set aside.
    pub(super) fn read(&self, digest: &Digest) -> Result<Option<LargeFile>, BlobError> {
        if self.size(digest).is_none() {
            return Ok(None);
        }
        match LargeFile::open(&self.path_of(digest), *digest) {
            Ok(file) => Ok(Some(file)),
            // Removed since.
            Err(_) if self.size(digest).is_none() => Ok(None),
            Err(error) if is_exhaustion(&error) => Err(error.into()),
            Err(error) => {
                tracing::error!(%digest, %error, "a blob's file is damaged and set aside");
                self.set_aside(digest);
                Err(BlobError::Damaged(*digest))
            }
        }
    }

    /// Takes a blob out of service, keeping its bytes until there is a good copy here, and a day for whoever wants to know what
    /// happened.
    pub(super) fn set_aside(&self, digest: &Digest) {
        let mut index = self.write_index();
        if index.remove(digest).is_some() {
            self.move_aside(*digest);
            self.health.damaged(*digest);
        }
    }

    fn move_aside(&self, digest: Digest) {
        let path = self.path_of(&digest);
        let aside = self.damaged.join(digest.to_string());
        // Its age counts from now.
        let moved = std::fs::rename(&path, &aside)
            .and_then(|()| File::options().append(true).open(&aside)?.set_modified(SystemTime::now()));
        if let Err(error) = moved {
            tracing::error!(%digest, %error, "a damaged blob cannot be set aside");
        }
    }

    /// Puts a blob back into service whose file was set aside, if its bytes are what its name says after all, as after an error
    /// of the disk that has passed; whether it is here. Reads all of it.
    pub(super) fn reinstate(&self, digest: &Digest) -> Result<bool, BlobError> {
        let aside = self.damaged.join(digest.to_string());
        let file = match LargeFile::open(&aside, *digest) {
            Ok(file) => file,
            // There is none, or its footer is what is damaged.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        let (mut sha256, mut at) = (Sha256::new(), 0);
        while at < file.size {
            match file.chunk(at) {
                Ok(chunk) => {
                    sha256.update(&chunk);
                    at += chunk.len() as u64;
                }
                Err(BlobError::Damaged(_)) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if Digest(sha256.finalize().into()) != *digest {
            return Ok(false);
        }
        let mut index = self.write_index();
        if !index.contains_key(digest) {
            let path = self.path_of(digest);
            std::fs::rename(&aside, &path)?;
            index.insert(*digest, Held { size: file.size, stored_at: SystemTime::now() });
        }
        Ok(true)
    }

    /// Removes a blob unless it is leased; whether it was removed.
    pub(super) fn remove(&self, digest: &Digest, leases: &Leases) -> io::Result<bool> {
        let trash = self.uploads.join(format!("{digest}.{}.trash", self.next.fetch_add(1, Ordering::Relaxed)));
        {
            // Under the lock: whoever leases and then finds the blob in the index can rely on it. The file leaves its name
            // here, too, so that an upload of the same blob that ends now is not removed in its place.
            let mut index = self.write_index();
            if leases.holds(digest) || !index.contains_key(digest) {
                return Ok(false);
            }
            std::fs::rename(self.path_of(digest), &trash)?;
            index.remove(digest);
        }
        std::fs::remove_file(&trash)?;
        Ok(true)
    }

    /// Removes uploads that are older than a day, and damaged files: those that were replaced as soon, others after a month, since
    /// they may be the last there is.
    pub(super) fn remove_stale(&self) {
        let uploads = std::fs::read_dir(&self.uploads).into_iter().flatten().flatten().map(|entry| entry.path());
        let owned = |path: &Path| digest_of_part(path).is_some_and(|digest| self.owners().contains_key(&digest));
        let uploads = uploads.filter(|path| !owned(path) && is_older(path, PART_KEPT_FOR));
        let damaged = self.set_aside_before().unwrap_or_default().into_iter().filter(|(digest, path)| {
            let kept_for = if self.size(digest).is_some() { PART_KEPT_FOR } else { DAMAGED_KEPT_FOR };
            is_older(path, kept_for)
        });
        for path in uploads.chain(damaged.map(|(_, path)| path)) {
            tracing::info!(path = %path.display(), "a stale file is removed");
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a stale file cannot be removed");
            }
        }
    }

    fn path_of(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.files.join(&name[..2]).join(name)
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<Digest, u64>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_index(&self) -> RwLockReadGuard<'_, HashMap<Digest, Held>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_index(&self) -> RwLockWriteGuard<'_, HashMap<Digest, Held>> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_older(path: &Path, than: Duration) -> bool {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > than))
}

/// Too many open files says nothing about the file.
fn is_exhaustion(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(rustix::io::Errno::MFILE.raw_os_error()) || code == Some(rustix::io::Errno::NFILE.raw_os_error())
}
