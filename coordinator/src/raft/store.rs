//! The durable copy of the registry in sled: reading rows, writing batches, replacing everything, and rebuilding.
//!
//! All rows are in one tree, with how far they are. Everything here blocks. Invariant: a batch is applied whole or
//! not at all, and carries the log id up to which its rows are true; so the tree is always a prefix of the log.
//! Each batch carries a sum over all rows, too: a store whose rows do not add up, for whatever reason, is not used.

mod copy;
mod generation;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use helix_common::files::available_bytes;
use helix_core::record::Addendum;
use helix_core::state::State;
use helix_core::{Row, RowKey};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{BuildId, Digest};
use helix_proto::raft;
use prost::Message;

pub(super) use self::copy::Copy;
use self::generation::Generation;
use super::rows::{
    META_KEY, ROWS_END, addenda_prefix, base_key, base_of, blobs_of, first_part, index_begin, index_digest, index_end,
    index_key, index_prefix, part_key, parts_of, split, sum_of,
};
use super::snapshot;
use super::types::SnapshotMeta;
use crate::codec::decode_row;

/// Keys in one batch while everything is replaced: batches lock out readers.
const IMPORT_KEYS: usize = 512;

/// What is read at once while the store is walked along and serves: what is applied meanwhile waits for it.
pub(super) const STEP_BYTES: usize = 256 << 10;
pub(super) const STEP_ROWS: usize = 256;

/// What a copy leaves of the disk: for two files of the log and a snapshot.
const ROOM_LEFT: u64 = 256 << 20;

/// Rows that are in memory twice while everything is loaded.
const LOAD_ROWS: usize = 1_024;
const LOAD_BYTES: usize = 4 << 20;

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
        let tree = self.tree();
        let mut rows = Rows { tree: &tree, step: Vec::new().into_iter(), cursor: Vec::new(), sum: 0, failed: None };
        let state = State::load(&mut rows);
        if let Some(error) = rows.failed {
            return Err(error);
        }
        // Before the sum: where rows contradict each other the rest was not read.
        let state = state.map_err(|error| io::Error::other(format!("rows contradict each other: {error:?}")))?;
        let Head { meta, sum: expected } = read_head(&tree)?;
        if rows.sum != expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "rows are missing, or not what was written"));
        }
        Ok((state, meta))
    }

    /// Rows behind `cursor`, in order, up to about so many bytes and rows; empty at the end.
    pub(super) fn walk(&self, cursor: &[u8], bytes_max: usize, rows_max: usize) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        walk(&self.tree(), cursor, bytes_max, rows_max)
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

/// What changes do to a tree; `sum` follows its rows.
fn batch_of(tree: &sled::Tree, changes: &Changes, sum: &mut u128) -> io::Result<sled::Batch> {
    let mut batch = sled::Batch::default();
    let mut unnamed = Unnamed::new();
    for (base, change) in changes {
        put_change(tree, &mut batch, (sum, &mut unnamed), base, change.as_ref())?;
    }
    keep_named(tree, &mut batch, changes, &unnamed)?;
    Ok(batch)
}

/// A blob that one row of a build names no more may be named by another.
fn keep_named(tree: &sled::Tree, batch: &mut sled::Batch, changes: &Changes, unnamed: &Unnamed) -> io::Result<()> {
    for (build, digests) in unnamed {
        let own = base_key(&RowKey::Build(build.clone()));
        let new =
            changes.range(addenda_prefix(build)..).take_while(|(base, _)| base.starts_with(&addenda_prefix(build)));
        let mut bases: BTreeSet<Vec<u8>> = new.map(|(base, _)| base.clone()).collect();
        bases.extend(addenda_keys(tree, build)?);
        bases.insert(own);
        for base in bases {
            let row = match changes.get(&base) {
                Some(change) => change.as_ref().map(|(_, row)| row.clone()),
                None => row_bytes(tree, &base)?.map(|bytes| decode_row(&bytes)).transpose()?,
            };
            let named = row.as_ref().and_then(blobs_of).map(|(_, named)| named).unwrap_or_default();
            for digest in named.intersection(digests) {
                batch.insert(index_key(digest, build), &[] as &[u8]);
            }
        }
    }
    Ok(())
}

fn addenda_keys(tree: &sled::Tree, build: &BuildId) -> io::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for key in tree.scan_prefix(addenda_prefix(build)).keys() {
        if let Some(base) = base_of(&key.map_err(io_error)?) {
            found.push(base.to_vec());
        }
    }
    Ok(found)
}

/// A tree's rows in order, checked against its index; ends early where reading fails.
struct Rows<'a> {
    tree: &'a sled::Tree,
    step: std::vec::IntoIter<(Vec<u8>, Vec<u8>)>,
    cursor: Vec<u8>,
    /// Of [`sum_of`] over those given.
    sum: u128,
    failed: Option<io::Error>,
}

impl Rows<'_> {
    fn read(&mut self) -> io::Result<Option<Row>> {
        if self.step.len() == 0 {
            self.step = walk(self.tree, &self.cursor, LOAD_BYTES, LOAD_ROWS)?.into_iter();
        }
        let Some((base, bytes)) = self.step.next() else { return Ok(None) };
        self.sum = self.sum.wrapping_add(sum_of(&base, &bytes));
        self.cursor = base;
        let row = decode_row(&bytes)?;
        check_index(self.tree, &row)?;
        Ok(Some(row))
    }
}

impl Iterator for Rows<'_> {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        if self.failed.is_some() {
            return None;
        }
        self.read().unwrap_or_else(|error| {
            self.failed = Some(error);
            None
        })
    }
}

/// How far a tree's rows are, and the sum of [`sum_of`] over them.
#[derive(Default)]
pub(super) struct Head {
    pub(super) meta: SnapshotMeta,
    pub(super) sum: u128,
}

/// The form of [`Head`] in the tree; the first had no sum.
const HEAD_FORM: u8 = 2;

fn encode_head(meta: &SnapshotMeta, sum: u128) -> Vec<u8> {
    let mut out = vec![HEAD_FORM];
    out.extend_from_slice(&sum.to_be_bytes());
    out.extend_from_slice(&snapshot::meta_to_wire(meta).encode_to_vec());
    out
}

fn read_head(tree: &sled::Tree) -> io::Result<Head> {
    let damaged = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let Some(value) = tree.get(META_KEY).map_err(io_error)? else {
        if tree.is_empty() {
            return Ok(Head::default());
        }
        return Err(damaged("rows without a log id".to_owned()));
    };
    let unknown = || damaged("the log id has an unknown form".to_owned());
    let Some((&HEAD_FORM, rest)) = value.split_first() else { return Err(unknown()) };
    let (sum, bytes) = rest.split_first_chunk().ok_or_else(unknown)?;
    let wire = raft::SnapshotHeader::decode(bytes).map_err(|error| damaged(error.to_string()))?;
    Ok(Head { meta: snapshot::meta_from_wire(wire)?, sum: u128::from_be_bytes(*sum) })
}

/// Whatever a row names is found from the blob's side, too, or the blob would be collected.
fn check_index(tree: &sled::Tree, row: &Row) -> io::Result<()> {
    let Some((build, digests)) = blobs_of(row) else { return Ok(()) };
    for digest in digests {
        if !tree.contains_key(index_key(&digest, &build)).map_err(io_error)? {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an index of blobs lacks an entry"));
        }
    }
    Ok(())
}

fn walk(tree: &sled::Tree, cursor: &[u8], bytes_max: usize, rows_max: usize) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut out = Vec::new();
    let mut bytes = 0;
    // Behind the row at the cursor, but not behind those whose names begin with its name: its last part has none of
    // them before it, the greatest possible part would. Its own other parts are passed over.
    let after = part_key(cursor, 0);
    let from = if cursor.is_empty() { Bound::Unbounded } else { Bound::Excluded(&after[..]) };
    for entry in tree.range::<&[u8], _>((from, Bound::Excluded(&[ROWS_END][..]))) {
        let (key, value) = entry.map_err(io_error)?;
        let Some(base) = base_of(&key) else { continue };
        let Some(row) = assemble(tree, base, &value)? else { continue };
        bytes += row.len();
        out.push((base.to_vec(), row));
        if bytes >= bytes_max || out.len() >= rows_max {
            break;
        }
    }
    Ok(out)
}

fn row_bytes(tree: &sled::Tree, base: &[u8]) -> io::Result<Option<Vec<u8>>> {
    match tree.get(part_key(base, 0)).map_err(io_error)? {
        Some(first) => assemble(tree, base, &first),
        None => Ok(None),
    }
}

fn assemble(tree: &sled::Tree, base: &[u8], first: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a row lacks a part");
    let (count, rest) = first_part(first).ok_or_else(damaged)?;
    let mut row = rest.to_vec();
    for part in 1..count {
        match tree.get(part_key(base, part)).map_err(io_error)? {
            Some(more) => row.extend_from_slice(&more),
            // Overwritten between the two reads: only a reader beside the writer sees that, and it reads again.
            None if row_count(tree, base)? != Some(count) => return row_bytes(tree, base),
            None => return Err(damaged()),
        }
    }
    Ok(Some(row))
}

fn row_count(tree: &sled::Tree, base: &[u8]) -> io::Result<Option<u16>> {
    let first = tree.get(part_key(base, 0)).map_err(io_error)?;
    Ok(first.as_deref().and_then(first_part).map(|(count, _)| count))
}

/// Blobs that a row of a build named and names no more.
type Unnamed = BTreeMap<BuildId, BTreeSet<Digest>>;

fn put_change(
    tree: &sled::Tree,
    batch: &mut sled::Batch,
    (sum, unnamed): (&mut u128, &mut Unnamed),
    base: &[u8],
    change: Option<&(Vec<u8>, Row)>,
) -> io::Result<()> {
    let before = row_bytes(tree, base)?;
    let parts_before = before.as_ref().map_or(0, |bytes| parts_of(bytes.len()));
    let mut parts_now = 0;
    if let Some(bytes) = &before {
        *sum = sum.wrapping_sub(sum_of(base, bytes));
    }
    if let Some(bytes) = &before
        && let Some((build, mut digests)) = blobs_of(&decode_row(bytes)?)
    {
        let named = change.and_then(|(_, row)| blobs_of(row)).map(|(_, named)| named).unwrap_or_default();
        digests.retain(|digest| !named.contains(digest));
        digests.iter().for_each(|digest| batch.remove(index_key(digest, &build)));
        if !digests.is_empty() {
            unnamed.entry(build).or_default().extend(digests);
        }
    }
    if let Some((bytes, row)) = change {
        *sum = sum.wrapping_add(sum_of(base, bytes));
        for (part, value) in (0u16..).zip(split(bytes)) {
            batch.insert(part_key(base, part), value);
            parts_now = part + 1;
        }
        if let Some((build, digests)) = blobs_of(row) {
            for digest in digests {
                batch.insert(index_key(&digest, &build), &[] as &[u8]);
            }
        }
    }
    for part in parts_now..parts_before {
        batch.remove(part_key(base, part));
    }
    Ok(())
}

fn import(tree: &sled::Tree, path: &Path) -> io::Result<SnapshotMeta> {
    let mut batch = sled::Batch::default();
    let mut keys = 0;
    let mut sum = 0;
    let meta = snapshot::read(path, |bytes| {
        let row = decode_row(&bytes)?;
        // The tree is empty: no row takes another's place.
        put_change(tree, &mut batch, (&mut sum, &mut Unnamed::new()), &base_key(&row.key()), Some(&(bytes, row)))?;
        keys += 1;
        if keys >= IMPORT_KEYS {
            keys = 0;
            tree.apply_batch(std::mem::take(&mut batch)).map_err(io_error)?;
        }
        Ok(())
    })?;
    // Last: a tree without it is not taken for whole.
    batch.insert(META_KEY, encode_head(&meta, sum));
    tree.apply_batch(batch).map_err(io_error)?;
    Ok(meta)
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
        assert!(self.tree().remove(part_key(&base_key(key), 0)).unwrap().is_some());
        self.sync().unwrap();
    }
}
