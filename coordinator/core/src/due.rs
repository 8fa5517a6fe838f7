//! What the leader should commit because time passed: losses, expiries, unproven ends, probes, retention.
//!
//! Proposes only; `apply` checks each again. Everything is found through indexes by time, except workers'
//! leases, which are as many as workers. What is under way is not proposed twice.

use std::collections::BTreeMap;

use helix_model::{AttemptKey, LogTime, Reason};

use crate::apply::deadline;
use crate::command::{Command, EndUnverified, ExpireAttempt, ProbeWorker};
use crate::liveness::{InFlight, Liveness, SessionState, WorkerLiveness};
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
        drained(state).map(|(deadline, _)| deadline).next(),
        index.quarantined.first().map(|(until, _)| *until),
        index.detached.first().map(|(until, _)| lease::back_by(*until, policy, liveness)),
        retention::next(state),
        lease::next(state, liveness),
        silences(state, liveness).filter_map(|(_, live, left_ms)| over_at(live, left_ms)).min(),
    ];
    times.into_iter().flatten().min()
}

/// Attempts over their wall-clock limit, their limit on silence, or on a worker whose drain is over.
fn expiries(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime, commands: &mut Vec<Command>) {
    let (index, policy) = (&state.index, &state.policy);
    let mut expired: BTreeMap<&AttemptKey, Reason> = BTreeMap::new();
    for (_, key) in drained(state).take_while(|(deadline, _)| *deadline <= now) {
        expired.insert(key, Reason::Drained);
    }
    for (key, ..) in silences(state, liveness).filter(|(.., left_ms)| *left_ms == 0) {
        expired.insert(key, Reason::Silence);
    }
    let limited = index.limited.iter().take_while(|(end, _)| end.plus_ms(policy.timeout_grace_ms) <= now);
    let unlimited = index.unlimited.iter().take_while(|(start, _)| deadline(*start, 0, policy) <= now);
    for (_, key) in limited.chain(unlimited) {
        expired.insert(key, Reason::Timeout);
    }
    let expired = expired.into_iter().filter(|(key, _)| !in_flight.attempts.contains(*key));
    commands.extend(expired.map(|(key, reason)| Command::ExpireAttempt(ExpireAttempt { key: key.clone(), reason })));
}

/// What runs on workers whose drains have a deadline and was not told to stop, and when it is to be, the soonest first.
fn drained(state: &State) -> impl Iterator<Item = (LogTime, &AttemptKey)> {
    let drains = state.index.drains.iter();
    let running = drains.flat_map(|(deadline, worker)| state.running_on(worker).map(move |key| (*deadline, key)));
    running.filter(|(_, key)| state.running_attempt(key).is_some_and(|attempt| attempt.stop.is_none()))
}

/// When silence may be over its limit. Who says nothing more will not say that it is.
fn over_at(live: &WorkerLiveness, left_ms: u64) -> Option<LogTime> {
    (live.session == SessionState::Open).then(|| live.last_seen.plus_ms(left_ms))
}

/// Attempts with a limit on silence whose agents said how silent they are, and for how many more milliseconds from then they may be.
fn silences<'a>(
    state: &'a State,
    liveness: &'a Liveness,
) -> impl Iterator<Item = (&'a AttemptKey, &'a WorkerLiveness, u64)> {
    state.index.silence.iter().filter_map(|key| {
        let limit = state.open.get(&key.build)?.spec.silence_timeout_ms;
        let live = liveness.workers.get(&state.running_attempt(key)?.worker)?;
        let silent = live.silent_ms.get(key)?;
        let left = limit.saturating_add(state.policy.timeout_grace_ms).saturating_sub(*silent);
        (limit > 0).then_some((key, live, left))
    })
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
