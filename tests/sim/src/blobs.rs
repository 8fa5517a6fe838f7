//! Coordinators' blob stores: bytes that are held once they are synced, promised for a while to whoever was told so,
//! collected when nothing names them, copied again where copies are missing.
//!
//! An agent puts its bytes on each holder itself; in the cluster the first holder passes them on.

use std::collections::{BTreeMap, BTreeSet};

use helix_model::placement::rendezvous;
use helix_model::{AttemptKey, Digest, NodeId};

use super::Bug;
use super::registry::NODES;
use super::store::named_blobs;
use super::world::{Event, World};

/// Between two looks for what nothing names.
const COLLECT_EVERY_MS: u64 = 1_000;
/// Younger blobs are never collected.
const AGE_MIN_MS: u64 = 1_500;
/// How long a promise lasts: longer than an attempt can be current without its agent being heard. From five workers on,
/// losses may be held back for a minute.
const LEASE_MS: u64 = 20_000;
const BRAKED_LEASE_MS: u64 = 90_000;
/// Between two passes of the leader over all copies.
const REPAIR_EVERY_MS: u64 = 3_000;

/// Bytes on the way to a coordinator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Put {
    pub(super) agent: usize,
    /// Which life of the agent waits for it.
    pub(super) life: u64,
    pub(super) key: AttemptKey,
    pub(super) digest: Digest,
}

#[derive(Debug, Default)]
struct Held {
    synced: bool,
    since: u64,
    /// Who is to be told once it is synced.
    waiting: Vec<Put>,
}

/// One coordinator's blobs.
#[derive(Debug, Default)]
pub(super) struct BlobStore {
    blobs: BTreeMap<Digest, Held>,
    leases: BTreeMap<Digest, u64>,
    /// What the pass before would have removed.
    doomed: BTreeSet<Digest>,
    /// Counts restarts: what was on its way to the disk then is gone.
    boot: u64,
    /// After a restart nothing goes until every promise it may have given is over.
    collects_from: u64,
}

impl BlobStore {
    /// Whether the bytes would be there after a crash.
    pub(super) fn holds(&self, digest: &Digest) -> bool {
        self.blobs.get(digest).is_some_and(|held| held.synced)
    }

    fn synced(&self) -> impl Iterator<Item = &Digest> {
        self.blobs.iter().filter(|(_, held)| held.synced).map(|(digest, _)| digest)
    }
}

/// What is known of the copies as a whole.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) stores: Vec<BlobStore>,
    /// What a whole pass found named and looked after, since the last disk was lost.
    looked_after: Option<BTreeSet<Digest>>,
    /// Disks lost so far.
    lost: u64,
}

impl Copies {
    pub(super) fn new() -> Self {
        Self { stores: (0..NODES).map(|_| BlobStore::default()).collect(), ..Self::default() }
    }

    /// Whether one more disk may be lost without asking more of the cluster than it promises.
    pub(super) fn may_lose_one(&self) -> bool {
        self.looked_after.is_some()
    }

    /// Whether anybody holds the bytes.
    pub(super) fn exist(&self, digest: &Digest) -> bool {
        self.stores.iter().any(|store| store.holds(digest))
    }
}

impl World {
    fn lease_ms(&self) -> u64 {
        if self.agents.len() < 5 { LEASE_MS } else { BRAKED_LEASE_MS }
    }

    /// Bytes arrive at a coordinator.
    pub(super) fn put_arrives(&mut self, node: usize, put: Put) {
        if !self.registry.nodes[node].up || !self.registry.nodes[node].joined {
            return;
        }
        let now = self.now;
        let store = &mut self.blobs.stores[node];
        if store.holds(&put.digest) {
            self.oracle.summary.reused += 1;
            return self.promise(node, &put);
        }
        let held = store.blobs.entry(put.digest).or_insert_with(|| Held { since: now, ..Held::default() });
        let (first, boot, digest) = (held.waiting.is_empty(), store.boot, put.digest);
        if self.bug == Some(Bug::HeldBeforeSynced) {
            self.promise(node, &put);
        } else if !held.waiting.contains(&put) {
            held.waiting.push(put);
        }
        if first {
            let ms = self.random.between(5, 60);
            self.after(ms, Event::Synced { node, boot, digest });
        }
    }

    pub(super) fn synced(&mut self, node: usize, boot: u64, digest: Digest) {
        let store = &mut self.blobs.stores[node];
        let Some(held) = store.blobs.get_mut(&digest).filter(|_| store.boot == boot) else { return };
        held.synced = true;
        let waiting = std::mem::take(&mut held.waiting);
        self.oracle.held.insert((self.registry.nodes[node].id, digest));
        for put in waiting {
            self.promise(node, &put);
        }
    }

    /// Tells an agent that its bytes are held: they will be, until its report can be committed.
    fn promise(&mut self, node: usize, put: &Put) {
        let until = self.now + self.lease_ms();
        self.blobs.stores[node].leases.insert(put.digest, until);
        let cut_off = self.agents[put.agent].cut_off_until > self.now;
        if !cut_off && (self.healed || !self.random.chance(3)) {
            let (ms, holder) = (self.random.between(1, 40), self.registry.nodes[node].id);
            self.after(ms, Event::Stored { put: put.clone(), holder });
        }
    }

    /// A coordinator looks for blobs that nothing names: they go when it finds so twice.
    pub(super) fn collect(&mut self, node: usize) {
        self.after(COLLECT_EVERY_MS, Event::Collect(node));
        let member = self.registry.nodes[node].up && self.registry.nodes[node].joined;
        if !member || self.now < self.blobs.stores[node].collects_from {
            return;
        }
        if !self.registry.is_led() {
            self.blobs.stores[node].doomed.clear();
            return;
        }
        self.catch_up(node);
        let named = named_blobs(&self.registry.nodes[node].rows);
        let (now, ignored) = (self.now, self.bug == Some(Bug::CollectedLease));
        let store = &self.blobs.stores[node];
        let leased = |digest: &Digest| store.leases.get(digest).is_some_and(|until| *until > now);
        let old = store.blobs.iter().filter(|(_, held)| held.synced && held.since + AGE_MIN_MS <= now);
        let unnamed = old.filter(|(digest, _)| !named.contains(digest) && (ignored || !leased(digest)));
        let found: BTreeSet<Digest> = unnamed.map(|(digest, _)| *digest).collect();
        let gone: Vec<Digest> = found.intersection(&store.doomed).copied().collect();
        self.blobs.stores[node].doomed = &found - &gone.iter().copied().collect();
        for digest in gone {
            self.blobs.stores[node].blobs.remove(&digest);
            self.oracle.summary.collected += 1;
            let id = self.registry.nodes[node].id;
            self.trace.note(self.now, format_args!("node {id} collects {}", super::words::short(&digest)));
        }
    }

    /// The leader begins a pass over the copies of all that is named.
    pub(super) fn repair(&mut self) {
        self.after(REPAIR_EVERY_MS, Event::Repair);
        let whole = self.registry.nodes.iter().all(|node| node.up && node.joined);
        let Some(rows) = self.registry.rows().filter(|_| whole && self.registry.is_led()) else { return };
        let (digests, lost, term) = (named_blobs(rows), self.blobs.lost, self.registry.term);
        let ms = self.random.between(50, 400);
        self.after(ms, Event::Repaired { term, lost, digests });
    }

    /// And ends it: what was short of copies has them.
    pub(super) fn repaired(&mut self, term: u64, lost: u64, digests: BTreeSet<Digest>) {
        let whole = self.registry.nodes.iter().all(|node| node.up && node.joined);
        if !self.registry.is_led() || term != self.registry.term || !whole || lost != self.blobs.lost {
            return;
        }
        // A coordinator whose copies are counted from the registry believes that all is well.
        if self.bug != Some(Bug::RepairFromRecord) {
            for digest in &digests {
                self.copy(digest);
            }
        }
        self.blobs.looked_after = Some(digests);
    }

    fn copy(&mut self, digest: &Digest) {
        let slots: BTreeMap<NodeId, usize> =
            self.registry.nodes.iter().enumerate().map(|(slot, node)| (node.id, slot)).collect();
        let holds = |slot: usize| self.blobs.stores[slot].holds(digest);
        let have = slots.values().filter(|slot| holds(**slot)).count();
        if have == 0 || have >= 2 {
            return;
        }
        let open = rendezvous(&digest.0, slots.keys().copied()).into_iter().find(|id| !holds(slots[id]));
        let Some(id) = open else { return };
        let held = Held { synced: true, since: self.now, waiting: Vec::new() };
        self.blobs.stores[slots[&id]].blobs.insert(*digest, held);
        self.oracle.held.insert((id, *digest));
        self.oracle.summary.repaired += 1;
        let now = self.now;
        self.trace.note(now, format_args!("the leader has {} copied to node {id}", super::words::short(digest)));
    }

    /// A coordinator restarts: what was not synced is gone, and so is its memory of promises.
    pub(super) fn blobs_restart(&mut self, node: usize) {
        let from = self.now + self.lease_ms();
        let store = &mut self.blobs.stores[node];
        store.boot += 1;
        store.blobs.retain(|_, held| held.synced);
        store.leases.clear();
        store.doomed.clear();
        store.collects_from = from;
    }

    /// A coordinator's blobs are gone. Those that nobody else holds are lost, which may only be if they were on one disk
    /// more than the cluster had time to look after.
    pub(super) fn lose_blobs(&mut self, node: usize) {
        self.blobs_restart(node);
        let before = std::mem::take(&mut self.blobs.stores[node].blobs);
        self.blobs.lost += 1;
        self.oracle.summary.disks_lost += 1;
        let looked_after = self.blobs.looked_after.take().unwrap_or_default();
        let named = self.registry.rows().map(named_blobs).unwrap_or_default();
        for digest in before.keys().filter(|digest| !self.blobs.exist(digest)) {
            if looked_after.contains(digest) && named.contains(digest) {
                let why = format!(
                    "{} was on the one disk that was lost, although builds name it and all copies were looked after",
                    super::words::short(digest)
                );
                self.wrong.get_or_insert(why);
            }
            self.oracle.excused.insert(*digest);
        }
    }

    /// What all stores hold, for the verdict at the end.
    pub(super) fn count_held(&self) -> usize {
        self.blobs.stores.iter().map(|store| store.synced().count()).sum()
    }
}
