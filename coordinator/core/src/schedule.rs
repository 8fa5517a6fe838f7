//! Which waiting task goes to which worker next. Proposes only; `apply` checks each assignment again.
//!
//! The best waiting task (higher priority, then older) goes to the worker with the most room among those that
//! fit; ties go by name. Assignments under way count as if they were made. A task that ran before goes to another
//! worker, if another fits now. No pass walks all workers or all tasks: queues of equal asks are opened from
//! their heads, and one that nobody fits is closed for the pass. Room that is kept for a task ([`claims`]) is not given
//! to others behind it.

use std::cmp::Reverse;
use std::collections::btree_set::Iter;
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use helix_model::{AttemptKey, AttemptNumber, LogTime, WorkerName};

use crate::command::{AssignTask, Command};
use crate::liveness::{InFlight, Liveness, SessionState};
use crate::record::{BuildRecord, TaskPhase, TaskRecord, WorkerRecord};
use crate::reply::Unfit;
use crate::state::State;
use crate::state::fit::{Ask, Room};
use crate::state::index::Waiting;

mod claim;

pub use claim::claims;

/// At most `max` assignments that the leader should commit now.
#[must_use]
pub fn schedule(state: &State, in_flight: &InFlight, liveness: &Liveness, now: LogTime, max: usize) -> Vec<Command> {
    let mut pass = Pass::new(state, in_flight, liveness);
    let mut commands = Vec::new();
    let mut tasks = Tasks::new(state, now);
    while commands.len() < max && pass.slots > 0 {
        let Some((waiting, ask, queued)) = tasks.pop() else { break };
        let Some((build, task)) = lookup(state, waiting) else { continue };
        let under_way = in_flight.assigning.contains_key(&(build.id.clone(), waiting.task));
        if !under_way {
            let Some(worker) = pass.place(waiting, &ask, task) else {
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
    /// What is left of workers that were given something, in this pass or by what is under way.
    touched: BTreeMap<WorkerName, Room>,
    asks: BTreeMap<Ask, Candidates<'a>>,
    /// Claims of tasks that still wait.
    claims: BTreeMap<&'a WorkerName, Waiting>,
    slots: u64,
}

/// The workers for one ask, most room first, in two parts.
struct Candidates<'a> {
    /// Workers whose room is as state says. What was skipped here is of no use for the whole pass.
    untouched: Peekable<Iter<'a, (Reverse<u32>, WorkerName)>>,
    /// Workers that were given something meanwhile, and still have room.
    touched: BTreeSet<(Reverse<u32>, WorkerName)>,
}

impl<'a> Pass<'a> {
    fn new(state: &'a State, in_flight: &InFlight, liveness: &'a Liveness) -> Self {
        let mut touched: BTreeMap<WorkerName, Room> = BTreeMap::new();
        for ((build, _), worker) in &in_flight.assigning {
            let Some(room) = state.index.queue.rooms.get(worker) else { continue };
            let amounts = state.open.get(build).map(|build| build.spec.resources).unwrap_or_default();
            let room = touched.entry(worker.clone()).or_insert(*room);
            *room = room.without(&amounts);
        }
        let claims = liveness.claims.iter().filter(|(_, claim)| waits(state, claim.place()));
        let claims = claims.map(|(worker, claim)| (worker, claim.place())).collect();
        // Assignments under way to workers without room are counted too: a few may be left for the next pass.
        let slots = state.index.queue.slots.saturating_sub(in_flight.assigning.len() as u64);
        Self { state, liveness, touched, asks: BTreeMap::new(), claims, slots }
    }

    /// The worker for a task, its room taken; `None` if nobody fits now.
    fn place(&mut self, waiting: Waiting, ask: &Ask, task: &TaskRecord) -> Option<&'a WorkerRecord> {
        let ask = effective(self.state, ask);
        let last = task.attempts.last().map(|attempt| &attempt.worker);
        let elsewhere = self.best(waiting, &ask, last);
        let worker = elsewhere.or_else(|| last.and_then(|_| self.best(waiting, &ask, None)))?;
        self.take(worker, &ask);
        Some(worker)
    }

    fn best(&mut self, waiting: Waiting, ask: &Ask, but: Option<&WorkerName>) -> Option<&'a WorkerRecord> {
        if !self.asks.contains_key(ask) {
            let candidates = self.candidates(ask)?;
            self.asks.insert(ask.clone(), candidates);
        }
        let (state, liveness, touched, claims) = (self.state, self.liveness, &self.touched, &self.claims);
        let usable = |name: &WorkerName| {
            let claimed = claims.get(name).is_some_and(|claim| *claim < waiting);
            but != Some(name) && !claimed
        };
        let stale = |name: &WorkerName| {
            touched.contains_key(name) || !state.workers.get(name).is_some_and(|worker| is_able(liveness, worker))
        };
        let candidates = self.asks.get_mut(ask)?;
        while candidates.untouched.next_if(|(_, name)| stale(name)).is_some() {}
        let first = candidates.untouched.clone().find(|(_, name)| !stale(name) && usable(name));
        let second = candidates.touched.iter().find(|(_, name)| usable(name));
        let (_, name) = [first, second].into_iter().flatten().min()?;
        state.workers.get(name).map(|worker| &**worker)
    }

    fn candidates(&self, ask: &Ask) -> Option<Candidates<'a>> {
        let untouched = self.state.index.queue.fits.get(ask)?.free.iter().peekable();
        let touched = self.touched.iter().filter_map(|(name, room)| {
            let worker = self.state.workers.get(name)?;
            let fits = room.fits(&ask.amounts) && ask.need.unfit(worker).is_none() && is_able(self.liveness, worker);
            fits.then(|| (Reverse(room.slots), name.clone()))
        });
        Some(Candidates { untouched, touched: touched.collect() })
    }

    fn take(&mut self, worker: &WorkerRecord, taken: &Ask) {
        let name = &worker.name;
        let Some(full) = self.state.index.queue.rooms.get(name) else { return };
        let before = self.touched.get(name).unwrap_or(full);
        let (slots, after) = (before.slots, before.without(&taken.amounts));
        self.touched.insert(name.clone(), after);
        self.slots = self.slots.saturating_sub(1);
        for (ask, candidates) in &mut self.asks {
            candidates.touched.remove(&(Reverse(slots), name.clone()));
            if after.fits(&ask.amounts) && ask.need.unfit(worker).is_none() {
                candidates.touched.insert((Reverse(after.slots), name.clone()));
            }
        }
    }
}

/// A build without a command goes where a worker has its own, if any has; else anywhere, to fail there as `no_command`.
fn effective(state: &State, ask: &Ask) -> Ask {
    let able = state.index.queue.fits.get(ask).map_or(0, |fit| fit.able);
    match ask.without_own() {
        Some(any) if able == 0 => any,
        Some(_) | None => ask.clone(),
    }
}

fn waits(state: &State, waiting: Waiting) -> bool {
    lookup(state, waiting).is_some_and(|(_, task)| matches!(task.phase, TaskPhase::Waiting { .. }))
}
