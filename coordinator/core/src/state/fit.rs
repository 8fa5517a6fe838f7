//! Which worker may have which task: the one place where platform, labels, executor, command and resources
//! are compared. `apply`, the scheduler, the refusal at submit and `explain` all ask here.

use std::collections::BTreeMap;

use helix_model::{BuildSpec, Executor, LogTime, Platform, Resources};

use crate::record::{Standing, Trust, WorkerRecord};
use crate::reply::Unfit;

/// What a task asks of a worker's kind. Tasks with equal needs wait for the same workers.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Need {
    /// `None` means any.
    pub platform: Option<Platform>,
    /// Labels the worker must carry.
    pub requires: BTreeMap<String, String>,
    /// What must run it.
    pub executor: Executor,
    /// Whose command is run.
    pub command: CommandNeed,
}

/// Whose command a task runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum CommandNeed {
    /// None: podman has its Dockerfile. Also what is left of [`Self::Own`] where no worker has a command: the
    /// build then runs anywhere and fails as `no_command`.
    Nothing,
    /// The build's; the worker must take commands from builds.
    Brought,
    /// The worker's own.
    Own,
}

/// A need, and what must be free or at least there. Tasks with equal asks form one queue.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ask {
    /// The kind of worker.
    pub need: Need,
    cpu_milli: u64,
    memory_bytes: u64,
    disk_bytes: u64,
}

impl Ask {
    /// What a task of `spec` for `platform` asks.
    #[must_use]
    pub fn of(spec: &BuildSpec, platform: Option<&Platform>) -> Self {
        let executor = spec.executor.unwrap_or(Executor::Exec);
        let command = match (executor, &spec.command) {
            (Executor::Podman, _) => CommandNeed::Nothing,
            (Executor::Exec, Some(_)) => CommandNeed::Brought,
            (Executor::Exec, None) => CommandNeed::Own,
        };
        let need = Need { platform: platform.cloned(), requires: spec.requires.clone(), executor, command };
        let Resources { cpu_milli, memory_bytes, disk_bytes } = spec.resources;
        Self { need, cpu_milli, memory_bytes, disk_bytes }
    }

    /// What of the worker's kind stands in the way; load and standing are not looked at.
    #[must_use]
    pub fn unfit(&self, worker: &WorkerRecord) -> Option<Unfit> {
        self.need.unfit(worker).or_else(|| self.unfit_resources(worker))
    }

    /// Like [`Self::unfit`], for `apply`: a task without a command may go where there is none, to fail there.
    #[must_use]
    pub fn unfit_leniently(&self, worker: &WorkerRecord) -> Option<Unfit> {
        let need = self.need.without_own();
        need.as_ref().unwrap_or(&self.need).unfit(worker).or_else(|| self.unfit_resources(worker))
    }

    /// What the worker says it has less of than is asked; a worker that does not say has enough.
    pub(crate) fn unfit_resources(&self, worker: &WorkerRecord) -> Option<Unfit> {
        let has = &worker.offer.resources;
        let lacks = |asked: u64, has: u64| has != 0 && asked > has;
        if lacks(self.cpu_milli, has.cpu_milli) {
            Some(Unfit::Resources("cpu"))
        } else if lacks(self.memory_bytes, has.memory_bytes) {
            Some(Unfit::Resources("memory"))
        } else if lacks(self.disk_bytes, has.disk_bytes) {
            Some(Unfit::Resources("disk"))
        } else {
            None
        }
    }
}

impl Need {
    /// What of the worker's kind stands in the way, resources aside.
    #[must_use]
    pub fn unfit(&self, worker: &WorkerRecord) -> Option<Unfit> {
        let offer = &worker.offer;
        if self.platform.as_ref().is_some_and(|platform| !offer.platforms.contains(platform)) {
            return Some(Unfit::Platform);
        }
        if !offer.executors.contains(&self.executor) {
            return Some(Unfit::Executor);
        }
        if let Some((key, _)) = self.requires.iter().find(|(key, value)| offer.labels.get(*key) != Some(*value)) {
            return Some(Unfit::Label(key.clone()));
        }
        let command = match self.command {
            CommandNeed::Nothing => true,
            CommandNeed::Brought => offer.allows_job_commands,
            CommandNeed::Own => offer.has_own_command,
        };
        if command { None } else { Some(Unfit::Command) }
    }

    /// The same need where no worker has a command of its own; `None` for needs that do not ask for one.
    #[must_use]
    pub fn without_own(&self) -> Option<Self> {
        match self.command {
            CommandNeed::Own => Some(Self { command: CommandNeed::Nothing, ..self.clone() }),
            CommandNeed::Nothing | CommandNeed::Brought => None,
        }
    }
}

/// What of the worker's present condition stands in the way of any new attempt.
#[must_use]
pub fn unready(worker: &WorkerRecord, load: u32) -> Option<Unfit> {
    match worker.standing {
        Standing::Lost => return Some(Unfit::Lost),
        Standing::Detached { until: LogTime(_) } => return Some(Unfit::Detached),
        Standing::Present => {}
    }
    if worker.drain.is_some() {
        return Some(Unfit::Draining);
    }
    if !worker.held.is_empty() {
        return Some(Unfit::Held);
    }
    match worker.trust {
        Trust::Quarantined { until, .. } => return Some(Unfit::Quarantined { until }),
        Trust::Probing { .. } if load > 0 => return Some(Unfit::Probing),
        Trust::Probing { .. } | Trust::Full { .. } => {}
    }
    if load >= worker.offer.capacity { Some(Unfit::Full { capacity: worker.offer.capacity }) } else { None }
}
