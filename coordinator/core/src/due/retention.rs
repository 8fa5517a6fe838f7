//! What has been kept long enough: builds over age or number, logs and artifacts over age, tombstones.
//!
//! A look costs the number of lifetimes that policy knows, and of what is due; nobody walks over what is kept.

use std::collections::BTreeSet;

use helix_model::limits::PURGE_IDS_MAX;
use helix_model::{BuildId, LogTime};

use crate::command::{Command, ExpireBytes, ExpireTombstones, PurgeBuilds};
use crate::liveness::InFlight;
use crate::retention::Kept;
use crate::state::State;
use crate::state::index::ByEnd;

/// When something will have been kept long enough; in the past if it has.
pub(super) fn next(state: &State) -> Option<LogTime> {
    let (index, policy) = (&state.index, &state.policy);
    let overfull = index.purgeable.len() as u64 > policy.retain_builds;
    let first =
        |((_, keep_ms), entries): (&(Kept, u64), &ByEnd)| entries.first().map(|(end, _, _)| end.plus_ms(*keep_ms));
    let aged = index.lifetimes.iter().filter_map(first).min();
    let tombstone = index.tombstones.first().map(|(purged, _)| purged.plus_ms(policy.tombstone_ms));
    [overfull.then(|| state.last_at()), aged, tombstone].into_iter().flatten().min()
}

pub(super) fn retention(state: &State, in_flight: &InFlight, now: LogTime, commands: &mut Vec<Command>) {
    let (index, policy) = (&state.index, &state.policy);
    let count = index.purgeable.len() as u64;
    let surplus = usize::try_from(count.saturating_sub(policy.retain_builds)).unwrap_or(usize::MAX);
    let over = index.purgeable.iter().take(surplus).chain(aged(state, Kept::Build, now));
    let over = over.filter(|(_, _, id)| !in_flight.purging.contains(id));
    // The same build may be over both.
    let over: BTreeSet<&(LogTime, u64, BuildId)> = over.take(PURGE_IDS_MAX).collect();
    if let Some((cutoff, _, _)) = over.last() {
        let builds = over.iter().map(|(_, _, id)| id.clone()).collect();
        commands.push(Command::PurgeBuilds(PurgeBuilds { builds, cutoff: *cutoff }));
    }
    let whole: BTreeSet<&BuildId> = over.iter().map(|(_, _, id)| id).collect();
    for kept in [Kept::Logs, Kept::Artifacts] {
        let going = |id: &BuildId| {
            whole.contains(id) || in_flight.purging.contains(id) || in_flight.letting_go.contains(&(id.clone(), kept))
        };
        let old = aged(state, kept, now).map(|(_, _, id)| id).filter(|id| !going(id)).take(PURGE_IDS_MAX);
        let builds: Vec<BuildId> = old.cloned().collect();
        if !builds.is_empty() {
            commands.push(Command::ExpireBytes(ExpireBytes { kept, builds }));
        }
    }
    let old = index.tombstones.iter().take_while(|(purged, _)| purged.plus_ms(policy.tombstone_ms) <= now);
    let old = old.filter(|(_, id)| !in_flight.expiring.contains(id)).take(PURGE_IDS_MAX);
    let builds: Vec<BuildId> = old.map(|(_, id)| id.clone()).collect();
    if !builds.is_empty() {
        commands.push(Command::ExpireTombstones(ExpireTombstones { builds }));
    }
}

/// Finished builds of which that is old enough, group by group.
fn aged(state: &State, kept: Kept, now: LogTime) -> impl Iterator<Item = &(LogTime, u64, BuildId)> {
    let groups = state.index.lifetimes.range((kept, 0)..=(kept, u64::MAX));
    groups.flat_map(move |((_, keep_ms), entries)| {
        entries.iter().take_while(move |(end, _, _)| end.plus_ms(*keep_ms) <= now)
    })
}
