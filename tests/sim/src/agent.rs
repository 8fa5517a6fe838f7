//! Agents: the real core of an agent, and a model of the shell around it: a session, a spool that survives a crash, a
//! process that may die at any moment. What the shell does with an attempt is in `attempt`.

use std::collections::{BTreeMap, BTreeSet};

use helix_agent_core::{
    Agent as Core, Assignment, Command, Event as Happening, ExitKind, Found, Message, Mode, Report, SessionNumber,
    StopCause,
};
use helix_core::command::WorkerOffer;
use helix_model::{AttemptKey, Executor, Instance, Platform, Resources, WorkerName};

use super::Bug;
use super::attempt::Work;
use super::host::Fate;
use super::random::Random;
use super::session::{Down, Hello, Up};
use super::world::{Event, World};

/// How long an agent that stopped everything says so, before it goes unheard.
const UNHEARD_MS: u64 = 2_000;

/// How long what is to be stopped may live on: a tick, and then the slowest kill.
const STOP_MS: u64 = 9_200;

/// What an agent writes of an attempt before it says anything of it.
#[derive(Clone, Debug)]
pub(super) struct Spooled {
    pub(super) assignment: Assignment,
    /// Which life of the worker was given it.
    pub(super) instance: Instance,
    pub(super) commit: Option<String>,
    pub(super) started: bool,
    pub(super) report: Option<Report>,
}

#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: WorkerName,
    /// Counts data directories.
    pub(super) data: u64,
    /// Counts its processes: what belongs to an earlier one is void.
    pub(super) life: u64,
    pub(super) up: bool,
    pub(super) cut_off_until: u64,
    /// How long it may do without a leader; 0 for ever.
    cut_off_limit_ms: u64,
    /// Since when it does, if it does.
    alone_since: u64,
    pub(super) capacity: u32,
    pub(super) core: Core,
    pub(super) spool: BTreeMap<AttemptKey, Spooled>,
    pub(super) work: BTreeMap<AttemptKey, Work>,
    arm: bool,
    pub(super) session: u64,
    open: bool,
    next_hello: u64,
    next_beat: u64,
    heard_at: u64,
    arrival: u64,
    unheard_since: Option<u64>,
}

impl Agent {
    /// An attempt that it has to keep, because it has not been told that nothing more of it is wanted.
    pub(super) fn owed(&self) -> Option<&AttemptKey> {
        self.spool.keys().chain(self.core.attempts().map(|(key, _)| key)).next()
    }

    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        // Every other one has a limit, and some are cut off for far longer than that.
        let cut_off_limit_ms = 1_000 * number as u64 * (number as u64 % 2);
        Self {
            name: WorkerName::new(&format!("w{number}")).unwrap_or_else(|error| panic!("{error}")),
            data: 0,
            life: 0,
            up: true,
            cut_off_until: 0,
            cut_off_limit_ms,
            alone_since: 0,
            capacity: random.between(1, 3) as u32,
            core: core(0, cut_off_limit_ms),
            spool: BTreeMap::new(),
            work: BTreeMap::new(),
            arm: number == 0 || random.chance(40),
            session: 0,
            open: false,
            next_hello: 0,
            next_beat: 0,
            heard_at: 0,
            arrival: 0,
            unheard_since: None,
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
}

/// The core of an agent's process that starts.
fn core(now: u64, cut_off_limit_ms: u64) -> Core {
    let mut core = Core::default();
    core.on(now, Happening::CutOffLimitSet(cut_off_limit_ms), &mut Vec::new());
    core
}

impl World {
    pub(super) fn instance(&self, agent: usize) -> Instance {
        let text = format!("d{}.b{}", self.agents[agent].data, self.hosts[agent].boot);
        Instance::new(&text).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(super) fn is_cut_off(&self, agent: usize) -> bool {
        self.agents[agent].cut_off_until > self.now
    }

    /// Breaks an agent's connection; a new one is dialled soon. The leader sees it break, or does not.
    pub(super) fn disconnect(&mut self, agent: usize) {
        let this = &mut self.agents[agent];
        let (session, was_open) = (this.session, this.open);
        this.open = false;
        this.session += 1;
        if was_open {
            this.alone_since = self.now;
        }
        if was_open && this.up {
            self.take(agent, Happening::SessionClosed(SessionNumber(session)));
        }
        if !self.is_cut_off(agent) && self.random.chance(70) {
            self.after(5, Event::Closed { agent, session });
        }
    }

    /// Delivers in order, or breaks the session.
    fn arrival(&mut self, agent: usize) -> Option<u64> {
        let lost = self.is_cut_off(agent) || (!self.healed && self.random.chance(1));
        if lost {
            self.disconnect(agent);
            return None;
        }
        let arrival = self.agents[agent].arrival.max(self.now + self.random.between(1, 40));
        self.agents[agent].arrival = arrival;
        Some(arrival)
    }

    fn send_up(&mut self, agent: usize, message: Up) {
        if let Some(time) = self.arrival(agent) {
            self.at(time, Event::Up { agent, message });
        }
    }

    pub(super) fn send_down(&mut self, agent: usize, session: u64, message: Down) {
        if self.agents[agent].session != session {
            return;
        }
        if let Some(time) = self.arrival(agent) {
            self.at(time, Event::Down { agent, session, message });
        }
    }

    pub(super) fn agent_tick(&mut self, agent: usize) {
        self.after(100, Event::AgentTick(agent));
        if !self.agents[agent].up {
            return;
        }
        let (now, cut_off) = (self.now, self.is_cut_off(agent));
        if self.agents[agent].open && now.saturating_sub(self.agents[agent].heard_at) > 2_000 {
            self.disconnect(agent);
        }
        if !self.agents[agent].open && self.agents[agent].next_hello <= now && !cut_off {
            self.say_hello(agent);
        }
        self.take(agent, Happening::Ticked);
        self.leave_unheard(agent);
        let verdict = self.judge_alone(agent);
        self.check(verdict);
        if cut_off {
            return;
        }
        self.store_what_is_wanted(agent);
        if self.agents[agent].open && self.agents[agent].next_beat <= now {
            self.agents[agent].next_beat = now + 500;
            let processes = self.hosts[agent].processes.iter();
            let silent = processes.filter(|(_, (fate, _))| *fate == Fate::Hangs);
            let silent_ms = silent.map(|(key, (_, since))| (key.clone(), now - since)).collect();
            let session = self.agents[agent].session;
            self.send_up(agent, Up::Beat { session, silent_ms });
        }
    }

    /// Whether something runs on that an agent which is cut off had to stop by now.
    fn judge_alone(&self, agent: usize) -> Result<(), String> {
        let this = &self.agents[agent];
        let (alone_ms, limit_ms) = (self.now - this.alone_since, this.cut_off_limit_ms);
        if !this.up || this.open || limit_ms == 0 || alone_ms < limit_ms + STOP_MS {
            return Ok(());
        }
        match this.spool.keys().find(|key| self.hosts[agent].can_kill(key)) {
            Some(key) => {
                Err(format!("{key} runs on w{agent}, which had {limit_ms} ms for finding a leader, and {alone_ms}"))
            }
            None => Ok(()),
        }
    }

    fn say_hello(&mut self, agent: usize) {
        let inflated = if self.bug == Some(Bug::InflatedOffer) { 2 } else { 1 };
        let memory = self.hosts[agent].memory * inflated;
        let instance = self.instance(agent);
        let this = &mut self.agents[agent];
        this.next_hello = self.now + 500;
        this.session += 1;
        let hello = Hello {
            session: this.session,
            instance,
            offer: this.offer(memory),
            attempts: this.core.offered().map(|(key, ended)| (key.clone(), ended)).collect(),
            leaving: matches!(this.core.mode(), Mode::Draining | Mode::Stopping),
        };
        self.send_up(agent, Up::Hello(Box::new(hello)));
    }

    /// Ends an agent that was told to stop everything, has, and is not heard: its reports are in the spool.
    fn leave_unheard(&mut self, agent: usize) {
        let now = self.now;
        let this = &mut self.agents[agent];
        let stopped = this.core.mode() == Mode::Stopping && this.core.attempts().all(|(_, a)| a.has_ended());
        if !this.up || !stopped {
            this.unheard_since = None;
        } else if now - *this.unheard_since.get_or_insert(now) >= UNHEARD_MS {
            self.take(agent, Happening::StopAllTimedOut);
        }
    }

    pub(super) fn agent_hears(&mut self, agent: usize, session: u64, message: Down) {
        let this = &mut self.agents[agent];
        if !this.up || this.session != session {
            return;
        }
        self.agents[agent].heard_at = self.now;
        match message {
            Down::Welcome => {
                self.agents[agent].open = true;
                self.agents[agent].next_beat = self.now;
                self.take(agent, Happening::SessionOpened(SessionNumber(session)));
            }
            Down::Alive => {}
            Down::Order(order) => self.take(agent, Happening::Said(SessionNumber(session), order)),
            Down::Over => self.disconnect(agent),
        }
    }

    /// Has the agent's core decide, and does what it says.
    pub(super) fn take(&mut self, agent: usize, happening: Happening) {
        if !self.agents[agent].up {
            return;
        }
        let mut commands = Vec::new();
        self.agents[agent].core.on(self.now, happening, &mut commands);
        for command in commands {
            if self.agents[agent].up {
                self.perform(agent, command);
            }
        }
    }

    fn perform(&mut self, agent: usize, command: Command) {
        match command {
            Command::Start(assignment) => self.start_attempt(agent, *assignment),
            Command::Resume(key) => self.resume_attempt(agent, &key),
            Command::GiveCommit(key, commit) => self.begin_process(agent, &key, Some(commit)),
            Command::GiveImages(key, images) => self.give_images(agent, &key, &images),
            Command::Stop(_, StopCause::CutOff { .. }) if self.bug == Some(Bug::CutOffIgnored) => {}
            Command::Stop(key, cause) => {
                self.oracle.summary.cut_off += u64::from(matches!(cause, StopCause::CutOff { .. }));
                self.stop_attempt(agent, &key, cause);
            }
            Command::Remove(key) => self.remove_attempt(agent, &key),
            Command::StoreAgain(key, report) => self.store_again(agent, &key, &report),
            Command::Send(message) => self.say(agent, message),
            Command::Exit(kind) => self.exit_agent(agent, kind),
        }
    }

    fn say(&mut self, agent: usize, message: Message) {
        if self.agents[agent].open {
            let session = self.agents[agent].session;
            self.send_up(agent, Up::Said { session, message });
        }
    }

    fn exit_agent(&mut self, agent: usize, kind: ExitKind) {
        self.trace.note(self.now, format_args!("the agent of w{agent} goes, as it was asked to: {kind:?}"));
        let ms = self.random.between(100, 4_000);
        self.agent_down(agent, ms);
    }

    /// The agent's process is gone, and comes back after a while.
    pub(super) fn agent_down(&mut self, agent: usize, back_after_ms: u64) {
        let this = &mut self.agents[agent];
        if !this.up {
            return;
        }
        this.up = false;
        this.life += 1;
        this.work.clear();
        self.disconnect(agent);
        self.after(back_after_ms, Event::AgentStart(agent));
    }

    pub(super) fn agent_start(&mut self, agent: usize) {
        self.trace.note(self.now, format_args!("the agent of w{agent} starts, as instance {}", self.instance(agent)));
        let this = &mut self.agents[agent];
        this.up = true;
        (this.core, this.alone_since) = (core(self.now, this.cut_off_limit_ms), self.now);
        this.unheard_since = None;
        let again = self.bug == Some(Bug::RanTwice);
        let spooled: Vec<(AttemptKey, Spooled)> = this.spool.iter().map(|(k, s)| (k.clone(), s.clone())).collect();
        for (key, spooled) in spooled {
            let found = match spooled.report {
                Some(report) => Found::Reported(Box::new(report)),
                None if spooled.started && !again => Found::Started,
                None => Found::Unstarted,
            };
            self.take(agent, Happening::AttemptFound(key, found));
        }
    }
}
