//! How results and logs get to coordinators, and an image's index to its registry: put, repeated, put elsewhere, until
//! enough hold them, or until it is too late.

use std::collections::BTreeSet;

use helix_agent_core::{Artifact, Blob, Event as Happening, Image, PlatformImage, Report, SealedLog, Verdict};
use helix_model::placement::rendezvous;
use helix_model::{AttemptKey, Digest, NodeId, Outputs, Reason};

use super::{Stage, digest_of};
use crate::Bug;
use crate::blobs::Put;
use crate::world::{Event, World};

/// Builds share so many different results: most bytes are there already.
const CONTENTS: u8 = 12;
/// How often the coordinator that took bytes finds no peer that takes them too, and says so.
const ALONE_PERCENT: u64 = 10;
/// A put that was not answered is repeated, maybe elsewhere.
const PUT_AGAIN_MS: u64 = 400;
/// As the policy has it.
const STORE_DEADLINE_MS: u64 = 20_000;

/// Bytes on their way to coordinators; the log's are the last.
#[derive(Clone, Debug)]
pub(super) struct Storing {
    blobs: Vec<(Digest, BTreeSet<NodeId>)>,
    began: u64,
    /// The log follows when large outputs are there.
    log_from: u64,
    next_try: u64,
    tries: u64,
}

impl Storing {
    fn new(digests: Vec<Digest>, now: u64) -> Self {
        let blobs = digests.into_iter().map(|digest| (digest, BTreeSet::new())).collect();
        Self { blobs, began: now, log_from: now, next_try: now, tries: 0 }
    }

    fn is_done(&self) -> bool {
        self.blobs.iter().all(|(_, holders)| holders.len() >= 2)
    }

    fn is_somewhere(&self) -> bool {
        self.blobs.iter().all(|(_, holders)| !holders.is_empty())
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
    /// A command ended well: its results and its log are stored before that is said.
    pub(super) fn store_results(&mut self, agent: usize, key: &AttemptKey) {
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

    pub(super) fn sealing(&self, key: &AttemptKey) -> Storing {
        Storing::new(vec![digest_of(key, 3)], self.now)
    }

    /// Sends bytes that not enough coordinators hold, and takes note where they do.
    pub(crate) fn store_what_is_wanted(&mut self, agent: usize) {
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
    pub(crate) fn stored(&mut self, put: &Put, holder: NodeId) {
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
        let alone = self.random.chance(ALONE_PERCENT);
        let Some(work) = self.agents[agent].work.get_mut(key) else { return };
        match &work.stage {
            Stage::Storing(storing) if storing.is_done() => {
                let (artifacts, log) = (storing.artifacts(), storing.log());
                let report = Report { artifacts, log, ..Report::bare(Verdict::Succeeded { image_tag: String::new() }) };
                self.results_stored(agent, key, report);
            }
            Stage::Sealing(storing) if storing.is_done() || (alone && storing.is_somewhere()) => {
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

    pub(crate) fn give_images(&mut self, agent: usize, key: &AttemptKey, images: &[PlatformImage]) {
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

    /// Too few coordinators hold what a report names: all of it is stored once more.
    pub(crate) fn store_again(&mut self, agent: usize, key: &AttemptKey, report: &Report) {
        let late = || digest_of(key, 3);
        let mut report = report.clone();
        if self.bug == Some(Bug::LateLogDropped) && report.artifacts.is_empty() {
            report.log = None;
        }
        let mut digests: Vec<Digest> = report.artifacts.iter().map(|artifact| artifact.blob.digest).collect();
        digests.push(report.log.as_ref().map_or_else(late, |log| log.blob.digest));
        let now = self.now;
        if let Some(work) = self.agents[agent].work.get_mut(key) {
            work.again = Some((Storing::new(digests, now), report));
        }
    }
}

/// What a build makes: one of a few results, so that bytes are often there already.
fn content(key: &AttemptKey) -> Digest {
    let sum = key.build.as_str().bytes().fold(key.task.0 as u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    Digest([0x40 + sum % CONTENTS; 32])
}
