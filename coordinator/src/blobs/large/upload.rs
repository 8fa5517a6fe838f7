//! Uploads of large blobs: a part that is written, hashed, synced and then named, and who may go on with it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use helix_common::files::sync_directory;
use helix_common::removal::remove_gradually;
use helix_failpoint::{self as failpoint, Point};
use helix_model::Digest;
use helix_model::limits::CHUNK_BYTES;
use rustix::fs::{Advice, fadvise};

use super::format::Sums;
use super::{Held, Large, Lies, make_shelf};
use crate::blobs::BlobError;

/// Bytes that the kernel is asked to write out together.
const WRITE_OUT_BYTES: u64 = 8 << 20;

impl Large {
    /// Bytes of an unfinished upload, to go on from.
    pub(in crate::blobs) fn part_len(&self, digest: &Digest, size_max: u64) -> u64 {
        std::fs::metadata(self.part_of(digest)).map_or(0, |metadata| metadata.len().min(size_max))
    }

    /// Begins an upload, or goes on with one at `offset`. One that goes on takes over from whoever else was writing:
    /// that is the same client, whose connection broke.
    pub(in crate::blobs) fn upload(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
        offset: u64,
    ) -> Result<Upload, BlobError> {
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
        let mut upload = Upload {
            slot,
            digest,
            size,
            sums: Sums::default(),
            asked: 0,
            file: file.try_clone()?,
            resumed: offset > 0,
        };
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

    fn part_of(&self, digest: &Digest) -> PathBuf {
        self.uploads.join(format!("{digest}.part"))
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
            let _ = remove_gradually(&self.path);
        } else {
            let mut owners = self.store.owners();
            if owners.get(&self.digest) == Some(&self.number) {
                owners.remove(&self.digest);
            }
        }
    }
}

/// A large blob on its way in.
pub(in crate::blobs) struct Upload {
    slot: Slot,
    digest: Digest,
    size: u64,
    sums: Sums,
    /// How far the kernel was asked to write out.
    asked: u64,
    file: File,
    resumed: bool,
}

impl Upload {
    /// Bytes that are here.
    #[cfg(test)]
    pub(in crate::blobs) fn offset(&self) -> u64 {
        self.sums.bytes
    }

    /// Adds bytes.
    pub(in crate::blobs) fn write(&mut self, data: &[u8]) -> Result<(), BlobError> {
        if self.sums.bytes + data.len() as u64 > self.size {
            return Err(BlobError::Size { announced: self.size, sent: self.sums.bytes + data.len() as u64 });
        }
        self.slot.check()?;
        failpoint::hit(Point::BlobWrite)?;
        self.file.write_all_at(data, self.sums.bytes)?;
        self.sums.update(data);
        self.write_out();
        Ok(())
    }

    /// Has the kernel begin to write what is here, so that less is left for the sync at the end.
    fn write_out(&mut self) {
        let Some(more) = NonZeroU64::new(self.sums.bytes - self.asked).filter(|more| more.get() >= WRITE_OUT_BYTES)
        else {
            return;
        };
        // Linux answers this advice so, and lets go of what is written already. It is no more than advice: whatever goes wrong
        // is told by the sync.
        let _ = fadvise(&self.file, self.asked, Some(more), Advice::DontNeed);
        self.asked = self.sums.bytes;
    }

    /// Checks the digest, makes the blob durable, and gives it its name.
    pub(in crate::blobs) fn finish(self) -> Result<(), BlobError> {
        let Self { slot, digest, size, sums, file, resumed, asked: _ } = self;
        if sums.bytes != size {
            return Err(BlobError::Size { announced: size, sent: sums.bytes });
        }
        slot.check()?;
        let (actual, table) = sums.finish();
        if actual != digest {
            remove_gradually(&slot.path)?;
            return Err(BlobError::Digest { announced: digest, actual, resumed });
        }
        // The order matters: bytes, then the name, then the directory that holds it, then the index.
        failpoint::hit(Point::BlobTable)?;
        let written = file.write_all_at(&table, size).and_then(|()| failpoint::hit(Point::BlobWritten));
        if let Err(error) = written.and_then(|()| file.sync_all()) {
            // After a failed fsync the bytes read well and are not on the disk: nobody may go on from them.
            remove_gradually(&slot.path)?;
            return Err(error.into());
        }
        failpoint::pass(Point::BlobSynced);
        let store = &slot.store;
        let path = store.path_of(&digest);
        make_shelf(&store.files, &path)?;
        let _names = store.names();
        slot.check()?;
        std::fs::rename(&slot.path, &path)?;
        failpoint::hit(Point::BlobRenamed)?;
        sync_directory(path.parent().unwrap_or(&store.files))?;
        failpoint::pass(Point::BlobStored);
        let held = Held { size, stored_at: SystemTime::now(), lies: Lies::Here };
        let before = store.write_index().insert(digest, held);
        if let Some(Held { lies: Lies::Bucket(_), .. }) = before {
            // It came a second time while the first went to the bucket. That object is nobody's now, and may go when the marker
            // cannot come back any more.
            let marker = store.marker_of(&digest);
            std::fs::remove_file(&marker)?;
            sync_directory(marker.parent().unwrap_or(&store.markers))?;
        }
        Ok(())
    }
}

/// Whose resumable part a file is.
pub(super) fn digest_of_part(path: &Path) -> Option<Digest> {
    Digest::parse(path.file_name()?.to_str()?.strip_suffix(".part")?).ok()
}
