//! What an agent's shell does with an attempt: prepare, run, store, report, remove. Each step takes its time, and any of
//! them may be cut short by a stop, a crash, a boot or the loss of the data directory.

use std::collections::BTreeSet;

use helix_agent_core::{
    Artifact, Assignment, Blob, Event as Happening, Image, PlatformImage, Report, SealedLog, StopCause, Verdict,
};
use helix_model::placement::rendezvous;
use helix_model::{AttemptKey, Death, Digest, NodeId, Outputs, Reason};

use super::Bug;
use super::agent::Spooled;
use super::blobs::Put;
use super::host::{Ended, Fate};
use super::world::{Event, World};

/// Builds share so many different results: most bytes are there already.
const CONTENTS: u8 = 12;
/// A put that was not answered is repeated, maybe elsewhere.
const PUT_AGAIN_MS: u64 = 400;
/// As the policy has it.
const STORE_DEADLINE_MS: u64 = 20_000;

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

/// Bytes on their way to coordinators; the log's are the last.
#[derive(Clone, Debug)]
struct Storing {
    blobs: Vec<(Digest, BTreeSet<NodeId>)>,
    began: u64,
    /// The log follows when large outputs are there.
    log_from: u64,
    next_try: u64,
    tries: u64,
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

impl Storing {
    fn new(digests: Vec<Digest>, now: u64) -> Self {
        let blobs = digests.into_iter().map(|digest| (digest, BTreeSet::new())).collect();
        Self { blobs, began: now, log_from: now, next_try: now, tries: 0 }
    }

    fn is_done(&self) -> bool {
        self.blobs.iter().all(|(_, holders)| holders.len() >= 2)
    }

    fn blob(&self, place: usize) -> Option<Blob> {
        let (digest, holders) = self.blobs.get(place)?;
        Some(Blob { digest: *digest, size: 1, holders: holders.iter().copied().collect() })
    }

    fn log(&self) -> Option<SealedLog> {
        Some(SealedLog { blob: self.blob(self.blobs.len().checked_sub(1)?)?, lines: 1 })
    }

    fn artifacts(&self) -> Vec<Artifact> {
        let made = (0..self.blobs.len().saturating_sub(1)).filter_map(|place| self.blob(place));
        made.map(|blob| Artifact { name: "out".to_owned(), blob }).collect()
    }
}

impl World {
    fn step(&mut self, agent: usize, key: &AttemptKey, ms: u64, step: Step) {
        let life = self.agents[agent].life;
        self.after(ms, Event::Step { agent, life, key: key.clone(), step });
    }

    pub(super) fn start_attempt(&mut self, agent: usize, assignment: Assignment) {
        let key = assignment.key.clone();
        let (commit, instance) = (assignment.commit.clone(), self.instance(agent));
        let spooled = Spooled { commit, assignment, instance, started: false, report: None };
        self.agents[agent].spool.insert(key.clone(), spooled);
        self.prepare_attempt(agent, &key);
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
            (_, Some(StopCause::Drained)) => failed(Reason::Drained, "the agent had to go"),
            (Ended::Exited(Fate::Fails), None) => failed(Reason::Exit, "exit code 1"),
            (Ended::Exited(_), None) => failed(Reason::DiskFull, "no space left"),
            (Ended::Killed, None) => failed(Reason::Signal, "killed"),
        };
        self.end_with(agent, key, Report::bare(verdict));
    }

    /// A command ended well: its results and its log are stored before that is said.
    fn store_results(&mut self, agent: usize, key: &AttemptKey) {
        let Some(spooled) = self.agents[agent].spool.get(key) else { return };
        let outputs = matches!(spooled.assignment.spec.outputs, Outputs::Named(_));
        let mut digests: Vec<Digest> = outputs.then(|| content(key)).into_iter().collect();
        digests.push(digest_of(key, 3));
        let large = outputs && self.random.chance(25);
        let log_from = self.now + if large { self.random.between(1_000, 8_000) } else { 0 };
        let storing = Storing { log_from, ..Storing::new(digests, self.now) };
        if let Some(work) = self.agents[agent].work.get_mut(key) {
            work.stage = Stage::Storing(storing);
        }
        self.take(agent, Happening::CommandEnded(key.clone()));
    }

    fn sealing(&self, key: &AttemptKey) -> Storing {
        Storing::new(vec![digest_of(key, 3)], self.now)
    }

    /// Sends bytes that not enough coordinators hold, and takes note where they do.
    pub(super) fn store_what_is_wanted(&mut self, agent: usize) {
        let now = self.now;
        let nodes: Vec<NodeId> = self.registry.nodes.iter().map(|node| node.id).collect();
        let mut puts = Vec::new();
        let mut late = Vec::new();
        let this = &mut self.agents[agent];
        let life = this.life;
        for (key, work) in &mut this.work {
            let result = matches!(work.stage, Stage::Storing(_));
            for (place, storing) in work.storings().enumerate() {
                if result && place == 0 && now - storing.began >= STORE_DEADLINE_MS {
                    late.push(key.clone());
                }
                if storing.next_try > now {
                    continue;
                }
                storing.next_try = now + PUT_AGAIN_MS;
                let tries = storing.tries;
                storing.tries += 1;
                let ready = storing.blobs.len() - usize::from(now < storing.log_from);
                for (digest, holders) in &storing.blobs[..ready] {
                    let order = rendezvous(&digest.0, nodes.iter().copied());
                    let mut open: Vec<NodeId> = order.into_iter().filter(|id| !holders.contains(id)).collect();
                    let turn = (tries % open.len().max(1) as u64) as usize;
                    open.rotate_left(turn);
                    let put = Put { agent, life, key: key.clone(), digest: *digest };
                    let wanted = 2usize.saturating_sub(holders.len());
                    puts.extend(open.into_iter().take(wanted).map(|id| (id, put.clone())));
                }
            }
        }
        for key in late {
            let message = "outputs and log could not be stored in time".to_owned();
            self.end_with(agent, &key, Report::bare(Verdict::Failed { reason: Reason::Artifact, message }));
        }
        for (id, put) in puts {
            self.send_put(&nodes, id, put);
        }
    }

    fn send_put(&mut self, nodes: &[NodeId], id: NodeId, put: Put) {
        let Some(node) = nodes.iter().position(|node| *node == id) else { return };
        let faulty = !self.healed;
        if self.is_cut_off(put.agent) || (faulty && self.random.chance(3)) {
            return;
        }
        if faulty && self.random.chance(3) {
            // The network brings it twice.
            let ms = self.random.between(40, 3_000);
            self.after(ms, Event::Put { node, put: put.clone() });
        }
        let ms = self.random.between(1, 40);
        self.after(ms, Event::Put { node, put });
    }

    /// A coordinator said that it holds bytes.
    pub(super) fn stored(&mut self, put: &Put, holder: NodeId) {
        let this = &mut self.agents[put.agent];
        if !this.up || this.life != put.life {
            return;
        }
        let Some(work) = this.work.get_mut(&put.key) else { return };
        for storing in work.storings() {
            for (digest, holders) in &mut storing.blobs {
                if *digest == put.digest {
                    holders.insert(holder);
                }
            }
        }
        self.store_done(put.agent, &put.key);
    }

    fn store_done(&mut self, agent: usize, key: &AttemptKey) {
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        if let Some((storing, report)) = work.again.take_if(|(storing, _)| storing.is_done()) {
            let log = report.log.as_ref().and_then(|_| storing.log());
            let report = Report { artifacts: storing.artifacts(), log, ..report };
            self.take(agent, Happening::StoredAgain(key.clone(), Box::new(report)));
        }
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        match &work.stage {
            Stage::Storing(storing) if storing.is_done() => {
                let (artifacts, log) = (storing.artifacts(), storing.log());
                let report = Report { artifacts, log, ..Report::bare(Verdict::Succeeded { image_tag: String::new() }) };
                self.results_stored(agent, key, report);
            }
            Stage::Sealing(storing) if storing.is_done() => {
                let log = storing.log();
                work.stage = Stage::Reported;
                if let Some(log) = log {
                    if let Some(report) = self.agents[agent].spool.get_mut(key).and_then(|s| s.report.as_mut()) {
                        report.log = Some(log.clone());
                    }
                    self.take(agent, Happening::LogSealed(key.clone(), log));
                }
            }
            _ => {}
        }
    }

    /// An image of several platforms is at its registry, and then it has to be known who pushes the index.
    fn results_stored(&mut self, agent: usize, key: &AttemptKey, report: Report) {
        let pushes = self.agents[agent].spool.get(key).is_some_and(|s| s.assignment.spec.pushes_index());
        if !pushes {
            return self.end_with(agent, key, report);
        }
        let (digest, id, media_type) = (digest_of(key, 0), digest_of(key, 2), String::new());
        let image = Image { digest, size: 1, id, manifest_size: 0, media_type };
        let report = Report { image: Some(image.clone()), ..report };
        if let Some(work) = self.agents[agent].work.get_mut(key) {
            work.stage = Stage::AwaitingImages(Box::new(report));
        }
        self.take(agent, Happening::ImagePushed(key.clone(), image));
    }

    pub(super) fn give_images(&mut self, agent: usize, key: &AttemptKey, images: &[PlatformImage]) {
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        let Stage::AwaitingImages(report) = &work.stage else { return };
        let mut report = Report::clone(report);
        if !images.is_empty() {
            let index = digest_of(key, 1);
            self.oracle.indexes.insert(index, images.iter().map(|i| (i.platform.clone(), i.digest)).collect());
            report.index = Some(index);
        }
        self.end_with(agent, key, report);
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
                let drained = Verdict::Failed { reason: Reason::Drained, message: "the agent had to go".to_owned() };
                let verdict = if cause == StopCause::Drained { drained } else { Verdict::Stopped };
                self.end_with(agent, key, Report::bare(verdict));
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

    /// Too few coordinators hold what a report names: all of it is stored once more.
    pub(super) fn store_again(&mut self, agent: usize, key: &AttemptKey, report: &Report) {
        let late = || digest_of(key, 3);
        let mut digests: Vec<Digest> = report.artifacts.iter().map(|artifact| artifact.blob.digest).collect();
        digests.push(report.log.as_ref().map_or_else(late, |log| log.blob.digest));
        let now = self.now;
        if let Some(work) = self.agents[agent].work.get_mut(key) {
            work.again = Some((Storing::new(digests, now), report.clone()));
        }
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

/// What a ref stands for: it moves.
fn commit_at(now: u64) -> String {
    format!("{:040x}", 0xc0de_0000 + now / 700)
}

/// What a build makes: one of a few results, so that bytes are often there already.
fn content(key: &AttemptKey) -> Digest {
    let sum = key.build.as_str().bytes().fold(key.task.0 as u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    Digest([0x40 + sum % CONTENTS; 32])
}

/// Tells attempts apart, and what is made of them.
fn digest_of(key: &AttemptKey, kind: u8) -> Digest {
    let mut out = [kind; 32];
    for (place, byte) in key.to_string().bytes().enumerate() {
        out[1 + place % 31] = out[1 + place % 31].wrapping_mul(31).wrapping_add(byte);
    }
    Digest(out)
}
