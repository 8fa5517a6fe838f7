//! Which waiting task goes to which worker next. Proposes only; `apply` checks each assignment again.
//!
//! The best waiting task (higher priority, then older) goes to the worker with the most room among those that
//! fit; ties go by name. Assignments under way count as if they were made. A task that ran before goes to another
//! worker, if another fits now. No pass walks all workers or all tasks: queues of equal asks are opened from
//! their heads, and one that nobody fits is closed for the pass.

use std::cmp::Reverse;
use std::collections::btree_set::Iter;
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use helix_model::{AttemptKey, AttemptNumber, LogTime, WorkerName};

use crate::command::{AssignTask, Command};
use crate::liveness::{InFlight, Liveness, SessionState};
use crate::record::{BuildRecord, TaskRecord, WorkerRecord};
use crate::reply::Unfit;
use crate::state::State;
use crate::state::fit::{Ask, Need};
use crate::state::index::Waiting;

/// At most `max` assignments that the leader should commit now.
#[must_use]
pub fn schedule(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime, max: usize) -> Vec<Command> {
    let mut pass = Pass::new(state, in_flight, liveness);
    let mut commands = Vec::new();
    let mut tasks = Tasks::new(state, now);
    while commands.len() < max && pass.room > 0 {
        let Some((waiting, ask, queued)) = tasks.pop() else { break };
        let Some((build, task)) = lookup(state, waiting) else { continue };
        let under_way = in_flight.assigning.contains_key(&(build.id.clone(), waiting.task));
        if !under_way {
            let Some(worker) = pass.place(&ask, task) else {
                tasks.close(&ask);
                continue;
            };
            let attempt = AttemptNumber(task.attempts.last().map_or(0, |attempt| attempt.number.0) + 1);
            let key = AttemptKey { build: build.id.clone(), task: waiting.task, attempt };
            let (worker, instance) = (worker.name.clone(), worker.instance.clone());
            commands.push(Command::AssignTask(AssignTask { key, worker, instance }));
        }
        if queued == Origin::Queue {
            tasks.open_next(waiting, ask);
        }
    }
    commands
}

/// What of a worker's liveness stands in the way of new work. Sessions belong to a life of the worker, so another life's
/// does not count; and an agent whose host is short of something says so with its heartbeats.
pub(crate) fn unable(liveness: &Liveness, worker: &WorkerRecord) -> Option<Unfit> {
    let live = liveness.workers.get(&worker.name);
    let live = live.filter(|live| live.session == SessionState::Open && live.instance == worker.instance);
    match live {
        None => Some(Unfit::Unhealthy),
        Some(live) if !live.pressure.is_empty() => Some(Unfit::Pressure(live.pressure.clone())),
        Some(_) => None,
    }
}

fn is_able(liveness: &Liveness, worker: &WorkerRecord) -> bool {
    unable(liveness, worker).is_none()
}

fn lookup(state: &State, waiting: Waiting) -> Option<(&Arc<BuildRecord>, &TaskRecord)> {
    let build = state.open.get(state.index.by_sequence.get(&waiting.sequence)?)?;
    Some((build, build.task(waiting.task)?))
}

/// Where a task came from: behind one from a queue stands the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Queue,
    Rested,
}

/// All waiting tasks in order, without touching more of them than are taken.
struct Tasks<'a> {
    state: &'a State,
    heads: Peekable<std::collections::btree_map::Iter<'a, Waiting, Arc<Ask>>>,
    opened: BTreeMap<Waiting, (Arc<Ask>, Origin)>,
    closed: BTreeSet<Arc<Ask>>,
}

impl<'a> Tasks<'a> {
    fn new(state: &'a State, now: LogTime) -> Self {
        // Back-offs that ended since log time last moved: few.
        let rested = state.index.queue.resting.iter().take_while(|(not_before, _)| *not_before <= now);
        let opened = rested.filter_map(|(_, waiting)| {
            let (build, task) = lookup(state, *waiting)?;
            let ask = Arc::new(Ask::of(&build.spec, task.platform.as_ref()));
            Some((*waiting, (ask, Origin::Rested)))
        });
        let opened = opened.collect();
        Self { state, heads: state.index.queue.heads.iter().peekable(), opened, closed: BTreeSet::new() }
    }

    fn pop(&mut self) -> Option<(Waiting, Arc<Ask>, Origin)> {
        loop {
            let head = self.heads.peek().map(|(waiting, _)| **waiting);
            let opened = self.opened.first_key_value().map(|(waiting, _)| *waiting);
            let (waiting, ask, origin) = match (head, opened) {
                (None, None) => return None,
                (Some(head), opened) if opened.is_none_or(|opened| head < opened) => {
                    let (waiting, ask) = self.heads.next()?;
                    (*waiting, Arc::clone(ask), Origin::Queue)
                }
                (_, _) => {
                    let (waiting, (ask, origin)) = self.opened.pop_first()?;
                    (waiting, ask, origin)
                }
            };
            if !self.closed.contains(&ask) {
                return Some((waiting, ask, origin));
            }
        }
    }

    fn close(&mut self, ask: &Arc<Ask>) {
        self.closed.insert(Arc::clone(ask));
    }

    fn open_next(&mut self, after: Waiting, ask: Arc<Ask>) {
        let queue = self.state.index.queue.ready.get(&ask);
        let next = queue.and_then(|queue| queue.range((Excluded(after), Unbounded)).next());
        if let Some(next) = next {
            self.opened.insert(*next, (ask, Origin::Queue));
        }
    }
}

/// Workers' room as one pass sees it: what state says, less what is under way.
struct Pass<'a> {
    state: &'a State,
    liveness: &'a Liveness,
    taken: BTreeMap<WorkerName, u32>,
    needs: BTreeMap<Need, Candidates<'a>>,
    room: u64,
}

/// The workers for one need, most room first, in two parts.
struct Candidates<'a> {
    /// Workers whose room is as state says. What was skipped here is of no use for the whole pass.
    untouched: Peekable<Iter<'a, (Reverse<u32>, WorkerName)>>,
    /// Workers that were given something meanwhile.
    touched: BTreeSet<(Reverse<u32>, WorkerName)>,
}

impl<'a> Pass<'a> {
    fn new(state: &'a State, in_flight: &InFlight, liveness: &'a Liveness) -> Self {
        let mut taken: BTreeMap<WorkerName, u32> = BTreeMap::new();
        for worker in in_flight.assigning.values() {
            *taken.entry(worker.clone()).or_default() += 1;
        }
        let spent: u64 = taken.values().map(|count| u64::from(*count)).sum();
        let room = state.index.queue.room.saturating_sub(spent);
        // Assignments under way to workers without room were counted too: a few may be left for the next pass.
        Self { state, liveness, taken, needs: BTreeMap::new(), room }
    }

    /// The worker for a task, its room taken; `None` if nobody fits now.
    fn place(&mut self, ask: &Ask, task: &TaskRecord) -> Option<&'a WorkerRecord> {
        let need = self.effective_need(&ask.need);
        let last = task.attempts.last().map(|attempt| &attempt.worker);
        let (room, worker) = self.best(&need, ask, last).or_else(|| last.and_then(|_| self.best(&need, ask, None)))?;
        self.take(&worker.name, room);
        Some(worker)
    }

    /// A build without a command goes where a worker has its own, if any has; else anywhere, to fail there as `no_command`.
    fn effective_need(&self, need: &Need) -> Need {
        let able = |need: &Need| self.state.index.queue.fits.get(need).map_or(0, |fit| fit.able);
        match need.without_own() {
            Some(any) if able(need) == 0 => any,
            Some(_) | None => need.clone(),
        }
    }

    fn best(&mut self, need: &Need, ask: &Ask, but: Option<&WorkerName>) -> Option<(u32, &'a WorkerRecord)> {
        let (state, liveness, taken) = (self.state, self.liveness, &self.taken);
        let usable = |name: &WorkerName| {
            let worker = &**state.workers.get(name)?;
            (but != Some(name) && ask.unfit_resources(worker).is_none()).then_some(worker)
        };
        if !self.needs.contains_key(need) {
            let candidates = Candidates::new(state, liveness, need, taken)?;
            self.needs.insert(need.clone(), candidates);
        }
        let candidates = self.needs.get_mut(need)?;
        let stale = |name: &WorkerName| {
            taken.contains_key(name) || !state.workers.get(name).is_some_and(|worker| is_able(liveness, worker))
        };
        while candidates.untouched.next_if(|(_, name)| stale(name)).is_some() {}
        let mut untouched = candidates.untouched.clone();
        let first = untouched.find_map(|(room, name)| {
            let worker = if stale(name) { None } else { usable(name) };
            worker.map(|worker| (*room, worker))
        });
        let second = candidates.touched.iter().find_map(|(room, name)| Some((*room, usable(name)?)));
        let best = match (first, second) {
            (Some(first), Some(second)) => {
                if (first.0, &first.1.name) < (second.0, &second.1.name) {
                    first
                } else {
                    second
                }
            }
            (first, second) => first.or(second)?,
        };
        Some((best.0.0, best.1))
    }

    fn take(&mut self, name: &WorkerName, room: u32) {
        *self.taken.entry(name.clone()).or_default() += 1;
        self.room = self.room.saturating_sub(1);
        let worker = self.state.workers.get(name);
        for (need, candidates) in &mut self.needs {
            candidates.touched.remove(&(Reverse(room), name.clone()));
            if room > 1 && worker.is_some_and(|worker| need.unfit(worker).is_none()) {
                candidates.touched.insert((Reverse(room - 1), name.clone()));
            }
        }
    }
}

impl<'a> Candidates<'a> {
    fn new(state: &'a State, liveness: &Liveness, need: &Need, taken: &BTreeMap<WorkerName, u32>) -> Option<Self> {
        let queue = &state.index.queue;
        let untouched = queue.fits.get(need)?.free.iter().peekable();
        let touched = taken.iter().filter_map(|(name, taken)| {
            let room = queue.rooms.get(name)?.saturating_sub(*taken);
            let worker = state.workers.get(name)?;
            let fits = room > 0 && need.unfit(worker).is_none() && is_able(liveness, worker);
            fits.then(|| (Reverse(room), name.clone()))
        });
        Some(Self { untouched, touched: touched.collect() })
    }
}
