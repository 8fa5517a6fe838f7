//! What a coordinator has on its disk: rows as of some entry, and the newest two snapshots of them.
//!
//! As in the coordinator: rows are written behind what is applied, in batches; a snapshot is walked in steps between them,
//! and a row that changes ahead of the walk is saved to it as it was. The log is purged only behind the older snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use helix_core::record::{Row, RowChange, RowKey};
use helix_core::retention::Kept;
use helix_model::{BuildId, Digest};

/// Snapshots kept.
const KEPT: usize = 2;

/// Rows by their keys.
pub(super) type Rows = BTreeMap<RowKey, Row>;

/// A whole snapshot.
#[derive(Clone)]
pub(super) struct Snapshot {
    /// Entries of the log that it covers.
    pub(super) at: usize,
    pub(super) rows: Rows,
}

#[derive(Default)]
pub(super) struct Store {
    pub(super) applied: usize,
    pub(super) rows: Rows,
    pub(super) snapshots: Vec<Snapshot>,
    walk: Option<Walk>,
}

struct Walk {
    at: usize,
    cursor: Option<RowKey>,
    file: Rows,
    done_ahead: BTreeSet<RowKey>,
}

/// Whether rows are saved as they were before they change ahead of a walk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Images {
    Saved,
    Forgotten,
}

impl Store {
    /// Writes what was applied since the last time.
    pub(super) fn write(&mut self, applied: usize, changes: &[RowChange], images: Images) {
        if images == Images::Saved {
            changes.iter().for_each(|change| self.save_image(change));
        }
        changes.iter().for_each(|change| change_row(&mut self.rows, change));
        self.applied = applied;
    }

    fn save_image(&mut self, change: &RowChange) {
        let Some(walk) = &mut self.walk else { return };
        let keys: Vec<RowKey> = match change {
            RowChange::Put(row) => vec![row.key()],
            RowChange::Delete(key) => vec![key.clone()],
            RowChange::DeleteAddenda(build) => self.rows.keys().filter(|key| is_about(key, build)).cloned().collect(),
            RowChange::Expire(build, kept, _) => {
                let expires = |key: &&RowKey| is_about(key, build) && Kept::of_key(key) == Some(*kept);
                let addenda = self.rows.keys().filter(expires).cloned();
                std::iter::once(RowKey::Build(build.clone())).chain(addenda).collect()
            }
        };
        for key in keys {
            let ahead = walk.cursor.as_ref().is_none_or(|cursor| key > *cursor);
            if ahead && !walk.done_ahead.contains(&key) {
                if let Some(row) = self.rows.get(&key) {
                    walk.file.insert(key.clone(), row.clone());
                }
                walk.done_ahead.insert(key);
            }
        }
    }

    /// Begins a snapshot, or goes on with it for some rows. Whether it is whole now.
    pub(super) fn walk(&mut self, rows: usize) -> bool {
        let at = self.applied;
        let walk =
            self.walk.get_or_insert_with(|| Walk { at, cursor: None, file: Rows::new(), done_ahead: BTreeSet::new() });
        for _ in 0..rows {
            let from = walk.cursor.as_ref().map_or(Unbounded, Excluded);
            let Some((key, row)) = self.rows.range((from, Unbounded)).next() else {
                let Walk { at, file, .. } = self.walk.take().unwrap_or_else(|| unreachable!("it was just there"));
                self.keep(Snapshot { at, rows: file });
                return true;
            };
            if !walk.done_ahead.remove(key) {
                walk.file.insert(key.clone(), row.clone());
            }
            walk.cursor = Some(key.clone());
        }
        false
    }

    fn keep(&mut self, snapshot: Snapshot) {
        self.snapshots.push(snapshot);
        if self.snapshots.len() > KEPT {
            self.snapshots.remove(0);
        }
    }

    /// The coordinator stops: what was half-written is gone.
    pub(super) fn crash(&mut self) {
        self.walk = None;
    }

    /// The rows are gone; snapshots and log are not. Whether there is a snapshot to begin from.
    pub(super) fn rebuild(&mut self) {
        let newest = self.snapshots.last().cloned().unwrap_or(Snapshot { at: 0, rows: Rows::new() });
        (self.applied, self.rows, self.walk) = (newest.at, newest.rows, None);
    }

    /// Takes the place of everything.
    pub(super) fn install(&mut self, snapshot: Snapshot) {
        (self.applied, self.rows, self.walk) = (snapshot.at, snapshot.rows.clone(), None);
        self.keep(snapshot);
    }

    /// Entries of the log that this node no longer has.
    pub(super) fn purged(&self) -> usize {
        if self.snapshots.len() < KEPT { 0 } else { self.snapshots.first().map_or(0, |oldest| oldest.at) }
    }
}

/// Carries out one change on rows.
pub(super) fn change_row(rows: &mut Rows, change: &RowChange) {
    match change {
        RowChange::Put(row) => {
            rows.insert(row.key(), row.clone());
        }
        RowChange::Delete(key) => {
            rows.remove(key);
        }
        RowChange::DeleteAddenda(build) => {
            rows.retain(|key, _| !is_about(key, build));
        }
        RowChange::Expire(build, kept, at) => {
            if let Some(Row::Build(record)) = rows.get_mut(&RowKey::Build(build.clone())) {
                Arc::make_mut(record).expire(*kept, *at);
            }
            rows.retain(|key, _| !is_about(key, build) || Kept::of_key(key) != Some(*kept));
        }
    }
}

/// Whether a row adds something to a build's.
fn is_about(key: &RowKey, build: &BuildId) -> bool {
    matches!(key, RowKey::Addendum(attempt, _) if attempt.build == *build)
}

/// Every blob that rows name.
pub(super) fn named_blobs(rows: &Rows) -> BTreeSet<Digest> {
    use helix_core::record::Addendum;
    let mut named = BTreeSet::new();
    for row in rows.values() {
        match row {
            Row::Build(build) => {
                for attempt in build.tasks.iter().flat_map(|task| &task.attempts) {
                    named.extend(attempt.artifacts.iter().map(|artifact| artifact.blob.digest));
                    named.extend(attempt.log.iter().map(|log| log.blob.digest));
                }
                named.extend(build.artifacts.iter().map(|artifact| artifact.blob.digest));
            }
            Row::Addendum(_, Addendum::Log(log)) => drop(named.insert(log.blob.digest)),
            Row::Addendum(_, Addendum::Artifact(artifact)) => drop(named.insert(artifact.blob.digest)),
            Row::Addendum(_, Addendum::Pinned(_))
            | Row::Counters(_)
            | Row::Policy(_)
            | Row::Node(_)
            | Row::Worker(_)
            | Row::Tombstone(_) => {}
        }
    }
    named
}
