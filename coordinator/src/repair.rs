//! Bytes on as many voters as policy says: looked after by the leader, and before a coordinator leaves.
//!
//! A pass walks all blobs that builds name, asks the voters which they hold, and has those that should hold one and do not
//! fetch it. Nothing of it is recorded: a pass that is cut short is begun anew, and finds less to do. When the leader begins
//! one, and which voters it does without, is in `keep` and `silence`.

mod keep;
mod silence;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use helix_common::status::status;
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_model::placement::rendezvous;
use helix_model::{Digest, ErrorCode, NodeId};
use helix_proto::peer;
use helix_proto::peer::member_service_client::MemberServiceClient;
use tonic::Status;
use tonic::transport::Channel;

pub use keep::Schedule;

use crate::peers::Peers;
use crate::registry::{Consistency, Registry};
use crate::rpc::answer;

/// How long a node may take to say which blobs it holds.
const HOLD_ANSWER: Duration = Duration::from_secs(10);
/// How long a node that fetches may say nothing; it says something every few seconds.
const FETCH_SILENCE: Duration = Duration::from_secs(30);
/// In the background so many bytes are copied a second, at most: builds come first.
const BYTES_PER_SECOND: u64 = 32 << 20;
/// And so long is waited between pages.
const PAGE_PAUSE: Duration = Duration::from_millis(20);
/// Digests that are named where copies are missing.
const NAMED_MAX: usize = 5;
/// Lost blobs that are remembered by name: whoever has more has lost disks.
pub const LOST_MAX: usize = 1_000;

/// The cluster's copies. Cheap to clone.
#[derive(Clone)]
pub struct Repair {
    registry: Registry,
    peers: Peers,
    /// What the last whole pass in the background found on nobody.
    lost: Arc<Mutex<Vec<Digest>>>,
}

/// What a pass is to bring about.
#[derive(PartialEq, Eq)]
pub(crate) struct Plan {
    /// Whose copies count.
    pub(crate) keepers: BTreeSet<NodeId>,
    /// Voters for whom nobody waits: they are not asked, take nothing, and may hold anything.
    pub(crate) silent: BTreeSet<NodeId>,
    /// Somebody whose copies do not count, and who may be asked for them.
    pub(crate) leaving: Option<NodeId>,
    /// How many keepers shall hold each blob.
    pub(crate) copies: usize,
    /// How many would, if nobody were silent.
    pub(crate) wanted: usize,
    /// Whether others come first.
    pub(crate) pace: Pace,
}

/// How a pass behaves to others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// An operator waits for it. A keeper that does not answer holds nothing.
    Now,
    /// Nobody does. A keeper that does not answer ends it: it may be back soon, with all it holds.
    Background,
}

/// What a pass found and did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    /// Blobs looked at.
    pub(crate) checked: u64,
    /// Copies made.
    pub(crate) copied: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// Blobs with fewer copies than they should have, but some.
    pub(crate) short: u64,
    /// Blobs that no keeper holds, although whoever leaves does, or may.
    pub(crate) last_copies: u64,
    /// Blobs that nobody has; at most [`LOST_MAX`].
    pub(crate) lost: Vec<Digest>,
    /// Some of these, and why they were not copied.
    pub(crate) examples: Vec<String>,
    /// Why whoever leaves did not say what it promised to keep.
    pub(crate) leases_unknown: Option<String>,
}

/// A pass under way.
pub(crate) struct Pass<'a> {
    repair: &'a Repair,
    plan: &'a Plan,
    after: Place,
    pub(crate) tally: Tally,
}

/// How far a pass is: behind this digest of those that builds name, or of those that whoever leaves promised to somebody.
enum Place {
    Named(Option<Digest>),
    Leased(Option<Digest>),
    End,
}

impl Pass<'_> {
    /// Looks after one page; whether there is more.
    pub(crate) async fn step(&mut self) -> Result<bool, Status> {
        let page = match self.after {
            Place::Named(after) => {
                self.repair.registry.named_blobs(after).await.map_err(|error| answer::of_store(&error))?
            }
            Place::Leased(after) => match self.plan.leaving {
                Some(leaving) => self.repair.leased(leaving, after).await.unwrap_or_else(|error| {
                    self.tally.leases_unknown = Some(error.message().to_owned());
                    Vec::new()
                }),
                None => Vec::new(),
            },
            Place::End => return Ok(false),
        };
        self.repair.page(self.plan, &page, &mut self.tally).await?;
        self.after = match (&self.after, page.last()) {
            (Place::Named(_), Some(last)) => Place::Named(Some(*last)),
            (Place::Named(_), None) => Place::Leased(None),
            (Place::Leased(_), Some(last)) => Place::Leased(Some(*last)),
            (Place::Leased(_) | Place::End, None) | (Place::End, Some(_)) => Place::End,
        };
        Ok(true)
    }
}

impl Repair {
    /// On these handles.
    #[must_use]
    pub fn new(registry: Registry, peers: Peers) -> Self {
        Self { registry, peers, lost: Arc::default() }
    }

    /// Blobs that builds name and nobody had when this node last looked, as the leader; at most [`LOST_MAX`].
    #[must_use]
    pub fn lost(&self) -> Vec<Digest> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is to be so once `leaving` has left.
    pub(crate) fn plan(&self, leaving: Option<NodeId>, pace: Pace) -> Plan {
        let mut keepers = self.registry.voters();
        if let Some(leaving) = leaving {
            keepers.remove(&leaving);
        }
        let copies = usize::try_from(self.registry.policy().copies_of(keepers.len())).unwrap_or(usize::MAX);
        Plan { keepers, silent: BTreeSet::new(), leaving, copies, wanted: copies, pace }
    }

    /// Begins a pass over all blobs that builds name now, and over those that whoever leaves has leased.
    pub(crate) async fn pass<'a>(&'a self, plan: &'a Plan) -> Result<Pass<'a>, Status> {
        let fresh = self.registry.barrier(Consistency::Linearizable).await;
        fresh.map_err(|error| answer::of_read(&error))?;
        Ok(Pass { repair: self, plan, after: Place::Named(None), tally: Tally::default() })
    }

    async fn page(&self, plan: &Plan, digests: &[Digest], tally: &mut Tally) -> Result<(), Status> {
        if digests.is_empty() {
            return Ok(());
        }
        let asked: Vec<NodeId> = plan.keepers.iter().chain(&plan.leaving).copied().collect();
        let asked = asked.into_iter().map(|node| async move { (node, self.held(node, digests).await) });
        let answers = join_all(asked).await;
        let mut holders: BTreeMap<NodeId, Vec<bool>> = BTreeMap::new();
        for (node, answer) in answers {
            match answer {
                Ok(held) if held.len() == digests.len() => drop(holders.insert(node, held)),
                Ok(_) => return Err(status(ErrorCode::Internal, format!("node {node} answers something else"))),
                Err(error) if plan.pace == Pace::Background => return Err(error),
                Err(error) => tracing::warn!(%node, %error, "a coordinator does not say what it holds"),
            }
        }
        let before = tally.bytes;
        let mut absent = Vec::new();
        let failures = self.spread(plan, digests, &mut holders, tally).await;
        for (at, digest) in digests.iter().enumerate() {
            let holds = |node: &NodeId| holders.get(node).is_some_and(|held| held[at]);
            let have = plan.keepers.iter().filter(|node| holds(node)).count();
            // Whoever leaves and does not answer may be the one that holds it.
            let elsewhere = plan.leaving.is_some_and(|node| !holders.contains_key(&node) || holds(&node));
            if have == 0 && elsewhere {
                tally.last_copies += 1;
                if tally.examples.len() < NAMED_MAX {
                    let why = failures.get(digest).map_or("nobody else has it", String::as_str);
                    tally.examples.push(format!("{digest}: {why}"));
                }
            } else if have > 0 && have < plan.wanted {
                tally.short += 1;
            } else if have == 0 && plan.leaving.is_none() {
                absent.push(*digest);
            }
        }
        let absences = absent.len();
        let lost = self.on_nobody(plan, absent).await;
        // Somebody has them, or may.
        tally.short += (absences - lost.len()) as u64;
        let room = LOST_MAX.saturating_sub(tally.lost.len());
        tally.lost.extend(lost.into_iter().take(room));
        tally.checked += digests.len() as u64;
        if plan.pace == Pace::Background {
            let copying = Duration::from_secs_f64((tally.bytes - before) as f64 / BYTES_PER_SECOND as f64);
            tokio::time::sleep(copying.max(PAGE_PAUSE)).await;
        }
        Ok(())
    }

    /// Those that members without a vote do not have either. A member that does not answer may have all of them, but for those
    /// that nobody had when all answered.
    async fn on_nobody(&self, plan: &Plan, mut digests: Vec<Digest>) -> Vec<Digest> {
        if digests.is_empty() {
            return digests;
        }
        let mut all_answer = plan.silent.is_empty();
        let members = self.registry.members().into_keys();
        for node in members.filter(|node| !plan.keepers.contains(node) && !plan.silent.contains(node)) {
            let Ok(held) = self.held(node, &digests).await else {
                all_answer = false;
                break;
            };
            let mut held = held.into_iter();
            digests.retain(|_| held.next() == Some(false));
        }
        if !all_answer {
            let known = self.lost();
            digests.retain(|digest| known.contains(digest));
        }
        digests
    }

    /// Has keepers fetch what they should hold, until each blob has its copies or nobody is left to try. Why what failed.
    async fn spread(
        &self,
        plan: &Plan,
        digests: &[Digest],
        holders: &mut BTreeMap<NodeId, Vec<bool>>,
        tally: &mut Tally,
    ) -> BTreeMap<Digest, String> {
        let mut failures = BTreeMap::new();
        let mut tried: BTreeSet<(NodeId, usize)> = BTreeSet::new();
        loop {
            let mut shares: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
            for (at, digest) in digests.iter().enumerate() {
                let holds = |node: &NodeId| holders.get(node).is_some_and(|held| held[at]);
                let have = plan.keepers.iter().filter(|node| holds(node)).count();
                if have >= plan.copies || !holders.values().any(|held| held[at]) {
                    continue;
                }
                let open = |node: &NodeId| holders.contains_key(node) && !holds(node) && !tried.contains(&(*node, at));
                let candidates = plan.keepers.iter().copied().filter(open);
                for node in rendezvous(&digest.0, candidates).into_iter().take(plan.copies - have) {
                    shares.entry(node).or_default().push(at);
                }
            }
            if shares.is_empty() {
                return failures;
            }
            let wanted = |share: &Vec<usize>| share.iter().map(|at| digests[*at]).collect::<Vec<Digest>>();
            let fetches: Vec<_> = shares.iter().map(|(node, share)| (*node, wanted(share))).collect();
            let fetches = fetches
                .into_iter()
                .map(|(node, wanted)| async move { (node, self.fetch(node, &wanted, plan.pace).await) });
            for (node, fetched) in join_all(fetches).await {
                for at in &shares[&node] {
                    tried.insert((node, *at));
                    match fetched.get(&digests[*at]) {
                        Some(Ok(bytes)) => {
                            tally.copied += 1;
                            tally.bytes = tally.bytes.saturating_add(*bytes);
                            if let Some(held) = holders.get_mut(&node) {
                                held[*at] = true;
                            }
                        }
                        Some(Err(why)) => drop(failures.insert(digests[*at], format!("node {node}: {why}"))),
                        None => drop(failures.insert(digests[*at], format!("node {node} stopped answering"))),
                    }
                }
            }
        }
    }

    async fn held(&self, node: NodeId, digests: &[Digest]) -> Result<Vec<bool>, Status> {
        let sha256 = digests.iter().map(|digest| digest.0.to_vec().into()).collect();
        let request = peer::HoldBlobsRequest { caller: Some(self.peers.caller(node)), sha256 };
        let mut client = self.client(node)?;
        let answer = tokio::time::timeout(HOLD_ANSWER, client.hold_blobs(request)).await;
        Ok(answer.map_err(|_| Status::deadline_exceeded(format!("node {node} does not answer")))??.into_inner().held)
    }

    async fn leased(&self, node: NodeId, after: Option<Digest>) -> Result<Vec<Digest>, Status> {
        let after = after.map_or_else(Vec::new, |digest| digest.0.to_vec());
        let request = peer::LeasedBlobsRequest { caller: Some(self.peers.caller(node)), after: after.into() };
        let asked = async {
            let answer = self.client(node)?.leased_blobs(request).await?;
            Ok::<_, Status>(answer.into_inner().sha256)
        };
        let page = tokio::time::timeout(HOLD_ANSWER, asked).await;
        let page = page.map_err(|_| Status::deadline_exceeded(format!("no answer within {HOLD_ANSWER:?}")))??;
        Ok(page.iter().filter_map(|bytes| Digest::from_slice(bytes).ok()).collect())
    }

    /// Has a node fetch blobs. How many bytes each had, or why it is not there; what is missing was not tried.
    async fn fetch(&self, node: NodeId, digests: &[Digest], pace: Pace) -> BTreeMap<Digest, Result<u64, String>> {
        let sha256 = digests.iter().map(|digest| digest.0.to_vec().into()).collect();
        let request = peer::FetchBlobsRequest {
            caller: Some(self.peers.caller(node)),
            sha256,
            sparingly: pace == Pace::Background,
        };
        let mut out = BTreeMap::new();
        let running = async {
            let mut answers = self.client(node)?.fetch_blobs(request).await?.into_inner();
            loop {
                let next = tokio::time::timeout(FETCH_SILENCE, answers.message()).await;
                let Some(one) = next.map_err(|_| Status::deadline_exceeded("it says nothing"))?? else { break };
                if let Ok(digest) = Digest::from_slice(&one.sha256) {
                    out.insert(digest, if one.failed.is_empty() { Ok(one.size) } else { Err(one.failed) });
                }
            }
            Ok::<_, Status>(())
        };
        if let Err(error) = running.await {
            tracing::warn!(%node, %error, "a coordinator stopped fetching blobs");
        }
        out
    }

    // A status is what every caller handles here; boxing it would only be undone.
    #[allow(clippy::result_large_err)]
    fn client(&self, node: NodeId) -> Result<MemberServiceClient<Channel>, Status> {
        let channel = self.peers.control(node).map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(MemberServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
    }
}
