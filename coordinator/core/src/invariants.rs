//! What must be true of a registry after every command. Walks everything: for tests, simulations and `doctor`.

use helix_model::{BuildState, Reason};

use crate::policy::QUARANTINE_AFTER_MAX;
use crate::record::{BuildRecord, Standing, TaskPhase, Trust};
use crate::state::State;
use crate::state::index::Index;

/// Checks every invariant that a state can show.
///
/// # Errors
/// The first one that does not hold, in words.
pub fn check(state: &State) -> Result<(), String> {
    for build in state.open.values() {
        crate::state::check_build(build).map_err(|error| error.to_string())?;
        check_open(state, build).map_err(|why| format!("build {}: {why}", build.id))?;
    }
    check_known_once(state)?;
    check_workers(state)?;
    check_index(state)
}

fn check_open(state: &State, build: &BuildRecord) -> Result<(), String> {
    ensure(!build.state.is_terminal(), "a finished build is among the open ones")?;
    ensure(build.sequence < state.counters.next_sequence, "its place in the order was never given out")?;
    let assigned = build.tasks.iter().any(|task| !task.attempts.is_empty());
    ensure((build.state == BuildState::Running) == assigned, "it runs from its first assignment on")?;
    ensure(build.started_at.is_some() == assigned, "it started at its first assignment")?;
    crate::apply::check_indexing(build)?;
    for task in &build.tasks {
        if let TaskPhase::Ended { state, reason, .. } = &task.phase {
            ensure(state.is_terminal(), "a task ended in a state that is none")?;
            ensure((*state == BuildState::Succeeded) == reason.is_none(), "a task has a reason unless it succeeded")?;
            ensure(*state != BuildState::Cancelled || build.cancel.is_some(), "a task was cancelled by nobody")?;
        }
        if build.cancel.is_some() {
            ensure(!matches!(task.phase, TaskPhase::Waiting { .. }), "a task of a cancelled build waits")?;
            let stopping = |reason: Option<Reason>| reason == Some(Reason::Cancelled);
            let stop = task.running().map(|attempt| attempt.stop.as_ref().map(|stop| stop.reason));
            ensure(stop.is_none_or(stopping), "an attempt of a cancelled build was not asked to stop")?;
        }
        if let Some(attempt) = task.running() {
            let worker = state.workers.get(&attempt.worker).ok_or("an attempt runs on an unknown worker")?;
            ensure(worker.instance == attempt.instance, "an attempt runs on an earlier life of its worker")?;
            let may_run = worker.standing != Standing::Lost || attempt.stop.is_some();
            ensure(may_run, "an attempt runs on a lost worker without having been asked to stop")?;
        }
        for attempt in &task.attempts {
            ensure(attempt.assigned_at <= state.last_at(), "an attempt begins after the last log time")?;
            let success = attempt.end.as_ref().is_some_and(|end| end.reason.is_none());
            ensure(!success || attempt.log.is_some(), "a success has no log")?;
        }
    }
    Ok(())
}

fn check_known_once(state: &State) -> Result<(), String> {
    let finished = state.finished.keys().find(|id| state.open.contains_key(*id) || state.tombstones.contains_key(*id));
    let buried = state.tombstones.keys().find(|id| state.open.contains_key(*id));
    match finished.or(buried) {
        Some(id) => Err(format!("build {id} is known twice")),
        None => Ok(()),
    }
}

fn check_workers(state: &State) -> Result<(), String> {
    for worker in state.workers.values() {
        let load = state.load_of(&worker.name);
        // A worker may offer less than it runs; it is given nothing then.
        let room = state.index.queue.rooms.get(&worker.name).map_or(0, |room| room.slots);
        let probing = matches!(worker.trust, Trust::Probing { .. });
        let most = if probing { 1 } else { worker.offer.capacity };
        let within = room == 0 || load + room == most;
        let patient = match &worker.trust {
            Trust::Full { failed } => failed.len() <= QUARANTINE_AFTER_MAX as usize,
            Trust::Quarantined { .. } => room == 0,
            Trust::Probing { since, .. } => *since <= state.last_at(),
        };
        ensure(patient, &format!("worker {}: its trust makes no sense", worker.name))?;
        ensure(within, &format!("worker {}: room {room} and load {load} exceed its capacity", worker.name))?;
        ensure(worker.offer.capacity > 0, &format!("worker {}: no capacity", worker.name))?;
        ensure(
            worker.held.iter().all(|key| state.running_attempt(key).is_none()),
            &format!("worker {}: held for an attempt that runs", worker.name),
        )?;
    }
    Ok(())
}

fn check_index(state: &State) -> Result<(), String> {
    let mut index = Index::default();
    for worker in state.workers.values() {
        index.change_worker(None, Some(worker));
    }
    for build in state.open.values() {
        index.add_build(build, state.last_at(), &state.workers);
    }
    for (id, build) in &state.finished {
        index.add_finished(id, build, &state.policy);
    }
    for tombstone in state.tombstones.values() {
        index.tombstones.insert((tombstone.purged_at, tombstone.id.clone()));
    }
    if index == state.index {
        return Ok(());
    }
    Err(format!("indexes disagree with rows:\n  kept    {:?}\n  derived {index:?}", state.index))
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}
