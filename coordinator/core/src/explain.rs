//! Why a build waits, in facts: its place in the queue, its back-off, and a verdict for each worker. Also the
//! check at submit whether any worker could ever run it.
//!
//! For people, not for decisions: it walks workers and, up to a limit, the queue.

use helix_model::{BuildId, BuildSpec, BuildState, LogTime, Platform, TaskIndex, WorkerName};

use crate::liveness::Liveness;
use crate::record::{BuildRecord, TaskPhase, TaskRecord};
use crate::reply::Unfit;
use crate::schedule::unable;
use crate::state::fit::{Ask, unready};
use crate::state::index::Waiting;
use crate::state::{Known, State};

/// Tasks ahead are counted up to here.
const AHEAD_MAX: u64 = 10_000;

/// Why a build is where it is.
#[derive(Clone, PartialEq, Debug)]
pub struct Explanation {
    /// The build.
    pub build: BuildId,
    /// Its state; `None` for a build that is not known.
    pub state: Option<BuildState>,
    /// One for each task of a build that has not ended.
    pub tasks: Vec<TaskExplanation>,
    /// All of it in a sentence or two.
    pub words: String,
}

/// Why a task is where it is.
#[derive(Clone, PartialEq, Debug)]
pub struct TaskExplanation {
    /// Its place among the platforms.
    pub task: TaskIndex,
    /// `None` means any.
    pub platform: Option<Platform>,
    /// Where it stands.
    pub phase: TaskPhase,
    /// Who runs or last ran it.
    pub worker: Option<WorkerName>,
    /// How many waiting tasks go first; `None` unless it waits. At most 10,000 are counted.
    pub ahead: Option<u64>,
    /// The end of its back-off, if that is not over.
    pub not_before: Option<LogTime>,
    /// For each worker what stands in the way, `None` if nothing does; empty unless the task waits.
    pub verdicts: Vec<(WorkerName, Option<Unfit>)>,
    /// All of it in a sentence.
    pub words: String,
}

/// Why `build` waits, or where it runs, or how it ended.
#[must_use]
pub fn explain(state: &State, liveness: &Liveness, build: &BuildId, now: LogTime) -> Explanation {
    let known = state.build(build);
    let (build_state, tasks, words) = match known {
        None => (None, Vec::new(), "no such build".to_owned()),
        Some(Known::Purged(tombstone)) => {
            (Some(tombstone.state), Vec::new(), format!("it ended as {}, and was purged", tombstone.state))
        }
        Some(Known::Finished(finished)) => {
            (Some(finished.state), Vec::new(), format!("it has ended: {}", finished.state))
        }
        Some(Known::Open(record)) => {
            let tasks =
                record.indexed_tasks().map(|(index, task)| explain_task(state, liveness, record, index, task, now));
            let tasks: Vec<_> = tasks.collect();
            let words = tasks.iter().map(|task| task.words.as_str()).collect::<Vec<_>>().join("; ");
            (Some(record.state), tasks, words)
        }
    };
    Explanation { build: build.clone(), state: build_state, tasks, words }
}

/// Whether some worker, given time, could run every task of `spec`. Load, liveness and drains do not count, and with
/// no worker registered nothing is known against it.
///
/// # Errors
/// Each worker and what of its kind stands in the way, for the first task that none could ever run.
pub fn could_ever_run(state: &State, spec: &BuildSpec) -> Result<(), Vec<(WorkerName, Unfit)>> {
    let any = [None];
    let named: Vec<Option<&Platform>> = spec.platforms.iter().map(Some).collect();
    for platform in if named.is_empty() { &any[..] } else { &named[..] } {
        let ask = Ask::of(spec, *platform);
        let mut against = Vec::new();
        for worker in state.workers() {
            match ask.unfit_leniently(worker) {
                None => break,
                Some(unfit) => against.push((worker.name.clone(), unfit)),
            }
        }
        if !against.is_empty() && against.len() == state.workers().count() {
            return Err(against);
        }
    }
    Ok(())
}

fn explain_task(
    state: &State,
    liveness: &Liveness,
    build: &BuildRecord,
    index: TaskIndex,
    task: &TaskRecord,
    now: LogTime,
) -> TaskExplanation {
    let worker = task.attempts.last().map(|attempt| attempt.worker.clone());
    let mut explanation = TaskExplanation {
        task: index,
        platform: task.platform.clone(),
        phase: task.phase.clone(),
        worker,
        ahead: None,
        not_before: None,
        verdicts: Vec::new(),
        words: String::new(),
    };
    let whose = task.platform.as_ref().map_or_else(String::new, |platform| format!("{platform}: "));
    let words = match &task.phase {
        TaskPhase::Running => {
            let name = explanation.worker.as_ref().map_or("", |name| name.as_str());
            let stop = task.running().and_then(|attempt| attempt.stop.as_ref());
            let stop = stop.map_or_else(String::new, |stop| format!(", asked to stop ({})", stop.reason));
            format!("runs on {name}{stop}")
        }
        TaskPhase::Ended { state, reason: None, .. } => format!("has ended: {state}"),
        TaskPhase::Ended { state, reason: Some(reason), .. } => format!("has ended: {state} ({reason})"),
        TaskPhase::Waiting { not_before } => {
            let ask = Ask::of(&build.spec, task.platform.as_ref());
            explanation.not_before = (*not_before > now).then_some(*not_before);
            explanation.ahead = Some(ahead(state, Waiting::of(build, index)));
            let place = Waiting::of(build, index);
            explanation.verdicts = verdicts(state, liveness, &ask, place);
            let kept = liveness.claims.iter().find(|(_, claim)| claim.place() == place);
            let kept = kept.map_or_else(String::new, |(worker, _)| format!("; {worker} is kept free for it"));
            format!("{}{kept}", waiting_words(&explanation, task))
        }
    };
    explanation.words = format!("{whose}{words}");
    explanation
}

fn ahead(state: &State, waiting: Waiting) -> u64 {
    let queues = state.index.queue.ready.values();
    let first = queues.flat_map(|queue| queue.range(..waiting)).take(AHEAD_MAX as usize);
    first.count() as u64
}

fn verdicts(state: &State, liveness: &Liveness, ask: &Ask, place: Waiting) -> Vec<(WorkerName, Option<Unfit>)> {
    let own_somewhere = state.workers().any(|worker| ask.unfit(worker).is_none());
    let verdict = |worker: &std::sync::Arc<crate::record::WorkerRecord>| {
        let kind = if own_somewhere { ask.unfit(worker) } else { ask.unfit_leniently(worker) };
        let ready = || unready(worker, state.load_of(&worker.name));
        let short = || ask.short(worker, &state.used_of(&worker.name));
        let claimed = || {
            let claim = liveness.claims.get(&worker.name).filter(|claim| claim.place() < place)?;
            let build = state.index.by_sequence.get(&claim.sequence)?;
            Some(Unfit::Claimed { build: build.clone() })
        };
        let now = ready().or_else(short).or_else(|| unable(liveness, worker)).or_else(claimed);
        (worker.name.clone(), kind.or(now))
    };
    state.workers().map(verdict).collect()
}

fn waiting_words(task: &TaskExplanation, record: &TaskRecord) -> String {
    if task.not_before.is_some() {
        return format!("waits for a pause to end{}", after_words(record));
    }
    let ahead = task.ahead.unwrap_or(0);
    let fits = task.verdicts.iter().filter(|(_, unfit)| unfit.is_none()).count();
    let is_full =
        |unfit: &Option<Unfit>| matches!(unfit, Some(Unfit::Full { .. } | Unfit::Short { .. } | Unfit::Claimed { .. }));
    let full = task.verdicts.iter().filter(|(_, unfit)| is_full(unfit)).count();
    let total = task.verdicts.len();
    if total == 0 {
        "waits: no worker is registered".to_owned()
    } else if fits > 0 {
        format!("waits for its turn: {ahead} ahead, {fits} of {total} workers could take it now")
    } else if full > 0 {
        format!("waits for room: {ahead} ahead, {full} of {total} workers fit and are full")
    } else {
        format!("waits: none of {total} workers can take it")
    }
}

/// How the last attempt ended; empty where there was none.
fn after_words(record: &TaskRecord) -> String {
    let Some(last) = record.attempts.last() else { return String::new() };
    let end = last.end.as_ref();
    let reason = end.and_then(|end| end.reason).map_or_else(String::new, |reason| format!(" as {reason}"));
    let message =
        end.filter(|end| !end.message.is_empty()).map_or_else(String::new, |end| format!(": {}", end.message));
    format!(" after attempt {} on {} ended{reason}{message}", last.number, last.worker)
}
