//! A registry in memory and peers on loopback, for the tests of the bytes plane.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use helix_model::BuildId;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Endpoint;
use tonic::transport::server::Router;

use super::*;

/// What all nodes of a test cluster agree on.
pub(crate) struct Ledger {
    pub(crate) policy: Mutex<Policy>,
    pub(crate) named: Mutex<BTreeSet<Digest>>,
    pub(crate) attempts: Mutex<HashMap<AttemptKey, AttemptFacts>>,
    /// What an attempt becomes right after the next look at it, and whoever listens has heard that by then.
    pub(crate) after_look: Mutex<Option<AttemptFacts>>,
    pub(crate) addresses: Mutex<BTreeMap<NodeId, SocketAddr>>,
    /// Nodes whose copies do not count.
    pub(crate) learners: Mutex<BTreeSet<NodeId>>,
    pub(crate) reachable: AtomicBool,
    /// Log time.
    pub(crate) now: AtomicU64,
    effects: broadcast::Sender<Arc<[Effect]>>,
}

impl Ledger {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            policy: Mutex::new(Policy { disk_reserve_bytes: 0, ..Policy::default() }),
            named: Mutex::default(),
            attempts: Mutex::default(),
            after_look: Mutex::default(),
            addresses: Mutex::default(),
            learners: Mutex::default(),
            reachable: AtomicBool::new(true),
            now: AtomicU64::new(0),
            effects: broadcast::Sender::new(64),
        })
    }

    /// The attempt is as given from now on, and everybody hears of it.
    pub(crate) fn set(&self, key: &AttemptKey, facts: AttemptFacts) {
        let sealed = matches!(facts, AttemptFacts::Sealed { .. });
        self.attempts.lock().unwrap().insert(key.clone(), facts);
        self.tell(if sealed { Effect::LogSealed(key.clone()) } else { Effect::BuildChanged(key.build.clone()) });
    }

    pub(crate) fn purge(&self, build: &BuildId) {
        self.attempts.lock().unwrap().retain(|key, _| key.build != *build);
        self.tell(Effect::BuildPurged(build.clone()));
    }

    fn tell(&self, effect: Effect) {
        // Nobody may be listening.
        let _ = self.effects.send(Arc::from([effect]));
    }
}

/// One node's view of the ledger.
pub(crate) struct Recorded {
    pub(crate) node: NodeId,
    pub(crate) ledger: Arc<Ledger>,
    channels: Mutex<HashMap<SocketAddr, Channel>>,
}

impl Recorded {
    pub(crate) fn new(node: u64, ledger: &Arc<Ledger>) -> Arc<Self> {
        Arc::new(Self { node: NodeId(node), ledger: Arc::clone(ledger), channels: Mutex::default() })
    }
}

impl Plane for Recorded {
    fn node(&self) -> NodeId {
        self.node
    }

    fn nodes(&self) -> Vec<NodeId> {
        self.ledger.addresses.lock().unwrap().keys().copied().collect()
    }

    fn voters(&self) -> Vec<NodeId> {
        let learners = self.ledger.learners.lock().unwrap();
        self.nodes().into_iter().filter(|node| !learners.contains(node)).collect()
    }

    fn bulk(&self, node: NodeId) -> Option<Channel> {
        let address = *self.ledger.addresses.lock().unwrap().get(&node)?;
        let mut channels = self.channels.lock().unwrap();
        let dial = || Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Some(channels.entry(address).or_insert_with(dial).clone())
    }

    fn policy(&self) -> Policy {
        self.ledger.policy.lock().unwrap().clone()
    }

    fn barrier(&self) -> BoxFuture<'_, Result<(), Unavailable>> {
        let reachable = self.ledger.reachable.load(Ordering::SeqCst);
        Box::pin(async move { if reachable { Ok(()) } else { Err(Unavailable("no leader".to_owned())) } })
    }

    fn names_blob(&self, digest: &Digest) -> bool {
        self.ledger.named.lock().unwrap().contains(digest)
    }

    fn attempt<'a>(&'a self, key: &'a AttemptKey) -> BoxFuture<'a, Result<AttemptFacts, Unavailable>> {
        let mut attempts = self.ledger.attempts.lock().unwrap();
        let facts = attempts.get(key).cloned().unwrap_or(AttemptFacts::Unknown);
        if let Some(next) = self.ledger.after_look.lock().unwrap().take() {
            attempts.insert(key.clone(), next);
        }
        Box::pin(async move { Ok(facts) })
    }

    fn now(&self) -> LogTime {
        LogTime(self.ledger.now.load(Ordering::SeqCst))
    }

    fn seal_log(&self, command: SealLog) -> BoxFuture<'_, Result<(), Unavailable>> {
        let reachable = self.ledger.reachable.load(Ordering::SeqCst);
        Box::pin(async move {
            if !reachable {
                return Err(Unavailable("no leader".to_owned()));
            }
            let known = self.ledger.attempts.lock().unwrap().get(&command.key).cloned();
            if let Some(AttemptFacts::Open { worker, end: Some(_) }) = known {
                assert_eq!(worker, command.worker);
                self.ledger.set(&command.key, AttemptFacts::Sealed { log: command.log });
            }
            Ok(())
        })
    }

    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        self.ledger.effects.subscribe()
    }
}

/// A server on a runtime of its own: dropping it breaks its connections, as a killed process would.
pub(crate) struct Server(Option<tokio::runtime::Runtime>);

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Reserves an address for a node.
pub(crate) fn listen(node: u64, ledger: &Ledger) -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    ledger.addresses.lock().unwrap().insert(NodeId(node), listener.local_addr().unwrap());
    listener
}

/// Serves a node.
pub(crate) fn serve(listener: std::net::TcpListener, router: Router) -> Server {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    });
    Server(Some(runtime))
}
