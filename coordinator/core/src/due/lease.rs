//! Leases of workers, and the brake: when most workers fall silent at once, the fault is likely ours, and
//! rerunning everything would make it worse.
//!
//! Braked, losses are held back for a minute and then declared for at most a tenth of the workers per lease. The brake is
//! released when most of those workers are back, or when none of them is left to be lost.

use helix_model::{LogTime, WorkerName};

use crate::command::LoseWorker;
use crate::liveness::{Brake, InFlight, Liveness, WorkerLiveness};
use crate::record::{Policy, Standing, WorkerRecord};
use crate::state::State;

/// Fewer workers than this are never braked for: half of them may well be one rack.
const BRAKE_WORKERS_MIN: usize = 5;

/// How long losses are held back.
const BRAKE_HOLD_MS: u64 = 60_000;

/// One in so many workers may be declared lost per lease after that.
const BRAKE_SHARE: usize = 10;

/// What `Liveness::brake` should be at `now`, given what it is. Losing the answer only begins the wait anew.
#[must_use]
pub fn brake(state: &State, liveness: &Liveness, now: LogTime) -> Option<Brake> {
    let lease = state.policy.worker_lease_ms;
    lapsed(state, liveness, now).next()?;
    if let Some(brake) = &liveness.brake {
        let away = brake.watched.iter().filter(|name| is_away(state, liveness, name, now)).count();
        return (away * 2 > brake.watched.len()).then(|| brake.clone());
    }
    let recently_lost = state.workers().filter(|worker| {
        let live = liveness.workers.get(&worker.name).filter(|live| live.instance == worker.instance);
        worker.standing == Standing::Lost && live.is_some_and(|live| now.since_ms(live.last_seen) < 2 * lease)
    });
    let watched: std::collections::BTreeSet<WorkerName> =
        state.index.present.iter().cloned().chain(recently_lost.map(|worker| worker.name.clone())).collect();
    let away = watched.iter().filter(|name| is_away(state, liveness, name, now)).count();
    let braked = watched.len() >= BRAKE_WORKERS_MIN && away * 2 > watched.len();
    braked.then_some(Brake { since: now, watched })
}

/// Workers to be declared lost now.
pub(super) fn losses(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime) -> Vec<LoseWorker> {
    let loss = |worker: &WorkerRecord| LoseWorker { worker: worker.name.clone(), instance: worker.instance.clone() };
    let free = |name: &&WorkerName| !in_flight.workers.contains(*name);
    // Who said when it would be back is not part of any riddle.
    let overdue = state.index.detached.iter().take_while(|(until, _)| back_by(*until, &state.policy, liveness) <= now);
    let overdue = overdue.map(|(_, name)| name);
    let mut lost: Vec<LoseWorker> =
        overdue.filter(free).filter_map(|name| state.worker(name)).map(|worker| loss(worker)).collect();
    let mut lapsed = lapsed(state, liveness, now).filter(|worker| free(&&worker.name)).peekable();
    if lapsed.peek().is_some() {
        let allowed = match brake(state, liveness, now) {
            None => usize::MAX,
            Some(brake) => allowance(state, in_flight, &brake, now),
        };
        lost.extend(lapsed.take(allowed).map(loss));
    }
    lost
}

/// When a detached worker has to be back: as it said, and after a fail-over not before it had a whole lease to find this leader.
pub(super) fn back_by(until: LogTime, policy: &Policy, liveness: &Liveness) -> LogTime {
    until.max(liveness.leader_since.plus_ms(policy.worker_lease_ms))
}

/// How many more workers may be declared lost under the brake.
fn allowance(state: &State, in_flight: &InFlight, brake: &Brake, now: LogTime) -> usize {
    let Some(released_ms) = now.since_ms(brake.since).checked_sub(BRAKE_HOLD_MS) else { return 0 };
    let leases = usize::try_from(released_ms / state.policy.worker_lease_ms.max(1)).unwrap_or(usize::MAX);
    let per_lease = (brake.watched.len() / BRAKE_SHARE).max(1);
    let is_lost = |name: &&WorkerName| {
        let lost = state.worker(name).is_some_and(|worker| worker.standing == Standing::Lost);
        lost || in_flight.workers.contains(*name)
    };
    let declared = brake.watched.iter().filter(is_lost).count();
    leases.saturating_add(1).saturating_mul(per_lease).saturating_sub(declared)
}

/// How long a worker has been silent. One that this leader never heard counts from the leader's beginning.
fn silence(state: &State, liveness: &Liveness, name: &WorkerName, now: LogTime) -> u64 {
    now.since_ms(last_heard(state, liveness, name))
}

fn last_heard(state: &State, liveness: &Liveness, name: &WorkerName) -> LogTime {
    match state.worker(name) {
        Some(worker) => last_heard_of(worker, liveness.workers.get(name), liveness),
        None => liveness.leader_since,
    }
}

fn last_heard_of(worker: &WorkerRecord, live: Option<&WorkerLiveness>, liveness: &Liveness) -> LogTime {
    let live = live.filter(|live| live.instance == worker.instance);
    // A registration is a sign of life, too; its session may not be noted yet.
    live.map_or(liveness.leader_since, |live| live.last_seen).max(worker.registered_at)
}

/// The workers that have a lease, by name, and when each was last heard. Every look at the clock asks for this, of thousands:
/// it is one walk along two maps of the same order.
fn heard<'a>(state: &'a State, liveness: &'a Liveness) -> impl Iterator<Item = (&'a WorkerRecord, LogTime)> {
    let mut known = liveness.workers.iter().peekable();
    let present = state.workers().filter(|worker| worker.standing == Standing::Present);
    present.map(move |worker| {
        while known.next_if(|(name, _)| **name < worker.name).is_some() {}
        let live = known.next_if(|(name, _)| **name == worker.name).map(|(_, live)| live);
        (&**worker, last_heard_of(worker, live, liveness))
    })
}

/// Those whose lease is over.
fn lapsed<'a>(state: &'a State, liveness: &'a Liveness, now: LogTime) -> impl Iterator<Item = &'a WorkerRecord> {
    let lease = state.policy.worker_lease_ms;
    heard(state, liveness).filter(move |(_, at)| now.since_ms(*at) >= lease).map(|(worker, _)| worker)
}

/// Lost, or silent for half a lease: longer than any heartbeat's interval.
fn is_away(state: &State, liveness: &Liveness, name: &WorkerName, now: LogTime) -> bool {
    let lost = state.worker(name).is_none_or(|worker| worker.standing == Standing::Lost);
    lost || silence(state, liveness, name, now) * 2 > state.policy.worker_lease_ms
}

/// When the next lease lapses.
pub(super) fn next(state: &State, liveness: &Liveness) -> Option<LogTime> {
    let lease = state.policy.worker_lease_ms;
    heard(state, liveness).map(|(_, at)| at.plus_ms(lease)).min()
}

#[cfg(test)]
mod tests {
    use helix_model::{Executor, Instance, Platform};

    use super::*;
    use crate::command::{Command, RegisterWorker, WorkerOffer};
    use crate::record::Applied;

    #[test]
    fn the_walk_finds_for_each_worker_what_a_lookup_finds() {
        let (mut state, mut liveness) = (State::default(), Liveness::default());
        liveness.leader_since = LogTime(50);
        let name = |text: &str| WorkerName::new(text).unwrap();
        let offer = WorkerOffer {
            capacity: 1,
            platforms: [Platform::new("linux/amd64").unwrap()].into(),
            executors: [Executor::Exec].into(),
            ..WorkerOffer::default()
        };
        for number in 0..8_u64 {
            let (worker, instance) = (name(&format!("w{number}")), Instance::new("d.b").unwrap());
            let register = RegisterWorker { worker, instance, offer: offer.clone() };
            state.apply(LogTime(10 * number), &Command::RegisterWorker(register), &mut Applied::default());
        }
        // Some were never heard, one in another life, and some that were heard have no row.
        for (seen, (text, instance)) in (100..).zip([
            ("a", "d.b"),
            ("w0", "d.b"),
            ("w1", "d.c"),
            ("w3", "d.b"),
            ("w35", "d.b"),
            ("w7", "d.b"),
            ("x", "d.b"),
        ]) {
            let live = WorkerLiveness::opened(Instance::new(instance).unwrap(), LogTime(seen));
            liveness.workers.insert(name(text), live);
        }
        let walked: Vec<_> = heard(&state, &liveness).map(|(worker, at)| (worker.name.clone(), at)).collect();
        let looked_up: Vec<_> =
            state.index.present.iter().map(|name| (name.clone(), last_heard(&state, &liveness, name))).collect();
        assert_eq!(walked, looked_up);
        let times: Vec<u64> = walked.iter().map(|(_, at)| at.0).collect();
        assert_eq!(times, [101, 50, 50, 103, 50, 50, 60, 105]);
    }
}
