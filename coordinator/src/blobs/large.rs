//! Large blobs: one file each, `blobs/ab/HEX`, and uploads that can be resumed, `uploads/HEX.part`.
//!
//! A file is the blob's bytes, a CRC32 per [`CHUNK_BYTES`], and a footer, so that no damaged byte is ever served, wherever a
//! reader begins. It has its name only when it is whole, hashed and fsynced. Everything here blocks.
//!
//! ```text
//! file    data, crc32 of each chunk u32, footer
//! footer  size u64, crc32 of the table and of the size u32, magic "HELIXBLB"
//! ```

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use helix_common::files::sync_directory;
use helix_failpoint::{self as failpoint, Point};
use helix_model::Digest;
use helix_model::limits::CHUNK_BYTES;
use sha2::{Digest as _, Sha256};

use super::BlobError;
use super::health::Health;
use super::leases::Leases;

const FOOTER_BYTES: u64 = 20;
const FOOTER_MAGIC: &[u8; 8] = b"HELIXBLB";

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

    /// Bytes of an unfinished upload, to go on from.
    pub(super) fn part_len(&self, digest: &Digest, size_max: u64) -> u64 {
        std::fs::metadata(self.part_of(digest)).map_or(0, |metadata| metadata.len().min(size_max))
    }

    /// Begins an upload, or goes on with one at `offset`. One that goes on takes over from whoever else was writing:
    /// that is the same client, whose connection broke.
    pub(super) fn upload(self: &Arc<Self>, digest: Digest, size: u64, offset: u64) -> Result<Upload, BlobError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let own_name = {
            let mut owners = self.owners();
            let taken = owners.contains_key(&digest) && offset == 0;
            if !taken {
                owners.insert(digest, number);
            }
            taken
        };
        let part = self.part_of(&digest);
        let path = if own_name { self.uploads.join(format!("{digest}.{number}.tmp")) } else { part };
        let slot = Slot { store: Arc::clone(self), digest, number, own_name, path };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&slot.path)?;
        let have = file.metadata()?.len();
        if have < offset {
            return Err(BlobError::Offset { have });
        }
        // A longer one was cut short while its table was written, or its tail was not acknowledged.
        file.set_len(offset)?;
        let mut upload =
            Upload { slot, digest, size, sums: Sums::default(), file: file.try_clone()?, resumed: offset > 0 };
        let mut buffer = vec![0; CHUNK_BYTES];
        while upload.sums.bytes < offset {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            upload.sums.update(&buffer[..read]);
        }
        Ok(upload)
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

    fn part_of(&self, digest: &Digest) -> PathBuf {
        self.uploads.join(format!("{digest}.part"))
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

/// An upload's place: the file, and the right to write it.
struct Slot {
    store: Arc<Large>,
    digest: Digest,
    number: u64,
    /// Its file is its own and goes with it; otherwise it is the resumable part.
    own_name: bool,
    path: PathBuf,
}

impl Slot {
    fn check(&self) -> Result<(), BlobError> {
        if self.own_name || self.store.owners().get(&self.digest) == Some(&self.number) {
            Ok(())
        } else {
            Err(BlobError::TakenOver)
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.own_name {
            // Gone already when the upload succeeded.
            let _ = std::fs::remove_file(&self.path);
        } else {
            let mut owners = self.store.owners();
            if owners.get(&self.digest) == Some(&self.number) {
                owners.remove(&self.digest);
            }
        }
    }
}

/// A large blob on its way in.
pub(super) struct Upload {
    slot: Slot,
    digest: Digest,
    size: u64,
    sums: Sums,
    file: File,
    resumed: bool,
}

impl Upload {
    /// Bytes that are here.
    #[cfg(test)]
    pub(super) fn offset(&self) -> u64 {
        self.sums.bytes
    }

    /// Adds bytes.
    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), BlobError> {
        if self.sums.bytes + data.len() as u64 > self.size {
            return Err(BlobError::Size { announced: self.size, sent: self.sums.bytes + data.len() as u64 });
        }
        self.slot.check()?;
        failpoint::hit(Point::BlobWrite)?;
        self.file.write_all_at(data, self.sums.bytes)?;
        self.sums.update(data);
        Ok(())
    }

    /// Checks the digest, makes the blob durable, and gives it its name.
    pub(super) fn finish(self) -> Result<(), BlobError> {
        let Self { slot, digest, size, sums, file, resumed } = self;
        if sums.bytes != size {
            return Err(BlobError::Size { announced: size, sent: sums.bytes });
        }
        slot.check()?;
        let (actual, table) = sums.finish();
        if actual != digest {
            std::fs::remove_file(&slot.path)?;
            return Err(BlobError::Digest { announced: digest, actual, resumed });
        }
        // The order matters: bytes, then the name, then the directory that holds it, then the index.
        failpoint::hit(Point::BlobTable)?;
        let written = file.write_all_at(&table, size).and_then(|()| failpoint::hit(Point::BlobWritten));
        if let Err(error) = written.and_then(|()| file.sync_all()) {
            // After a failed fsync the bytes read well and are not on the disk: nobody may go on from them.
            std::fs::remove_file(&slot.path)?;
            return Err(error.into());
        }
        failpoint::pass(Point::BlobSynced);
        let store = &slot.store;
        let path = store.path_of(&digest);
        let shelf = path.parent().unwrap_or(&store.files);
        if !shelf.is_dir() {
            std::fs::create_dir_all(shelf)?;
            sync_directory(&store.files)?;
        }
        {
            let mut index = store.write_index();
            slot.check()?;
            std::fs::rename(&slot.path, &path)?;
            failpoint::hit(Point::BlobRenamed)?;
            sync_directory(shelf)?;
            failpoint::pass(Point::BlobStored);
            index.insert(digest, Held { size, stored_at: SystemTime::now() });
        }
        Ok(())
    }
}

/// What is computed of bytes as they pass.
#[derive(Default)]
struct Sums {
    bytes: u64,
    digest: Sha256,
    chunk: crc32fast::Hasher,
    chunk_len: usize,
    table: Vec<u8>,
}

impl Sums {
    fn update(&mut self, mut data: &[u8]) {
        self.bytes += data.len() as u64;
        self.digest.update(data);
        while !data.is_empty() {
            let (now, later) = data.split_at(data.len().min(CHUNK_BYTES - self.chunk_len));
            self.chunk.update(now);
            self.chunk_len += now.len();
            data = later;
            if self.chunk_len == CHUNK_BYTES {
                self.close_chunk();
            }
        }
    }

    fn close_chunk(&mut self) {
        let crc = std::mem::take(&mut self.chunk).finalize();
        self.table.extend_from_slice(&crc.to_le_bytes());
        self.chunk_len = 0;
    }

    /// The digest, and the table with the footer.
    fn finish(mut self) -> (Digest, Vec<u8>) {
        if self.chunk_len > 0 {
            self.close_chunk();
        }
        self.table.extend_from_slice(&self.bytes.to_le_bytes());
        let crc = crc32fast::hash(&self.table);
        self.table.extend_from_slice(&crc.to_le_bytes());
        self.table.extend_from_slice(FOOTER_MAGIC);
        (Digest(self.digest.finalize().into()), self.table)
    }
}

/// A large blob open for reading. Removing the blob does not disturb it.
pub(super) struct LargeFile {
    file: File,
    digest: Digest,
    size: u64,
    table: Vec<u8>,
}

impl LargeFile {
    fn open(path: &Path, digest: Digest) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the footer is damaged");
        let footer_at = len.checked_sub(FOOTER_BYTES).ok_or_else(wrong)?;
        let mut footer = [0; 20];
        file.read_exact_at(&mut footer, footer_at)?;
        let size = u64::from_le_bytes(footer[..8].try_into().map_err(|_| wrong())?);
        let table_bytes = size.div_ceil(CHUNK_BYTES as u64).checked_mul(4).ok_or_else(wrong)?;
        if footer[12..] != *FOOTER_MAGIC || size.checked_add(table_bytes) != Some(footer_at) {
            return Err(wrong());
        }
        let mut table = vec![0; usize::try_from(table_bytes).map_err(|_| wrong())?];
        file.read_exact_at(&mut table, size)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&table);
        crc.update(&footer[..8]);
        if crc.finalize().to_le_bytes() != footer[8..12] {
            return Err(wrong());
        }
        Ok(Self { file, digest, size, table })
    }

    /// The blob's size.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Has the chunk at `offset` come from the disk when it is read next, and not from what the system keeps of it.
    pub(super) fn forget_pages(&self, offset: u64) {
        let len = std::num::NonZeroU64::new(CHUNK_BYTES as u64);
        // Advice: without it older bytes are checked.
        let _ = rustix::fs::fadvise(&self.file, offset, len, rustix::fs::Advice::DontNeed);
    }

    /// The rest of the chunk that `offset` lies in, checked; empty at the end.
    pub(super) fn chunk(&self, offset: u64) -> Result<Vec<u8>, BlobError> {
        if offset >= self.size {
            return Ok(Vec::new());
        }
        let chunk_bytes = CHUNK_BYTES as u64;
        let start = offset - offset % chunk_bytes;
        let len = usize::try_from(chunk_bytes.min(self.size - start)).unwrap_or(CHUNK_BYTES);
        let mut data = vec![0; len];
        let damaged = |why: &dyn std::fmt::Display| {
            tracing::error!(digest = %self.digest, start, why = %why, "a blob's file is damaged");
            BlobError::Damaged(self.digest)
        };
        self.file.read_exact_at(&mut data, start).map_err(|error| damaged(&error))?;
        let entry = usize::try_from(start / chunk_bytes).unwrap_or(usize::MAX).saturating_mul(4);
        let expected = self.table.get(entry..entry.saturating_add(4));
        if expected != Some(&crc32fast::hash(&data).to_le_bytes()[..]) {
            return Err(damaged(&"a chunk does not match its checksum"));
        }
        data.drain(..usize::try_from(offset - start).unwrap_or(0));
        Ok(data)
    }
}

fn digest_of_part(path: &Path) -> Option<Digest> {
    Digest::parse(path.file_name()?.to_str()?.strip_suffix(".part")?).ok()
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
