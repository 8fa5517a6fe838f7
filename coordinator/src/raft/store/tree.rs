//! One tree of rows: how far it is, a row in its parts, the index from blobs to the builds that name them, and the sum over all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::path::Path;

use helix_core::state::State;
use helix_core::{Row, RowKey};
use helix_model::{BuildId, Digest};
use helix_proto::raft;
use prost::Message;

use super::super::rows::{
    META_KEY, ROWS_END, addenda_prefix, base_key, base_of, blobs_of, first_part, index_key, part_key, parts_of, split,
    sum_of,
};
use super::super::snapshot;
use super::super::types::SnapshotMeta;
use super::{Changes, io_error};
use crate::codec::decode_row;

/// Keys in one batch while everything is replaced: batches lock out readers.
const IMPORT_KEYS: usize = 512;

/// Rows that are in memory twice while everything is loaded.
const LOAD_ROWS: usize = 1_024;
const LOAD_BYTES: usize = 4 << 20;

/// What changes do to a tree; `sum` follows its rows.
pub(super) fn batch_of(tree: &sled::Tree, changes: &Changes, sum: &mut u128) -> io::Result<sled::Batch> {
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

/// The keys of all addenda of a build.
pub(super) fn addenda_keys(tree: &sled::Tree, build: &BuildId) -> io::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for key in tree.scan_prefix(addenda_prefix(build)).keys() {
        if let Some(base) = base_of(&key.map_err(io_error)?) {
            found.push(base.to_vec());
        }
    }
    Ok(found)
}

/// Loads all rows, a few at a time.
pub(super) fn load(tree: &sled::Tree) -> io::Result<(State, SnapshotMeta)> {
    let mut rows = Rows { tree, step: Vec::new().into_iter(), cursor: Vec::new(), sum: 0, failed: None };
    let state = State::load(&mut rows);
    if let Some(error) = rows.failed {
        return Err(error);
    }
    // Before the sum: where rows contradict each other the rest was not read.
    let state = state.map_err(|error| io::Error::other(format!("rows contradict each other: {error:?}")))?;
    let Head { meta, sum: expected } = read_head(tree)?;
    if rows.sum != expected {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "rows are missing, or not what was written"));
    }
    Ok((state, meta))
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
pub(in crate::raft) struct Head {
    pub(in crate::raft) meta: SnapshotMeta,
    pub(in crate::raft) sum: u128,
}

/// The form of [`Head`] in the tree; the first had no sum.
const HEAD_FORM: u8 = 2;

pub(super) fn encode_head(meta: &SnapshotMeta, sum: u128) -> Vec<u8> {
    let mut out = vec![HEAD_FORM];
    out.extend_from_slice(&sum.to_be_bytes());
    out.extend_from_slice(&snapshot::meta_to_wire(meta).encode_to_vec());
    out
}

pub(super) fn read_head(tree: &sled::Tree) -> io::Result<Head> {
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

/// Rows behind `cursor`, in order, up to about so many bytes and rows; empty at the end.
pub(super) fn walk(
    tree: &sled::Tree,
    cursor: &[u8],
    bytes_max: usize,
    rows_max: usize,
) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
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

/// A row's bytes.
pub(super) fn row_bytes(tree: &sled::Tree, base: &[u8]) -> io::Result<Option<Vec<u8>>> {
    match tree.get(part_key(base, 0)).map_err(io_error)? {
        Some(first) => assemble(tree, base, &first),
        None => Ok(None),
    }
}

/// A row of all its parts.
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
pub(super) type Unnamed = BTreeMap<BuildId, BTreeSet<Digest>>;

/// What one change does: the row's parts, the index of its blobs, the sum.
pub(super) fn put_change(
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

/// Fills an empty tree with a verified snapshot's rows.
pub(super) fn import(tree: &sled::Tree, path: &Path) -> io::Result<SnapshotMeta> {
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
