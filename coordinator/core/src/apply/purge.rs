//! Removing what has served its time: logs and artifacts of finished builds, then the builds, and later the tombstones they left.
//!
//! Only the naming of bytes is removed here. What no build names any more each coordinator collects for itself, later.

use helix_model::limits::PURGE_IDS_MAX;
use helix_model::{BuildId, LogTime};

use crate::command::{ExpireBytes, ExpireTombstones, PurgeBuilds};
use crate::record::{Applied, Pinned};
use crate::reply::{Rejection, Reply};
use crate::retention::Kept;
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

/// Lets go of the logs or artifacts of those of the named builds that are as old as policy says and not pinned.
pub(super) fn expire_bytes(state: &mut State, at: LogTime, c: &ExpireBytes, out: &mut Applied) -> Outcome {
    check_count(&c.builds)?;
    let mut expired = 0;
    for id in &c.builds {
        let due = state.finished.get(id).is_some_and(|build| {
            let old = build.completed_at.plus_ms(state.policy.lifetime_ms(c.kept, build)) <= at;
            old && build.pinned == Pinned::No && build.expired.at(c.kept).is_none()
        });
        if due && c.kept != Kept::Build {
            state.expire(id, c.kept, at, out);
            expired += 1;
        }
    }
    Ok(Reply::Purged(expired))
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
