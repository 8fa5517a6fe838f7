//! A snapshot's file as the rest of the coordinator sees it, to be copied away: how far it goes, its bytes, the blobs it names.

use std::io;
use std::path::Path;

use helix_model::Digest;

use super::rows::blobs_of;
use super::snapshot::{self, SnapshotFile};
use super::state_machine::applied_of;
use super::types::SnapshotMeta;
use crate::codec::decode_row;
use crate::registry::Applied;

/// A whole snapshot, open: it stays readable when newer ones take its place.
#[derive(Clone, Debug)]
pub struct SavedSnapshot {
    applied: Applied,
    file: SnapshotFile,
}

impl SavedSnapshot {
    pub(super) fn open(meta: &SnapshotMeta, path: &Path) -> io::Result<Self> {
        Ok(Self { applied: applied_of(meta.last_log_id.as_ref()), file: SnapshotFile::open(path)? })
    }

    /// The last entry that is in it.
    #[must_use]
    pub fn applied(&self) -> Applied {
        self.applied
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// Reads up to `length` bytes from `offset`. Blocks.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.file.read_at(offset, length)
    }

    /// Tells every blob that its builds name; one that several name, several times. Blocks, and reads all of it.
    ///
    /// # Errors
    /// When the disk fails, or `each` does.
    pub fn each_blob(&self, mut each: impl FnMut(Digest) -> io::Result<()>) -> io::Result<()> {
        let read = snapshot::read_from(self.file.reader(), &self.file.path, |bytes| {
            let Some((_, blobs)) = blobs_of(&decode_row(&bytes)?) else { return Ok(()) };
            blobs.into_iter().try_for_each(&mut each)
        });
        read.map(drop)
    }
}
