//! An S3 endpoint on loopback, in this process: real signatures, parts and ranges over a real socket, objects in files. It can fail.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Result, s3_error};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

/// The bucket that there is.
pub(crate) const BUCKET: &str = "builds";

/// What the endpoint does to a request that was signed well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Answers it.
    None,
    /// 500.
    Internal,
    /// 403.
    Denied,
    /// 403 for objects with one of these in their keys, answers for the others.
    DeniedTo(Vec<String>),
    /// 404, and not for the object.
    NoBucket,
    /// Takes it and says nothing, ever.
    Silent,
}

#[derive(Clone)]
struct Gate {
    fault: Arc<Mutex<Fault>>,
    asked: Arc<AtomicU64>,
}

#[tonic::async_trait]
impl S3Access for Gate {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let fault = self.fault.lock().unwrap().clone();
        match fault {
            Fault::None => Ok(()),
            Fault::Internal => Err(s3_error!(InternalError)),
            Fault::Denied => Err(s3_error!(AccessDenied)),
            Fault::DeniedTo(parts) => match context.s3_path().get_object_key() {
                Some(key) if parts.iter().any(|part| key.contains(part)) => Err(s3_error!(AccessDenied)),
                _ => Ok(()),
            },
            Fault::NoBucket => Err(s3_error!(NoSuchBucket)),
            Fault::Silent => std::future::pending().await,
        }
    }
}

/// See the module.
pub(crate) struct Endpoint {
    root: TempDir,
    address: SocketAddr,
    service: S3Service,
    gate: Gate,
    server: Option<JoinHandle<()>>,
}

impl Endpoint {
    pub(crate) async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("objects").join(BUCKET)).unwrap();
        std::fs::write(root.path().join("id"), "helix\n").unwrap();
        std::fs::write(root.path().join("secret"), "not a word to anybody\n").unwrap();
        let gate = Gate { fault: Arc::new(Mutex::new(Fault::None)), asked: Arc::default() };
        let mut service = S3ServiceBuilder::new(FileSystem::new(root.path().join("objects")).unwrap());
        service.set_auth(SimpleAuth::from_single("helix", "not a word to anybody"));
        service.set_access(gate.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = service.build();
        let server = Some(tokio::spawn(serve(listener, service.clone())));
        Self { root, address, service, gate, server }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Files with the id of the key and the key.
    pub(crate) fn keys(&self) -> (PathBuf, PathBuf) {
        (self.root.path().join("id"), self.root.path().join("secret"))
    }

    pub(crate) fn fails_with(&self, fault: Fault) {
        *self.gate.fault.lock().unwrap() = fault;
    }

    /// Requests that came in, and were signed well.
    pub(crate) fn asked(&self) -> u64 {
        self.gate.asked.load(Ordering::SeqCst)
    }

    /// Closes the listener and every connection.
    pub(crate) async fn close(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = server.await;
        }
    }

    pub(crate) async fn reopen(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.server = Some(tokio::spawn(serve(listener, self.service.clone())));
    }

    /// Files of all objects but owners', in order.
    pub(crate) fn objects(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        walk(&self.root.path().join("objects").join(BUCKET), &mut found);
        found.retain(|path| path.file_name().is_some_and(|name| name != "owner"));
        found.sort();
        found
    }

    /// Removes everything, as if it were another bucket of this name.
    pub(crate) fn empty(&self) {
        let bucket = self.root.path().join("objects").join(BUCKET);
        std::fs::remove_dir_all(&bucket).unwrap();
        std::fs::create_dir(bucket).unwrap();
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            server.abort();
        }
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// Serves until it is dropped, and its connections with it.
async fn serve(listener: TcpListener, service: S3Service) {
    let mut connections = JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let service = service.clone();
        connections.spawn(async move {
            // A client that goes away is no failure of the test.
            let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
        });
    }
}
