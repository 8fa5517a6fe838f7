//! Why a build waits or where it runs, on the wire; and, for a submit that is refused, which worker came nearest.
//!
//! The facts are the core's; here they become words.

use helix_core::Unfit;
use helix_core::explain::{Explanation, TaskExplanation};
use helix_core::record::{AttemptRecord, BuildRecord, TaskPhase, TaskRecord};
use helix_model::{BuildState, WorkerName};
use helix_proto::v1;

use super::view;
use crate::rpc::answer::unfit_text;

/// Workers named when none could ever run a build.
const WORKERS_SHOWN: usize = 5;

/// The tasks of a build that has ended: where each ran, and how it ended.
pub(super) fn of_ended(record: &BuildRecord) -> Vec<v1::TaskExplanation> {
    let tasks = record.tasks.iter().map(|task| {
        let state = view::task_state(task);
        let last = task.attempts.last();
        let place = last.map_or_else(|| "never ran".to_owned(), |last| format!("ran on {}", last.worker));
        let reason = match &task.phase {
            TaskPhase::Ended { reason: Some(reason), .. } => format!(" ({reason})"),
            TaskPhase::Ended { reason: None, .. } | TaskPhase::Waiting { .. } | TaskPhase::Running => String::new(),
        };
        v1::TaskExplanation {
            platform: view::platform_of(task),
            state: state.as_str().to_owned(),
            summary: format!("{state}{reason}; {place}, {}{}{}", attempts(task), ends(task), unseen(task)),
            ..v1::TaskExplanation::default()
        }
    });
    tasks.collect()
}

fn attempts(task: &TaskRecord) -> String {
    match task.attempts.len() {
        1 => "1 attempt".to_owned(),
        count => format!("{count} attempts"),
    }
}

/// How attempts of a task that did not go well ended, in the words of their agents.
fn ends(task: &TaskRecord) -> String {
    let several = task.attempts.len() > 1;
    let text = |attempt: &AttemptRecord| {
        let end = attempt.end.as_ref()?;
        let reason = end.reason?;
        Some(match (several, end.message.as_str()) {
            (false, "") => String::new(),
            (false, message) => format!("; {message}"),
            (true, "") => format!("; attempt {} on {}: {reason}", attempt.number, attempt.worker),
            (true, message) => format!("; attempt {} on {}: {reason}: {message}", attempt.number, attempt.worker),
        })
    };
    task.attempts.iter().filter_map(text).collect()
}

/// Which attempts of a task were not seen dead; empty when all were.
fn unseen(task: &TaskRecord) -> String {
    let ended = |attempt: &&AttemptRecord| attempt.end.as_ref().is_some_and(|end| !end.verified);
    let unseen: Vec<String> = task
        .attempts
        .iter()
        .filter(ended)
        .map(|attempt| format!("attempt {} on {}", attempt.number, attempt.worker))
        .collect();
    if unseen.is_empty() {
        return String::new();
    }
    format!("; not seen dead, so that a process of it may still run: {}", unseen.join(", "))
}

/// The tasks of a build that has not.
pub(super) fn of_open(explanation: Explanation) -> Vec<v1::TaskExplanation> {
    explanation.tasks.into_iter().map(task_of).collect()
}

fn task_of(task: TaskExplanation) -> v1::TaskExplanation {
    let state = match &task.phase {
        TaskPhase::Waiting { .. } => BuildState::Queued,
        TaskPhase::Running => BuildState::Running,
        TaskPhase::Ended { state, .. } => *state,
    };
    let summary = format!("{}{}", task.words, nearest_text(&task.verdicts));
    let verdicts = task.verdicts.into_iter().map(|(worker, unfit)| v1::WorkerVerdict {
        worker: worker.to_string(),
        fits: unfit.is_none(),
        why: unfit.as_ref().map_or_else(String::new, unfit_text),
    });
    v1::TaskExplanation {
        platform: task.platform.map_or_else(String::new, |platform| platform.to_string()),
        state: state.as_str().to_owned(),
        summary,
        ahead: task.ahead.unwrap_or(0),
        not_before_ms: task.not_before.map_or(0, view::unix_ms),
        verdicts: verdicts.collect(),
    }
}

/// What stands in the way at the workers that come nearest to taking a task now; empty where one could.
fn nearest_text(verdicts: &[(WorkerName, Option<Unfit>)]) -> String {
    let against: Option<Vec<_>> = verdicts.iter().map(|(name, unfit)| Some((name, unfit.as_ref()?))).collect();
    let mut against = against.unwrap_or_default();
    against.sort_by_key(|(name, unfit)| (distance(unfit), *name));
    let shown = against.iter().take(WORKERS_SHOWN).map(|(name, unfit)| format!("; {name} {}", unfit_text(unfit)));
    let shown: String = shown.collect();
    match against.len().saturating_sub(WORKERS_SHOWN) {
        0 => shown,
        rest => format!("{shown}; and {rest} more"),
    }
}

/// Why no worker could ever run a spec, the nearest first.
pub(super) fn unsatisfiable_text(mut against: Vec<(WorkerName, Unfit)>) -> String {
    against.sort_by(|a, b| distance(&a.1).cmp(&distance(&b.1)).then_with(|| a.0.cmp(&b.0)));
    let shown = against.iter().take(WORKERS_SHOWN).map(|(name, unfit)| format!("{name} {}", unfit_text(unfit)));
    let shown: Vec<_> = shown.collect();
    let more = match against.len().saturating_sub(WORKERS_SHOWN) {
        0 => String::new(),
        rest => format!("; and {rest} more"),
    };
    format!(
        "no worker could ever run this: {}{more}; change the spec, or set park to wait for one that can",
        shown.join("; ")
    )
}

/// How far a worker of this kind is from fitting: what an operator changes most easily comes first.
fn distance(unfit: &Unfit) -> (u8, u64) {
    let kind = match unfit {
        Unfit::Unhealthy
        | Unfit::Lost
        | Unfit::Detached
        | Unfit::Draining
        | Unfit::Held
        | Unfit::Quarantined { .. }
        | Unfit::Probing
        | Unfit::Pressure(_)
        | Unfit::Short { .. }
        | Unfit::Claimed { .. }
        | Unfit::Full { .. } => 0,
        Unfit::Resources { asked, has, .. } => {
            // Among those that have too little, the one that has most of what is asked.
            let lack = u128::from(asked.saturating_sub(*has)) * 1_000 / u128::from(*asked).max(1);
            return (1, u64::try_from(lack).unwrap_or(u64::MAX));
        }
        Unfit::Command => 2,
        Unfit::Secret(_) | Unfit::Label { .. } => 3,
        Unfit::Executor { .. } => 4,
        Unfit::Platform { .. } => 5,
    };
    (kind, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_worker_is_named_first() {
        let name = |text: &str| WorkerName::new(text).unwrap();
        let platform = || Unfit::Platform { asked: "a/b".to_owned(), has: "c/d".to_owned() };
        let label = Unfit::Label { asked: "gpu=yes".to_owned(), has: None };
        let mut against = vec![(name("a"), platform()), (name("b"), label)];
        against.extend((0..9).map(|number| (name(&format!("c{number}")), platform())));
        let text = unsatisfiable_text(against);
        let begins =
            "no worker could ever run this: b lacks the label gpu=yes; a does not build for a/b, but for c/d; ";
        assert!(text.starts_with(begins), "{text}");
        assert!(text.contains("and 6 more; ") && text.contains("park"), "{text}");
    }
}
