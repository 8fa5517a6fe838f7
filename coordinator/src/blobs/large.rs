//! Large blobs: one file each, `blobs/ab/HEX`, and uploads that can be resumed, `uploads/HEX.part`. Where there is a bucket,
//! a file may go there (`offload`), and a marker stays: `offloaded/ab/HEX`.
//!
//! A file is the blob's bytes, a CRC32 per chunk, and a footer, so that no damaged byte is ever served, wherever a
//! reader begins (`format`). It has its name only when it is whole, hashed and fsynced (`upload`). Invariant: of a blob in the
//! index there is the file, or a durable marker and the object that it names. Opening and changing blocks, reading does not.

mod aside;
pub(super) mod format;
pub(super) mod marker;
pub(super) mod place;
pub(super) mod upload;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use helix_common::files::sync_directory;
use helix_common::removal::remove_gradually;
use helix_model::Digest;

use self::format::{LargeBlob, Tail};
use self::marker::Marker;
use self::upload::digest_of_part;
use super::BlobError;
use super::bucket::{Bucket, InBucket};
use super::health::Health;
use super::leases::Leases;

/// How long an upload that nobody goes on with is kept.
const PART_KEPT_FOR: Duration = Duration::from_secs(86_400);

/// The store of large blobs.
pub(super) struct Large {
    files: PathBuf,
    markers: PathBuf,
    uploads: PathBuf,
    damaged: PathBuf,
    bucket: Option<Arc<Bucket>>,
    /// Held while files and markers change their names, and taken before the index: a sync on the way keeps nobody who only looks.
    names: Mutex<()>,
    index: RwLock<HashMap<Digest, Held>>,
    health: Arc<Health>,
    /// Uploads under way that own the resumable part of their digest, and which of them does.
    owners: Mutex<HashMap<Digest, u64>>,
    next: AtomicU64,
}

/// Where a large blob's bytes lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lies {
    /// In its file.
    Here,
    /// In the object of this number.
    Bucket(u64),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    size: u64,
    stored_at: SystemTime,
    lies: Lies,
}

/// What was done about a blob that was to be removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Removed {
    /// It stays, or was not here.
    Nothing,
    /// Its file has gone.
    File,
    /// Its marker has gone for good, and the object of this number may go.
    Marker(u64),
}

/// Blobs that lie in one kind of place, and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Sum {
    pub(super) blobs: u64,
    pub(super) bytes: u64,
}

impl Large {
    /// Opens the store beneath `root`, reads the footer of every file and every marker, removes stale uploads.
    pub(super) fn open(root: &Path, health: Arc<Health>, bucket: Option<Arc<Bucket>>) -> io::Result<Self> {
        let store = Self {
            files: root.join("blobs"),
            markers: root.join("offloaded"),
            uploads: root.join("uploads"),
            damaged: root.join("damaged"),
            bucket,
            names: Mutex::default(),
            index: RwLock::default(),
            health,
            owners: Mutex::default(),
            next: AtomicU64::new(0),
        };
        for directory in [&store.files, &store.markers, &store.uploads, &store.damaged] {
            std::fs::create_dir_all(directory)?;
        }
        in_shelves(&store.files, |digest, path| store.load_file(digest, path))?;
        in_shelves(&store.markers, |digest, path| store.load_marker(digest, path))?;
        // Whatever has a name of its own belongs to a process that is no more; only resumable parts are kept.
        for entry in std::fs::read_dir(&store.uploads)? {
            let path = entry?.path();
            if digest_of_part(&path).is_none() {
                remove_gradually(&path)?;
            }
        }
        store.remove_stale();
        // What was set aside and not replaced before this node ended is still looked for.
        for aside in store.set_aside_before()? {
            if store.size(&aside.digest).is_none() {
                store.health.suspect(aside.digest);
            }
        }
        Ok(store)
    }

    fn load_file(&self, digest: Digest, path: &Path) -> io::Result<()> {
        match LargeBlob::open(path, digest) {
            Ok(blob) => {
                let stored_at = std::fs::metadata(path)?.modified()?;
                self.write_index().insert(digest, Held { size: blob.size(), stored_at, lies: Lies::Here });
            }
            Err(error) => {
                tracing::error!(%digest, %error, "a blob's file is damaged and set aside");
                self.move_aside(digest, Lies::Here);
                self.health.damaged(digest);
            }
        }
        Ok(())
    }

    fn load_marker(&self, digest: Digest, path: &Path) -> io::Result<()> {
        if self.size(&digest).is_some() {
            // The node ended between marker and file. The file needs nobody else; its object is found by listing.
            return std::fs::remove_file(path);
        }
        match Marker::read(path) {
            Ok(Marker { object, tail }) => {
                let stored_at = std::fs::metadata(path)?.modified()?;
                self.write_index().insert(digest, Held { size: tail.size, stored_at, lies: Lies::Bucket(object) });
            }
            Err(error) if is_exhaustion(&error) => return Err(error),
            Err(error) => {
                tracing::error!(%digest, %error, "the marker of a blob in the bucket is damaged and set aside");
                self.move_aside(digest, Lies::Bucket(0));
                self.health.damaged(digest);
            }
        }
        Ok(())
    }

    /// The size of a blob that is held.
    pub(super) fn size(&self, digest: &Digest) -> Option<u64> {
        self.held(digest).map(|held| held.size)
    }

    fn held(&self, digest: &Digest) -> Option<Held> {
        self.read_index().get(digest).copied()
    }

    /// Blobs whose digests begin with this byte.
    pub(super) fn beginning_with(&self, first: u8) -> Vec<Digest> {
        self.read_index().keys().filter(|digest| digest.0[0] == first).copied().collect()
    }

    /// Blobs in files, and in the bucket.
    pub(super) fn totals(&self) -> (Sum, Sum) {
        let (mut here, mut bucket) = (Sum::default(), Sum::default());
        for held in self.read_index().values() {
            let sum = if held.lies == Lies::Here { &mut here } else { &mut bucket };
            sum.blobs += 1;
            sum.bytes += held.size;
        }
        (here, bucket)
    }

    /// Blobs stored at or before `before`.
    pub(super) fn stored_before(&self, before: SystemTime) -> Vec<Digest> {
        let index = self.read_index();
        index.iter().filter(|(_, held)| held.stored_at <= before).map(|(digest, _)| *digest).collect()
    }

    /// Blobs that lie in files, the oldest first, with when they were stored.
    pub(super) fn in_files(&self) -> Vec<(SystemTime, Digest)> {
        let index = self.read_index();
        let here = index.iter().filter(|(_, held)| held.lies == Lies::Here);
        let mut found: Vec<_> = here.map(|(digest, held)| (held.stored_at, *digest)).collect();
        found.sort_unstable();
        found
    }

    /// Blobs that lie in the bucket, in order.
    pub(super) fn in_bucket(&self) -> Vec<Digest> {
        let index = self.read_index();
        let away = index.iter().filter(|(_, held)| held.lies != Lies::Here);
        let mut found: Vec<_> = away.map(|(digest, _)| *digest).collect();
        found.sort_unstable();
        found
    }

    /// Whether no blob is, or may be, in the bucket.
    pub(super) fn has_nothing_in_bucket(&self) -> bool {
        let away = self.read_index().values().any(|held| held.lies != Lies::Here);
        !away && self.set_aside_before().is_ok_and(|asides| !asides.iter().any(|aside| aside.is_marker))
    }

    /// Whether an object is needed: a marker names it, or there is one that may yet be looked at again.
    pub(super) fn needs_object(&self, digest: &Digest, object: u64) -> bool {
        // Under the lock: a marker is set aside, and put back, in one step.
        let index = self.read_index();
        match index.get(digest) {
            Some(Held { lies: Lies::Bucket(named), .. }) if *named == object => true,
            Some(_) => self.has_marker_aside(digest),
            // One that could not be set aside is where it was.
            None => self.has_marker_aside(digest) || self.marker_of(digest).try_exists().unwrap_or(true),
        }
    }

    /// Opens a blob for reading; `None` if it is not held. One whose file or marker is damaged is set aside.
    pub(super) fn read(&self, digest: &Digest) -> Result<Option<LargeBlob>, BlobError> {
        loop {
            let Some(held) = self.held(digest) else { return Ok(None) };
            let opened = match held.lies {
                Lies::Here => LargeBlob::open(&self.path_of(digest), *digest),
                Lies::Bucket(_) => Marker::read(&self.marker_of(digest)).map(|marker| self.in_object(*digest, marker)),
            };
            match opened {
                Ok(blob) => return Ok(Some(blob)),
                // Removed since, or it went to the bucket, or came back.
                Err(_) if self.held(digest) != Some(held) => {}
                Err(error) if is_exhaustion(&error) => return Err(error.into()),
                Err(error) => {
                    tracing::error!(%digest, %error, lies = ?held.lies, "a blob's file is damaged and set aside");
                    self.set_aside(digest, held.lies);
                    return Err(BlobError::Damaged(*digest));
                }
            }
        }
    }

    fn in_object(&self, digest: Digest, Marker { object, tail }: Marker) -> LargeBlob {
        let place = InBucket::new(self.bucket.clone(), marker::object_name(&digest, object), &tail);
        LargeBlob::elsewhere(digest, object, tail, Box::new(place))
    }

    /// The object of this number holds what the file holds: leaves a marker, then lets the file go. Whether it did: the blob may
    /// have been removed meanwhile.
    pub(super) fn went_to_bucket(&self, digest: &Digest, object: u64, tail: &Tail) -> io::Result<bool> {
        let Some(Held { stored_at, lies: Lies::Here, .. }) = self.held(digest) else { return Ok(false) };
        let marker = self.marker_of(digest);
        make_shelf(&self.markers, &marker)?;
        // The order matters: a durable marker, then the index, then the file.
        if let Err(error) = Marker::write(&marker, object, tail, stored_at) {
            let _ = std::fs::remove_file(&marker);
            return Err(error);
        }
        let trash = self.trash_of(digest);
        {
            let _names = self.names();
            let mut index = self.write_index();
            let Some(held) = index.get_mut(digest).filter(|held| held.lies == Lies::Here) else {
                std::fs::remove_file(&marker)?;
                return Ok(false);
            };
            std::fs::rename(self.path_of(digest), &trash)?;
            held.lies = Lies::Bucket(object);
        }
        // From here on it did, whatever becomes of the file: what is left of it goes at the next start.
        if let Err(error) = remove_gradually(&trash) {
            tracing::warn!(path = %trash.display(), %error, "the file of a blob that went to the bucket cannot be removed");
        }
        Ok(true)
    }

    /// Removes a blob unless it is leased.
    pub(super) fn remove(&self, digest: &Digest, leases: &Leases) -> io::Result<Removed> {
        let trash = self.trash_of(digest);
        let marker = self.marker_of(digest);
        let lies = {
            // Under the lock: whoever leases and then finds the blob in the index can rely on it. The file leaves its name
            // here, too, so that an upload of the same blob that ends now is not removed in its place.
            let _names = self.names();
            let mut index = self.write_index();
            let Some(held) = index.get(digest).copied().filter(|_| !leases.holds(digest)) else {
                return Ok(Removed::Nothing);
            };
            match held.lies {
                Lies::Here => {
                    std::fs::rename(self.path_of(digest), &trash)?;
                    // One that was being made for it.
                    let _ = std::fs::remove_file(&marker);
                }
                Lies::Bucket(_) => std::fs::rename(&marker, &trash)?,
            }
            index.remove(digest);
            held.lies
        };
        remove_gradually(&trash)?;
        match lies {
            Lies::Here => Ok(Removed::File),
            Lies::Bucket(object) => {
                // A power cut must not bring back a marker whose object has gone.
                sync_directory(marker.parent().unwrap_or(&self.markers))?;
                Ok(Removed::Marker(object))
            }
        }
    }

    fn path_of(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.files.join(&name[..2]).join(name)
    }

    fn marker_of(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.markers.join(&name[..2]).join(name)
    }

    fn trash_of(&self, digest: &Digest) -> PathBuf {
        self.uploads.join(format!("{digest}.{}.trash", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<Digest, u64>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, ()> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read_index(&self) -> RwLockReadGuard<'_, HashMap<Digest, Held>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_index(&self) -> RwLockWriteGuard<'_, HashMap<Digest, Held>> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the directory that `path` lies in, durably.
fn make_shelf(root: &Path, path: &Path) -> io::Result<()> {
    let shelf = path.parent().unwrap_or(root);
    if !shelf.is_dir() {
        std::fs::create_dir_all(shelf)?;
        sync_directory(root)?;
    }
    Ok(())
}

/// Goes through what has a digest for its name. What a write that was cut short left is removed.
fn in_shelves(root: &Path, mut found: impl FnMut(Digest, &Path) -> io::Result<()>) -> io::Result<()> {
    for shelf in std::fs::read_dir(root)? {
        let shelf = shelf?;
        if !shelf.file_type()?.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(shelf.path())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Ok(digest) = Digest::parse(name) {
                found(digest, &entry.path())?;
            } else if name.starts_with('.') && name.ends_with(".tmp") {
                remove_gradually(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Too many open files says nothing about the file.
fn is_exhaustion(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(rustix::io::Errno::MFILE.raw_os_error()) || code == Some(rustix::io::Errno::NFILE.raw_os_error())
}
