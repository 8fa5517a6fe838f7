//! Our cluster as benchmarks see it: its endpoints, what it says of itself, what it costs.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::channel::{self, Traffic};
use helix_common::tls::{TlsFiles, TlsStore};
use helix_model::{BuildSpec, Command, Outputs};
use helix_proto::v1;
use helix_proto::v1::build_service_client::BuildServiceClient;
use helix_proto::v1::worker_service_client::WorkerServiceClient;
use serde::Deserialize;
use tonic::transport::Channel;

use super::drive::{DEADLINE, Replicated, Target, Writer, gone};
use crate::cluster::{Cluster, Member, Shape, signal, wait_for};

/// What a cluster that has nothing to do takes at most, in cores; and for how long, before that is believed.
const QUIET: f64 = 0.18;
const QUIET_SECONDS: u32 = 3;

#[derive(Deserialize)]
struct Context {
    endpoints: Vec<String>,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

/// A cluster and the means to talk to it.
pub struct Ours {
    /// The cluster.
    pub cluster: Cluster,
    endpoints: Vec<String>,
    tls: Arc<TlsStore>,
    down: Option<Member>,
}

/// A build that does nothing and makes nothing.
#[must_use]
pub fn no_op() -> BuildSpec {
    exec(&["/bin/true"])
}

/// A build of one program that makes nothing.
#[must_use]
pub fn exec(argv: &[&str]) -> BuildSpec {
    let command = Some(Command::Argv(argv.iter().map(|word| (*word).to_owned()).collect()));
    BuildSpec { command, outputs: Outputs::None, ..BuildSpec::default() }
}

impl Ours {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(shape: &Shape) -> anyhow::Result<Self> {
        let cluster = Cluster::start(shape)?;
        let context: Context = toml::from_str(&fs::read_to_string(cluster.context())?)?;
        let tls = TlsStore::load(TlsFiles { ca: context.ca, cert: context.cert, key: context.key, revoked: None })?;
        Ok(Self { cluster, endpoints: context.endpoints, tls, down: None })
    }

    /// What clients write to: connections to the leader, so that no forwarding is measured.
    ///
    /// # Errors
    /// When the leader is not known. Needs a tokio runtime.
    pub fn leader(&self, connections: usize) -> anyhow::Result<Target> {
        let leader = self.cluster.leader().grpc.context("a coordinator has an endpoint")?;
        let channels = (0..connections).map(|_| self.channel(&leader, Traffic::Control)).collect::<Result<_, _>>()?;
        Ok(Target { writer: Writer::Ours, channels })
    }

    /// All coordinators' endpoints.
    #[must_use]
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// A new connection to an endpoint.
    ///
    /// # Errors
    /// When it is malformed. Needs a tokio runtime.
    pub fn channel(&self, endpoint: &str, traffic: Traffic) -> anyhow::Result<Channel> {
        Ok(channel::lazy(endpoint, &self.tls, self.tls.expect_any(), traffic)?)
    }

    /// Changes the cluster's policy.
    ///
    /// # Errors
    /// When it is not taken.
    pub fn set_policy(&self, changes: &[&str]) -> anyhow::Result<()> {
        let said = self.cluster.helix(&[&["cluster", "policy", "set"], changes].concat());
        ensure!(said.code == 0, "the policy is not taken: {}", said.stderr);
        Ok(())
    }

    /// How many builds of a state the registry has.
    ///
    /// # Errors
    /// When it does not say.
    pub fn count(&self, state: &str) -> anyhow::Result<usize> {
        let said = self.cluster.helix(&["list", "--state", state, "--all", "--limit", "1000000", "-o", "quiet"]);
        ensure!(said.code == 0, "the list is not given: {}", said.stderr);
        Ok(said.stdout.lines().count())
    }

    /// A build's status.
    ///
    /// # Errors
    /// What the coordinator says.
    pub async fn status(channel: Channel, id: &str) -> Result<v1::BuildStatus, tonic::Status> {
        let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale: false };
        Ok(BuildServiceClient::new(channel).get_build_status(request).await?.into_inner())
    }

    /// How many builds are queued and running.
    ///
    /// # Errors
    /// What the coordinator says.
    pub async fn totals(channel: Channel) -> Result<v1::GetTotalsResponse, tonic::Status> {
        Ok(WorkerServiceClient::new(channel).get_totals(v1::GetTotalsRequest {}).await?.into_inner())
    }

    /// The sum of a counter over all coordinators.
    #[must_use]
    pub fn metric(&self, name: &str) -> f64 {
        let text = fs::read_to_string(self.cluster.root().join("cluster.json")).unwrap_or_default();
        let all: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap_or_default();
        let pages = all.iter().filter_map(|member| member["http"].as_str()).filter_map(|url| http_get(url, "/metrics"));
        let value = |line: &str| line.strip_prefix(name)?.split_whitespace().last()?.parse::<f64>().ok();
        pages.map(|page| page.lines().filter_map(value).sum::<f64>()).sum()
    }

    /// Processor time in seconds of all daemons so far, and of what they started and waited for.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        self.cluster.members().iter().filter_map(|member| cpu_seconds(member.pid?)).sum()
    }

    /// Waits until the cluster has done what it put off (snapshots, copies of the registry's file): until all processes together
    /// take hardly any of a core for a few seconds.
    ///
    /// # Errors
    /// When that does not come.
    pub fn until_quiet(&self) -> anyhow::Result<()> {
        let (end, mut quiet) = (Instant::now() + DEADLINE * 5, 0);
        while quiet < QUIET_SECONDS {
            ensure!(Instant::now() < end, "the cluster does not come to rest");
            let before = self.cpu_seconds();
            std::thread::sleep(Duration::from_secs(1));
            quiet = if self.cpu_seconds() - before < QUIET { quiet + 1 } else { 0 };
        }
        Ok(())
    }
}

/// Processor time of a process, and of the children that it waited for.
#[must_use]
pub fn cpu_seconds(pid: i32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = stat.rsplit(')').next()?.split_whitespace().map(|field| field.parse().unwrap_or(0.0));
    // utime, stime and those of waited-for children: fields 14 to 17, counted from the state, which is the third.
    Some(fields.skip(11).take(4).sum::<f64>() / 100.0)
}

fn http_get(url: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(url.strip_prefix("http://")?).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

impl Replicated for Ours {
    fn everywhere(&self) -> anyhow::Result<Target> {
        let channels = self.endpoints.iter().map(|endpoint| self.channel(endpoint, Traffic::Control));
        Ok(Target { writer: Writer::Ours, channels: channels.collect::<Result<_, _>>()? })
    }

    fn kill_leader(&mut self, _: &tokio::runtime::Runtime) -> anyhow::Result<Instant> {
        let leader = self.cluster.leader();
        let pid = leader.pid.context("the leader runs")?;
        let at = Instant::now();
        signal(pid, rustix::process::Signal::KILL);
        gone(pid);
        self.down = Some(leader);
        Ok(at)
    }

    fn mend(&mut self, _: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        let member = self.down.take().context("one was killed")?;
        self.cluster.kill(&member);
        self.cluster.start_again(&member);
        wait_for("all coordinators to be healthy", DEADLINE, || {
            let said = self.cluster.helix(&["cluster", "status", "-o", "json"]);
            let status: serde_json::Value = serde_json::from_str(&said.stdout).ok()?;
            status["members"].as_array()?.iter().all(|member| member["healthy"] == true).then_some(())
        });
        Ok(())
    }

    fn check(&self, runtime: &tokio::runtime::Runtime, keys: &[String]) -> anyhow::Result<()> {
        let target = self.leader(1)?;
        runtime.block_on(async {
            for key in keys {
                let found = Self::status(target.channel(0), key).await;
                ensure!(found.is_ok(), "{key} was acknowledged and is lost: {found:?}");
            }
            Ok(())
        })
    }
}

/// Waits for what a cluster says of its builds.
///
/// # Errors
/// When it does not come true in time.
pub async fn until_idle(channel: &Channel) -> anyhow::Result<()> {
    let end = Instant::now() + DEADLINE * 5;
    loop {
        let totals = Ours::totals(channel.clone()).await?;
        if totals.queued + totals.running == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "builds do not end: {totals:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
