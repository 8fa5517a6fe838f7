//! Rows that were applied and are not in the store yet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_core::retention::Kept;
use helix_core::{Row, RowChange, RowKey};
use helix_model::{BuildId, Digest, LogTime};

use super::super::rows::blobs_of;

#[derive(Clone, Default)]
pub(super) struct Rows {
    pub(super) changes: BTreeMap<RowKey, Option<Row>>,
    /// Builds whose addenda in the store go; those in `changes` are newer.
    pub(super) addenda_gone: BTreeSet<BuildId>,
    /// What stored rows of builds, and of their addenda, are to forget; those in `changes` have.
    pub(super) expired: BTreeMap<(BuildId, Kept), LogTime>,
    /// Blobs named by what waits.
    pub(super) blobs: BTreeSet<Digest>,
}

impl Rows {
    pub(super) fn take_in(&mut self, change: RowChange) {
        match change {
            RowChange::Put(row) => {
                if let Some((_, blobs)) = blobs_of(&row) {
                    self.blobs.extend(blobs);
                }
                self.changes.insert(row.key(), Some(row));
            }
            RowChange::Delete(key) => {
                self.changes.insert(key, None);
            }
            RowChange::DeleteAddenda(build) => {
                self.changes.retain(|key, _| !matches!(key, RowKey::Addendum(attempt, _) if attempt.build == build));
                self.expired.retain(|(id, _), _| *id != build);
                self.addenda_gone.insert(build);
            }
            RowChange::Expire(build, kept, at) => self.expire(build, kept, at),
        }
    }

    /// What waits is changed here, what is stored when it is written.
    fn expire(&mut self, build: BuildId, kept: Kept, at: LogTime) {
        if let Some(Some(Row::Build(record))) = self.changes.get_mut(&RowKey::Build(build.clone())) {
            Arc::make_mut(record).expire(kept, at);
        }
        let about = |key: &RowKey| {
            matches!(key, RowKey::Addendum(attempt, _) if attempt.build == build) && Kept::of_key(key) == Some(kept)
        };
        self.changes.retain(|key, _| !about(key));
        self.expired.insert((build, kept), at);
    }

    pub(super) fn len(&self) -> usize {
        self.changes.len() + self.addenda_gone.len() + self.expired.len()
    }

    /// Puts what waits here about a build over what is known of it so far.
    pub(super) fn overlay(&self, build: &BuildId, record: &mut Option<Row>, addenda: &mut BTreeMap<RowKey, Row>) {
        if let Some(change) = self.changes.get(&RowKey::Build(build.clone())) {
            record.clone_from(change);
        }
        if self.addenda_gone.contains(build) {
            addenda.clear();
        }
        for ((_, kept), at) in self.expired.iter().filter(|((id, _), _)| id == build) {
            if let Some(Row::Build(record)) = record {
                Arc::make_mut(record).expire(*kept, *at);
            }
            addenda.retain(|key, _| Kept::of_key(key) != Some(*kept));
        }
        for (key, change) in &self.changes {
            let RowKey::Addendum(attempt, _) = key else { continue };
            if attempt.build == *build {
                match change {
                    Some(row) => drop(addenda.insert(key.clone(), row.clone())),
                    None => drop(addenda.remove(key)),
                }
            }
        }
    }

    /// What waits here about one build.
    pub(super) fn overlay_of(&self, build: &BuildId) -> Self {
        let about = |key: &RowKey| match key {
            RowKey::Build(id) => id == build,
            RowKey::Addendum(attempt, _) => attempt.build == *build,
            RowKey::Counters | RowKey::Policy | RowKey::Node(_) | RowKey::Worker(_) | RowKey::Tombstone(_) => false,
        };
        let changes = self.changes.iter().filter(|(key, _)| about(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let addenda_gone = self.addenda_gone.get(build).cloned().into_iter().collect();
        let expired = self.expired.iter().filter(|((id, _), _)| id == build).map(|(k, v)| (k.clone(), *v)).collect();
        Self { changes, addenda_gone, expired, blobs: BTreeSet::new() }
    }
}
