//! The leader killed by SIGKILL, until the next durable write is acknowledged: ours and etcd's in turns.
//!
//! Both clusters run side by side all the time. One client, the same for both, asks all members at once and tries again every
//! few milliseconds. The clock begins when the signal is sent; only writes begun after the process was gone count.

use std::time::Duration;

use anyhow::Context as _;

use super::Settings;
use super::drive::{Replicated, new_key, runtime};
use super::etcd::{self, Etcd};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, ms};
use super::limits;
use super::ours::Ours;
use crate::cluster::Shape;

/// Writes acknowledged before each kill: the last of them right before it.
const BEFORE: usize = 20;

/// A side and what it was told.
struct Side {
    store: Box<dyn Replicated>,
    acknowledged: Vec<String>,
    times: Times,
}

impl Side {
    fn new(store: Box<dyn Replicated>, what: &str) -> Self {
        Self {
            store,
            acknowledged: Vec::new(),
            times: Times::new(format!("{what}: killed to next acknowledged write")),
        }
    }

    fn round(&mut self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Duration> {
        let target = self.store.everywhere()?;
        for _ in 0..BEFORE {
            let key = new_key();
            runtime.block_on(target.writer.insist(&target, &key))?;
            self.acknowledged.push(key);
        }
        let key = new_key();
        let killed = self.store.kill_leader(runtime)?;
        runtime.block_on(target.writer.insist(&target, &key))?;
        let time = killed.elapsed();
        self.acknowledged.push(key);
        self.times.add(time);
        self.store.mend(runtime)?;
        Ok(time)
    }
}

/// Measures.
///
/// # Errors
/// When a side does not recover, or anything acknowledged is lost on ours.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let mut ours = Side::new(Box::new(Ours::start(&Shape { agents: 0, ..Shape::default() })?), "ours");
    let described = etcd::describe();
    let mut peer = match &described {
        Ok(_) => Some(Side::new(Box::new(Etcd::start(&runtime)?), "etcd")),
        Err(_) => None,
    };
    let mut pairs = Vec::new();
    for _ in 0..settings.rounds(30, 5) {
        let own = ours.round(&runtime)?;
        let other = peer.as_mut().map(|peer| peer.round(&runtime)).transpose()?;
        pairs.push(Pair { ours: ms(own), peer: other.map(ms) });
    }
    ours.store.check(&runtime, &ours.acknowledged)?;
    let mut history = format!("all {} writes that ours acknowledged are there", ours.acknowledged.len());
    if let Some(peer) = &peer {
        peer.store.check(&runtime, &peer.acknowledged).context("the peer's history")?;
        history.push_str(&format!(", and all {} of etcd's", peer.acknowledged.len()));
    }
    // A vote and an entry, each synced by a majority that is one round trip away.
    let limit = 2.0 * (limits::sync_ms(&std::env::temp_dir())? + limits::round_trip_ms()?);
    let row = Row::new("kill to next acknowledged write", Unit::Ms, pairs).goal(Goal::Ratio(0.2));
    let worst = |side: &Side| side.times.ms(100.0);
    Ok(Figure {
        name: "fail-over",
        peer: described.unwrap_or_else(|absent| absent),
        rows: vec![row.limit(limit, "two syncs and two loopback round trips: a vote, and an entry")],
        notes: peer.iter().map(|it| format!("worst to worst: {:.2}", worst(&ours) / worst(it))).collect(),
        times: std::iter::once(ours.times).chain(peer.map(|peer| peer.times)).collect(),
        history,
    })
}
