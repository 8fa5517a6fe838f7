//! Thousands of agents that have nothing to do: what they cost the leader, and how long they take to find the next one.
//!
//! Each has a certificate of its own, its own connection, and the agent's own code of a session: how it finds the leader,
//! introduces itself, waits and tries again, at the pace of heartbeats that the leader sets. Nothing stands behind it that
//! could build. All are in this process.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_agent::config::Config;
use helix_agent::executor::podman::Standing;
use helix_agent::session::{self, OfferChanges, PROTOCOL, SessionEvent};
use helix_common::channel::Traffic;
use helix_common::endpoints::Endpoints;
use helix_common::files::{Durability, write_atomic};
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE};
use helix_common::tls::{TlsFiles, TlsStore};
use helix_proto::agent::{AgentMessage, Heartbeat, Hello, Offer, agent_message::Message};
use helix_proto::v1::worker_service_client::WorkerServiceClient;
use helix_proto::v1::{ListWorkersRequest, WorkerStatus};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::Settings;
use super::drive::{DEADLINE, Replicated as _};
use super::figure::{Figure, Goal, Pair, Row, Times, Unit, ms};
use super::ours::{Ours, cpu_seconds};
use crate::cluster::Shape;

/// The pace until the leader has said one.
const FIRST_PACE: Duration = Duration::from_secs(1);

/// How long certificates are good for.
const VALID_FOR: Duration = Duration::from_secs(24 * 3600);

/// How long all may take to be attached.
const PATIENCE: Duration = Duration::from_secs(120);

/// So many are started at a time: a machine that is half agents is no measure of how all come at once.
const TOGETHER: usize = 100;

/// The lease of a worker, as the policy has it by default.
const LEASE: Duration = Duration::from_secs(15);

/// Measures.
///
/// # Errors
/// When an agent is refused, not all are attached in time, or one is lost.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _entered = runtime.enter();
    let mut ours = Ours::start(&Shape { agents: 0, ..Shape::default() })?;
    let count = settings.rounds(5_000, 500);
    let files = tempfile::tempdir()?;
    let mut crowd = Crowd::gather(&runtime, &ours, files.path(), count)?;
    let (idle, entries) = idle(settings, &ours, &crowd)?;

    // Nobody leads for as long as an election takes, so none is attached to the next before this.
    let killed = ours.kill_leader(&runtime)?;
    crowd.shared.expect_all(killed);
    let again = crowd.attach(&runtime)?;
    ensure!(ms(LEASE) > again.ms(100.0), "some were attached only after a lease: {again}");
    // Had any been taken for lost, it would be so by now.
    std::thread::sleep(LEASE);
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let workers = runtime.block_on(workers(&ours, &leader))?;
    let well = workers.iter().filter(|worker| worker.healthy && worker.standing == "present").count();
    ensure!(well == count, "{well} of {count} workers are well a lease after the fail-over");
    let seconds = Pair { ours: again.ms(100.0), peer: None };
    Ok(Figure {
        name: "idle-agents",
        peer: "none is driven".to_owned(),
        rows: vec![
            Row::new(format!("the leader's processor time with {count} agents"), Unit::PercentOfCore, idle)
                .goal(Goal::Value(10.0)),
            Row::new("leader killed to all attached to the next", Unit::Ms, vec![seconds])
                .limit(ms(LEASE), "the lease: later ones would be taken for lost")
                .goal(Goal::Value(15_000.0)),
        ],
        times: vec![again],
        history: format!(
            "all {count} were attached to the next leader within a lease, and healthy a lease later; {entries} log entries \
             while nothing happened"
        ),
        notes: vec![
            format!("a heartbeat each {:?}, which is the leader's choice", crowd.shared.pace()),
            "all agents are in one process on the machine of the cluster, and take their share of its processors"
                .to_owned(),
        ],
    })
}

/// What the leader takes in windows in which nothing happens, and how many entries the log grew by in all of them.
fn idle(settings: &Settings, ours: &Ours, crowd: &Crowd) -> anyhow::Result<(Vec<Pair>, u64)> {
    let window = Duration::from_secs(if settings.quick { 3 } else { 10 });
    // Attaching is not idling, and the pace follows the number of agents.
    std::thread::sleep(window);
    let leader = ours.cluster.leader().pid.context("the leader runs")?;
    let look = || (ours.metric("helix_entries_total"), crowd.shared.beats.load(Ordering::Relaxed));
    let (entries, beats) = look();
    let (mut pairs, began) = (Vec::new(), Instant::now());
    for _ in 0..5 {
        let (before, started) = (cpu_seconds(leader).context("the leader runs")?, Instant::now());
        std::thread::sleep(window);
        let busy = cpu_seconds(leader).context("the leader runs")? - before;
        pairs.push(Pair { ours: busy / started.elapsed().as_secs_f64() * 100.0, peer: None });
    }
    let (entries, beats) = (look().0 - entries, look().1 - beats);
    let due = began.elapsed().as_secs_f64() / crowd.shared.pace().as_secs_f64() * crowd.count as f64;
    ensure!(beats as f64 > 0.9 * due, "{beats} heartbeats were said, and {due:.0} were due");
    // One for each heartbeat is what must not be; what else a leader finds to do is little.
    ensure!(entries < beats as f64 / 100.0, "{entries} log entries for {beats} heartbeats");
    Ok((pairs, entries as u64))
}

async fn workers(ours: &Ours, endpoint: &str) -> anyhow::Result<Vec<WorkerStatus>> {
    let mut client = WorkerServiceClient::new(ours.channel(endpoint, Traffic::Bulk)?);
    Ok(client.list_workers(ListWorkersRequest {}).await?.into_inner().workers)
}

/// All agents.
struct Crowd {
    shared: Arc<Shared>,
    count: usize,
    tasks: JoinSet<String>,
}

/// What agents say of themselves.
struct Shared {
    attached: AtomicUsize,
    beats: AtomicU64,
    pace_ms: AtomicU64,
    round: Mutex<Round>,
}

/// From when on each agent is waited for once.
struct Round {
    number: u64,
    since: Instant,
    times: Times,
}

impl Shared {
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect_all(&self, since: Instant) {
        let mut round = self.round();
        let times = Times::new("leader killed to attached to the next");
        *round = Round { number: round.number + 1, since, times };
    }

    fn pace(&self) -> Duration {
        Duration::from_millis(self.pace_ms.load(Ordering::Relaxed))
    }
}

impl Crowd {
    fn gather(runtime: &Runtime, ours: &Ours, files: &Path, count: usize) -> anyhow::Result<Self> {
        let pki = ours.cluster.root().join("pki");
        let authority = Authority::load(&pki)?;
        let mut agents = Vec::new();
        for number in 0..count {
            let name = format!("idle-{number}");
            let issued = authority.issue(Role::Agent, &name, &[], VALID_FOR)?;
            let (cert, key) = (files.join(format!("{name}.pem")), files.join(format!("{name}-key.pem")));
            write_atomic(&cert, issued.cert_pem.as_bytes(), 0o644, Durability::Unsynced)?;
            write_atomic(&key, issued.key_pem.as_bytes(), 0o600, Durability::Unsynced)?;
            let files = TlsFiles { ca: pki.join(CA_FILE), cert, key, revoked: None };
            let config: Config = toml::from_str(&format!("name = {name:?}\n[tls]\n{}", toml::to_string(&files)?))?;
            let endpoints = Endpoints::new(ours.endpoints(), TlsStore::load(files)?)?;
            agents.push((name, endpoints, Arc::new(config)));
        }
        let times = Times::new("started to attached");
        let shared = Arc::new(Shared {
            attached: AtomicUsize::new(0),
            beats: AtomicU64::new(0),
            pace_ms: AtomicU64::new(millis(FIRST_PACE)),
            round: Mutex::new(Round { number: 1, since: Instant::now(), times }),
        });
        let mut crowd = Self { shared, count: 0, tasks: JoinSet::new() };
        for (name, endpoints, config) in agents {
            let shared = Arc::clone(&crowd.shared);
            crowd.tasks.spawn_on(live(name, endpoints, config, shared), runtime.handle());
            crowd.count += 1;
            if crowd.count.is_multiple_of(TOGETHER) {
                crowd.attach(runtime)?;
            }
        }
        crowd.attach(runtime)?;
        Ok(crowd)
    }

    /// Waits until each of those that were started was attached in this round; how long each took.
    fn attach(&mut self, runtime: &Runtime) -> anyhow::Result<Times> {
        let end = Instant::now() + PATIENCE.max(DEADLINE);
        loop {
            if let Some(ended) = self.tasks.try_join_next() {
                anyhow::bail!("an agent ended: {}", ended?);
            }
            let all = self.count;
            let (counted, attached) = (self.shared.round().times.count(), self.shared.attached.load(Ordering::Relaxed));
            if counted as usize == all && attached == all {
                return Ok(self.shared.round().times.clone());
            }
            ensure!(Instant::now() < end, "{counted} of {all} were attached in time, {attached} still are");
            runtime.block_on(sleep(Duration::from_millis(5)));
        }
    }
}

/// One agent, for as long as it is wanted; why it is not.
async fn live(name: String, endpoints: Endpoints, config: Arc<Config>, shared: Arc<Shared>) -> String {
    let (events, heard) = mpsc::channel(16);
    let (settings, told) = watch::channel(None);
    let (_podman, podman) = watch::channel(Standing::Disabled);
    let (_allowed, allowed) = watch::channel(config);
    tokio::select! {
        () = session::keep(endpoints, events, settings, OfferChanges { podman, allowed }) => "it gave up".to_owned(),
        why = answer(name, heard, told, &shared) => why,
    }
}

async fn answer(
    name: String,
    mut heard: mpsc::Receiver<SessionEvent>,
    told: watch::Receiver<Option<Arc<helix_agent::settings::Settings>>>,
    shared: &Shared,
) -> String {
    let mut outbox: Option<mpsc::Sender<AgentMessage>> = None;
    let mut counted = 0;
    let paced = |pace| {
        let mut beat = interval(pace);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        beat
    };
    let mut beat = paced(FIRST_PACE);
    loop {
        tokio::select! {
            event = heard.recv() => match event {
                Some(SessionEvent::HelloWanted(reply)) => {
                    let _ = reply.send(hello(&name));
                }
                Some(SessionEvent::Opened(_, tx)) => {
                    outbox = Some(tx);
                    shared.attached.fetch_add(1, Ordering::Relaxed);
                    let mut round = shared.round();
                    if counted != round.number {
                        counted = round.number;
                        let time = round.since.elapsed();
                        round.times.add(time);
                    }
                }
                Some(SessionEvent::Closed(_)) => {
                    outbox = None;
                    shared.attached.fetch_sub(1, Ordering::Relaxed);
                }
                Some(SessionEvent::Said(..)) => {}
                Some(SessionEvent::Refused(why)) => return why,
                None => return "nobody speaks to it".to_owned(),
            },
            _ = beat.tick() => {
                if let Some(outbox) = &outbox {
                    let message = Some(Message::Heartbeat(Heartbeat::default()));
                    let sent = outbox.try_send(AgentMessage { message }).is_ok();
                    shared.beats.fetch_add(u64::from(sent), Ordering::Relaxed);
                }
            }
        }
        let pace = told.borrow().as_ref().map_or(FIRST_PACE, |settings| settings.heartbeat_interval);
        if pace != beat.period() {
            shared.pace_ms.store(millis(pace), Ordering::Relaxed);
            beat = paced(pace);
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn hello(name: &str) -> Hello {
    let offer = Offer {
        capacity: 1,
        platforms: vec!["linux/amd64".to_owned()],
        executors: vec!["exec".to_owned()],
        allows_job_commands: true,
        labels: BTreeMap::from([("kind".to_owned(), "idle".to_owned())]).into_iter().collect(),
        ..Offer::default()
    };
    Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        name: name.to_owned(),
        instance: "data1.boot1".to_owned(),
        offer: Some(offer),
        ..Hello::default()
    }
}
