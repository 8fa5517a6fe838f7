//! Small blobs: append-only segment files, one thread that writes them, an index in memory.
//!
//! Whatever many callers put while the disk is busy is written and fsynced once (group commit). A blob is in the index
//! only when it is durable. Segments that are mostly dead are copied together in small steps between commits.
//! What cannot be read, or is not what it was, is set aside: not served, and its segment stays until there is a good copy here or nothing
//! names it. It may be all that is left, and an error of the disk is not damage.
//! A removal that a crash or a compaction forgets brings back a blob that is collected again later: harmless, since
//! its name is its contents.

mod committer;

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use helix_common::removal::share;
use helix_common::sha256::Sha256;
use helix_model::Digest;
use tokio::sync::{mpsc, oneshot};

use self::committer::Committer;
use super::BlobError;
use super::frame::{FRAME_HEADER_BYTES, Found, FrameHeader, Kind, scan};
use super::health::Health;
use super::leases::Leases;

/// Jobs in one commit, at most, and in its queue.
const COMMIT_JOBS_MAX: usize = 1024;

/// The store of small blobs. Dropping it waits for its thread.
pub(super) struct Segments {
    shared: Arc<Shared>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    index: RwLock<Index>,
    health: Arc<Health>,
    syncs: AtomicU64,
}

#[derive(Default)]
struct Index {
    entries: HashMap<Digest, Entry>,
    /// What was set aside; none of it is in `entries`.
    aside: HashMap<Digest, Entry>,
    segments: BTreeMap<u32, Segment>,
}

struct Segment {
    file: Arc<File>,
    path: PathBuf,
    /// Bytes of all frames, and of those that the index points to, set aside or not.
    total: u64,
    live: u64,
}

/// Where a blob lies.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    segment: u32,
    data_at: u64,
    len: u32,
    crc: u32,
    stored_at_s: u64,
}

impl Entry {
    fn frame_bytes(&self) -> u64 {
        FRAME_HEADER_BYTES as u64 + u64::from(self.len)
    }
}

enum Job {
    Put { digest: Digest, data: Bytes, done: oneshot::Sender<Result<(), BlobError>> },
    Remove { digest: Digest, done: oneshot::Sender<Result<(), BlobError>> },
}

impl Segments {
    /// Opens the segments in `directory`, reads them all, cuts a torn end. Returns the digests of what it set aside, too. Blocks.
    pub(super) fn open(directory: &Path, leases: Arc<Leases>, health: Arc<Health>) -> io::Result<(Self, Vec<Digest>)> {
        std::fs::create_dir_all(directory)?;
        let mut index = Index::default();
        let numbers = numbers_in(directory)?;
        for &number in &numbers {
            let path = path_of(directory, number);
            index.load(number, &path, numbers.last() == Some(&number))?;
        }
        let damaged = index.aside.keys().copied().collect();
        let shared = Arc::new(Shared { index: RwLock::new(index), health, syncs: AtomicU64::new(0) });
        let (tx, rx) = mpsc::channel(COMMIT_JOBS_MAX);
        let next = numbers.last().map_or(1, |last| last + 1);
        let committer = Committer::new(Arc::clone(&shared), leases, directory.to_owned(), next);
        let thread = std::thread::Builder::new().name("blob-segments".to_owned()).spawn(move || committer.run(rx))?;
        Ok((Self { shared, jobs: Some(tx), thread: Some(thread) }, damaged))
    }

    /// Stores a blob whose digest was checked. Answers when it is durable.
    pub(super) async fn put(&self, digest: Digest, data: Bytes) -> Result<(), BlobError> {
        if self.size(&digest).is_some() {
            return Ok(());
        }
        self.submit(|done| Job::Put { digest, data, done }).await
    }

    /// Removes a blob unless somebody leased it meanwhile.
    pub(super) async fn remove(&self, digest: Digest) -> Result<(), BlobError> {
        self.submit(|done| Job::Remove { digest, done }).await
    }

    /// The size of a blob that is here.
    pub(super) fn size(&self, digest: &Digest) -> Option<u64> {
        self.shared.read().entries.get(digest).map(|entry| u64::from(entry.len))
    }

    /// A blob's bytes; `None` if it is not here. One that is damaged, or cannot be read, is an error, and is set aside. Blocks.
    pub(super) fn read(&self, digest: &Digest) -> Result<Option<Bytes>, BlobError> {
        let Some((entry, file)) = self.shared.find(digest) else { return Ok(None) };
        match read_checked(&file, &entry) {
            Ok(data) => Ok(Some(data.into())),
            Err(error) => Err(self.shared.set_aside(digest, entry, error)),
        }
    }

    /// Reads a blob from the disk and holds it against its checksum and its name; its size, `None` if it is not here. Otherwise as
    /// [`Self::read`].
    pub(super) fn check(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let Some((entry, file)) = self.shared.find(digest) else { return Ok(None) };
        forget_cached(&file, &entry);
        match read_named(&file, &entry, digest) {
            Ok(()) => Ok(Some(u64::from(entry.len))),
            Err(error) => Err(self.shared.set_aside(digest, entry, error)),
        }
    }

    /// Puts a blob back into service that was set aside, if it is what its name says after all; whether it is here. Blocks.
    pub(super) fn reinstate(&self, digest: &Digest) -> bool {
        let found = {
            let index = self.shared.read();
            index.aside.get(digest).and_then(|entry| Some((*entry, index.file_of(entry)?)))
        };
        if let Some((entry, file)) = found {
            match read_named(&file, &entry, digest) {
                Ok(()) => self.shared.write().put_back(digest, entry),
                // An error that lasts is as bad as damage: to be asked again and again would be all that this disk does. The next start
                // looks once more.
                Err(error) => tracing::warn!(%digest, %error, "a small blob that was set aside is not put back"),
            }
        }
        self.size(digest).is_some()
    }

    /// Nobody wants what was set aside of a blob.
    pub(super) fn give_up(&self, digest: &Digest) {
        self.shared.write().forget_aside(digest);
    }

    /// The segments, by number.
    pub(super) fn numbers(&self) -> Vec<u32> {
        self.shared.read().segments.keys().copied().collect()
    }

    /// The blobs that lie in a segment.
    pub(super) fn inside(&self, number: u32) -> Vec<Digest> {
        let index = self.shared.read();
        index.entries.iter().filter(|(_, entry)| entry.segment == number).map(|(digest, _)| *digest).collect()
    }

    /// Blobs stored at or before `before_s` (Unix seconds).
    pub(super) fn stored_before(&self, before_s: u64) -> Vec<Digest> {
        let index = self.shared.read();
        let old = index.entries.iter().filter(|(_, entry)| entry.stored_at_s <= before_s);
        old.map(|(digest, _)| *digest).collect()
    }

    /// Blobs and their bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        let index = self.shared.read();
        (index.entries.len() as u64, index.entries.values().map(|entry| u64::from(entry.len)).sum())
    }

    /// Opens all segments anew for what reads them.
    #[cfg(test)]
    pub(super) fn reopen(&self, options: &OpenOptions) {
        for segment in self.shared.write().segments.values_mut() {
            segment.file = Arc::new(options.open(&segment.path).unwrap());
        }
    }

    /// How many fsyncs commits have cost.
    pub(super) fn syncs(&self) -> u64 {
        self.shared.syncs.load(Ordering::Relaxed)
    }

    async fn submit(&self, job: impl FnOnce(oneshot::Sender<Result<(), BlobError>>) -> Job) -> Result<(), BlobError> {
        let (done, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(BlobError::Closed)?;
        jobs.send(job(done)).await.map_err(|_| BlobError::Closed)?;
        answer.await.map_err(|_| BlobError::Closed)?
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the blob segments panicked");
        }
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a blob lies.
    fn find(&self, digest: &Digest) -> Option<(Entry, Arc<File>)> {
        let index = self.read();
        let entry = index.entries.get(digest).copied()?;
        Some((entry, index.file_of(&entry)?))
    }

    /// Takes a blob out of service that cannot be read well, unless it lies elsewhere by now; what its reader is told.
    fn set_aside(&self, digest: &Digest, entry: Entry, error: io::Error) -> BlobError {
        if self.write().set_aside(digest, entry) {
            tracing::error!(%digest, %error, "a small blob cannot be read well and is no longer served from here");
            self.health.damaged(*digest);
        }
        if is_damage(&error) { BlobError::Damaged(*digest) } else { error.into() }
    }
}

impl Index {
    fn load(&mut self, number: u32, path: &Path, last: bool) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        share(&file)?;
        let bytes = std::fs::read(path)?;
        let mut torn = None;
        let mut frames = Vec::new();
        scan(&bytes, |found| match found {
            Found::Frame { header, data_at } => frames.push((header, data_at, true)),
            Found::Damaged { header, data_at } => {
                tracing::error!(digest = %header.digest, data_at, path = %path.display(), "a small blob is damaged");
                frames.push((header, data_at, false));
            }
            Found::Garbage { from, to } => {
                tracing::error!(from, to, path = %path.display(), "part of a blob segment is damaged");
            }
            Found::Torn { at } => torn = Some(at),
        });
        if let Some(at) = torn {
            tracing::warn!(at, bytes = bytes.len(), path = %path.display(), "a blob segment ends in an incomplete write, which is cut off");
            file.set_len(at)?;
        }
        if last {
            // What a crash left in the page cache must be durable before it is called held.
            file.sync_all()?;
        }
        let segment = Segment { file: Arc::new(file), path: path.to_owned(), total: 0, live: 0 };
        self.segments.insert(number, segment);
        for (header, data_at, sound) in frames {
            match header.kind {
                Kind::Put => {
                    let FrameHeader { len, data_crc: crc, stored_at_s, digest, .. } = header;
                    let entry = Entry { segment: number, data_at, len, crc, stored_at_s };
                    if sound || !self.entries.contains_key(&digest) {
                        self.insert(digest, entry);
                    } else {
                        self.count_dead(number, entry.frame_bytes());
                    }
                    if !sound {
                        self.set_aside(&digest, entry);
                    }
                }
                Kind::Remove => {
                    self.forget(&header.digest);
                    self.forget_aside(&header.digest);
                    self.count_dead(number, FRAME_HEADER_BYTES as u64);
                }
            }
        }
        Ok(())
    }

    fn file_of(&self, entry: &Entry) -> Option<Arc<File>> {
        self.segments.get(&entry.segment).map(|segment| Arc::clone(&segment.file))
    }

    fn insert(&mut self, digest: Digest, entry: Entry) {
        self.forget(&digest);
        self.forget_aside(&digest);
        if let Some(segment) = self.segments.get_mut(&entry.segment) {
            segment.total += entry.frame_bytes();
            segment.live += entry.frame_bytes();
        }
        self.entries.insert(digest, entry);
    }

    /// Forgets a blob that is served.
    fn forget(&mut self, digest: &Digest) {
        let entry = self.entries.remove(digest);
        self.count_not_live(entry);
    }

    /// Forgets what was set aside of a blob.
    fn forget_aside(&mut self, digest: &Digest) {
        let entry = self.aside.remove(digest);
        self.count_not_live(entry);
    }

    fn count_not_live(&mut self, entry: Option<Entry>) {
        if let Some(entry) = entry
            && let Some(segment) = self.segments.get_mut(&entry.segment)
        {
            segment.live -= entry.frame_bytes();
        }
    }

    /// Takes a blob out of service while it lies there; whether it did.
    fn set_aside(&mut self, digest: &Digest, entry: Entry) -> bool {
        let lies_there = self.entries.get(digest) == Some(&entry);
        if lies_there {
            self.entries.remove(digest);
            self.aside.insert(*digest, entry);
        }
        lies_there
    }

    /// Puts a blob back into service while it is set aside there.
    fn put_back(&mut self, digest: &Digest, entry: Entry) {
        if self.aside.get(digest) == Some(&entry) {
            self.aside.remove(digest);
            self.entries.insert(*digest, entry);
        }
    }

    /// Whether something in a segment was set aside.
    fn has_aside(&self, number: u32) -> bool {
        self.aside.values().any(|entry| entry.segment == number)
    }

    fn count_dead(&mut self, segment: u32, bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&segment) {
            segment.total += bytes;
        }
    }
}

/// Reads what must match its checksum. What does not is read once more, from the disk: what was kept of it in memory may be what is wrong.
fn read_checked(file: &File, entry: &Entry) -> io::Result<Vec<u8>> {
    let read = || {
        let mut data = vec![0; entry.len as usize];
        file.read_exact_at(&mut data, entry.data_at)?;
        if crc32fast::hash(&data) == entry.crc {
            Ok(data)
        } else {
            Err(damage("the bytes do not match their checksum"))
        }
    };
    read().or_else(|_| {
        forget_cached(file, entry);
        read()
    })
}

/// As [`read_checked`], and holds it against its name, too.
fn read_named(file: &File, entry: &Entry, digest: &Digest) -> io::Result<()> {
    let data = read_checked(file, entry)?;
    if Sha256::digest(&data) == *digest { Ok(()) } else { Err(damage("the bytes are others than its name says")) }
}

/// Has a blob's bytes come from the disk when they are read next.
fn forget_cached(file: &File, entry: &Entry) {
    let len = std::num::NonZeroU64::new(u64::from(entry.len));
    // Advice: without it, what the system keeps in memory is checked.
    let _ = rustix::fs::fadvise(file, entry.data_at, len, rustix::fs::Advice::DontNeed);
}

fn damage(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Whether the bytes are wrong, or not there. All else is the disk's fault, and may pass.
fn is_damage(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

fn path_of(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("{number:08}.seg"))
}

fn numbers_in(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        numbers.extend(stem.and_then(|stem| stem.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
