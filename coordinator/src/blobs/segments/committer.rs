//! The thread that writes segments: commits of what came together, and compaction between them.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use helix_common::files::sync_directory;
use helix_common::removal::{remove_gradually, share};
use helix_failpoint::{self as failpoint, Point};
use helix_model::Digest;
use tokio::sync::mpsc;

use super::super::frame::{FRAME_HEADER_BYTES, FrameHeader, SEGMENT_HEADER};
use super::super::leases::Leases;
use super::super::{BlobError, now_s};
use super::{COMMIT_JOBS_MAX, Entry, Job, Segment, Shared, is_damage, path_of, read_checked};

/// A segment is closed when it has grown to this: small enough to be read whole at start and copied when half dead.
const SEGMENT_BYTES: u64 = 32 << 20;

/// Bytes in one commit, at most: bounds memory and the wait of the first.
const COMMIT_BYTES_MAX: usize = 4 << 20;

/// Bytes that one step of compaction copies: what a put may have to wait for.
const COMPACTION_STEP_BYTES: usize = 1 << 20;

/// The one writer.
pub(super) struct Committer {
    shared: Arc<Shared>,
    leases: Arc<Leases>,
    directory: PathBuf,
    active: Option<Active>,
    next: u32,
    compaction: Option<Compaction>,
    /// What was written could neither be made durable nor taken back: nothing more is accepted.
    broken: bool,
}

struct Active {
    number: u32,
    file: Arc<File>,
    len: u64,
}

struct Compaction {
    segment: u32,
    remaining: Vec<Digest>,
}

/// Frames to be written together.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Digest, place of its data in `bytes`, and its header.
    puts: Vec<(FrameHeader, usize)>,
    removals: u64,
}

impl Batch {
    fn put(&mut self, digest: Digest, data: &[u8], stored_at_s: u64) {
        let header = FrameHeader::put(digest, data, stored_at_s);
        header.encode(&mut self.bytes);
        self.puts.push((header, self.bytes.len()));
        self.bytes.extend_from_slice(data);
    }
}

impl Committer {
    /// `next`: the number of the segment that is begun first.
    pub(super) fn new(shared: Arc<Shared>, leases: Arc<Leases>, directory: PathBuf, next: u32) -> Self {
        Self { shared, leases, directory, active: None, next, compaction: None, broken: false }
    }

    /// Commits what comes until nobody can send any more, and compacts meanwhile. Blocks.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.blocking_recv() {
            let mut bytes = first.bytes();
            let mut together = vec![first];
            while bytes < COMMIT_BYTES_MAX
                && together.len() < COMMIT_JOBS_MAX
                && let Ok(job) = jobs.try_recv()
            {
                bytes += job.bytes();
                together.push(job);
            }
            self.commit(together);
            self.compact_step();
            while jobs.is_empty() && self.compact_step() {}
        }
    }

    fn commit(&mut self, jobs: Vec<Job>) {
        let now = now_s();
        let mut batch = Batch::default();
        // Removals first: a put beside one then finds the blob gone and writes it again.
        for job in &jobs {
            if let Job::Remove { digest, .. } = job
                && self.forget_unless_leased(digest)
            {
                FrameHeader::remove(*digest, now).encode(&mut batch.bytes);
                batch.removals += 1;
            }
        }
        let mut seen = HashSet::new();
        for job in &jobs {
            if let Job::Put { digest, data, .. } = job
                && !self.shared.read().entries.contains_key(digest)
                && seen.insert(*digest)
            {
                batch.put(*digest, data, now);
            }
        }
        let outcome = self.write(&batch);
        for job in jobs {
            let (Job::Put { done, .. } | Job::Remove { done, .. }) = job;
            // A caller that went away does not mind.
            let _ = done.send(outcome.as_ref().map_err(BlobError::again).copied());
        }
    }

    /// The lease is looked at under the lock: whoever leases and then finds the blob in the index can rely on it.
    fn forget_unless_leased(&self, digest: &Digest) -> bool {
        let mut index = self.shared.write();
        if self.leases.holds(digest) || !index.entries.contains_key(digest) {
            return false;
        }
        index.forget(digest);
        true
    }

    /// Writes the frames, makes them durable, and only then puts them in the index.
    fn write(&mut self, batch: &Batch) -> Result<(), BlobError> {
        if batch.bytes.is_empty() {
            return Ok(());
        }
        if self.broken {
            return Err(BlobError::Closed);
        }
        let (number, file, at) = self.active()?;
        let written = failpoint::hit(Point::SegmentWrite).and_then(|()| file.write_all_at(&batch.bytes, at));
        let written = written.and_then(|()| {
            if batch.puts.is_empty() {
                return Ok(());
            }
            self.shared.syncs.fetch_add(1, Ordering::Relaxed);
            failpoint::hit(Point::SegmentWritten)?;
            file.sync_data()
        });
        if let Err(error) = written {
            // After a failed fsync the bytes may be readable and yet not durable: they are taken back, and the
            // segment is never written again.
            self.active = None;
            if let Err(worse) = file.set_len(at) {
                self.broken = true;
                tracing::error!(%worse, "a blob segment cannot be cut back; no more small blobs are accepted");
            }
            tracing::error!(%error, segment = number, "a blob segment cannot be written");
            return Err(error.into());
        }
        failpoint::pass(Point::SegmentSynced);
        let mut index = self.shared.write();
        for (header, data_at) in &batch.puts {
            let FrameHeader { len, data_crc: crc, stored_at_s, digest, .. } = *header;
            index.insert(digest, Entry { segment: number, data_at: at + *data_at as u64, len, crc, stored_at_s });
        }
        index.count_dead(number, batch.removals * FRAME_HEADER_BYTES as u64);
        drop(index);
        let len = at + batch.bytes.len() as u64;
        self.active = (len < SEGMENT_BYTES).then_some(Active { number, file, len });
        Ok(())
    }

    /// The segment that is written, made if there is none.
    fn active(&mut self) -> Result<(u32, Arc<File>, u64), BlobError> {
        if let Some(Active { number, file, len }) = &self.active {
            return Ok((*number, Arc::clone(file), *len));
        }
        let number = self.next;
        self.next += 1;
        let path = path_of(&self.directory, number);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        share(&file)?;
        file.write_all_at(SEGMENT_HEADER, 0)?;
        failpoint::hit(Point::SegmentBegun)?;
        file.sync_all()?;
        sync_directory(&self.directory)?;
        let file = Arc::new(file);
        let segment = Segment { file: Arc::clone(&file), path, total: 0, live: 0 };
        self.shared.write().segments.insert(number, segment);
        let len = SEGMENT_HEADER.len() as u64;
        self.active = Some(Active { number, file: Arc::clone(&file), len });
        Ok((number, file, len))
    }

    /// Does a little of what compaction has to do; whether there was anything.
    fn compact_step(&mut self) -> bool {
        let Some(mut compaction) = self.compaction.take().or_else(|| self.choose()) else { return false };
        let mut batch = Batch::default();
        let mut moved = Vec::new();
        while batch.bytes.len() < COMPACTION_STEP_BYTES
            && let Some(digest) = compaction.remaining.pop()
        {
            let found = {
                let index = self.shared.read();
                let entry = index.entries.get(&digest).copied().filter(|entry| entry.segment == compaction.segment);
                entry.and_then(|entry| Some((entry, index.file_of(&entry)?)))
            };
            let Some((entry, file)) = found else { continue };
            match read_checked(&file, &entry) {
                Ok(data) => {
                    batch.put(digest, &data, entry.stored_at_s);
                    moved.push(digest);
                }
                Err(error) => {
                    let passing = !is_damage(&error);
                    self.shared.set_aside(&digest, entry, error);
                    if passing {
                        // A disk that fails is not asked for one blob after the other: all others stay where they are, and this segment
                        // is no candidate while something in it is set aside.
                        return false;
                    }
                }
            }
        }
        if self.write(&batch).is_err() {
            // They stay where they are; another choice will be made when the disk is well.
            return false;
        }
        if compaction.remaining.is_empty() {
            self.drop_segment(compaction.segment);
        } else {
            self.compaction = Some(compaction);
        }
        true
    }

    fn choose(&self) -> Option<Compaction> {
        let index = self.shared.read();
        let active = self.active.as_ref().map(|active| active.number);
        let mostly_dead = |segment: &Segment| segment.live * 2 < segment.total || segment.total == 0;
        let (&number, _) = index
            .segments
            .iter()
            .find(|(number, segment)| Some(**number) != active && mostly_dead(segment) && !index.has_aside(**number))?;
        let inside = index.entries.iter().filter(|(_, entry)| entry.segment == number);
        Some(Compaction { segment: number, remaining: inside.map(|(digest, _)| *digest).collect() })
    }

    fn drop_segment(&self, number: u32) {
        let segment = {
            let mut index = self.shared.write();
            // Something was set aside meanwhile, or put back.
            if index.segments.get(&number).is_some_and(|segment| segment.live > 0) {
                return;
            }
            index.segments.remove(&number)
        };
        let Some(segment) = segment else { return };
        failpoint::pass(Point::SegmentDrop);
        if let Err(error) = remove_gradually(&segment.path) {
            tracing::warn!(%error, path = %segment.path.display(), "an empty blob segment cannot be removed");
        }
    }
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Put { data, .. } => data.len() + FRAME_HEADER_BYTES,
            Self::Remove { .. } => FRAME_HEADER_BYTES,
        }
    }
}
