//! One client for both sides: what it writes, how it waits, how it tries again. Only the call itself differs.

use std::time::{Duration, Instant};

use anyhow::ensure;
use helix_proto::convert::submit_of_spec;
use helix_proto::v1::build_service_client::BuildServiceClient;
use prost::Message as _;
use tonic::Status;
use tonic::transport::Channel;

use super::etcd;
use super::ours::no_op;
use crate::cluster::alive;

/// How long anything may take, fail-overs included.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// How long one try may take while a cluster looks for a leader.
const TRY: Duration = Duration::from_millis(500);

/// The pause before the next try.
const PAUSE: Duration = Duration::from_millis(5);

/// How a durable write is made.
#[derive(Clone, Copy, Debug)]
pub enum Writer {
    /// A submit of a build that does nothing.
    Ours,
    /// A put of a key like our builds' ids, and a value as long as our submit.
    Etcd,
}

impl Writer {
    /// Writes one; acknowledged means durable on a majority. The same again is harmless.
    ///
    /// # Errors
    /// What the other side says.
    pub async fn write(self, channel: Channel, key: &str) -> Result<(), Status> {
        let request = submit_of_spec(&no_op(), key);
        match self {
            Self::Ours => BuildServiceClient::new(channel).submit_build(request).await.map(|_| ()),
            Self::Etcd => etcd::put(channel, key.as_bytes().to_vec(), vec![b'x'; request.encoded_len()]).await,
        }
    }

    /// [`Self::write`] until it is acknowledged, by whichever connection: each tries again at once, whatever the others do, as
    /// impatient as can be, since the cluster is to be measured and not a client's back-off.
    ///
    /// # Errors
    /// When nobody acknowledges it in time.
    pub async fn insist(self, target: &Target, key: &str) -> anyhow::Result<()> {
        let one = |channel: &Channel| {
            let channel = channel.clone();
            Box::pin(async move {
                loop {
                    if let Ok(Ok(())) = tokio::time::timeout(TRY, self.write(channel.clone(), key)).await {
                        return;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            })
        };
        let all = futures::future::select_all(target.channels.iter().map(one));
        let acknowledged = tokio::time::timeout(DEADLINE, all).await;
        ensure!(acknowledged.is_ok(), "nobody acknowledged a write within {DEADLINE:?}");
        Ok(())
    }
}

/// Where and how to write.
#[derive(Clone, Debug)]
pub struct Target {
    /// How.
    pub writer: Writer,
    /// Where.
    pub channels: Vec<Channel>,
}

impl Target {
    /// One of the connections; clients are spread over them.
    #[must_use]
    pub fn channel(&self, client: usize) -> Channel {
        self.channels[client % self.channels.len()].clone()
    }
}

/// A replicated store whose leader can be killed.
pub trait Replicated {
    /// A connection to each member.
    ///
    /// # Errors
    /// When an endpoint is malformed. Needs a tokio runtime.
    fn everywhere(&self) -> anyhow::Result<Target>;

    /// Kills the leader by SIGKILL; when the signal was sent. Returns when the process is gone.
    ///
    /// # Errors
    /// When there is no leader.
    fn kill_leader(&mut self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Instant>;

    /// Starts who was killed, and waits until all members are well.
    ///
    /// # Errors
    /// When they do not get well.
    fn mend(&mut self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()>;

    /// That all these keys, whose writes were acknowledged, are there.
    ///
    /// # Errors
    /// When one is not.
    fn check(&self, runtime: &tokio::runtime::Runtime, keys: &[String]) -> anyhow::Result<()>;
}

/// A key of 32 characters that was not used before.
#[must_use]
pub fn new_key() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Waits until a killed process is gone, to a fraction of a millisecond.
pub fn gone(pid: i32) {
    let end = Instant::now() + DEADLINE;
    while alive(pid) && Instant::now() < end {
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// What drives: one thread, so that what is driven has the rest of the machine.
///
/// # Errors
/// When threads cannot be made.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}
