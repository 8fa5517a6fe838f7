//! The durable copy of the registry in sled: reading rows, writing batches, replacing everything, and rebuilding.
//!
//! All rows are in one tree, with how far they are. Everything here blocks. Invariant: a batch is applied whole or
//! not at all, and carries the log id up to which its rows are true; so the tree is always a prefix of the log.
//! Each batch carries a sum over all rows, too: a store whose rows do not add up, for whatever reason, is not used.

mod copy;
mod generation;
mod tree;

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use helix_common::files::available_bytes;
use helix_core::record::Addendum;
use helix_core::state::State;
use helix_core::{Row, RowKey};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{BuildId, Digest};

pub(super) use self::copy::Copy;
use self::generation::Generation;
pub(super) use self::tree::Head;
use self::tree::{addenda_keys, batch_of, encode_head, import, read_head, row_bytes};
use super::rows::{META_KEY, base_key, index_begin, index_digest, index_end, index_prefix};
use super::types::SnapshotMeta;
use crate::codec::decode_row;

/// What is read at once while the store is walked along and serves: what is applied meanwhile waits for it.
pub(super) const STEP_BYTES: usize = 256 << 10;
pub(super) const STEP_ROWS: usize = 256;

/// What a copy leaves of the disk: for two files of the log and a snapshot.
const ROOM_LEFT: u64 = 256 << 20;

/// What is done to one row; `None` removes it.
pub(super) type Changes = BTreeMap<Vec<u8>, Option<(Vec<u8>, Row)>>;

/// The store.
pub(crate) struct Store {
    root: PathBuf,
    cache_bytes: u64,
    current: RwLock<Arc<Generation>>,
}

fn io_error(error: sled::Error) -> io::Error {
    match error {
        sled::Error::Io(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

/// sled panics on some kinds of damage, and may on a disk that is full: a panic is an error here.
pub(super) fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let panicked = "it panicked, as sled does when its files are damaged or its disk is full";
    let done = catch_unwind(AssertUnwindSafe(work));
    done.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::InvalidData, panicked)))
}

impl Store {
    /// Opens a store, or makes an empty one.
    pub(crate) fn open(root: &Path, cache_bytes: u64) -> io::Result<Self> {
        let current = RwLock::new(Arc::new(Generation::open_current(root, cache_bytes)?));
        Ok(Self { root: root.to_owned(), cache_bytes, current })
    }

    fn current(&self) -> Arc<Generation> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn tree(&self) -> sled::Tree {
        self.current().tree.clone()
    }

    /// How far the rows are, and what they add up to.
    pub(super) fn head(&self) -> io::Result<Head> {
        read_head(&self.tree())
    }

    /// Loads all rows, a few at a time.
    ///
    /// # Errors
    /// Also when some are missing, or are not what was written.
    pub(crate) fn load(&self) -> io::Result<(State, SnapshotMeta)> {
        tree::load(&self.tree())
    }

    /// Rows behind `cursor`, in order, up to about so many bytes and rows; empty at the end.
    pub(super) fn walk(&self, cursor: &[u8], bytes_max: usize, rows_max: usize) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        tree::walk(&self.tree(), cursor, bytes_max, rows_max)
    }

    /// A row's bytes.
    pub(super) fn row(&self, base: &[u8]) -> io::Result<Option<Vec<u8>>> {
        row_bytes(&self.tree(), base)
    }

    /// The keys of all addenda of a build.
    pub(super) fn addenda_keys(&self, build: &BuildId) -> io::Result<Vec<Vec<u8>>> {
        addenda_keys(&self.tree(), build)
    }

    /// A build's row and its addenda.
    pub(super) fn build(&self, build: &BuildId) -> io::Result<(Option<Row>, Vec<Row>)> {
        let record = self.row(&base_key(&RowKey::Build(build.clone())))?;
        let record = record.map(|bytes| decode_row(&bytes)).transpose()?;
        let mut addenda = Vec::new();
        for base in self.addenda_keys(build)? {
            if let Some(bytes) = self.row(&base)? {
                addenda.push(decode_row(&bytes)?);
            }
        }
        Ok((record, addenda))
    }

    /// Whether some stored build names the blob.
    pub(super) fn names_blob(&self, digest: &Digest) -> io::Result<bool> {
        self.tree().scan_prefix(index_prefix(digest)).next().transpose().map(|found| found.is_some()).map_err(io_error)
    }

    /// Blobs that some stored build names, in order from behind `after` on, at most `max`.
    pub(super) fn named_blobs(&self, after: Option<Digest>, max: usize) -> io::Result<Vec<Digest>> {
        let tree = self.tree();
        let mut found = Vec::new();
        let mut from = after.map_or_else(index_begin, |digest| index_end(&digest));
        while found.len() < max {
            let next = tree.range::<&[u8], _>(&from[..]..).keys().next().transpose().map_err(io_error)?;
            let Some(digest) = next.and_then(|key| index_digest(&key)) else { break };
            from = index_end(&digest);
            found.push(digest);
        }
        Ok(found)
    }

    /// Applies changes and how far they go, in one step. Not synced.
    pub(super) fn write(&self, changes: &Changes, meta: &SnapshotMeta) -> io::Result<()> {
        let tree = self.tree();
        let mut sum = read_head(&tree)?.sum;
        let mut batch = batch_of(&tree, changes, &mut sum)?;
        batch.insert(META_KEY, encode_head(meta, sum));
        failpoint::hit(Point::StoreWrite)?;
        tree.apply_batch(batch).map_err(io_error)?;
        failpoint::pass(Point::StoreWritten);
        Ok(())
    }

    /// Makes everything written so far survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        failpoint::hit(Point::StoreSync)?;
        self.current().sync()?;
        failpoint::pass(Point::StoreSynced);
        Ok(())
    }

    /// Bytes on disk, now and when its file was new; the latter is 0 where that is not known.
    pub(super) fn sizes(&self) -> (u64, u64) {
        let current = self.current();
        (current.size(), current.new_bytes)
    }

    /// Replaces all rows by a verified snapshot's.
    pub(super) fn replace(&self, path: &Path) -> io::Result<SnapshotMeta> {
        let rows = self.current().next(&self.root, self.cache_bytes)?;
        let meta = import(&rows.tree, path)?;
        rows.sync_new(&self.root)?;
        self.switch(rows)?;
        Ok(meta)
    }

    /// Begins a copy of all rows.
    ///
    /// # Errors
    /// Also when there is too little room for one as large as the original.
    pub(super) fn begin_copy(&self) -> io::Result<Copy> {
        let current = self.current();
        self.expect_room(current.size())?;
        Ok(Copy::new(current.next(&self.root, self.cache_bytes)?))
    }

    /// A copy can wait, the log cannot.
    fn expect_room(&self, bytes: u64) -> io::Result<()> {
        let (free, wanted) = (available_bytes(&self.root)?, bytes.saturating_add(ROOM_LEFT));
        if free >= wanted {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::StorageFull, format!("{free} bytes are free, {wanted} are wanted")))
    }

    /// Goes on with a finished copy.
    ///
    /// # Errors
    /// Then it is not known which of the two the next start takes: nothing may be written any more.
    pub(super) fn switch_to(&self, copy: Copy) -> io::Result<()> {
        self.switch(copy.into_rows())
    }

    /// The next generation is durable: it counts from here on, and the others go.
    fn switch(&self, mut rows: Generation) -> io::Result<()> {
        failpoint::hit(Point::StoreImported)?;
        rows.become_current(&self.root)?;
        failpoint::hit(Point::StoreSwitched)?;
        let rows = Arc::new(rows);
        let old = {
            let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, Arc::clone(&rows))
        };
        // Readers may still have it: what they read stays until they let go.
        generation::close(old);
        rows.remove_others(&self.root);
        Ok(())
    }
}

/// Puts facts that arrived after a build's end into its record.
pub(super) fn merge(record: &mut helix_core::record::BuildRecord, addenda: Vec<Row>) {
    for row in addenda {
        let Row::Addendum(key, addendum) = row else { continue };
        match addendum {
            Addendum::Log(log) => {
                let task = record.tasks.get_mut(usize::from(key.task.0));
                let mut attempts = task.into_iter().flat_map(|task| &mut task.attempts);
                if let Some(attempt) = attempts.find(|attempt| attempt.number == key.attempt) {
                    attempt.log = Some(log);
                }
            }
            Addendum::Artifact(artifact) => {
                record.artifacts.retain(|other| other.name != artifact.name);
                record.artifacts.push(artifact);
            }
            Addendum::Pinned(pinned) => record.pinned = pinned,
        }
    }
}

#[cfg(test)]
fn pairs(tree: &sled::Tree) -> Vec<(sled::IVec, sled::IVec)> {
    tree.iter().map(|pair| pair.unwrap()).collect()
}

#[cfg(test)]
impl Store {
    /// All that is in its tree.
    pub(super) fn pairs(&self) -> Vec<(sled::IVec, sled::IVec)> {
        pairs(&self.tree())
    }

    /// Syncs what is current now, whenever it is called.
    pub(super) fn syncs_later(&self) -> impl Fn() -> io::Result<()> + use<> {
        let current = self.current();
        move || current.sync()
    }

    /// Takes a row away behind the store's back, as sled does when it loses a page.
    pub(super) fn lose(&self, key: &RowKey) {
        assert!(self.tree().remove(super::rows::part_key(&base_key(key), 0)).unwrap().is_some());
        self.sync().unwrap();
    }
}
