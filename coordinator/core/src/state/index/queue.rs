//! Waiting tasks in queues of equal asks, and for each ask the workers with room for it, most room first.
//!
//! A change of one worker's room costs a logarithm for each ask that is kept, and a placement costs a few. Asks that nobody
//! waits for are kept for a while, because the next build likely has one of them; how many is bounded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helix_model::{BuildSpec, LogTime, Platform, WorkerName};

use crate::record::WorkerRecord;
use crate::state::fit::{Ask, Room};

use super::{Waiting, Workers};

/// Asks without a waiting task that are kept, at most: each costs a little whenever a worker's room changes.
const IDLE_ASKS_MAX: usize = 64;

#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    /// Tasks that may start now, by ask.
    pub(crate) ready: BTreeMap<Arc<Ask>, BTreeSet<Waiting>>,
    /// The first of each queue.
    pub(crate) heads: BTreeMap<Waiting, Arc<Ask>>,
    /// Tasks in their back-off.
    pub(crate) resting: BTreeSet<(LogTime, Waiting)>,
    /// Workers for each ask.
    pub(crate) fits: BTreeMap<Ask, Fit>,
    /// Workers with room, and how much.
    pub(crate) rooms: BTreeMap<WorkerName, Room>,
    /// The sum of all slots in it.
    pub(crate) slots: u64,
}

/// The workers that fit an ask.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Fit {
    /// Those with room for it, most slots first, then by name.
    pub(crate) free: BTreeSet<(Reverse<u32>, WorkerName)>,
    /// How many workers fit, whatever their condition.
    pub(crate) able: usize,
    /// Tasks that wait for it.
    waiting: usize,
}

/// Equal up to asks that are kept although nobody waits for them.
impl PartialEq for Queue {
    fn eq(&self, other: &Self) -> bool {
        let awaited = |queue: &Self| -> Vec<(Ask, Fit)> {
            let fits = queue.fits.iter().filter(|(_, fit)| fit.waiting > 0);
            fits.map(|(ask, fit)| (ask.clone(), fit.clone())).collect()
        };
        self.ready == other.ready
            && self.heads == other.heads
            && self.resting == other.resting
            && self.rooms == other.rooms
            && self.slots == other.slots
            && awaited(self) == awaited(other)
    }
}

impl Queue {
    pub(crate) fn add(
        &mut self,
        waiting: Waiting,
        not_before: LogTime,
        now: LogTime,
        spec: &BuildSpec,
        platform: Option<&Platform>,
        workers: &Workers,
    ) {
        let ask = Ask::of(spec, platform);
        for ask in std::iter::once(ask.clone()).chain(ask.without_own()) {
            self.fit_of(ask, workers).waiting += 1;
        }
        if not_before > now {
            self.resting.insert((not_before, waiting));
        } else {
            self.insert(waiting, ask);
        }
    }

    pub(crate) fn remove(
        &mut self,
        waiting: Waiting,
        not_before: LogTime,
        spec: &BuildSpec,
        platform: Option<&Platform>,
    ) {
        let ask = Ask::of(spec, platform);
        for ask in std::iter::once(ask.clone()).chain(ask.without_own()) {
            let kept = self.fits.len();
            if let Some(fit) = self.fits.get_mut(&ask) {
                fit.waiting = fit.waiting.saturating_sub(1);
                if fit.waiting == 0 && kept > IDLE_ASKS_MAX {
                    self.fits.remove(&ask);
                }
            }
        }
        if !self.resting.remove(&(not_before, waiting)) {
            self.take(waiting, &ask);
        }
    }

    /// Takes out one task whose back-off is over.
    pub(crate) fn pop_rested(&mut self, now: LogTime) -> Option<Waiting> {
        let first = *self.resting.first().filter(|(not_before, _)| *not_before <= now)?;
        self.resting.remove(&first);
        Some(first.1)
    }

    pub(crate) fn insert_ready(&mut self, waiting: Waiting, spec: &BuildSpec, platform: Option<&Platform>) {
        self.insert(waiting, Ask::of(spec, platform));
    }

    fn insert(&mut self, waiting: Waiting, ask: Ask) {
        let ask = match self.ready.get_key_value(&ask) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(ask),
        };
        let queue = self.ready.entry(Arc::clone(&ask)).or_default();
        let head = queue.first().copied();
        queue.insert(waiting);
        if head.is_none_or(|head| waiting < head) {
            if let Some(head) = head {
                self.heads.remove(&head);
            }
            self.heads.insert(waiting, ask);
        }
    }

    fn take(&mut self, waiting: Waiting, ask: &Ask) {
        let Some(queue) = self.ready.get_mut(ask) else { return };
        queue.remove(&waiting);
        let next = queue.first().copied();
        if next.is_none() {
            self.ready.remove(ask);
        }
        if let Some(ask) = self.heads.remove(&waiting)
            && let Some(next) = next
        {
            self.heads.insert(next, ask);
        }
    }

    fn fit_of(&mut self, ask: Ask, workers: &Workers) -> &mut Fit {
        let rooms = &self.rooms;
        self.fits.entry(ask).or_insert_with_key(|ask| {
            let mut fit = Fit::default();
            for worker in workers.values().filter(|worker| ask.fits(worker)) {
                fit.able += 1;
                if let Some(room) = rooms.get(&worker.name).filter(|room| room.fits(&ask.amounts)) {
                    fit.free.insert((Reverse(room.slots), worker.name.clone()));
                }
            }
            fit
        })
    }

    pub(crate) fn learn_worker(&mut self, worker: &WorkerRecord, room: Room) {
        for (ask, fit) in &mut self.fits {
            fit.able += usize::from(ask.fits(worker));
        }
        self.set_room(worker, room);
    }

    pub(crate) fn forget_worker(&mut self, worker: &WorkerRecord) {
        self.set_room(worker, Room::NONE);
        for (ask, fit) in &mut self.fits {
            fit.able -= usize::from(ask.fits(worker));
        }
    }

    /// Takes in how much room the worker has now.
    pub(crate) fn set_room(&mut self, worker: &WorkerRecord, room: Room) {
        let name = &worker.name;
        let before = self.rooms.get(name).copied().unwrap_or(Room::NONE);
        let room = if room.slots == 0 { Room::NONE } else { room };
        if before == room {
            return;
        }
        self.slots = self.slots - u64::from(before.slots) + u64::from(room.slots);
        if room.slots == 0 {
            self.rooms.remove(name);
        } else {
            self.rooms.insert(name.clone(), room);
        }
        for (ask, fit) in &mut self.fits {
            if !ask.need.fits(worker) {
                continue;
            }
            if before.fits(&ask.amounts) {
                fit.free.remove(&(Reverse(before.slots), name.clone()));
            }
            if room.fits(&ask.amounts) {
                fit.free.insert((Reverse(room.slots), name.clone()));
            }
        }
    }
}
