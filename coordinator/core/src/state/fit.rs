//! Which worker may have which task: the one place where platform, labels, executor, command, secrets and resources
//! are compared. `apply`, the scheduler, the refusal at submit and `explain` all ask here.

use std::collections::{BTreeMap, BTreeSet};

use helix_model::{BuildSpec, Executor, LogTime, Measure, Platform, Resources};

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
    /// Secrets the worker must have.
    pub secrets: BTreeSet<String>,
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

/// A need, and what must be left beside a slot. Tasks with equal asks form one queue.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ask {
    /// The kind of worker.
    pub need: Need,
    /// What it takes of it.
    pub amounts: Resources,
}

/// What a worker's attempts take beside slots. Wide, because a worker that does not say what it has takes any amount.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Used([u128; 3]);

/// What a worker can still be given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Further attempts.
    pub slots: u32,
    /// What is left for them; `u64::MAX` of what the worker does not tell about.
    pub left: Resources,
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
        let (platform, requires, secrets) = (platform.cloned(), spec.requires.clone(), spec.secrets.clone());
        let need = Need { platform, requires, executor, command, secrets };
        Self { need, amounts: spec.resources }
    }

    /// What of the worker's kind stands in the way; load and standing are not looked at.
    #[must_use]
    pub fn unfit(&self, worker: &WorkerRecord) -> Option<Unfit> {
        self.need.unfit(worker).or_else(|| self.unfit_resources(worker))
    }

    /// Whether the worker is of the kind, and has as much as is asked when it is idle.
    #[must_use]
    pub fn fits(&self, worker: &WorkerRecord) -> bool {
        self.need.fits(worker) && self.unfit_resources(worker).is_none()
    }

    /// Like [`Self::unfit`], for `apply`: a task without a command may go where there is none, to fail there.
    #[must_use]
    pub fn unfit_leniently(&self, worker: &WorkerRecord) -> Option<Unfit> {
        self.without_own().as_ref().unwrap_or(self).unfit(worker)
    }

    /// What the worker's attempts leave too little of.
    #[must_use]
    pub fn short(&self, worker: &WorkerRecord, used: &Used) -> Option<Unfit> {
        let left = used.left_of(&worker.offer.resources);
        Measure::ALL.into_iter().find_map(|what| {
            let (asked, left, has) = (self.amounts.get(what), left.get(what), worker.offer.resources.get(what));
            (asked > left).then_some(Unfit::Short { what, asked, left, has })
        })
    }

    /// What the worker says it has less of than is asked; a worker that does not say has enough.
    fn unfit_resources(&self, worker: &WorkerRecord) -> Option<Unfit> {
        Measure::ALL.into_iter().find_map(|what| {
            let (asked, has) = (self.amounts.get(what), worker.offer.resources.get(what));
            (has != 0 && asked > has).then_some(Unfit::Resources { what, asked, has })
        })
    }

    /// The same where no worker has a command of its own; `None` for asks that do not need one.
    #[must_use]
    pub fn without_own(&self) -> Option<Self> {
        Some(Self { need: self.need.without_own()?, amounts: self.amounts })
    }
}

impl Used {
    /// With an attempt more.
    pub(crate) fn add(&mut self, amounts: &Resources) {
        for (sum, what) in self.0.iter_mut().zip(Measure::ALL) {
            *sum += u128::from(amounts.get(what));
        }
    }

    /// With an attempt that was added before gone.
    pub(crate) fn subtract(&mut self, amounts: &Resources) {
        for (sum, what) in self.0.iter_mut().zip(Measure::ALL) {
            *sum = sum.saturating_sub(u128::from(amounts.get(what)));
        }
    }

    /// What is left of what a worker has.
    #[must_use]
    pub fn left_of(&self, has: &Resources) -> Resources {
        let [cpu, memory, disk] = self.0;
        Resources::of(|what| {
            let used = match what {
                Measure::Cpu => cpu,
                Measure::Memory => memory,
                Measure::Disk => disk,
            };
            match has.get(what) {
                // Whoever has all that can be told has no limit.
                0 | u64::MAX => u64::MAX,
                has => u64::try_from(u128::from(has).saturating_sub(used)).unwrap_or(u64::MAX),
            }
        })
    }
}

impl Room {
    /// For nothing.
    pub(crate) const NONE: Self = Self { slots: 0, left: Resources { cpu_milli: 0, memory_bytes: 0, disk_bytes: 0 } };

    /// Whether an attempt that takes `amounts` finds room.
    #[must_use]
    pub fn fits(&self, amounts: &Resources) -> bool {
        self.slots > 0 && Measure::ALL.into_iter().all(|what| amounts.get(what) <= self.left.get(what))
    }

    /// What is left after an attempt that takes `amounts`.
    #[must_use]
    pub fn without(&self, amounts: &Resources) -> Self {
        let left = Resources::of(|what| match self.left.get(what) {
            u64::MAX => u64::MAX,
            left => left.saturating_sub(amounts.get(what)),
        });
        Self { slots: self.slots.saturating_sub(1), left }
    }
}

/// What of a worker's kind a need misses.
enum Miss<'a> {
    Platform(&'a Platform),
    Executor,
    Label(&'a str, &'a str),
    Secret(&'a str),
    Command,
}

impl Need {
    /// What of the worker's kind stands in the way, resources aside.
    #[must_use]
    pub fn unfit(&self, worker: &WorkerRecord) -> Option<Unfit> {
        let offer = &worker.offer;
        Some(match self.miss(worker)? {
            Miss::Platform(platform) => {
                let emulated = offer.emulated.iter().filter(|_| self.executor == Executor::Podman);
                let has: Vec<&str> = offer.platforms.iter().chain(emulated).map(Platform::as_str).collect();
                Unfit::Platform { asked: platform.to_string(), has: has.join(" ") }
            }
            Miss::Executor => {
                let why = if self.executor == Executor::Podman { offer.podman.clone() } else { String::new() };
                Unfit::Executor { asked: self.executor.as_str().to_owned(), why }
            }
            Miss::Label(key, value) => {
                Unfit::Label { asked: format!("{key}={value}"), has: offer.labels.get(key).cloned() }
            }
            Miss::Secret(name) => Unfit::Secret(name.to_owned()),
            Miss::Command => Unfit::Command,
        })
    }

    /// Whether the worker is of the kind, resources aside.
    #[must_use]
    pub fn fits(&self, worker: &WorkerRecord) -> bool {
        self.miss(worker).is_none()
    }

    fn miss(&self, worker: &WorkerRecord) -> Option<Miss<'_>> {
        let offer = &worker.offer;
        let builds_for = |platform: &Platform| {
            let emulated = self.executor == Executor::Podman && offer.emulated.contains(platform);
            offer.platforms.contains(platform) || emulated
        };
        if let Some(platform) = self.platform.as_ref().filter(|platform| !builds_for(platform)) {
            return Some(Miss::Platform(platform));
        }
        if !offer.executors.contains(&self.executor) {
            return Some(Miss::Executor);
        }
        if let Some((key, value)) = self.requires.iter().find(|(key, value)| offer.labels.get(*key) != Some(*value)) {
            return Some(Miss::Label(key, value));
        }
        if let Some(given) = &offer.secrets
            && let Some(name) = self.secrets.iter().find(|name| !given.contains_key(*name))
        {
            return Some(Miss::Secret(name));
        }
        let command = match self.command {
            CommandNeed::Nothing => true,
            CommandNeed::Brought => offer.allows_job_commands,
            CommandNeed::Own => offer.has_own_command,
        };
        if command { None } else { Some(Miss::Command) }
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
