//! Calls to the cluster: any coordinator, retried through fail-overs until the connect time-out.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use helix_common::backoff::Backoff;
use helix_common::channel::Traffic;
use helix_common::endpoints::{CallError, Endpoints, Verdict};
use helix_common::status::error_code;
use helix_common::tls::{TlsFiles, TlsStore};
use helix_model::limits::MESSAGE_BYTES_MAX;
use helix_model::parse::duration_text;
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::build_service_client::BuildServiceClient;
use helix_proto::v1::cluster_service_client::ClusterServiceClient;
use helix_proto::v1::worker_service_client::WorkerServiceClient;
use tonic::Status;
use tonic::transport::Channel;

use crate::context::ContextOptions;
use crate::failure::Failure;

/// The service of builds on a channel.
pub(crate) fn builds(channel: Channel) -> BuildServiceClient<Channel> {
    BuildServiceClient::new(channel).max_decoding_message_size(2 * MESSAGE_BYTES_MAX)
}

/// The service of blobs on a channel.
pub(crate) fn blobs(channel: Channel) -> BlobServiceClient<Channel> {
    BlobServiceClient::new(channel).max_decoding_message_size(2 * MESSAGE_BYTES_MAX)
}

/// The service of workers on a channel.
pub(crate) fn workers(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel).max_decoding_message_size(16 * MESSAGE_BYTES_MAX)
}

/// The service of coordinators on a channel.
pub(crate) fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel)
}

/// A random build id: chosen here, so that a submit can be repeated without making a second build.
pub(crate) fn new_build_id() -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    (0..12).map(|_| char::from(ALPHABET[usize::from(rand::random::<u8>()) % ALPHABET.len()])).collect()
}

/// The cluster, as one identity sees it.
pub(crate) struct Connection {
    endpoints: Endpoints,
    patience: Duration,
    /// Failures in a row of streams, and when the first of them was.
    failing: RefCell<Failing>,
}

/// Each fits well into the next.
struct Times {
    /// A wait on purpose.
    round: Duration,
    /// One try at one coordinator.
    attempt: Duration,
    /// All tries together.
    patience: Duration,
}

impl Times {
    fn of(patience: Duration) -> Self {
        let patience = patience.max(Duration::from_secs(1));
        Self { round: (patience / 3).min(Duration::from_secs(10)), attempt: patience * 2 / 3, patience }
    }
}

struct Failing {
    since: Option<Instant>,
    endpoint: String,
    backoff: Backoff,
}

impl Connection {
    /// Reads the context; dials nothing yet.
    pub(crate) fn open(options: &ContextOptions) -> Result<Self, Failure> {
        let context = options.load()?;
        let files = TlsFiles { ca: context.ca, cert: context.cert, key: context.key, revoked: None };
        let tls = TlsStore::load(files).map_err(|error| Failure::plain(error.to_string()))?;
        let own = tls.own_identity().cluster.as_str();
        if own != context.cluster {
            let message = format!("the certificate is for cluster {own}, the context for {}", context.cluster);
            return Err(Failure { word: Some("wrong_cluster".to_owned()), ..Failure::plain(message) });
        }
        let endpoints = Endpoints::new(&context.endpoints, tls).map_err(|error| Failure::plain(error.to_string()))?;
        // A coordinator that hangs must not use up all the patience. Once for all calls: each would else begin with whom the
        // one before found dead.
        let endpoints = endpoints.with_attempt_timeout(Times::of(options.connect_timeout).attempt);
        let backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        let failing = RefCell::new(Failing { since: None, endpoint: String::new(), backoff });
        Ok(Self { endpoints, patience: options.connect_timeout, failing })
    }

    /// Calls until there is a final answer, or the patience ends. `f` must be safe to repeat.
    pub(crate) async fn call<T, F, Fut>(&self, f: F) -> Result<T, Failure>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        self.endpoints.call(Times::of(self.patience).patience, f).await.map_err(|error| match &error {
            CallError::Answered(status) => Failure::from_status(status),
            CallError::NoAnswer { last, .. } => {
                let patience = duration_text(u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX));
                let asked = self.endpoints.list().join(", ");
                Failure::unreachable(format!("no answer within {patience} from {asked}: {}", in_words(last)))
            }
        })
    }

    /// How long a call may wait on purpose at the coordinator before it is made again: well within the patience, which
    /// is for coordinators that do not answer, not for builds that go on.
    pub(crate) fn round_ms(&self) -> u64 {
        u64::try_from(Times::of(self.patience).round.as_millis()).unwrap_or(u64::MAX)
    }

    /// One try, for streams, which resume in loops of their own: see [`Self::pause_or_fail`].
    pub(crate) async fn once<T, F, Fut>(&self, f: F) -> Result<T, Status>
    where
        F: FnOnce(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let (endpoint, channel) =
            self.endpoints.channel(Traffic::Bulk).map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.failing.borrow_mut().endpoint = endpoint;
        f(channel).await
    }

    /// After a stream broke: returns when it is worth going on elsewhere, or fails for good.
    pub(crate) async fn pause_or_fail(&self, status: Status) -> Result<(), Failure> {
        let wait = {
            let mut failing = self.failing.borrow_mut();
            let endpoint =
                if failing.endpoint.is_empty() { self.endpoints.current() } else { failing.endpoint.clone() };
            if self.endpoints.observe(&endpoint, &status) == Verdict::Final {
                return Err(status.into());
            }
            let since = *failing.since.get_or_insert_with(Instant::now);
            if since.elapsed() > self.patience {
                return Err(Failure::unreachable(format!(
                    "no coordinator goes on with the stream: {}",
                    in_words(&status)
                )));
            }
            failing.backoff.next_wait()
        };
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// A stream that was open for longer than the patience is no failure in a row with the one before it.
    pub(crate) fn lasted(&self, opened: Instant) {
        if opened.elapsed() > self.patience {
            self.succeeded();
        }
    }

    /// How many coordinators may be asked.
    pub(crate) fn coordinators(&self) -> usize {
        self.endpoints.list().len()
    }

    /// A stream makes progress: patience begins anew.
    pub(crate) fn succeeded(&self) {
        let mut failing = self.failing.borrow_mut();
        if failing.since.take().is_some() {
            failing.backoff.reset();
        }
    }

    /// The build that an id, a unique prefix or `last` stands for.
    pub(crate) async fn resolve(&self, text: &str) -> Result<String, Failure> {
        self.resolve_as(text, false).await
    }

    /// [`Self::resolve`], from what the coordinator at hand knows if `stale`.
    pub(crate) async fn resolve_as(&self, text: &str, stale: bool) -> Result<String, Failure> {
        let request = v1::ResolveBuildRequest { text: text.to_owned(), stale };
        let call = |channel| {
            let request = request.clone();
            async move { builds(channel).resolve_build(request).await }
        };
        Ok(self.call(call).await?.into_inner().build_id)
    }

    /// A build as it is now.
    pub(crate) async fn status(&self, id: &str, stale: bool) -> Result<v1::BuildStatus, Failure> {
        let request = v1::GetBuildStatusRequest { build_id: id.to_owned(), stale };
        let call = |channel| {
            let request = request.clone();
            async move { builds(channel).get_build_status(request).await }
        };
        Ok(self.call(call).await?.into_inner())
    }
}

fn in_words(status: &Status) -> String {
    let word = error_code(status).map(|code| format!("{code}: ")).unwrap_or_default();
    format!("{word}{}", status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_ids() {
        for _ in 0..100 {
            assert!(helix_model::BuildId::new(&new_build_id()).is_ok());
        }
        assert_ne!(new_build_id(), new_build_id());
    }

    #[test]
    fn a_build_that_goes_on_is_no_coordinator_that_does_not_answer() {
        for seconds in [0, 1, 5, 30, 3600] {
            let times = Times::of(Duration::from_secs(seconds));
            assert!(times.round > Duration::ZERO && times.round * 2 <= times.attempt, "{seconds}");
            assert!(times.attempt + times.round <= times.patience, "no time to ask another: {seconds}");
        }
    }
}
