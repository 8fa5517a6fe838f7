//! Three coordinators of which one falls silent. Their shelves stand in for blob stores: they answer as such, and hold names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::BoxStream;
use helix_core::command::SetPolicy;
use helix_core::{Command, Policy};
use helix_model::{BuildSpec, Digest, NodeId, Source};
use helix_proto::peer;
use helix_proto::peer::member_service_server::{MemberService, MemberServiceServer};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::raft::tests::harness::{Cluster, PATIENCE, submit, until};
use crate::registry::NAMED_BLOBS_MAX;
use crate::repair::{Repair, Schedule};

const ALL: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];
/// The one that falls silent.
const AWAY: NodeId = NodeId(3);
const LIVING: [NodeId; 2] = [NodeId(1), NodeId(2)];

/// How patience ends in these tests: soon, or not at all.
const SOON: Duration = Duration::from_millis(100);
const NEVER: Duration = Duration::from_secs(86_400);

/// What a coordinator holds, and what it was asked.
#[derive(Default)]
pub(crate) struct Shelf {
    held: BTreeSet<Digest>,
    pub(crate) silent: bool,
    /// How often it said who it is.
    pub(crate) introductions: usize,
    /// After so many questions about blobs it falls silent.
    pages_left: Option<usize>,
    /// Questions about no blob.
    looks: usize,
    /// Questions about some.
    pages: usize,
    /// Blobs that it was told to fetch.
    fetches: usize,
}

pub(crate) type Shelves = Arc<Mutex<BTreeMap<NodeId, Shelf>>>;

pub(crate) struct Member {
    pub(crate) node: NodeId,
    pub(crate) shelves: Shelves,
}

fn digests(all: &[prost::bytes::Bytes]) -> Vec<Digest> {
    all.iter().map(|bytes| Digest::from_slice(bytes).unwrap()).collect()
}

impl Member {
    /// What happens at a coordinator that answers.
    #[allow(clippy::result_large_err)]
    fn answer<T>(&self, act: impl FnOnce(NodeId, &mut BTreeMap<NodeId, Shelf>) -> T) -> Result<T, Status> {
        let mut shelves = self.shelves.lock().unwrap();
        if shelves[&self.node].silent {
            return Err(Status::unavailable("silent"));
        }
        Ok(act(self.node, &mut shelves))
    }
}

#[tonic::async_trait]
impl MemberService for Member {
    async fn introduce(&self, _: Request<peer::IntroduceRequest>) -> Result<Response<peer::IntroduceResponse>, Status> {
        self.answer(|node, shelves| shelves.get_mut(&node).unwrap().introductions += 1)?;
        Ok(Response::new(peer::IntroduceResponse::default()))
    }

    async fn dismiss(&self, _: Request<peer::DismissRequest>) -> Result<Response<peer::DismissResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn leased_blobs(
        &self,
        _: Request<peer::LeasedBlobsRequest>,
    ) -> Result<Response<peer::LeasedBlobsResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn hold_blobs(
        &self,
        request: Request<peer::HoldBlobsRequest>,
    ) -> Result<Response<peer::HoldBlobsResponse>, Status> {
        let asked = digests(&request.into_inner().sha256);
        let held = self.answer(|node, shelves| {
            let shelf = shelves.get_mut(&node).unwrap();
            if asked.is_empty() {
                shelf.looks += 1;
            } else {
                shelf.pages += 1;
                shelf.pages_left = shelf.pages_left.map(|left| left - 1);
                shelf.silent = shelf.pages_left == Some(0);
            }
            asked.iter().map(|digest| shelf.held.contains(digest)).collect()
        })?;
        Ok(Response::new(peer::HoldBlobsResponse { held }))
    }

    type FetchBlobsStream = BoxStream<'static, Result<peer::FetchBlobsResponse, Status>>;

    async fn fetch_blobs(
        &self,
        request: Request<peer::FetchBlobsRequest>,
    ) -> Result<Response<Self::FetchBlobsStream>, Status> {
        let wanted = digests(&request.into_inner().sha256);
        let answers = self.answer(|node, shelves| {
            let fetch = |digest: Digest| {
                let found = shelves.values().any(|shelf| !shelf.silent && shelf.held.contains(&digest));
                let shelf = shelves.get_mut(&node).unwrap();
                shelf.fetches += 1;
                let failed = if found { "" } else { "nobody has it" }.to_owned();
                if found {
                    shelf.held.insert(digest);
                }
                Ok(peer::FetchBlobsResponse { sha256: digest.0.to_vec().into(), size: 1, failed })
            };
            wanted.into_iter().map(fetch).collect::<Vec<_>>()
        })?;
        Ok(Response::new(futures::stream::iter(answers).boxed()))
    }
}

/// Three coordinators, builds that name blobs, and shelves.
struct Three {
    cluster: Cluster,
    shelves: Shelves,
}

/// The copies being looked after, at whoever leads.
struct Keeping {
    repairs: Vec<Repair>,
    tasks: Vec<JoinHandle<()>>,
    stop: CancellationToken,
}

impl Keeping {
    /// What any coordinator takes for lost.
    fn lost(&self) -> Vec<Digest> {
        self.repairs.iter().flat_map(Repair::lost).collect()
    }

    async fn end(self) {
        self.stop.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

fn blob(number: usize) -> Digest {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Digest(bytes)
}

/// A submit of a build that names a blob.
fn named(number: usize) -> Command {
    let mut command = submit(&format!("b{number}"));
    if let Command::SubmitBuild(submit) = &mut command {
        let source = Some(Source { digest: blob(number), size: 1 });
        submit.spec = Arc::new(BuildSpec { repo_url: String::new(), source, ..BuildSpec::clone(&submit.spec) });
    }
    command
}

impl Three {
    /// With so many builds, each of which names a blob, of which so many copies are to be.
    async fn start(builds: usize, copies: u32) -> Self {
        let mut cluster = Cluster::new(3).await;
        let shelves: Shelves = Arc::new(Mutex::new(ALL.map(|node| (node, Shelf::default())).into()));
        for node in ALL {
            let member = Member { node, shelves: Arc::clone(&shelves) };
            cluster.routes.insert(node, Routes::new(MemberServiceServer::new(member)));
        }
        cluster.start_all().await;
        let policy = Policy { copies, ..cluster.registry(cluster.leader().await).policy() };
        let mut commands = vec![Command::SetPolicy(SetPolicy { policy, expected: None })];
        commands.extend((0..builds).map(named));
        let began = Instant::now();
        while let Err(error) = cluster.registry(ALL[0]).propose_all(commands.clone()).await {
            assert!(began.elapsed() < PATIENCE, "{error}");
        }
        Self { cluster, shelves }
    }

    fn shelves(&self) -> MutexGuard<'_, BTreeMap<NodeId, Shelf>> {
        self.shelves.lock().unwrap()
    }

    fn put(&self, number: usize, nodes: &[NodeId]) {
        let mut shelves = self.shelves();
        for node in nodes {
            shelves.get_mut(node).unwrap().held.insert(blob(number));
        }
    }

    fn change(&self, node: NodeId, change: impl FnOnce(&mut Shelf)) {
        change(self.shelves().get_mut(&node).unwrap());
    }

    /// One falls silent, and the others lose a blob in the same moment.
    fn all_but_away_lose(&self, number: usize) {
        let mut shelves = self.shelves();
        for (node, shelf) in shelves.iter_mut() {
            shelf.silent = *node == AWAY;
            if *node != AWAY {
                shelf.held.remove(&blob(number));
            }
        }
    }

    fn term(&self) -> u64 {
        self.cluster.registry(ALL[0]).leadership().borrow().term
    }

    fn keep(&self, patience: Duration) -> Keeping {
        let schedule = Schedule { look_every: Duration::from_millis(20), patience, ..Schedule::default() };
        let stop = CancellationToken::new();
        let new = |node: &NodeId| {
            let node = &self.cluster.nodes[node];
            Repair::new(node.registry.clone(), node.peers.clone())
        };
        let repairs: Vec<Repair> = ALL.iter().map(new).collect();
        let tasks = repairs.iter().map(|repair| tokio::spawn(repair.clone().keep(schedule, stop.clone())));
        Keeping { tasks: tasks.collect(), repairs, stop }
    }

    /// So many more looks of the leader's.
    async fn looks(&self, count: usize) {
        let looks = || self.shelves()[&LIVING[0]].looks;
        let enough = looks() + count;
        until("the leader has looked", || looks() >= enough).await;
    }

    fn is_on(&self, number: usize, nodes: &[NodeId]) -> bool {
        let shelves = self.shelves();
        nodes.iter().all(|node| shelves[node].held.contains(&blob(number)))
    }

    /// How many blobs the leader says are short of copies.
    fn short(&self) -> u64 {
        let counts = self.cluster.nodes.values().map(|node| node.registry.counters().blobs_short.get());
        counts.max().unwrap_or(0)
    }

    fn fetches(&self) -> usize {
        self.shelves().values().map(|shelf| shelf.fetches).sum()
    }

    async fn end(mut self) {
        self.cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_voter_held_is_copied_to_those_that_live_after_a_while_and_not_before() {
    const BLOBS: usize = 40;
    let (alone, nowhere) = (0, 1);
    let three = Three::start(BLOBS, 2).await;
    three.put(alone, &[AWAY]);
    for number in 2..BLOBS {
        three.put(number, &[LIVING[number % 2], AWAY]);
    }
    three.change(AWAY, |shelf| shelf.silent = true);
    let keeping = three.keep(NEVER);
    three.looks(10).await;
    assert_eq!((three.fetches(), keeping.lost()), (0, vec![]), "it may be back soon");
    keeping.end().await;

    let keeping = three.keep(SOON);
    until("two copies live", || (2..BLOBS).all(|number| three.is_on(number, &LIVING))).await;
    until("those that only the dead one may have are told", || three.short() == 2).await;
    // Again before the hour is over, and no blob of which that one may have a copy is ever called lost.
    let pages = three.shelves()[&LIVING[0]].pages;
    until("it was looked after again", || three.shelves()[&LIVING[0]].pages > pages + 1).await;
    assert_eq!(keeping.lost(), []);

    three.change(AWAY, |shelf| shelf.silent = false);
    let copied = || LIVING.iter().any(|node| three.is_on(alone, &[*node]));
    until("what it alone had has two copies", || copied() && three.short() == 0).await;
    until("all have answered: what nobody has is lost", || keeping.lost() == [blob(nowhere)]).await;

    // It stays so while one is silent that did not have it. What came to be on that one alone is not lost.
    let term = three.term();
    three.all_but_away_lose(alone);
    until("it is left out again", || three.short() > 0).await;
    let lost = keeping.lost();
    // Who leads since a moment ago knows of nothing.
    if three.term() == term {
        assert_eq!((lost, three.short()), (vec![blob(nowhere)], 1));
    } else {
        assert!(!lost.contains(&blob(alone)), "{lost:?}");
    }
    keeping.end().await;
    three.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_falls_silent_in_the_middle_of_a_pass_is_done_without_in_all_of_it() {
    const BLOBS: usize = 2 * NAMED_BLOBS_MAX + 50;
    // More copies than there will be coordinators that answer.
    let three = Three::start(BLOBS, 3).await;
    for number in 0..BLOBS {
        three.put(number, &[LIVING[number % 2], AWAY]);
    }
    three.change(AWAY, |shelf| shelf.pages_left = Some(1));
    let keeping = three.keep(SOON);
    until("two copies live", || (0..BLOBS).all(|number| three.is_on(number, &LIVING))).await;
    until("all are told to have one copy too few", || three.short() == BLOBS as u64).await;
    let first_page = three.shelves()[&AWAY].pages;
    assert_eq!((first_page, three.shelves()[&AWAY].silent), (1, true), "it fell silent behind the first page");
    assert_eq!(keeping.lost(), []);
    keeping.end().await;
    three.end().await;
}
