//! Agents as small models: they dial in, run what they are given, keep what they must not lose, report until it is taken.
//!
//! What an agent writes to its spool survives its crash; nothing survives the loss of its data directory, and its host's
//! processes survive both. Messages on a session arrive in order, or the session breaks.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::{self as cmd, Command, Outcome, WorkerOffer};
use helix_core::record::{BlobRef, SealedLog, Standing};
use helix_core::state::Offered;
use helix_core::{Effect, Rejection, Reply};
use helix_model::{
    AttemptKey, Death, Digest, Executor, Instance, NodeId, Platform, Reason, Resources, Room, WorkerName,
};

use super::Bug;
use super::host::Fate;
use super::image::Pushed;
use super::random::Random;
use super::registry::Origin;
use super::world::{Event, World};

/// From an agent to the leader.
#[derive(Clone, Debug)]
pub(super) enum Up {
    Hello { session: u64, register: cmd::RegisterWorker, offered: Vec<AttemptKey> },
    Beat { session: u64, silent_ms: BTreeMap<AttemptKey, u64> },
    Report { session: u64, command: Command },
}

/// From the leader to an agent.
#[derive(Clone, Debug)]
pub(super) enum Down {
    Welcome { offered: Vec<(AttemptKey, Offered)>, pending: Vec<Effect>, held: BTreeSet<AttemptKey> },
    Effect(Effect),
    Answered { key: AttemptKey, sealing: bool, reply: Reply },
    Beaten { held: BTreeSet<AttemptKey> },
    Unknown,
}

/// Where an attempt stands for its agent.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    Running,
    /// Being killed; afterwards it is reported, or what is left of it is given up.
    Killing(Afterwards),
    /// Its image is pushed; it is repeated until it is known who pushes the index.
    Pushed(Box<Pushed>),
    Reporting(Box<cmd::FinishAttempt>),
    Sealing,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Afterwards {
    Report,
    Seal,
    Forget,
}

#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: WorkerName,
    /// Counts data directories.
    pub(super) data: u64,
    pub(super) up: bool,
    pub(super) cut_off_until: u64,
    pub(super) capacity: u32,
    arm: bool,
    session: u64,
    open: bool,
    next_hello: u64,
    next_beat: u64,
    heard_at: u64,
    arrival: u64,
    pub(super) runs: BTreeMap<AttemptKey, (Phase, u64)>,
}

impl Agent {
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        Self {
            name: WorkerName::new(&format!("w{number}")).unwrap_or_else(|error| panic!("{error}")),
            data: 0,
            up: true,
            cut_off_until: 0,
            capacity: random.between(1, 3) as u32,
            arm: number == 0 || random.chance(40),
            session: 0,
            open: false,
            next_hello: 0,
            next_beat: 0,
            heard_at: 0,
            arrival: 0,
            runs: BTreeMap::new(),
        }
    }

    fn offer(&self, memory_bytes: u64) -> WorkerOffer {
        let platforms: &[&str] = if self.arm { &["linux/amd64", "linux/arm64"] } else { &["linux/amd64"] };
        WorkerOffer {
            capacity: self.capacity,
            platforms: platforms.iter().filter_map(|text| Platform::new(text).ok()).collect(),
            executors: BTreeSet::from([Executor::Exec, Executor::Podman]),
            allows_job_commands: true,
            resources: Resources { memory_bytes, ..Resources::default() },
            ..WorkerOffer::default()
        }
    }

    /// Breaks its connection; a new one is dialled soon.
    pub(super) fn disconnect(&mut self) {
        self.open = false;
        self.session += 1;
    }

    /// Loses everything it wrote.
    pub(super) fn wipe(&mut self) {
        self.runs.clear();
    }
}

impl World {
    fn instance(&self, agent: usize) -> Instance {
        let text = format!("d{}.b{}", self.agents[agent].data, self.hosts[agent].boot);
        Instance::new(&text).unwrap_or_else(|error| panic!("{error}"))
    }

    fn is_cut_off(&self, agent: usize) -> bool {
        self.agents[agent].cut_off_until > self.now
    }

    /// Delivers in order, or breaks the session.
    fn arrival(&mut self, agent: usize) -> Option<u64> {
        let lost = self.is_cut_off(agent) || (!self.healed && self.random.chance(1));
        if lost {
            self.agents[agent].disconnect();
            return None;
        }
        let arrival = self.agents[agent].arrival.max(self.now + self.random.between(1, 40));
        self.agents[agent].arrival = arrival;
        Some(arrival)
    }

    fn send_up(&mut self, agent: usize, message: Up) {
        if let Some(time) = self.arrival(agent) {
            self.at(time, Event::Up { agent, message: Box::new(message) });
        }
    }

    pub(super) fn send_down(&mut self, agent: usize, session: u64, message: Down) {
        if let Some(time) = self.arrival(agent) {
            self.at(time, Event::Down { agent, session, message });
        }
    }

    pub(super) fn send_detach(&mut self, agent: usize) {
        let (worker, instance) = (self.agents[agent].name.clone(), self.instance(agent));
        let command = Command::DetachWorker(cmd::DetachWorker { worker, instance });
        let session = self.agents[agent].session;
        self.send_up(agent, Up::Report { session, command });
    }

    pub(super) fn agent_tick(&mut self, agent: usize) {
        self.after(100, Event::AgentTick(agent));
        if !self.agents[agent].up || self.is_cut_off(agent) {
            return;
        }
        let now = self.now;
        let (name, instance) = (self.agents[agent].name.clone(), self.instance(agent));
        let inflated = if self.bug == Some(Bug::InflatedOffer) { 2 } else { 1 };
        let memory = self.hosts[agent].memory * inflated;
        let this = &mut self.agents[agent];
        if this.open && now.saturating_sub(this.heard_at) > 2_000 {
            this.disconnect();
        }
        if !this.open {
            if this.next_hello <= now {
                this.next_hello = now + 500;
                this.session += 1;
                let register = cmd::RegisterWorker { worker: name, instance, offer: this.offer(memory) };
                let hello = Up::Hello { session: this.session, register, offered: this.runs.keys().cloned().collect() };
                self.send_up(agent, hello);
            }
            return;
        }
        let session = this.session;
        let mut messages = Vec::new();
        for (key, (phase, again)) in &mut this.runs {
            if *again > now {
                continue;
            }
            *again = now + 400;
            match phase {
                Phase::Pushed(pushed) => messages.push(pushed.command()),
                Phase::Reporting(report) => messages.push(Command::FinishAttempt((**report).clone())),
                Phase::Sealing => {
                    let (key, worker) = (key.clone(), name.clone());
                    messages.push(Command::SealLog(cmd::SealLog { key, worker, log: log(2) }));
                }
                Phase::Running | Phase::Killing(_) => {}
            }
        }
        let beat = this.next_beat <= now;
        if beat {
            this.next_beat = now + 500;
        }
        for command in messages {
            self.send_up(agent, Up::Report { session, command });
        }
        if beat {
            let processes = self.hosts[agent].processes.iter();
            let silent = processes.filter(|(_, (fate, _))| *fate == Fate::Hangs);
            let silent_ms = silent.map(|(key, (_, since))| (key.clone(), now - since)).collect();
            self.send_up(agent, Up::Beat { session, silent_ms });
        }
    }

    /// The leader hears an agent.
    pub(super) fn hear_agent(&mut self, agent: usize, message: Up) {
        if self.registry.leader.is_none() {
            return;
        }
        let time = self.registry.time(self.now);
        let name = self.agents[agent].name.clone();
        let live = self.registry.liveness.workers.get_mut(&name);
        match message {
            Up::Hello { session, register, offered } => {
                // A second life under one name is refused while the first one speaks.
                let other = live
                    .is_some_and(|live| live.instance != register.instance && time.since_ms(live.last_seen) < 1_500);
                if !other {
                    let origin = Origin::Hello { agent, session, offered };
                    self.propose(vec![(Command::RegisterWorker(register), origin)]);
                }
            }
            Up::Beat { session, silent_ms } => {
                // A worker that was removed or lost while it was connected has to introduce itself again.
                let leader = self.registry.leader.map(|leader| &self.registry.nodes[leader].state);
                let row = leader.and_then(|state| state.worker(&name));
                let counted = row.is_some_and(|row| row.standing != Standing::Lost);
                let known = self.sessions.get(&agent) == Some(&session) && counted;
                let Some(live) = live.filter(|_| known) else {
                    return self.send_down(agent, session, Down::Unknown);
                };
                live.last_seen = time;
                live.session = helix_core::SessionState::Open;
                live.silent_ms = silent_ms;
                let worker = self.registry.state().and_then(|state| state.worker(&name));
                let held = worker.map(|worker| worker.held.clone()).unwrap_or_default();
                self.send_down(agent, session, Down::Beaten { held });
            }
            Up::Report { session, command } => {
                if self.sessions.get(&agent) == Some(&session) {
                    self.propose(vec![(command, Origin::Report { agent, session })]);
                }
            }
        }
    }

    pub(super) fn agent_hears(&mut self, agent: usize, session: u64, message: Down) {
        let this = &mut self.agents[agent];
        if !this.up || this.session != session {
            return;
        }
        this.heard_at = self.now;
        match message {
            Down::Welcome { offered, pending, held } => {
                this.open = true;
                for (key, verdict) in offered {
                    match verdict {
                        Offered::Current => {}
                        Offered::Stop(_) => self.stop(agent, &key, Afterwards::Report),
                        Offered::Superseded { log_wanted: true } => self.stop(agent, &key, Afterwards::Seal),
                        Offered::Superseded { log_wanted: false } => self.stop(agent, &key, Afterwards::Forget),
                    }
                }
                for effect in pending {
                    self.carry_out(agent, effect);
                }
                self.release(agent, &held);
            }
            Down::Effect(effect) => self.carry_out(agent, effect),
            Down::Answered { key, sealing, reply } => self.answered(agent, &key, sealing, &reply),
            Down::Beaten { held } => self.release(agent, &held),
            Down::Unknown => this.disconnect(),
        }
    }

    fn carry_out(&mut self, agent: usize, effect: Effect) {
        match effect {
            Effect::SendAssignment { key, instance, .. } => {
                let mine = instance == self.instance(agent);
                if mine && !self.agents[agent].runs.contains_key(&key) {
                    self.start(agent, key);
                }
            }
            Effect::SendImages { key, images, .. } => self.images_given(agent, &key, images),
            Effect::SendStop { key, .. } => self.stop(agent, &key, Afterwards::Report),
            Effect::SendForget { key, .. } => self.stop(agent, &key, Afterwards::Forget),
            _ => {}
        }
    }

    fn start(&mut self, agent: usize, key: AttemptKey) {
        let fate = match self.random.below(100) {
            0..70 => Fate::Succeeds,
            70..80 => Fate::Fails,
            80..86 => Fate::Breaks,
            _ => Fate::Hangs,
        };
        self.note(|| format!("w{agent} starts {key}: {fate:?}"));
        self.hosts[agent].processes.insert(key.clone(), (fate, self.now));
        self.agents[agent].runs.insert(key.clone(), (Phase::Running, 0));
        if fate != Fate::Hangs {
            let (ms, boot) = (self.random.between(5, 6_000), self.hosts[agent].boot);
            self.after(ms, Event::Exit { host: agent, boot, key });
        }
    }

    /// Kills what lives of an attempt, and then does `afterwards`.
    fn stop(&mut self, agent: usize, key: &AttemptKey, afterwards: Afterwards) {
        let lives = self.hosts[agent].can_kill(key);
        let phase = self.agents[agent].runs.get(key).map(|(phase, _)| phase);
        match (phase, afterwards) {
            (None, Afterwards::Seal | Afterwards::Forget) => return,
            (Some(Phase::Reporting(_) | Phase::Sealing), Afterwards::Report) => return,
            (Some(Phase::Reporting(_) | Phase::Sealing), Afterwards::Forget) if !lives => {
                self.agents[agent].runs.remove(key);
                return;
            }
            (_, _) => {}
        }
        let dying = matches!(phase, Some(Phase::Killing(_)));
        self.agents[agent].runs.insert(key.clone(), (Phase::Killing(afterwards), 0));
        if lives && !dying {
            let ms =
                if self.random.chance(5) { self.random.between(3_000, 9_000) } else { self.random.between(5, 300) };
            let boot = self.hosts[agent].boot;
            self.after(ms, Event::Killed { host: agent, boot, key: key.clone() });
        }
        if !lives || self.bug == Some(Bug::StoppedBeforeDead) {
            self.is_dead(agent, key);
        }
    }

    pub(super) fn is_dead(&mut self, agent: usize, key: &AttemptKey) {
        let report = self.report(agent, key, Outcome::Stopped);
        let runs = &mut self.agents[agent].runs;
        match runs.get(key) {
            Some((Phase::Killing(Afterwards::Report), _)) => {
                runs.insert(key.clone(), (Phase::Reporting(Box::new(report)), 0));
            }
            Some((Phase::Killing(Afterwards::Seal), _)) => {
                runs.insert(key.clone(), (Phase::Sealing, 0));
            }
            Some((Phase::Killing(Afterwards::Forget), _)) => {
                runs.remove(key);
            }
            Some((Phase::Running | Phase::Pushed(_) | Phase::Reporting(_) | Phase::Sealing, _)) | None => {}
        }
    }

    pub(super) fn process_exits(&mut self, host: usize, boot: u64, key: &AttemptKey) {
        if self.hosts[host].boot != boot {
            return;
        }
        let Some((fate, _)) = self.hosts[host].processes.remove(key) else { return };
        if fate == Fate::Succeeds {
            self.oracle.succeeded.insert(key.clone());
        }
        self.is_dead(host, key);
        let outcome = match fate {
            Fate::Succeeds => Outcome::Succeeded { digest: None, size: 0, image_tag: String::new() },
            Fate::Fails => Outcome::Failed { reason: Reason::Exit, message: String::new() },
            Fate::Breaks | Fate::Hangs => Outcome::Failed { reason: Reason::DiskFull, message: String::new() },
        };
        let report = self.report(host, key, outcome);
        let next = self.after_the_end(report);
        if let Some(run @ (Phase::Running, _)) = self.agents[host].runs.get_mut(key) {
            *run = (next, 0);
        }
    }

    pub(super) fn process_dies(&mut self, host: usize, boot: u64, key: &AttemptKey) {
        let here = self.hosts[host].boot == boot && self.hosts[host].can_kill(key);
        if here && self.hosts[host].processes.remove(key).is_some() {
            self.is_dead(host, key);
        }
    }

    pub(super) fn report(&mut self, agent: usize, key: &AttemptKey, outcome: Outcome) -> cmd::FinishAttempt {
        let sealed = matches!(outcome, Outcome::Succeeded { .. }) || self.random.chance(30);
        // Now and then bytes are on fewer coordinators than they should be.
        let holders = if self.random.chance(10) { 1 } else { 2 };
        cmd::FinishAttempt {
            key: key.clone(),
            worker: self.agents[agent].name.clone(),
            instance: self.instance(agent),
            outcome,
            exit_code: None,
            signal: None,
            artifacts: Vec::new(),
            log: sealed.then(|| log(holders)),
            death: if self.knows_dead(agent, key) { Death::Proven } else { Death::Unproven },
            image: None,
            index: None,
            room: Room::Host,
        }
    }

    /// Whether the agent may claim that nothing of an attempt is left, as far as its runner's fate goes.
    fn knows_dead(&self, agent: usize, key: &AttemptKey) -> bool {
        !self.hosts[agent].unproven.contains(key) || self.bug == Some(Bug::ClaimedProof)
    }

    fn answered(&mut self, agent: usize, key: &AttemptKey, sealing: bool, reply: &Reply) {
        if let (Reply::Rejected(_), Some((Phase::Pushed(_), _))) = (reply, self.agents[agent].runs.get(key)) {
            return self.image_refused(agent, key);
        }
        let Some((phase, again)) = self.agents[agent].runs.get_mut(key) else { return };
        match (phase, reply) {
            (Phase::Reporting(report), Reply::Rejected(Rejection::TooFewHolders { .. })) if !sealing => {
                report.log = Some(log(2));
                *again = 0;
            }
            (Phase::Reporting(report), Reply::Done) if !sealing => {
                if report.log.as_ref().is_some_and(|log| log.blob.holders.len() > 1) {
                    self.agents[agent].runs.remove(key);
                } else {
                    self.agents[agent].runs.insert(key.clone(), (Phase::Sealing, 0));
                }
            }
            (Phase::Reporting(_), Reply::Rejected(Rejection::AttemptEnded(_) | Rejection::StaleAttempt { .. }))
                if !sealing =>
            {
                self.agents[agent].runs.insert(key.clone(), (Phase::Sealing, 0));
            }
            (Phase::Reporting(_), Reply::Rejected(_)) if !sealing => {
                self.agents[agent].runs.remove(key);
            }
            (Phase::Sealing, _) if sealing => {
                self.agents[agent].runs.remove(key);
            }
            (_, _) => {}
        }
    }

    /// Proves dead what is held against this worker, as far as it is.
    fn release(&mut self, agent: usize, held: &BTreeSet<AttemptKey>) {
        for key in held {
            if !self.hosts[agent].can_kill(key) && self.knows_dead(agent, key) {
                let (worker, instance) = (self.agents[agent].name.clone(), self.instance(agent));
                let command = Command::ReleaseHold(cmd::ReleaseHold { worker, instance, key: key.clone() });
                let session = self.agents[agent].session;
                self.send_up(agent, Up::Report { session, command });
            }
        }
    }

    pub(super) fn agent_start(&mut self, agent: usize) {
        self.agents[agent].up = true;
        self.agents[agent].disconnect();
        if self.bug == Some(Bug::InventedSuccess) {
            let running = self.agents[agent].runs.iter().filter(|(_, (phase, _))| matches!(phase, Phase::Running));
            let keys: Vec<AttemptKey> = running.map(|(key, _)| key.clone()).collect();
            for key in keys {
                let outcome = Outcome::Succeeded { digest: None, size: 0, image_tag: String::new() };
                let report = self.report(agent, &key, outcome);
                self.agents[agent].runs.insert(key, (Phase::Reporting(Box::new(report)), 0));
            }
        }
    }
}

fn log(holders: u64) -> SealedLog {
    let holders = (1..=holders).map(NodeId).collect();
    SealedLog { blob: BlobRef { digest: Digest([1; 32]), size: 1, holders }, lines: 1 }
}
