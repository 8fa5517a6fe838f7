//! etcd as a peer: three members on loopback, TLS with certificates on both sides for clients and peers, default timings.
//!
//! Certificates come from an authority of ours, so that the very same client code dials both.

mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use helix_common::channel::{self, Traffic};
use helix_common::identity::Role;
use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
use helix_common::ports;
use helix_common::tls::{TlsFiles, TlsStore};
use tonic::Status;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

use super::drive::{DEADLINE, Replicated, Target, Writer, gone};
use super::machine::version;
use crate::cluster::signal;

const MEMBERS: u16 = 3;

/// How to get it.
const INSTALL: &str = "etcd is absent: apt-get install etcd-server";

/// What runs here and how, or the step that installs it.
pub fn describe() -> Result<String, String> {
    let version = version(Command::new("etcd").arg("--version")).ok_or_else(|| INSTALL.to_owned())?;
    Ok(format!("{version}, {MEMBERS} members, TLS with certificates on both sides, default timings, driven over gRPC"))
}

/// Puts a value.
///
/// # Errors
/// What the member says.
pub async fn put(channel: Channel, key: Vec<u8>, value: Vec<u8>) -> Result<(), Status> {
    let _: wire::PutResponse = call(channel, "/etcdserverpb.KV/Put", wire::PutRequest { key, value }).await?;
    Ok(())
}

async fn call<Q, A>(channel: Channel, path: &'static str, request: Q) -> Result<A, Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static(path);
    Ok(client.unary(tonic::Request::new(request), path, ProstCodec::<Q, A>::default()).await?.into_inner())
}

struct Member {
    arguments: Vec<String>,
    client: String,
    child: Child,
}

/// A cluster of etcd; ends with its owner.
pub struct Etcd {
    members: Vec<Member>,
    tls: Arc<TlsStore>,
    down: Option<usize>,
    directory: tempfile::TempDir,
}

impl Etcd {
    /// Starts one and waits until it has a leader.
    ///
    /// # Errors
    /// When it does not; says what the members logged.
    pub fn start(runtime: &tokio::runtime::Runtime) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("helix-bench-etcd-").tempdir()?;
        let root = directory.path();
        let authority = Authority::create("etcd")?;
        authority.save(root)?;
        let (cert, key) = authority.issue(Role::Client, "bench", &[], VALID_FOR_DEFAULT)?.save(root, "client")?;
        let tls = TlsStore::load(TlsFiles { ca: root.join("ca.pem"), cert, key, revoked: None })?;
        let first = ports::free(MEMBERS * 2)?;
        let peer = |member: u16| format!("https://127.0.0.1:{}", first + MEMBERS + member);
        let cluster: Vec<String> = (0..MEMBERS).map(|member| format!("m{member}={}", peer(member))).collect();
        let mut members = Vec::new();
        for member in 0..MEMBERS {
            let client = format!("https://127.0.0.1:{}", first + member);
            let arguments = arguments(root, &authority, member, &client, &peer(member), &cluster.join(","))?;
            let child = spawn(root, &arguments)?;
            members.push(Member { arguments, client, child });
        }
        let etcd = Self { members, tls, down: None, directory };
        etcd.until_healthy(runtime)?;
        Ok(etcd)
    }

    /// Connections to the leader.
    ///
    /// # Errors
    /// When there is none. Needs to be within the runtime.
    pub fn leader(&self, runtime: &tokio::runtime::Runtime, connections: usize) -> anyhow::Result<Target> {
        let (leader, _) = runtime.block_on(self.states())?;
        let channels = (0..connections).map(|_| self.channel(leader)).collect::<Result<_, _>>()?;
        Ok(Target { writer: Writer::Etcd, channels })
    }

    /// How many keys there are, to a read that is linearizable.
    ///
    /// # Errors
    /// What the member says.
    pub fn count(&self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<u64> {
        let target = self.leader(runtime, 1)?;
        // From the lowest to the highest key.
        let all = wire::RangeRequest { key: vec![0], range_end: vec![0], count_only: true };
        let found: wire::RangeResponse = runtime.block_on(call(target.channel(0), "/etcdserverpb.KV/Range", all))?;
        Ok(u64::try_from(found.count)?)
    }

    /// Process ids.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        self.members.iter().filter_map(|member| i32::try_from(member.child.id()).ok()).collect()
    }

    /// Where it keeps its data.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.directory.path()
    }

    fn channel(&self, member: usize) -> anyhow::Result<Channel> {
        let client = &self.members[member].client;
        Ok(channel::lazy(client, &self.tls, self.tls.expect_any(), Traffic::Control)?)
    }

    /// Which member leads, and that all are of one mind about it.
    async fn states(&self) -> anyhow::Result<(usize, u64)> {
        let mut leads = None;
        let mut named = Vec::new();
        for member in 0..self.members.len() {
            let call = call(self.channel(member)?, "/etcdserverpb.Maintenance/Status", wire::StatusRequest {});
            let status: wire::StatusResponse = tokio::time::timeout(Duration::from_secs(2), call).await??;
            let id = status.header.context("a status has a header")?.member_id;
            ensure!(status.leader != 0, "m{member} knows no leader");
            if status.leader == id {
                leads = Some(member);
            }
            named.push(status.leader);
        }
        ensure!(named.iter().all(|leader| *leader == named[0]), "members name different leaders");
        Ok((leads.context("the leader is a member")?, named[0]))
    }

    fn until_healthy(&self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            // A linearizable read through every member: each can reach the leader, and has applied what it has.
            let healthy = runtime.block_on(async {
                self.states().await?;
                for member in 0..self.members.len() {
                    let read = wire::RangeRequest { key: b"health".to_vec(), ..Default::default() };
                    let call = call(self.channel(member)?, "/etcdserverpb.KV/Range", read);
                    let _: wire::RangeResponse = tokio::time::timeout(Duration::from_secs(2), call).await??;
                }
                Ok::<_, anyhow::Error>(())
            });
            match healthy {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= end => {
                    let log = fs::read_to_string(self.root().join("etcd.log")).unwrap_or_default();
                    let tail: Vec<&str> = log.lines().rev().take(20).collect();
                    bail!("etcd does not get well: {error:#}; its last words, the last first:\n{}", tail.join("\n"))
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn arguments(
    root: &Path,
    authority: &Authority,
    member: u16,
    client: &str,
    peer: &str,
    cluster: &str,
) -> anyhow::Result<Vec<String>> {
    let name = format!("m{member}");
    let names = ["127.0.0.1".to_owned()];
    let issued = authority.issue(Role::Coordinator, &(member + 1).to_string(), &names, VALID_FOR_DEFAULT)?;
    let (cert, key) = issued.save(root, &name)?;
    let show = |path: PathBuf| path.display().to_string();
    let (ca, cert, key) = (show(root.join("ca.pem")), show(cert), show(key));
    let pairs = [
        ("--name", name.as_str()),
        ("--data-dir", &show(root.join(format!("{name}.etcd")))),
        ("--listen-client-urls", client),
        ("--advertise-client-urls", client),
        ("--listen-peer-urls", peer),
        ("--initial-advertise-peer-urls", peer),
        ("--initial-cluster", cluster),
        ("--trusted-ca-file", &ca),
        ("--cert-file", &cert),
        ("--key-file", &key),
        ("--peer-trusted-ca-file", &ca),
        ("--peer-cert-file", &cert),
        ("--peer-key-file", &key),
    ];
    let mut all: Vec<String> = pairs.iter().flat_map(|(name, value)| [*name, *value]).map(str::to_owned).collect();
    all.extend(["--client-cert-auth", "--peer-client-cert-auth"].map(str::to_owned));
    Ok(all)
}

fn spawn(root: &Path, arguments: &[String]) -> anyhow::Result<Child> {
    let log = fs::OpenOptions::new().create(true).append(true).open(root.join("etcd.log"))?;
    let mut command = Command::new("etcd");
    command.args(arguments).stdin(Stdio::null()).stderr(log.try_clone()?).stdout(log);
    // Its settings come from here alone.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ETCD_")) {
        command.env_remove(name);
    }
    command.spawn().context(INSTALL)
}

impl Replicated for Etcd {
    fn everywhere(&self) -> anyhow::Result<Target> {
        let channels = (0..self.members.len()).map(|member| self.channel(member)).collect::<Result<_, _>>()?;
        Ok(Target { writer: Writer::Etcd, channels })
    }

    fn kill_leader(&mut self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Instant> {
        let (leader, _) = runtime.block_on(self.states())?;
        let pid = i32::try_from(self.members[leader].child.id())?;
        let at = Instant::now();
        signal(pid, rustix::process::Signal::KILL);
        gone(pid);
        self.down = Some(leader);
        Ok(at)
    }

    fn mend(&mut self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        let down = self.down.take().context("one was killed")?;
        let child = spawn(self.root(), &self.members[down].arguments)?;
        let mut killed = std::mem::replace(&mut self.members[down].child, child);
        killed.wait()?;
        self.until_healthy(runtime)
    }

    fn check(&self, runtime: &tokio::runtime::Runtime, keys: &[String]) -> anyhow::Result<()> {
        let target = self.leader(runtime, 1)?;
        runtime.block_on(async {
            for key in keys {
                let read = wire::RangeRequest { key: key.as_bytes().to_vec(), ..Default::default() };
                let found: wire::RangeResponse = call(target.channel(0), "/etcdserverpb.KV/Range", read).await?;
                ensure!(found.count == 1, "{key} was acknowledged by etcd and is lost");
            }
            Ok(())
        })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}
