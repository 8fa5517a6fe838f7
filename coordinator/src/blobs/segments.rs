//! Small blobs: append-only segment files, one thread that writes them, an index in memory.
//!
//! Whatever many callers put while the disk is busy is written and fsynced once (group commit). A blob is in the index
//! only when it is durable. Segments that are mostly dead are copied together in small steps between commits.
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
    segments: BTreeMap<u32, Segment>,
}

struct Segment {
    file: Arc<File>,
    path: PathBuf,
    /// Bytes of all frames, and of those that the index points to.
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
    /// Opens the segments in `directory`, reads them all, cuts a torn end. Returns the digests of damaged blobs too.
    /// Blocks.
    pub(super) fn open(directory: &Path, leases: Arc<Leases>, health: Arc<Health>) -> io::Result<(Self, Vec<Digest>)> {
        std::fs::create_dir_all(directory)?;
        let mut index = Index::default();
        let mut damaged = Vec::new();
        let numbers = numbers_in(directory)?;
        for &number in &numbers {
            let path = path_of(directory, number);
            index.load(number, &path, numbers.last() == Some(&number), &mut damaged)?;
        }
        damaged.retain(|digest| !index.entries.contains_key(digest));
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

    /// A blob's bytes; `None` if it is not here. Damaged bytes are an error, and the blob is forgotten. Blocks.
    pub(super) fn read(&self, digest: &Digest) -> Result<Option<Bytes>, BlobError> {
        let Some((entry, file)) = self.shared.find(digest) else { return Ok(None) };
        match read_checked(&file, &entry) {
            Ok(data) => Ok(Some(data.into())),
            Err(error) => {
                self.shared.set_aside(digest, entry, &error);
                Err(BlobError::Damaged(*digest))
            }
        }
    }

    /// Reads a blob from the disk and holds it against its checksum and its name; its size, `None` if it is not here. A
    /// damaged one is forgotten. Blocks.
    pub(super) fn check(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let Some((entry, file)) = self.shared.find(digest) else { return Ok(None) };
        let len = std::num::NonZeroU64::new(u64::from(entry.len));
        // Advice: without it, what the system keeps in memory is checked.
        let _ = rustix::fs::fadvise(&*file, entry.data_at, len, rustix::fs::Advice::DontNeed);
        let named = |data: &Vec<u8>| Sha256::digest(data) == *digest;
        match read_checked(&file, &entry) {
            Ok(data) if named(&data) => Ok(Some(u64::from(entry.len))),
            outcome => {
                let other = io::Error::new(io::ErrorKind::InvalidData, "the bytes are others than its name says");
                self.shared.set_aside(digest, entry, &outcome.err().unwrap_or(other));
                Err(BlobError::Damaged(*digest))
            }
        }
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
        Some((entry, Arc::clone(&index.segments.get(&entry.segment)?.file)))
    }

    /// Takes a damaged blob out of service. Its bytes stay where they are until the segment is mostly dead.
    fn set_aside(&self, digest: &Digest, entry: Entry, error: &io::Error) {
        if self.write().forget(digest, Some(entry)) {
            tracing::error!(%digest, %error, "a small blob is damaged and no longer served from here");
            self.health.damaged(*digest);
        }
    }
}

impl Index {
    fn load(&mut self, number: u32, path: &Path, last: bool, damaged: &mut Vec<Digest>) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        share(&file)?;
        let bytes = std::fs::read(path)?;
        let mut torn = None;
        let mut frames = Vec::new();
        scan(&bytes, |found| match found {
            Found::Frame { header, data_at } => frames.push((header, data_at)),
            Found::Damaged { digest, at } => {
                tracing::error!(%digest, at, path = %path.display(), "a small blob is damaged");
                damaged.push(digest);
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
        for (header, data_at) in frames {
            match header.kind {
                Kind::Put => {
                    let FrameHeader { len, data_crc: crc, stored_at_s, digest, .. } = header;
                    self.insert(digest, Entry { segment: number, data_at, len, crc, stored_at_s });
                }
                Kind::Remove => {
                    self.forget(&header.digest, None);
                    self.count_dead(number, FRAME_HEADER_BYTES as u64);
                }
            }
        }
        Ok(())
    }

    fn insert(&mut self, digest: Digest, entry: Entry) {
        self.forget(&digest, None);
        if let Some(segment) = self.segments.get_mut(&entry.segment) {
            segment.total += entry.frame_bytes();
            segment.live += entry.frame_bytes();
        }
        self.entries.insert(digest, entry);
    }

    /// Forgets a blob; with `only`, only while it lies there. Whether it was here.
    fn forget(&mut self, digest: &Digest, only: Option<Entry>) -> bool {
        if only.is_some_and(|only| self.entries.get(digest) != Some(&only)) {
            return false;
        }
        let Some(entry) = self.entries.remove(digest) else { return false };
        if let Some(segment) = self.segments.get_mut(&entry.segment) {
            segment.live -= entry.frame_bytes();
        }
        true
    }

    fn count_dead(&mut self, segment: u32, bytes: u64) {
        if let Some(segment) = self.segments.get_mut(&segment) {
            segment.total += bytes;
        }
    }
}

fn read_checked(file: &File, entry: &Entry) -> io::Result<Vec<u8>> {
    let mut data = vec![0; entry.len as usize];
    file.read_exact_at(&mut data, entry.data_at)?;
    if crc32fast::hash(&data) == entry.crc {
        Ok(data)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the bytes do not match their checksum"))
    }
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
