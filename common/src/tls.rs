//! Who is let in and whom we speak to: certificates, their verification and their reload.
//!
//! TLS 1.3 only, both sides always show a certificate, no session resumption (a resumed session would skip
//! the check for revocation). Servers are known by their SPIFFE id, not by their host name, so that addresses may change.
//! Invariant: a connection registered with a [`TlsStore`] is trusted by the newest material that the store loaded;
//! one that no longer is, is cut, and so is one whose peer's certificate has run out.

mod guard;
mod material;
mod verify;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use helix_model::NodeId;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};

pub use self::guard::Guarded;
use self::guard::{Cut, Registration};
use self::material::Material;
use crate::identity::{Identity, IdentityError, Name};
use crate::pki::Serial;

/// Where a process's TLS material is.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted (PEM; several while one replaces another).
    pub ca: PathBuf,
    /// Our certificate, followed by intermediates if there are any (PEM).
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Serial numbers that are refused, one a line; the file must exist if it is named here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<PathBuf>,
}

impl TlsFiles {
    /// Takes relative paths as relative to `directory`.
    #[must_use]
    pub fn relative_to(self, directory: &Path) -> Self {
        Self {
            ca: directory.join(self.ca),
            cert: directory.join(self.cert),
            key: directory.join(self.key),
            revoked: self.revoked.map(|path| directory.join(path)),
        }
    }
}

/// Whom a client expects to reach: a coordinator of this cluster, and maybe one in particular.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expect {
    /// The cluster.
    pub cluster: Name,
    /// The node, where only that one will do.
    pub node: Option<NodeId>,
}

/// Who is at the other end of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerInfo {
    /// Whom its certificate speaks for.
    pub identity: Identity,
    /// Where it is.
    pub address: SocketAddr,
    /// Its certificate's serial number.
    pub serial: Serial,
}

/// Why TLS material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {why}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The certificate is not usable by us, now.
    #[error("{path}: {why}; issue a new certificate with `helix pki issue`")]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The certificate carries no identity.
    #[error("{path}: {source}; issue one with `helix pki issue`")]
    Identity {
        /// Which.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// A reload brought another identity: a process cannot become someone else.
    #[error("{path} is now {found}, and this process is {running}; restart it to change its identity")]
    IdentityChanged {
        /// Which.
        path: PathBuf,
        /// Who we are.
        running: Box<Identity>,
        /// Who the file says we are.
        found: Box<Identity>,
    },
}

/// Parts of a reload that failed. What those files held before stays in use; all other parts were taken over.
#[derive(Debug, thiserror::Error)]
#[error("{}; what was there before stays in use, all else was read again", joined(.failed))]
pub struct ReloadFailed {
    /// What is wrong with which file.
    pub failed: Vec<TlsError>,
    /// Connections that were cut all the same.
    pub cut: usize,
}

fn joined(errors: &[TlsError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A process's TLS material, reloadable, and the connections that depend on it.
pub struct TlsStore {
    files: TlsFiles,
    identity: Identity,
    current: ArcSwap<Material>,
    connections: Mutex<HashMap<u64, Connection>>,
    next_connection: AtomicU64,
    this: Weak<Self>,
}

struct Connection {
    chain: Vec<CertificateDer<'static>>,
    serial: Serial,
    identity: Identity,
    side: Side,
    since: UnixTime,
    cut: Arc<Cut>,
}

/// Which end of a connection the peer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    /// The peer dialled us.
    Client,
    /// We dialled the peer.
    Server,
}

impl TlsStore {
    /// Reads and checks the files: the key belongs to the certificate, the certificate to the authority, it has one
    /// identity, is valid now, and is not revoked itself.
    ///
    /// # Errors
    /// [`TlsError`], which names the file and what to do.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let material = Material::load(&files)?;
        Ok(Arc::new_cyclic(|this| Self {
            files,
            identity: material.identity().clone(),
            current: ArcSwap::from_pointee(material),
            connections: Mutex::new(HashMap::new()),
            next_connection: AtomicU64::new(0),
            this: this.clone(),
        }))
    }

    /// Reads the files again. New connections use the new material; connections whose peer is revoked by it, or no
    /// longer issued by a trusted authority, are cut. Returns how many were cut. Blocks for the reading of four small files.
    ///
    /// Authorities, revocations, and our certificate with its key are three parts: one that cannot be read keeps none of
    /// the others out.
    ///
    /// # Errors
    /// [`ReloadFailed`] names the parts that stay as they were.
    pub fn reload(&self) -> Result<usize, ReloadFailed> {
        let (material, failed) = self.current.load().reload(&self.files);
        // The order matters: first the new material, then the sweep. A handshake that ends in between registers
        // itself and is then checked against the new material.
        self.current.store(Arc::new(material));
        let material = self.current.load();
        let mut cut = 0;
        for connection in self.lock().values() {
            if let Some(why) = material.distrusts(connection) {
                connection.cut.cut();
                cut += 1;
                tracing::warn!(target: "audit", peer = %connection.identity, serial = %connection.serial, why, "connection cut");
            }
        }
        if failed.is_empty() { Ok(cut) } else { Err(ReloadFailed { failed, cut }) }
    }

    /// Who we are.
    #[must_use]
    pub fn own_identity(&self) -> &Identity {
        &self.identity
    }

    /// When our certificate ends, as last loaded.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.current.load().not_after()
    }

    /// The files this store reads.
    #[must_use]
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Any coordinator of our cluster.
    #[must_use]
    pub fn expect_any(&self) -> Expect {
        Expect { cluster: self.identity.cluster.clone(), node: None }
    }

    /// One coordinator of our cluster.
    #[must_use]
    pub fn expect_node(&self, node: NodeId) -> Expect {
        Expect { cluster: self.identity.cluster.clone(), node: Some(node) }
    }

    /// The newest configuration for accepting connections.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().server)
    }

    /// The newest configuration for dialling someone.
    #[must_use]
    pub fn client_config(&self, expect: &Expect) -> Arc<ClientConfig> {
        self.current.load().client(expect)
    }

    /// Connections that depend on this store now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().len()
    }

    /// Wraps a stream whose handshake is done, so that it is cut when its peer is no longer trusted.
    ///
    /// # Errors
    /// When the peer's chain is empty, carries no identity, or was revoked during the handshake.
    pub(crate) fn guard<S>(
        &self,
        stream: S,
        chain: &[CertificateDer<'_>],
        address: SocketAddr,
        side: Side,
    ) -> Result<(Guarded<S>, PeerInfo), rustls::Error> {
        let leaf = chain.first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let info = verify::read(leaf)?;
        let connection = Connection {
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            serial: info.serial.clone(),
            identity: info.identity.clone(),
            side,
            since: UnixTime::now(),
            cut: Arc::default(),
        };
        let cut = Arc::clone(&connection.cut);
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let why = {
            let mut connections = self.lock();
            let why = self.current.load().distrusts(&connection);
            connections.insert(id, connection);
            why
        };
        let registration = Registration { store: self.this.clone(), id };
        if let Some(why) = why {
            return Err(rustls::Error::General(why.to_owned()));
        }
        let peer = PeerInfo { identity: info.identity, address, serial: info.serial };
        Ok((Guarded::new(stream, cut, info.not_after, registration), peer))
    }

    fn forget(&self, id: u64) {
        self.lock().remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        // Nothing panics while holding it; the map is whole in any case.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for TlsStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStore").field("identity", &self.identity).finish_non_exhaustive()
    }
}
