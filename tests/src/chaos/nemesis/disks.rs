//! Disks that are full, fail, hang or are slow.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rustix::process::Signal;

use crate::chaos::nemesis::{Nemesis, Scene};
use crate::chaos::site::Node;
use crate::chaos::site::disk::Unsynced;
use crate::chaos::site::layout::RESERVE;

/// How long a fault waits to be noticed before it counts as one that met nothing.
const NOTICE_LIMIT: Duration = Duration::from_secs(15);

/// How long a coordinator may take to stop itself when its disk fails.
const STOP_LIMIT: Duration = Duration::from_secs(20);

impl Nemesis {
    /// Fills a coordinator's disk to the last block. It may stop itself, if it says why.
    pub(super) fn fill_to_the_brim(
        &mut self,
        scene: &mut Scene<'_>,
        node: Node,
        wait: Duration,
    ) -> anyhow::Result<bool> {
        let mark = scene.site.log_length(node)?;
        scene.site.disk(node)?.fill(0)?;
        let words = ["No space left", "disk_reserve", "space"];
        let noticed = scene
            .wait_until(NOTICE_LIMIT, |site| Ok(site.said_since(node, mark, &words)? || site.ended(node)?.is_some()))?;
        std::thread::sleep(wait);
        self.expect_words(scene, node, mark, &words)?;
        scene.site.disk(node)?.free()?;
        Ok(noticed)
    }

    /// Fills a coordinator's disk below its reserve: it takes no submits, and says so.
    pub(super) fn fill_below_reserve(
        &mut self,
        scene: &mut Scene<'_>,
        node: Node,
        wait: Duration,
    ) -> anyhow::Result<bool> {
        scene.site.disk(node)?.fill(RESERVE / 4)?;
        let asked = ["cluster", "status", "--stale", "-o", "json", "--connect-timeout", "3s"];
        let noticed = scene.wait_until(NOTICE_LIMIT, |site| {
            Ok(site.helix_at(node, &asked).is_ok_and(|said| said.contains("disk_reserve")))
        })?;
        std::thread::sleep(wait);
        if scene.site.ended(node)?.is_some() {
            self.wrong(format!("{} ended although its disk had a reserve left", node.name()));
        }
        scene.site.disk(node)?.free()?;
        Ok(noticed)
    }

    /// Fills an agent's disk: it takes no new work, and says so.
    pub(super) fn fill_agent(&mut self, scene: &mut Scene<'_>, node: Node, wait: Duration) -> anyhow::Result<bool> {
        let left = if self.random.random_bool(0.5) { 0 } else { 4 << 20 };
        scene.site.disk(node)?.fill(left)?;
        let name = node.name();
        let asked = ["workers", "show", &name, "-o", "json", "--connect-timeout", "3s"];
        let noticed = scene.wait_until(NOTICE_LIMIT, |site| {
            let Ok(said) = site.helix(&asked) else { return Ok(false) };
            let worker: serde_json::Value = serde_json::from_str(&said)?;
            Ok(worker["pressure"].as_str().is_some_and(|pressure| !pressure.is_empty())
                || worker["pressure"].as_array().is_some_and(|pressure| !pressure.is_empty()))
        })?;
        std::thread::sleep(wait);
        scene.site.disk(node)?.free()?;
        Ok(noticed)
    }

    /// A coordinator's disk fails: it has to stop itself and say why.
    pub(super) fn fail_disk(
        &mut self,
        scene: &mut Scene<'_>,
        node: Node,
        how: Failing,
        wait: Duration,
    ) -> anyhow::Result<bool> {
        let mark = scene.site.log_length(node)?;
        // Nobody may be within fsync meanwhile: ext4 can answer one with success whose journal is aborted under it, and then a
        // disk has lied, which no program can bear.
        scene.site.halt(node)?;
        match how {
            Failing::Error => scene.site.disk(node)?.fail(Unsynced::Lost)?,
            Failing::ReadOnly => scene.site.disk(node)?.make_read_only()?,
        }
        scene.site.signal(node, Signal::CONT);
        let stopped = scene.wait_until(STOP_LIMIT, |site| Ok(site.ended(node)?.is_some()))?;
        if !stopped {
            self.wrong(format!("{} still ran {STOP_LIMIT:?} after its disk had failed ({how:?})", node.name()));
        }
        self.expect_words(scene, node, mark, &["nput/output error", "ead-only file system"])?;
        std::thread::sleep(wait);
        scene.site.kill(node)?;
        scene.site.disk(node)?.replace()?;
        Ok(true)
    }

    /// An agent's disk fails; its builds end with it.
    pub(super) fn fail_agent_disk(
        &mut self,
        scene: &mut Scene<'_>,
        node: Node,
        wait: Duration,
    ) -> anyhow::Result<bool> {
        let mark = scene.site.log_length(node)?;
        scene.site.disk(node)?.fail(Unsynced::Kept)?;
        let words = ["nput/output error"];
        let noticed = scene
            .wait_until(NOTICE_LIMIT, |site| Ok(site.said_since(node, mark, &words)? || site.ended(node)?.is_some()))?;
        std::thread::sleep(wait);
        scene.site.kill(node)?;
        scene.site.disk(node)?.replace()?;
        Ok(noticed)
    }

    /// A coordinator's disk takes nothing for a while, and loses nothing.
    pub(super) fn hang_disk(scene: &mut Scene<'_>, node: Node, wait: Duration) -> anyhow::Result<bool> {
        let disk = scene.site.disk(node)?;
        disk.freeze()?;
        let waits = scene.site.waits_for_disk(node, wait);
        scene.site.disk(node)?.thaw()?;
        Ok(waits)
    }

    /// All coordinators' disks hang for a moment, again and again.
    pub(super) fn slow_disks(&mut self, scene: &mut Scene<'_>, wait: Duration) -> anyhow::Result<bool> {
        let nodes: Vec<Node> = scene.site.coordinators().collect();
        let (until, mut waited) = (Instant::now() + wait, false);
        while Instant::now() < until {
            let hang = Duration::from_millis(self.random.random_range(20..250));
            for node in &nodes {
                scene.site.disk(*node)?.freeze()?;
            }
            waited |= nodes.first().is_some_and(|node| scene.site.waits_for_disk(*node, hang));
            for node in &nodes {
                scene.site.disk(*node)?.thaw()?;
            }
            std::thread::sleep(Duration::from_millis(self.random.random_range(5..50)));
        }
        Ok(waited)
    }

    /// Whoever stopped itself has said why.
    fn expect_words(&mut self, scene: &mut Scene<'_>, node: Node, mark: u64, words: &[&str]) -> anyhow::Result<()> {
        if let Some(status) = scene.site.ended(node)? {
            let text = format!("{} stopped itself because of its disk: {status}", node.name());
            self.write(&text);
            if !scene.site.said_since(node, mark, words)? {
                self.wrong(format!("{} stopped and did not say that its disk made it ({status})", node.name()));
            }
        }
        Ok(())
    }
}

/// How a disk fails.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failing {
    /// Everything is an error.
    Error,
    /// It can be read.
    ReadOnly,
}
