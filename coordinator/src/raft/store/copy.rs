//! A copy of all rows into a new sled file, made in steps while the old one serves.
//!
//! sled 0.34 never frees about half of the segments that it has emptied, once some rows stay: its file grows with every build that
//! ever was. So its rows move to a new file from time to time, and the old one goes.
//!
//! Invariant: a copy holds what the store holds of the rows up to the cursor, and nothing of the others.

use std::io;

use super::generation::Generation;
use super::tree::{Unnamed, batch_of, encode_head, put_change};
use super::{Changes, META_KEY, STEP_BYTES, STEP_ROWS, Store, io_error};
use crate::codec::decode_row;

/// It is synced whenever it has grown by so much, or the end would wait long for the disk.
const SYNC_BYTES: usize = 4 << 20;

/// The copy.
pub(in crate::raft) struct Copy {
    rows: Generation,
    cursor: Vec<u8>,
    sum: u128,
    unsynced: usize,
}

impl Copy {
    pub(super) fn new(rows: Generation) -> Self {
        Self { rows, cursor: Vec::new(), sum: 0, unsynced: 0 }
    }

    /// Copies some more rows; true when all are there.
    pub(in crate::raft) fn step(&mut self, store: &Store) -> io::Result<bool> {
        let found = store.walk(&self.cursor, STEP_BYTES, STEP_ROWS)?;
        let Some((last, _)) = found.last() else { return Ok(true) };
        let cursor = last.clone();
        let mut batch = sled::Batch::default();
        for (base, bytes) in found {
            self.unsynced += base.len() + bytes.len();
            let row = decode_row(&bytes)?;
            // No row takes another's place.
            put_change(&self.rows.tree, &mut batch, (&mut self.sum, &mut Unnamed::new()), &base, Some(&(bytes, row)))?;
        }
        self.rows.tree.apply_batch(batch).map_err(io_error)?;
        self.cursor = cursor;
        if self.unsynced >= SYNC_BYTES {
            self.unsynced = 0;
            self.rows.sync()?;
            store.expect_room(0)?;
        }
        Ok(false)
    }

    /// Does to the rows that are here already what was done to the store.
    pub(in crate::raft) fn write(&mut self, mut changes: Changes) -> io::Result<()> {
        // What comes right behind the cursor.
        let mut behind = self.cursor.clone();
        behind.push(0);
        changes.split_off(&behind);
        let batch = batch_of(&self.rows.tree, &changes, &mut self.sum)?;
        self.rows.tree.apply_batch(batch).map_err(io_error)
    }

    /// Makes a copy that has all rows durable, with how far they go.
    ///
    /// # Errors
    /// Also when it is not what the store holds.
    pub(in crate::raft) fn finish(&self, store: &Store) -> io::Result<()> {
        let head = store.head()?;
        if self.sum != head.sum {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a copy of the rows does not add up"));
        }
        // Last: a tree without it is not taken for whole.
        self.rows.tree.insert(META_KEY, encode_head(&head.meta, head.sum)).map_err(io_error)?;
        self.rows.sync_new(&store.root)
    }

    /// Bytes on disk.
    pub(in crate::raft) fn size(&self) -> u64 {
        self.rows.size()
    }

    pub(super) fn into_rows(self) -> Generation {
        self.rows
    }

    /// Gives it up.
    pub(in crate::raft) fn discard(self) {
        self.rows.discard();
    }
}

#[cfg(test)]
impl Copy {
    /// All that is in its tree.
    pub(in crate::raft) fn pairs(&self) -> Vec<(sled::IVec, sled::IVec)> {
        super::pairs(&self.rows.tree)
    }
}
