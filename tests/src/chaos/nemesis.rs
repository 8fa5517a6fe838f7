//! What breaks the cluster: one fault after another, each for a while, each undone, and recovery from each waited for.
//!
//! Now and then the next one comes while the cluster still recovers.

mod disks;
mod members;
mod witness;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_common::endpoints::Endpoints;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::runtime::Runtime;

use crate::chaos::fault::{Deck, Fault};
use crate::chaos::load::{Load, Window};
use crate::chaos::nemesis::disks::Failing;
use crate::chaos::site::{CLIENTS, Node, Site};
use crate::chaos::switch::Rule;
use crate::cluster::signal;

/// How long all that was broken may take to work again once nothing is broken any more.
pub(super) const RECOVERY_LIMIT: Duration = Duration::from_secs(10);

/// How long it is waited for before the run is given up.
const PATIENCE: Duration = Duration::from_secs(90);

/// How often the next fault comes before the cluster has recovered.
const HURRY: f64 = 0.2;

const HOUR_S: i64 = 3600;
const YEAR_S: i64 = 365 * 24 * HOUR_S;

/// What a nemesis acts on.
pub(super) struct Scene<'a> {
    /// What is broken.
    pub(super) site: &'a mut Site,
    /// Who works meanwhile.
    pub(super) load: Arc<Load>,
    /// For builds of its own.
    pub(super) endpoints: Endpoints,
    /// On which it submits them.
    pub(super) runtime: &'a Runtime,
}

impl Scene<'_> {
    /// Waits for something to be seen; whether it was.
    fn wait_until(
        &mut self,
        limit: Duration,
        mut seen: impl FnMut(&mut Site) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            if seen(self.site)? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Who is meant by a fault, and for how long.
struct Aim {
    leader: Node,
    others: Vec<Node>,
    follower: Node,
    agent: Node,
    /// Longer than an agent's lease.
    long: Duration,
    short: Duration,
}

/// Breaks things.
pub(super) struct Nemesis {
    random: StdRng,
    lease: Duration,
    start: Instant,
    witnesses: u32,
    /// The cluster was not seen whole since the last fault.
    hurried: bool,
    /// What comes when.
    pub(super) deck: Deck,
    /// Tells people what happens.
    say: fn(&str),
    /// What must hold and did not.
    pub(super) wrong: Vec<String>,
    /// When nobody had to be served, because no majority was left.
    pub(super) windows: Vec<Window>,
    /// The longest recovery from each fault.
    pub(super) recovery: BTreeMap<Fault, Duration>,
}

impl Nemesis {
    /// Agents' leases are so long.
    #[must_use]
    pub(super) fn new(seed: u64, lease: Duration, faults: Vec<Fault>, say: fn(&str)) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            lease,
            start: Instant::now(),
            witnesses: 0,
            hurried: false,
            deck: Deck::new(StdRng::seed_from_u64(seed), faults),
            say,
            wrong: Vec::new(),
            windows: Vec::new(),
            recovery: BTreeMap::new(),
        }
    }

    /// Says what happens.
    pub(super) fn write(&self, text: &str) {
        (self.say)(&format!("{:8.3} {text}", self.start.elapsed().as_secs_f64()));
    }

    fn wrong(&mut self, text: String) {
        self.write(&format!("WRONG {text}"));
        self.wrong.push(text);
    }

    /// Makes a fault, waits, undoes it, and lets the cluster recover.
    ///
    /// # Errors
    /// When something cannot be undone: a process not be started, a disk not be mounted.
    pub(super) fn strike(&mut self, scene: &mut Scene<'_>, fault: Fault) -> anyhow::Result<()> {
        let begin = scene.load.start.elapsed();
        let Some(aim) = self.aim(scene.site) else { return Ok(()) };
        let witness = if fault.spares_builds() { self.call_witness(scene)? } else { None };
        self.write(&format!("{fault:?}: leader {:?}, follower {:?}, agent {:?}", aim.leader, aim.follower, aim.agent));
        let agent = witness.as_ref().map_or(aim.agent, |witness| witness.agent);
        let met = self.commit(scene, fault, &Aim { agent, ..aim })?;
        if met {
            self.deck.met(fault);
        } else {
            self.write(&format!("{fault:?} met nothing"));
        }
        for line in scene.site.start_fallen()? {
            self.write(&line);
        }
        let undone = scene.load.start.elapsed();
        if fault.takes_majority() || self.hurried {
            self.windows.push(Window { begin, end: undone });
        }
        self.recover(scene, fault)?;
        if let Some(witness) = witness {
            self.hear_witness(scene, &witness);
        }
        std::thread::sleep(Duration::from_millis(self.random.random_range(200..1_500)));
        Ok(())
    }

    fn aim(&mut self, site: &Site) -> Option<Aim> {
        let coordinators: Vec<Node> = site.coordinators().collect();
        let leader = site.leader().or_else(|| coordinators.first().copied())?;
        let others: Vec<Node> = coordinators.into_iter().filter(|node| *node != leader).collect();
        let follower = *others.choose(&mut self.random)?;
        let agents: Vec<Node> = site.agents().collect();
        let agent = *agents.choose(&mut self.random)?;
        let long = self.lease + Duration::from_millis(self.random.random_range(500..4_000));
        let short = Duration::from_millis(self.random.random_range(300..5_000));
        Some(Aim { leader, others, follower, agent, long, short })
    }

    /// Waits until the cluster is whole again, unless this is one of the times when it is given no rest.
    fn recover(&mut self, scene: &mut Scene<'_>, fault: Fault) -> anyhow::Result<()> {
        let undone = Instant::now();
        if self.random.random_bool(HURRY) {
            self.hurried = true;
            return Ok(());
        }
        while let Some(missing) = scene.site.missing() {
            if undone.elapsed() > PATIENCE {
                anyhow::bail!("the cluster was not whole {PATIENCE:?} after {fault:?} was undone: {missing}");
            }
            for line in scene.site.start_fallen()? {
                self.write(&line);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let took = undone.elapsed();
        // After several faults at once it is not known from which it recovered.
        if !self.hurried {
            let worst = self.recovery.entry(fault).or_default();
            *worst = (*worst).max(took);
        }
        if took > RECOVERY_LIMIT {
            self.wrong(format!(
                "it took {took:.1?} to recover from {fault:?}, and must not take more than {RECOVERY_LIMIT:?}"
            ));
        }
        self.hurried = false;
        self.look_after_held(scene)
    }

    /// Plays the operator: workers that are held for what nobody has seen dead get no work until somebody acts.
    fn look_after_held(&mut self, scene: &mut Scene<'_>) -> anyhow::Result<()> {
        for agent in scene.site.held()? {
            self.write(&format!("{agent:?} is held: its host is started anew"));
            scene.site.start_anew(agent)?;
            self.expect_whole(scene, "after a worker was removed")?;
        }
        Ok(())
    }

    /// For what has to begin on a whole cluster.
    ///
    /// # Errors
    /// When a node cannot be started.
    pub(super) fn expect_whole(&mut self, scene: &mut Scene<'_>, when: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        while let Some(missing) = scene.site.missing() {
            if begun.elapsed() > PATIENCE {
                self.wrong(format!("the cluster was not whole within {PATIENCE:?} {when}: {missing}"));
                break;
            }
            // One that stopped for its disk may have ended only after the fault before was undone.
            for line in scene.site.start_fallen()? {
                self.write(&line);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Makes a fault and undoes it. Whether it met anything.
    fn commit(&mut self, scene: &mut Scene<'_>, fault: Fault, aim: &Aim) -> anyhow::Result<bool> {
        let Aim { leader, follower, agent, long, short, .. } = *aim;
        let either = if self.random.random_bool(0.5) { leader } else { follower };
        match fault {
            Fault::KillLeader => Self::fell(scene.site, &[leader], short),
            Fault::KillFollower => Self::fell(scene.site, &[follower], short),
            Fault::KillAll => {
                let all: Vec<Node> = scene.site.coordinators().collect();
                Self::fell(scene.site, &all, short / 4)
            }
            Fault::KillAgent => Self::fell(scene.site, &[agent], Duration::from_millis(200)),
            Fault::LoseAgent => Self::fell(scene.site, &[agent], long),
            Fault::PauseLeader => Ok(Self::pause(scene.site, leader, short)),
            Fault::PauseFollower => Ok(Self::pause(scene.site, follower, short)),
            Fault::PauseAgent => Ok(Self::pause(scene.site, agent, long)),
            Fault::IsolateLeader => Ok(Self::isolate(scene.site, leader, short)),
            Fault::IsolateFollower => Ok(Self::isolate(scene.site, follower, short)),
            Fault::IsolateAgent => Ok(Self::isolate(scene.site, agent, long)),
            Fault::SplitLeader | Fault::OneWay | Fault::Loss | Fault::Delay => {
                Ok(Self::disturb(scene.site, fault, aim))
            }
            Fault::KillRunner => Ok(self.kill_runner(scene.site, short)),
            Fault::LoseRegistry => Self::lose_registry(scene.site, follower),
            Fault::FillLeader => self.fill_to_the_brim(scene, leader, short),
            Fault::FillFollower => self.fill_below_reserve(scene, follower, short),
            Fault::FillAgent => self.fill_agent(scene, agent, short),
            Fault::FailLeaderDisk => self.fail_disk(scene, leader, Failing::Error, short),
            Fault::FailFollowerDisk => self.fail_disk(scene, follower, Failing::Error, short),
            Fault::ReadOnlyDisk => self.fail_disk(scene, either, Failing::ReadOnly, short),
            Fault::FailAgentDisk => self.fail_agent_disk(scene, agent, short),
            Fault::HangLeaderDisk => Self::hang_disk(scene, leader, short),
            Fault::SlowDisks => self.slow_disks(scene, short),
            Fault::ClockBackLeader => Self::jump(scene.site, leader, -HOUR_S, long),
            Fault::ClockAheadLeader => Self::jump(scene.site, leader, YEAR_S, long),
            Fault::ClockAheadFollower => Self::jump(scene.site, follower, YEAR_S, long),
            Fault::ClockAgent => {
                let offset_s = if self.random.random_bool(0.5) { -HOUR_S } else { YEAR_S };
                Self::jump(scene.site, agent, offset_s, long)
            }
            Fault::AddMember => self.add_member(scene),
            Fault::RemoveMember => self.remove_member(scene),
            Fault::KillLeaderInChange => self.kill_leader_in_change(scene, leader, short),
            Fault::TransferLeadership => self.transfer(scene, follower),
            Fault::RollingRestart => self.restart_all(scene, leader),
            Fault::DetachAgent => self.detach(scene, agent, short),
        }
    }

    fn fell(site: &mut Site, nodes: &[Node], wait: Duration) -> anyhow::Result<bool> {
        let ran = nodes.iter().all(|node| site.pid(*node).is_some());
        // All are told before any is waited for.
        for node in nodes {
            site.signal(*node, Signal::KILL);
        }
        for node in nodes {
            site.kill(*node)?;
        }
        std::thread::sleep(wait);
        Ok(ran)
    }

    fn pause(site: &Site, node: Node, wait: Duration) -> bool {
        site.signal(node, Signal::STOP);
        std::thread::sleep(wait);
        site.signal(node, Signal::CONT);
        site.pid(node).is_some()
    }

    fn isolate(site: &Site, node: Node, wait: Duration) -> bool {
        let cut = Rule { cut: true, ..Rule::default() };
        for other in Self::hosts(site) {
            site.switch.set(node.host(), other, cut);
            site.switch.set(other, node.host(), cut);
        }
        Self::hold(site, wait)
    }

    fn disturb(site: &Site, fault: Fault, aim: &Aim) -> bool {
        let cut = Rule { cut: true, ..Rule::default() };
        let ms = Duration::from_millis;
        let mut wait = aim.short;
        match fault {
            Fault::SplitLeader => {
                // Agents that it keeps are lost to the next one after a lease.
                wait = aim.long;
                for other in &aim.others {
                    site.switch.set(aim.leader.host(), other.host(), cut);
                    site.switch.set(other.host(), aim.leader.host(), cut);
                }
            }
            Fault::Loss => Self::everywhere(site, Rule { loss: 0.33, ..Rule::default() }),
            Fault::Delay => {
                Self::everywhere(site, Rule { delay: ms(5), jitter: ms(60), twice: 0.1, ..Rule::default() });
            }
            _ => site.switch.set(aim.leader.host(), aim.follower.host(), cut),
        }
        Self::hold(site, wait)
    }

    fn hosts(site: &Site) -> Vec<u8> {
        site.nodes().iter().map(|node| node.host()).chain([CLIENTS]).collect()
    }

    fn everywhere(site: &Site, rule: Rule) {
        let hosts = Self::hosts(site);
        for from in &hosts {
            for to in &hosts {
                site.switch.set(*from, *to, rule);
            }
        }
    }

    /// Waits, heals the network, and says whether any frame had met a rule.
    fn hold(site: &Site, wait: Duration) -> bool {
        std::thread::sleep(wait);
        site.switch.heal() > 0
    }

    fn kill_runner(&mut self, site: &Site, patience: Duration) -> bool {
        // Builds come and go all the time.
        let found = Instant::now() + patience;
        let mut runners = site.runners();
        while runners.is_empty() && Instant::now() < found {
            std::thread::sleep(Duration::from_millis(10));
            runners = site.runners();
        }
        let runner = runners.choose(&mut self.random).copied();
        runner.inspect(|runner| signal(*runner, Signal::KILL)).is_some()
    }

    fn lose_registry(site: &mut Site, node: Node) -> anyhow::Result<bool> {
        site.kill(node)?;
        let registry = site.data_dir(node).join("registry");
        let there = registry.exists();
        if there {
            fs::remove_dir_all(&registry)?;
        }
        Ok(there)
    }

    /// Moves a node's wall clock for a while.
    fn jump(site: &Site, node: Node, offset_s: i64, wait: Duration) -> anyhow::Result<bool> {
        let clock = site.clock(node)?;
        let before = clock.answered()?;
        clock.set(offset_s)?;
        std::thread::sleep(wait);
        clock.set(0)?;
        Ok(clock.answered()? > before)
    }
}
