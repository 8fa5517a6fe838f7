//! What breaks the cluster: one fault at a time, or two, each for a while, each undone.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rustix::process::Signal;

use crate::chaos::site::{CLIENTS, Node, Site};
use crate::chaos::switch::Rule;
use crate::cluster::signal;

/// What can be done to a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Fault {
    /// SIGKILL of the leader.
    KillLeader,
    /// SIGKILL of another coordinator.
    KillFollower,
    /// SIGKILL of all coordinators at once.
    KillAll,
    /// SIGSTOP of the leader, for longer than an election takes.
    PauseLeader,
    /// SIGSTOP of another coordinator.
    PauseFollower,
    /// The leader reaches nobody, and nobody reaches it.
    IsolateLeader,
    /// The leader reaches the other coordinators no longer; clients and agents still reach it.
    SplitLeader,
    /// What the leader says to one other coordinator is lost; the other way it is heard.
    OneWay,
    /// Another coordinator is cut off.
    IsolateFollower,
    /// A third of all frames is lost, everywhere.
    Loss,
    /// Everything takes long, and overtakes each other, and some arrives twice.
    Delay,
    /// SIGKILL of an agent, which returns at once.
    KillAgent,
    /// SIGKILL of an agent, which returns after its lease.
    LoseAgent,
    /// SIGSTOP of an agent for longer than its lease.
    PauseAgent,
    /// An agent is cut off for longer than its lease.
    IsolateAgent,
    /// SIGKILL of a runner.
    KillRunner,
    /// SIGKILL of a coordinator, whose registry is removed before it returns.
    LoseRegistry,
}

impl Fault {
    /// All there are.
    pub(super) const ALL: [Self; 17] = [
        Self::KillLeader,
        Self::KillFollower,
        Self::KillAll,
        Self::PauseLeader,
        Self::PauseFollower,
        Self::IsolateLeader,
        Self::SplitLeader,
        Self::OneWay,
        Self::IsolateFollower,
        Self::Loss,
        Self::Delay,
        Self::KillAgent,
        Self::LoseAgent,
        Self::PauseAgent,
        Self::IsolateAgent,
        Self::KillRunner,
        Self::LoseRegistry,
    ];
}

/// What was done, and whether it did anything.
#[derive(Default, Debug)]
pub(super) struct Done {
    /// How often each fault was made and was felt.
    pub(super) felt: BTreeMap<Fault, u32>,
    /// What happened, in order, for people.
    pub(super) journal: Vec<String>,
}

/// Breaks things.
pub(super) struct Nemesis {
    random: StdRng,
    lease: Duration,
    start: Instant,
    next: usize,
    order: Vec<Fault>,
    /// What was done so far.
    pub(super) done: Done,
}

impl Nemesis {
    /// Agents' leases are so long.
    #[must_use]
    pub(super) fn new(random: StdRng, lease: Duration) -> Self {
        let order = Fault::ALL.to_vec();
        Self { random, lease, start: Instant::now(), next: order.len(), order, done: Done::default() }
    }

    /// Each fault once, in random order, then all again in another.
    fn choose(&mut self) -> Fault {
        if self.next == self.order.len() {
            use rand::seq::SliceRandom as _;
            self.order.shuffle(&mut self.random);
            self.next = 0;
        }
        self.next += 1;
        self.order[self.next - 1]
    }

    fn write(&mut self, text: String) {
        self.done.journal.push(format!("{:8.3} {text}", self.start.elapsed().as_secs_f64()));
    }

    /// Makes a fault, waits, undoes it, and waits a little longer.
    ///
    /// # Errors
    /// When a process cannot be started again.
    pub(super) fn strike(&mut self, site: &mut Site) -> anyhow::Result<()> {
        let fault = self.choose();
        let coordinators: Vec<Node> = site.coordinators().collect();
        let leader = site.leader().map(Node::Coordinator).or_else(|| coordinators.first().copied());
        let Some(leader) = leader else { return Ok(()) };
        let others: Vec<Node> = coordinators.iter().copied().filter(|node| *node != leader).collect();
        let follower = others.choose(&mut self.random).copied().unwrap_or(leader);
        let agents: Vec<Node> = site.agents().collect();
        let agent = agents.choose(&mut self.random).copied().unwrap_or(leader);
        let long = self.lease + Duration::from_millis(self.random.random_range(500..4_000));
        let short = Duration::from_millis(self.random.random_range(300..5_000));
        self.write(format!("{fault:?}: leader {leader:?}, follower {follower:?}, agent {agent:?}"));
        let felt = match fault {
            Fault::KillLeader => Self::fell(site, &[leader], short)?,
            Fault::KillFollower => Self::fell(site, &[follower], short)?,
            Fault::KillAll => Self::fell(site, &coordinators, short / 4)?,
            Fault::KillAgent => Self::fell(site, &[agent], Duration::from_millis(200))?,
            Fault::LoseAgent => Self::fell(site, &[agent], long)?,
            Fault::PauseLeader => Self::pause(site, leader, short),
            Fault::PauseFollower => Self::pause(site, follower, short),
            Fault::PauseAgent => Self::pause(site, agent, long),
            Fault::IsolateLeader => Self::isolate(site, leader, short),
            Fault::IsolateFollower => Self::isolate(site, follower, short),
            Fault::IsolateAgent => Self::isolate(site, agent, long),
            Fault::SplitLeader => {
                let cut = Rule { cut: true, ..Rule::default() };
                for other in &others {
                    site.switch.set(leader.host(), other.host(), cut);
                    site.switch.set(other.host(), leader.host(), cut);
                }
                Self::hold(site, short)
            }
            Fault::OneWay => {
                site.switch.set(leader.host(), follower.host(), Rule { cut: true, ..Rule::default() });
                Self::hold(site, short)
            }
            Fault::Loss => {
                Self::everywhere(site, Rule { loss: 0.33, ..Rule::default() });
                Self::hold(site, short)
            }
            Fault::Delay => {
                let ms = Duration::from_millis;
                Self::everywhere(site, Rule { delay: ms(5), jitter: ms(60), twice: 0.1, ..Rule::default() });
                Self::hold(site, short)
            }
            Fault::KillRunner => {
                // Builds come and go all the time.
                let found = Instant::now() + short;
                let mut runners = site.runners();
                while runners.is_empty() && Instant::now() < found {
                    std::thread::sleep(Duration::from_millis(10));
                    runners = site.runners();
                }
                let runner = runners.choose(&mut self.random).copied();
                runner.inspect(|runner| signal(*runner, Signal::KILL)).is_some()
            }
            Fault::LoseRegistry => {
                site.kill(follower)?;
                let registry = site.data_dir(follower).join("registry");
                let there = registry.exists();
                fs::remove_dir_all(&registry)?;
                there
            }
        };
        if felt {
            *self.done.felt.entry(fault).or_default() += 1;
        } else {
            self.write(format!("{fault:?} met nothing"));
        }
        for line in site.start_fallen()? {
            self.write(line);
        }
        let rest = Duration::from_millis(self.random.random_range(200..3_000));
        std::thread::sleep(rest);
        Ok(())
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
}
