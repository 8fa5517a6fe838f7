//! What an agent's shell does with an attempt: prepare, run, store, report, remove. Each step takes its time, and any of
//! them may be cut short by a stop, a crash, a boot or the loss of the data directory. How bytes get to coordinators is in `storing`.

use helix_agent_core::{Assignment, Event as Happening, Order, Report, SessionNumber, StopCause, Verdict};
use helix_model::{AttemptKey, Death, Digest, Reason};

use super::Bug;
use super::agent::Spooled;
use super::host::{Ended, Fate};
use super::world::{Event, World};

mod storing;

use storing::Storing;

/// An attempt in the agent's hands.
#[derive(Debug)]
pub(super) struct Work {
    stage: Stage,
    stop: Option<StopCause>,
    again: Option<(Storing, Report)>,
}

#[derive(Debug)]
enum Stage {
    Preparing,
    AwaitingCommit,
    Running,
    /// Outputs and log of a success are stored.
    Storing(Storing),
    /// The image is pushed, all bytes are stored, and it is not known who pushes the index.
    AwaitingImages(Box<Report>),
    /// The log is stored behind the report.
    Sealing(Storing),
    Reported,
    Removing,
}

/// Something of an attempt took its time and is done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Prepared,
    Removed,
}

impl Work {
    fn new(stage: Stage) -> Self {
        Self { stage, stop: None, again: None }
    }

    fn storings(&mut self) -> impl Iterator<Item = &mut Storing> {
        let first = match &mut self.stage {
            Stage::Storing(storing) | Stage::Sealing(storing) => Some(storing),
            Stage::Preparing
            | Stage::AwaitingCommit
            | Stage::Running
            | Stage::AwaitingImages(_)
            | Stage::Reported
            | Stage::Removing => None,
        };
        first.into_iter().chain(self.again.as_mut().map(|(storing, _)| storing))
    }
}

impl World {
    fn step(&mut self, agent: usize, key: &AttemptKey, ms: u64, step: Step) {
        let life = self.agents[agent].life;
        self.after(ms, Event::Step { agent, life, key: key.clone(), step });
    }

    pub(super) fn start_attempt(&mut self, agent: usize, assignment: Assignment) {
        let key = assignment.key.clone();
        if self.bug == Some(Bug::UnsealedForgotten) {
            self.forget_earlier(agent, &key);
        }
        let (commit, instance) = (assignment.commit.clone(), self.instance(agent));
        let spooled = Spooled { commit, assignment, instance, started: false, report: None };
        let chance = self.random.below(100);
        if chance > 0 {
            self.agents[agent].spool.insert(key.clone(), spooled);
        }
        match chance {
            0..3 => self.cannot_begin(agent, &key),
            _ => self.prepare_attempt(agent, &key),
        }
    }

    fn forget_earlier(&mut self, agent: usize, key: &AttemptKey) {
        let of_task =
            |other: &&AttemptKey| other.build == key.build && other.task == key.task && other.attempt < key.attempt;
        let earlier: Vec<_> = self.agents[agent].work.keys().filter(of_task).cloned().collect();
        let session = SessionNumber(self.agents[agent].session);
        for earlier in earlier {
            self.take(agent, Happening::Said(session, Order::Forget(earlier)));
        }
    }

    /// There is no room for what was assigned; now and then not even for writing that down.
    fn cannot_begin(&mut self, agent: usize, key: &AttemptKey) {
        self.agents[agent].work.insert(key.clone(), Work::new(Stage::Preparing));
        let message = "the agent cannot begin it".to_owned();
        self.end_with(agent, key, Report::bare(Verdict::Failed { reason: Reason::DiskFull, message }));
        if self.bug == Some(Bug::UnbegunUnsealed)
            && let Some(work) = self.agents[agent].work.get_mut(key)
        {
            work.stage = Stage::Reported;
        }
    }

    fn prepare_attempt(&mut self, agent: usize, key: &AttemptKey) {
        self.agents[agent].work.insert(key.clone(), Work::new(Stage::Preparing));
        let ms = self.random.between(1, 300);
        self.step(agent, key, ms, Step::Prepared);
    }

    pub(super) fn steps(&mut self, agent: usize, life: u64, key: &AttemptKey, step: Step) {
        if !self.agents[agent].up || self.agents[agent].life != life {
            return;
        }
        let this = &mut self.agents[agent];
        let Some(work) = this.work.get_mut(key) else { return };
        match (step, &work.stage) {
            (Step::Prepared, Stage::Preparing) => {
                let wanted = this.spool.get(key);
                let resolve = wanted.is_some_and(|s| s.commit.is_none() && !s.assignment.spec.repo_url.is_empty());
                let commit = commit_at(self.now);
                if !resolve {
                    self.begin_process(agent, key, None);
                } else if self.bug == Some(Bug::UnpinnedSource) {
                    self.begin_process(agent, key, Some(commit));
                } else {
                    work.stage = Stage::AwaitingCommit;
                    self.take(agent, Happening::SourceResolved(key.clone(), commit));
                }
            }
            (Step::Removed, Stage::Removing) => self.attempt_removed(agent, key),
            _ => {}
        }
    }

    pub(super) fn begin_process(&mut self, agent: usize, key: &AttemptKey, commit: Option<String>) {
        let this = &mut self.agents[agent];
        let (Some(work), Some(spooled)) = (this.work.get_mut(key), this.spool.get_mut(key)) else { return };
        if !matches!(work.stage, Stage::Preparing | Stage::AwaitingCommit) || work.stop.is_some() {
            return;
        }
        work.stage = Stage::Running;
        spooled.started = true;
        spooled.commit = commit.or(spooled.commit.take());
        let commit = spooled.commit.clone();
        let fate = match self.random.below(100) {
            0..70 => Fate::Succeeds,
            70..80 => Fate::Fails,
            80..86 => Fate::Breaks,
            _ => Fate::Hangs,
        };
        self.trace.note(self.now, format_args!("w{agent} begins to run {key}, which {}", super::words::fate(fate)));
        let instance = self.instance(agent);
        let verdict = self.oracle.began(key, &self.agents[agent].name, &instance, commit);
        self.check(verdict);
        self.hosts[agent].processes.insert(key.clone(), (fate, self.now));
        if fate != Fate::Hangs {
            let (ms, boot) = (self.random.between(5, 6_000), self.hosts[agent].boot);
            self.after(ms, Event::Exit { host: agent, boot, key: key.clone() });
        }
        self.take(agent, Happening::CommandStarted(key.clone()));
    }

    /// Goes on with an attempt that lay in the spool when the agent started.
    pub(super) fn resume_attempt(&mut self, agent: usize, key: &AttemptKey) {
        let instance = self.instance(agent);
        let Some(spooled) = self.agents[agent].spool.get(key) else { return };
        let outlived = spooled.instance != instance && self.bug != Some(Bug::OutlivedAssignment);
        if let Some(report) = &spooled.report {
            let unsealed = report.log.is_none();
            let stage = if unsealed { Stage::Sealing(self.sealing(key)) } else { Stage::Reported };
            self.agents[agent].work.insert(key.clone(), Work::new(stage));
        } else if !spooled.started && outlived {
            // The registry has ended it with the life that was given it: it must not begin now.
            self.agents[agent].work.insert(key.clone(), Work::new(Stage::Preparing));
            let message = "its host booted before it began".to_owned();
            self.end_with(agent, key, Report::bare(Verdict::Failed { reason: Reason::Internal, message }));
        } else if !spooled.started || self.bug == Some(Bug::RanTwice) {
            self.prepare_attempt(agent, key);
        } else {
            self.agents[agent].work.insert(key.clone(), Work::new(Stage::Running));
            let invented = self.bug == Some(Bug::InventedSuccess);
            if invented {
                self.hosts[agent].ended.insert(key.clone(), Ended::Exited(Fate::Succeeds));
            }
            if invented || !self.hosts[agent].can_kill(key) {
                self.process_over(agent, key);
            }
        }
    }

    /// A process ends by itself.
    pub(super) fn process_exits(&mut self, host: usize, boot: u64, key: &AttemptKey) {
        if self.hosts[host].boot != boot {
            return;
        }
        let Some((fate, _)) = self.hosts[host].processes.remove(key) else { return };
        self.trace.note(self.now, format_args!("{key} ends by itself on w{host}: {fate:?}"));
        // What hid from its agent ends unseen.
        if !self.hosts[host].hidden.contains(key) {
            self.oracle.exited(key, fate);
        }
        self.leave_word(host, key, Ended::Exited(fate));
    }

    /// A process is dead that was to be killed.
    pub(super) fn process_dies(&mut self, host: usize, boot: u64, key: &AttemptKey) {
        let here = self.hosts[host].boot == boot && self.hosts[host].can_kill(key);
        if here && self.hosts[host].processes.remove(key).is_some() {
            self.trace.note(self.now, format_args!("{key} is dead on w{host}"));
            self.leave_word(host, key, Ended::Killed);
        }
    }

    /// A runner writes how its attempt ended, if its directory is still there; its agent sees that.
    pub(super) fn leave_word(&mut self, host: usize, key: &AttemptKey, ended: Ended) {
        if self.agents[host].spool.contains_key(key) {
            self.hosts[host].ended.entry(key.clone()).or_insert(ended);
            if self.agents[host].up {
                self.process_over(host, key);
            }
        }
    }

    /// Nothing of an attempt runs any more, as far as its agent sees: there is an end to report, or nothing left to wait for.
    fn process_over(&mut self, agent: usize, key: &AttemptKey) {
        let Some(work) = self.agents[agent].work.get(key) else { return };
        match work.stage {
            Stage::Removing => {
                let ms = self.random.between(1, 50);
                self.step(agent, key, ms, Step::Removed);
            }
            Stage::Running => self.judge_end(agent, key),
            _ => {}
        }
    }

    fn judge_end(&mut self, agent: usize, key: &AttemptKey) {
        let Some(work) = self.agents[agent].work.get(key) else { return };
        let stop = work.stop;
        let ended = self.hosts[agent].ended.get(key).copied().unwrap_or(Ended::RunnerLost);
        let failed = |reason, text: &str| Verdict::Failed { reason, message: text.to_owned() };
        let verdict = match (ended, stop) {
            (Ended::Exited(Fate::Succeeds), None) => return self.store_results(agent, key),
            (_, Some(StopCause::Registry(_))) => Verdict::Stopped,
            (Ended::RunnerLost, _) => failed(Reason::Internal, "the runner died"),
            (_, Some(cause)) => stopped(cause),
            (Ended::Exited(Fate::Fails), None) => failed(Reason::Exit, "exit code 1"),
            (Ended::Exited(_), None) => failed(Reason::DiskFull, "no space left"),
            (Ended::Killed, None) => failed(Reason::Signal, "killed"),
        };
        self.end_with(agent, key, Report::bare(verdict));
    }

    /// Writes a report to the spool, says it, and sees to the log.
    fn end_with(&mut self, agent: usize, key: &AttemptKey, report: Report) {
        let proven = !self.hosts[agent].unproven.contains(key) || self.bug == Some(Bug::ClaimedProof);
        let report = Report { death: if proven { Death::Proven } else { Death::Unproven }, ..report };
        let sealing = report.log.is_none().then(|| self.sealing(key));
        if let Some(spooled) = self.agents[agent].spool.get_mut(key) {
            spooled.report = Some(report.clone());
        }
        if let Some(work) = self.agents[agent].work.get_mut(key) {
            work.stage = sealing.map_or(Stage::Reported, Stage::Sealing);
        }
        self.take(agent, Happening::AttemptEnded(key.clone(), Box::new(report)));
    }

    /// Somebody wants an attempt's end.
    pub(super) fn stop_attempt(&mut self, agent: usize, key: &AttemptKey, cause: StopCause) {
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        work.stop = Some(cause);
        match work.stage {
            Stage::Running => {
                self.kill(agent, key);
                if self.bug == Some(Bug::StoppedBeforeDead) {
                    self.judge_end(agent, key);
                }
            }
            Stage::Preparing | Stage::AwaitingCommit | Stage::Storing(_) | Stage::AwaitingImages(_) => {
                self.end_with(agent, key, Report::bare(stopped(cause)));
            }
            Stage::Sealing(_) | Stage::Reported | Stage::Removing => {}
        }
    }

    fn kill(&mut self, agent: usize, key: &AttemptKey) {
        if self.hosts[agent].can_kill(key) {
            let slow = self.random.chance(5);
            let ms = if slow { self.random.between(3_000, 9_000) } else { self.random.between(5, 300) };
            let boot = self.hosts[agent].boot;
            self.after(ms, Event::Killed { host: agent, boot, key: key.clone() });
        }
    }

    pub(super) fn remove_attempt(&mut self, agent: usize, key: &AttemptKey) {
        let name = &self.agents[agent].name;
        if self.registry.state().is_some_and(|state| state.wants_log(key, name)) {
            let why = format!("{name} lets go of {key}, whose log is not sealed");
            self.check(Err(why));
        }
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        (work.stage, work.again) = (Stage::Removing, None);
        if self.hosts[agent].can_kill(key) {
            self.kill(agent, key);
        } else {
            let ms = self.random.between(1, 50);
            self.step(agent, key, ms, Step::Removed);
        }
    }

    fn attempt_removed(&mut self, agent: usize, key: &AttemptKey) {
        self.agents[agent].work.remove(key);
        self.agents[agent].spool.remove(key);
        self.hosts[agent].ended.remove(key);
        let proven = !self.hosts[agent].unproven.contains(key) || self.bug == Some(Bug::ClaimedProof);
        let death = if proven { Death::Proven } else { Death::Unproven };
        self.take(agent, Happening::AttemptRemoved(key.clone(), death));
    }

    /// A runner of one of the agent's attempts is killed. Where cgroups are, what it leaves is killed and known to be dead;
    /// where not, some of it hides, and its agent must not claim to know.
    pub(super) fn kill_runner(&mut self, agent: usize) {
        let host = &self.hosts[agent];
        let has_runner = |key: &&AttemptKey| !host.hidden.contains(*key) && self.agents[agent].spool.contains_key(*key);
        let Some(key) = host.processes.keys().find(has_runner).cloned() else { return };
        let hides = !host.cgroups && self.random.chance(50);
        let fate = if hides { "lives on, hidden" } else { "dies with it" };
        self.trace.note(self.now, format_args!("the runner of {key} on w{agent} is killed; what it ran {fate}"));
        let host = &mut self.hosts[agent];
        if !host.cgroups {
            host.unproven.insert(key.clone());
        }
        if hides {
            host.hidden.insert(key.clone());
        } else {
            host.processes.remove(&key);
        }
        self.leave_word(agent, &key, Ended::RunnerLost);
    }
}

/// The verdict on what was stopped.
fn stopped(cause: StopCause) -> Verdict {
    let drained = |message: &str| Verdict::Failed { reason: Reason::Drained, message: message.to_owned() };
    match cause {
        StopCause::Registry(_) => Verdict::Stopped,
        StopCause::Drained => drained("the agent had to go"),
        StopCause::CutOff { .. } => drained("the agent was cut off"),
    }
}

/// What a ref stands for: it moves.
fn commit_at(now: u64) -> String {
    format!("{:040x}", 0xc0de_0000 + now / 700)
}

/// Tells attempts apart, and what is made of them.
fn digest_of(key: &AttemptKey, kind: u8) -> Digest {
    let mut out = [kind; 32];
    for (place, byte) in key.to_string().bytes().enumerate() {
        out[1 + place % 31] = out[1 + place % 31].wrapping_mul(31).wrapping_add(byte);
    }
    Digest(out)
}
