//! What the leader should commit because time passed: losses, expiries, unproven ends, probes, retention.
//!
//! Proposes only; `apply` checks each again. Everything is found through indexes by time, except workers'
//! leases, which are as many as workers. What is under way is not proposed twice.

use std::collections::BTreeMap;

use helix_model::{AttemptKey, LogTime, Reason};

use crate::apply::deadline;
use crate::command::{Command, EndUnverified, ExpireAttempt, ProbeWorker};
use crate::liveness::{InFlight, Liveness};
use crate::record::Standing;
use crate::state::State;

mod lease;
mod retention;

pub use lease::brake;

/// Commands that are due at `now`. The shell stores [`brake`]'s answer in `liveness.brake` first.
#[must_use]
pub fn due(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime) -> Vec<Command> {
    let mut commands = Vec::new();
    commands.extend(lease::losses(state, in_flight, liveness, now).into_iter().map(Command::LoseWorker));
    expiries(state, in_flight, liveness, now, &mut commands);
    unproven(state, in_flight, now, &mut commands);
    commands.extend(probes(state, in_flight, now));
    retention::retention(state, in_flight, now, &mut commands);
    commands
}

/// When there may next be something to do, for [`due`] or because a task's back-off ends; `None` if nothing is
/// foreseen. It may be in the past while what is due is under way or held back.
#[must_use]
pub fn next(state: &State, liveness: &Liveness) -> Option<LogTime> {
    let (index, policy) = (&state.index, &state.policy);
    let stop = index.stopping.first().map(|(at, _)| at.plus_ms(policy.cancel_unverified_after_ms));
    let times = [
        index.queue.resting.first().map(|(not_before, _)| *not_before),
        index.limited.first().map(|(end, _)| end.plus_ms(policy.timeout_grace_ms)),
        index.unlimited.first().map(|(start, _)| deadline(*start, 0, policy)),
        stop,
        index.drains.first().map(|(deadline, _)| *deadline),
        index.quarantined.first().map(|(until, _)| *until),
        index.detached.first().map(|(until, _)| *until),
        retention::next(state),
        lease::next(state, liveness),
        (!index.silence.is_empty()).then(|| state.last_at().plus_ms(policy.worker_lease_ms)),
    ];
    times.into_iter().flatten().min()
}

/// Attempts over their wall-clock limit, their limit on silence, or on a worker whose drain is over.
fn expiries(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime, commands: &mut Vec<Command>) {
    let (index, policy) = (&state.index, &state.policy);
    let mut expired: BTreeMap<&AttemptKey, Reason> = BTreeMap::new();
    for worker in index.drains.iter().take_while(|(deadline, _)| *deadline <= now).map(|(_, worker)| worker) {
        for key in state.running_on(worker) {
            if state.running_attempt(key).is_some_and(|attempt| attempt.stop.is_none()) {
                expired.insert(key, Reason::Drained);
            }
        }
    }
    for key in &index.silence {
        let limit = state.open.get(&key.build).map_or(0, |build| build.spec.silence_timeout_ms);
        let attempt = state.running_attempt(key);
        let live = attempt.and_then(|attempt| liveness.workers.get(&attempt.worker));
        let silent = live.and_then(|live| live.silent_ms.get(key)).copied().unwrap_or(0);
        if limit > 0 && silent >= limit.saturating_add(policy.timeout_grace_ms) {
            expired.insert(key, Reason::Silence);
        }
    }
    let limited = index.limited.iter().take_while(|(end, _)| end.plus_ms(policy.timeout_grace_ms) <= now);
    let unlimited = index.unlimited.iter().take_while(|(start, _)| deadline(*start, 0, policy) <= now);
    for (_, key) in limited.chain(unlimited) {
        expired.insert(key, Reason::Timeout);
    }
    let expired = expired.into_iter().filter(|(key, _)| !in_flight.attempts.contains(*key));
    commands.extend(expired.map(|(key, reason)| Command::ExpireAttempt(ExpireAttempt { key: key.clone(), reason })));
}

/// Stops that waited long enough for a proof, on workers that are lost. A worker that is there
/// proves in its own time, or reports that it cannot.
fn unproven(state: &State, in_flight: &InFlight, now: LogTime, commands: &mut Vec<Command>) {
    let patience = state.policy.cancel_unverified_after_ms;
    for (_, key) in state.index.stopping.iter().take_while(|(at, _)| at.plus_ms(patience) <= now) {
        let worker = state.running_attempt(key).and_then(|attempt| state.worker(&attempt.worker));
        let lost = worker.is_some_and(|worker| worker.standing == Standing::Lost);
        if lost && !in_flight.attempts.contains(key) {
            commands.push(Command::EndUnverified(EndUnverified { key: key.clone() }));
        }
    }
}

/// Workers whose quarantine is over.
fn probes(state: &State, in_flight: &InFlight, now: LogTime) -> impl Iterator<Item = Command> {
    let over = state.index.quarantined.iter().take_while(move |(until, _)| *until <= now);
    let over = over.filter(|(_, worker)| !in_flight.workers.contains(worker));
    over.map(|(_, worker)| Command::ProbeWorker(ProbeWorker { worker: worker.clone() }))
}
