//! Removing what has served its time: finished builds, and later the tombstones they left.

use helix_model::limits::PURGE_IDS_MAX;
use helix_model::{BuildId, LogTime};

use crate::command::{ExpireTombstones, PurgeBuilds};
use crate::record::{Applied, Pinned};
use crate::reply::{Rejection, Reply};
use crate::state::State;

use super::Outcome;

/// Removes those of the named builds that have ended at or before the cutoff and are not pinned.
pub(super) fn purge_builds(state: &mut State, at: LogTime, c: &PurgeBuilds, out: &mut Applied) -> Outcome {
    check_count(&c.builds)?;
    let mut purged = 0;
    for id in &c.builds {
        let finished = state.finished.get(id);
        if finished.is_some_and(|build| build.pinned == Pinned::No && build.completed_at <= c.cutoff) {
            state.bury(id, at, out);
            purged += 1;
        }
    }
    Ok(Reply::Purged(purged))
}

/// Removes those of the named tombstones that are as old as policy says.
pub(super) fn expire_tombstones(state: &mut State, at: LogTime, c: &ExpireTombstones, out: &mut Applied) -> Outcome {
    check_count(&c.builds)?;
    let keep_ms = state.policy.tombstone_ms;
    let mut removed = 0;
    for id in &c.builds {
        if state.tombstones.get(id).is_some_and(|tombstone| tombstone.purged_at.plus_ms(keep_ms) <= at) {
            state.remove_tombstone(id, out);
            removed += 1;
        }
    }
    Ok(Reply::Purged(removed))
}

fn check_count(ids: &[BuildId]) -> Result<(), Rejection> {
    if ids.len() > PURGE_IDS_MAX {
        return Err(Rejection::TooManyRows { given: ids.len() });
    }
    Ok(())
}
