//! From rows to a state, and back to rows.
//!
//! Rows may come in any order: what refers to other rows is put together at the end. A row that contradicts
//! itself is an error with a name, because a registry that is not what the log made must not be served.

use std::fmt;
use std::sync::Arc;

use helix_model::{AttemptKey, BuildId, WorkerName};

use crate::record::{Addendum, BuildRecord, FinishedBuild, Row, TaskPhase};

use super::State;

/// Why rows do not make a registry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LoadError {
    /// Two rows share a key, or a build is both kept and buried.
    Twice(String),
    /// A fact about a build that is not among the finished ones.
    AddendumAstray(AttemptKey),
    /// The build's row contradicts itself.
    BuildBroken {
        /// The build.
        build: BuildId,
        /// What does not fit.
        why: &'static str,
    },
    /// An attempt runs on a worker that has no row.
    WorkerMissing {
        /// The attempt.
        key: AttemptKey,
        /// The worker.
        worker: WorkerName,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Twice(what) => write!(f, "row {what} exists twice"),
            Self::AddendumAstray(key) => write!(f, "an addendum for {key}, whose build is not a finished one"),
            Self::BuildBroken { build, why } => write!(f, "build {build}: {why}"),
            Self::WorkerMissing { key, worker } => write!(f, "attempt {key} runs on {worker}, which has no row"),
        }
    }
}

impl std::error::Error for LoadError {}

impl State {
    /// Puts a registry together from all its rows, in any order.
    ///
    /// # Errors
    /// [`LoadError`] when the rows contradict each other.
    pub fn load(rows: impl IntoIterator<Item = Row>) -> Result<Self, LoadError> {
        let mut state = Self::default();
        let mut open: Vec<Arc<BuildRecord>> = Vec::new();
        let mut addenda = Vec::new();
        for row in rows {
            match row {
                Row::Counters(counters) => state.counters = counters,
                Row::Policy(policy) => state.replace_policy(policy),
                Row::Node(node) => {
                    let id = node.id;
                    unique(state.nodes.insert(id, node), "node", id)?;
                }
                Row::Worker(worker) => {
                    unique(state.workers.get(&worker.name), "worker", &worker.name)?;
                    state.insert_worker(worker);
                }
                Row::Build(build) => {
                    check_build(&build)?;
                    unique(state.finished.get(&build.id), "build", &build.id)?;
                    if build.state.is_terminal() {
                        state.put_finished(build.id.clone(), FinishedBuild::of(&build));
                    } else {
                        open.push(build);
                    }
                }
                Row::Addendum(key, addendum) => addenda.push((key, addendum)),
                Row::Tombstone(tombstone) => {
                    unique(state.tombstones.get(&tombstone.id), "tombstone", &tombstone.id)?;
                    state.insert_tombstone(tombstone);
                }
            }
        }
        for build in open {
            state.load_open(build)?;
        }
        for (key, addendum) in addenda {
            state.load_addendum(&key, &addendum)?;
        }
        if let Some(id) = state.tombstones.keys().find(|id| state.finished.contains_key(*id)) {
            return Err(LoadError::Twice(format!("build {id}")));
        }
        Ok(state)
    }

    /// Every row that memory holds whole; finished builds' records and addenda are in the store alone.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        std::iter::once(Row::Counters(self.counters.clone()))
            .chain(std::iter::once(Row::Policy(self.policy.clone())))
            .chain(self.nodes.values().cloned().map(Row::Node))
            .chain(self.workers.values().cloned().map(Row::Worker))
            .chain(self.open.values().cloned().map(Row::Build))
            .chain(self.tombstones.values().cloned().map(Row::Tombstone))
    }

    fn load_open(&mut self, build: Arc<BuildRecord>) -> Result<(), LoadError> {
        let known = self.open.contains_key(&build.id)
            || self.finished.contains_key(&build.id)
            || self.tombstones.contains_key(&build.id);
        unique(known.then_some(()), "build", &build.id)?;
        for (index, task) in build.indexed_tasks() {
            if let Some(attempt) = task.running()
                && !self.workers.contains_key(&attempt.worker)
            {
                let key = build.attempt_key(index, attempt.number);
                return Err(LoadError::WorkerMissing { key, worker: attempt.worker.clone() });
            }
        }
        self.insert_open(build);
        Ok(())
    }

    fn load_addendum(&mut self, key: &AttemptKey, addendum: &Addendum) -> Result<(), LoadError> {
        let Some(mut finished) = self.finished.get(&key.build).cloned() else {
            return Err(LoadError::AddendumAstray(key.clone()));
        };
        finished.add(key, addendum);
        self.put_finished(key.build.clone(), finished);
        Ok(())
    }
}

fn unique<T>(before: Option<T>, what: &str, key: impl fmt::Display) -> Result<(), LoadError> {
    match before {
        None => Ok(()),
        Some(_) => Err(LoadError::Twice(format!("{what} {key}"))),
    }
}

/// What a build's row must be for anything else here to make sense.
pub(crate) fn check_build(build: &BuildRecord) -> Result<(), LoadError> {
    let broken = |why| Err(LoadError::BuildBroken { build: build.id.clone(), why });
    if build.tasks.is_empty() || build.tasks.len() > helix_model::limits::TASKS_PER_BUILD_MAX {
        return broken("has no tasks, or too many");
    }
    if build.state.is_terminal() != build.completed_at.is_some() {
        return broken("a terminal state and an end go together");
    }
    if build.state.is_terminal() != build.tasks.iter().all(|task| matches!(task.phase, TaskPhase::Ended { .. })) {
        return broken("a build is terminal exactly when all its tasks ended");
    }
    for task in &build.tasks {
        let ended = task.attempts.iter().filter(|attempt| attempt.end.is_some()).count();
        let running = matches!(task.phase, TaskPhase::Running);
        if task.attempts.is_empty() && running {
            return broken("a task runs without an attempt");
        }
        let expected = task.attempts.len() - usize::from(running);
        if ended != expected || task.running().is_some_and(|attempt| attempt.end.is_some()) {
            return broken("exactly the last attempt of a running task has no end");
        }
        let numbers = task.attempts.iter().map(|attempt| attempt.number.0);
        if !numbers.eq(1..=u32::try_from(task.attempts.len()).unwrap_or(u32::MAX)) {
            return broken("attempts are numbered from 1 without gaps");
        }
    }
    Ok(())
}
