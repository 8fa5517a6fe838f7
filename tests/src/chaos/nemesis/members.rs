//! Changes of members, hand-overs and upgrades: what operators do while a cluster serves.

use std::io::Read as _;
use std::process::Child;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use rustix::process::Signal;

use crate::chaos::nemesis::{Nemesis, Scene};
use crate::chaos::site::Node;

/// How long a change of members may take: what a node that leaves holds is copied first, and nobody promises how fast.
const CHANGE_LIMIT: Duration = Duration::from_secs(300);

/// How long a node that is asked to end may take.
const END_LIMIT: Duration = Duration::from_secs(30);

impl Nemesis {
    /// A coordinator joins; somebody makes room first if need be.
    pub(super) fn add_member(&mut self, scene: &mut Scene<'_>) -> anyhow::Result<bool> {
        if !scene.site.has_room() && !self.remove_member(scene)? {
            return Ok(false);
        }
        self.change(scene, Change::Add, None)
    }

    /// A coordinator is removed; somebody joins first if only three are there.
    pub(super) fn remove_member(&mut self, scene: &mut Scene<'_>) -> anyhow::Result<bool> {
        if scene.site.has_room() && !self.change(scene, Change::Add, None)? {
            return Ok(false);
        }
        self.change(scene, Change::Remove, None)
    }

    /// A change of either kind, in the middle of which the leader is killed.
    pub(super) fn kill_leader_in_change(
        &mut self,
        scene: &mut Scene<'_>,
        leader: Node,
        away: Duration,
    ) -> anyhow::Result<bool> {
        let change = if scene.site.has_room() { Change::Add } else { Change::Remove };
        self.change(scene, change, Some((leader, away)))
    }

    /// Carries out a change, and says whether it was done: with a leader to kill, while that was alive no longer.
    fn change(
        &mut self,
        scene: &mut Scene<'_>,
        change: Change,
        kill: Option<(Node, Duration)>,
    ) -> anyhow::Result<bool> {
        self.expect_whole(scene, "before the members change")?;
        let node = match change {
            Change::Add => scene.site.seat()?,
            Change::Remove => {
                let all: Vec<Node> = scene.site.coordinators().collect();
                let Some(node) = all.choose(&mut self.random) else { return Ok(false) };
                *node
            }
        };
        let verb = if change == Change::Add { "add" } else { "remove" };
        let id = scene.site.id(node);
        let what = format!("helix cluster {verb} {id}");
        self.write(&format!("{what} ({node:?})"));
        let mut child = scene.site.begin_change(verb, node)?;
        let mut interrupted = kill.is_none();
        if let Some((leader, away)) = kill {
            std::thread::sleep(Duration::from_millis(self.random.random_range(20..600)));
            interrupted = child.try_wait()?.is_none();
            scene.site.signal(leader, Signal::KILL);
            scene.site.kill(leader)?;
            std::thread::sleep(away);
            // Who is being removed may be the leader, and is to end by itself.
            scene.site.start_fallen()?;
        }
        let begun = Instant::now();
        let done = loop {
            match Self::finish(&mut child, begun + CHANGE_LIMIT)? {
                Ok(()) => break true,
                // The node was killed while it was asked: the refusal says that it is to be repeated, and so an operator does.
                Err(said)
                    if kill.is_some() && said.contains("member_unreachable") && begun.elapsed() < CHANGE_LIMIT =>
                {
                    self.write(&format!("{what}, once more: {}", said.lines().last().unwrap_or_default()));
                    child = scene.site.begin_change(verb, node)?;
                }
                Err(said) => {
                    self.wrong(format!("{what} failed {said}"));
                    break false;
                }
            }
        };
        self.write(&format!("{what} has ended after {:.1?}", begun.elapsed()));
        if done && change == Change::Remove {
            self.wrong.extend(scene.site.unseat(node)?);
        }
        Ok(done && interrupted)
    }

    /// Waits for a change's end; how it failed, in words.
    fn finish(child: &mut Child, deadline: Instant) -> anyhow::Result<Result<(), String>> {
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill()?;
                break child.wait()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if status.success() {
            return Ok(Ok(()));
        }
        let mut said = String::new();
        child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said)).transpose()?;
        Ok(Err(format!("({status}): {said}")))
    }

    /// Another coordinator is asked to lead, and does.
    pub(super) fn transfer(&mut self, scene: &mut Scene<'_>, to: Node) -> anyhow::Result<bool> {
        self.expect_whole(scene, "before leadership is handed over")?;
        let before = scene.site.leader();
        let id = scene.site.id(to).to_string();
        if let Err(error) = scene.site.helix(&["cluster", "transfer-leader", &id, "--connect-timeout", "30s"]) {
            self.wrong(format!("helix cluster transfer-leader {id} failed: {error:#}"));
            return Ok(false);
        }
        Ok(before != Some(to))
    }

    /// Each coordinator is ended in order and started again, the leader last.
    pub(super) fn restart_all(&mut self, scene: &mut Scene<'_>, leader: Node) -> anyhow::Result<bool> {
        let others = scene.site.coordinators().filter(|node| *node != leader);
        for node in others.chain([leader]).collect::<Vec<_>>() {
            self.expect_whole(scene, "before the next node is upgraded")?;
            scene.site.signal(node, Signal::TERM);
            match scene.wait_until(END_LIMIT, |site| Ok(site.ended(node)?.is_some()))? {
                true => {
                    let status = scene.site.ended(node)?;
                    if status.is_some_and(|status| !status.success()) {
                        self.wrong(format!("{} was asked to end and ended as {status:?}", node.name()));
                    }
                }
                false => self.wrong(format!("{} was asked to end and had not after {END_LIMIT:?}", node.name())),
            }
            scene.site.kill(node)?;
            scene.site.spawn(node)?;
        }
        Ok(true)
    }

    /// An agent goes for an upgrade while it runs the witness; its runners go on.
    pub(super) fn detach(&mut self, scene: &mut Scene<'_>, agent: Node, away: Duration) -> anyhow::Result<bool> {
        let runners = scene.site.runners_of(agent);
        if let Err(error) = scene.site.detach(agent) {
            self.wrong(format!("{} could not be detached: {error:#}", agent.name()));
        }
        if !scene.wait_until(END_LIMIT, |site| Ok(site.ended(agent)?.is_some()))? {
            self.wrong(format!("{} was detached and had not ended after {END_LIMIT:?}", agent.name()));
        }
        scene.site.kill(agent)?;
        std::thread::sleep(away);
        let went_on = scene.site.runners_of(agent).iter().any(|runner| runners.contains(runner));
        scene.site.spawn(agent)?;
        Ok(went_on)
    }
}

/// Of members.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Add,
    Remove,
}
