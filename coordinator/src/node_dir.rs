//! A node's data directory: who the node is, which other nodes it has met, and that one process alone uses it.
//!
//! `init` writes the identity once, into an empty directory; nothing changes it later. The epoch is a random number:
//! a directory that was wiped and made again has another one, and every peer that met the first refuses the second,
//! because a node that forgot its log could help to elect a leader without committed entries.
//! Invariant: a file here is whole or absent; what fails its checksum is refused, never guessed at.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fs4::fs_std::FileExt;
use helix_common::files::{Durability, remove_temporaries, write_atomic};
use helix_model::NodeId;
use serde::{Deserialize, Serialize};

mod filling;

pub use filling::{Begun, Filling, Replacing};

/// The form of the files in a data directory; a newer one is refused.
pub const FORMAT: u32 = 1;

const IDENTITY: &str = "node.json";
const EPOCHS: &str = "peers.json";
const REMOVED: &str = "removed.json";
const LOCK: &str = "lock";
/// While a registry is given to a new cluster.
const RECOVERY: &str = "recovery";

/// How long another process's lock is waited for: one that was killed may hold it until the last of its threads is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeDirError {
    /// `init` found something there.
    #[error(
        "{0} is not empty: a node's directory is made once; start the node that is there, or choose an empty directory"
    )]
    NotEmpty(PathBuf),
    /// There is no node in it.
    #[error(
        "{0} holds no node: make one with `helix-coordinator init`; one that is to join a cluster that runs with \
         `init --join`, and then `helix cluster add`"
    )]
    Empty(PathBuf),
    /// Another process uses it.
    #[error("{0} is in use by another process: one directory is one node")]
    Locked(PathBuf),
    /// It was written by a newer program.
    #[error("{path} has format {found}, and this program knows {FORMAT}: start a newer helix-coordinator")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A file does not say what was written to it.
    #[error(
        "{path} is damaged ({why}): this node's identity is lost; remove the node and add it under a new id with `helix cluster add`"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The node was removed from its cluster.
    #[error(
        "{path} was node {node} of cluster {cluster}, which removed it: its id is never used again; remove the directory, \
         and to join anew make a node under a new id with `helix-coordinator init --join`"
    )]
    Removed {
        /// The directory.
        path: PathBuf,
        /// Its number.
        node: u64,
        /// Its cluster.
        cluster: String,
    },
    /// A recovery was cut short.
    #[error(
        "{0} is being made a cluster of its own, and that was cut short: repeat `helix-coordinator recover --data-dir {0}`, \
         which goes on"
    )]
    Recovering(PathBuf),
    /// A peer is known under another epoch.
    #[error(
        "node {node} was met under epoch {known:016x} and now has {found:016x}: its data was wiped or copied; add it under a new id"
    )]
    EpochChanged {
        /// Who.
        node: NodeId,
        /// What is remembered.
        known: u64,
        /// What it says.
        found: u64,
    },
    /// An argument makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The system says no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Who a node is, for ever.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeIdentity {
    /// The cluster's name.
    pub cluster: String,
    /// The node's number, at least 1, never used twice.
    pub node: u64,
    /// The random number of this directory.
    pub epoch: u64,
    /// The cluster's first members, id to HOST:PORT; empty for a node that joins later.
    pub members: BTreeMap<u64, String>,
}

impl NodeIdentity {
    /// The node's number.
    #[must_use]
    pub fn id(&self) -> NodeId {
        NodeId(self.node)
    }
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    format: u32,
    crc32: u32,
    body: String,
}

/// An open data directory. While it lives no other process can open it.
#[derive(Debug)]
pub struct NodeDir {
    path: PathBuf,
    identity: NodeIdentity,
    epochs: Mutex<BTreeMap<u64, u64>>,
    // Held for its lock, which ends with it.
    lock: Mutex<Option<File>>,
}

/// Makes a node: writes its identity into `path`, which is empty or absent. Blocks.
///
/// # Errors
/// [`NodeDirError`]; nothing is left half-made that `open` would accept.
pub fn init(
    path: &Path,
    cluster: &str,
    node: NodeId,
    members: &BTreeMap<NodeId, String>,
) -> Result<NodeIdentity, NodeDirError> {
    if node.0 == 0 {
        return Err(NodeDirError::Invalid("a node's id is at least 1".to_owned()));
    }
    if cluster.is_empty() {
        return Err(NodeDirError::Invalid("a cluster has a name".to_owned()));
    }
    if !members.is_empty() && !members.contains_key(&node) {
        return Err(NodeDirError::Invalid(format!("node {node} is not among the initial members")));
    }
    let io = |source| NodeDirError::Io { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
    let _lock = lock(path)?;
    // One that was cut short made nothing: it can be repeated.
    remove_temporaries(path).map_err(io)?;
    let mut names = std::fs::read_dir(path).map_err(io)?.filter_map(Result::ok);
    if names.any(|entry| entry.file_name() != LOCK) {
        return Err(NodeDirError::NotEmpty(path.to_owned()));
    }
    let identity = NodeIdentity {
        cluster: cluster.to_owned(),
        node: node.0,
        epoch: new_epoch(),
        members: members.iter().map(|(id, address)| (id.0, address.clone())).collect(),
    };
    write_sealed(&path.join(IDENTITY), &identity)?;
    Ok(identity)
}

/// What no other directory has.
#[must_use]
pub fn new_epoch() -> u64 {
    rand::random::<u64>().max(1)
}

impl NodeDir {
    /// Opens the node in `path` and takes the directory's lock. Blocks.
    ///
    /// # Errors
    /// [`NodeDirError`]: no node, another process, a newer format, damage.
    pub fn open(path: &Path) -> Result<Self, NodeDirError> {
        let file = path.join(IDENTITY);
        if !file.exists() {
            return Err(NodeDirError::Empty(path.to_owned()));
        }
        let lock = lock(path)?;
        let io = |source| NodeDirError::Io { path: path.to_owned(), source };
        remove_temporaries(path).map_err(io)?;
        if path.join(RECOVERY).join(filling::READY).exists() {
            return Err(NodeDirError::Recovering(path.to_owned()));
        }
        let identity: NodeIdentity = read_sealed(&file)?;
        if path.join(REMOVED).exists() {
            let NodeIdentity { cluster, node, .. } = identity;
            return Err(NodeDirError::Removed { path: path.to_owned(), node, cluster });
        }
        let epochs_file = path.join(EPOCHS);
        let epochs = if epochs_file.exists() { read_sealed(&epochs_file)? } else { BTreeMap::new() };
        Ok(Self { path: path.to_owned(), identity, epochs: Mutex::new(epochs), lock: Mutex::new(Some(lock)) })
    }

    /// Lets another process have the directory; nothing is written to it through this any more.
    pub(crate) fn release(&self) {
        // The order matters: whoever writes holds this lock.
        let _epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Whether this process still has the directory.
    pub(crate) fn is_held(&self) -> bool {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Notes for ever that the cluster removed this node: it is not opened again. Blocks for one small write.
    ///
    /// # Errors
    /// The failing write: then nothing is noted.
    pub fn mark_removed(&self) -> Result<(), NodeDirError> {
        write_sealed(&self.path.join(REMOVED), &self.identity)
    }

    /// Who this node is.
    #[must_use]
    pub fn identity(&self) -> &NodeIdentity {
        &self.identity
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The epoch a node was met under.
    #[must_use]
    pub fn epoch_of(&self, node: NodeId) -> Option<u64> {
        if node == self.identity.id() {
            return Some(self.identity.epoch);
        }
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner).get(&node.0).copied()
    }

    /// Checks a node's epoch against what is remembered, and remembers the first one, durably. Blocks for one small
    /// write when the node is new, and not at all otherwise.
    ///
    /// # Errors
    /// [`NodeDirError::EpochChanged`], or the failing write: then nothing is remembered.
    pub fn meet(&self, node: NodeId, epoch: u64) -> Result<(), NodeDirError> {
        if node == self.identity.id() {
            return same_epoch(node, self.identity.epoch, epoch);
        }
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = epochs.get(&node.0) {
            return same_epoch(node, *known, epoch);
        }
        if self.lock.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return Err(NodeDirError::Locked(self.path.clone()));
        }
        let mut grown = epochs.clone();
        grown.insert(node.0, epoch);
        write_sealed(&self.path.join(EPOCHS), &grown)?;
        *epochs = grown;
        Ok(())
    }
}

fn same_epoch(node: NodeId, known: u64, found: u64) -> Result<(), NodeDirError> {
    if known == found { Ok(()) } else { Err(NodeDirError::EpochChanged { node, known, found }) }
}

fn lock(path: &Path) -> Result<File, NodeDirError> {
    let io = |source| NodeDirError::Io { path: path.join(LOCK), source };
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path.join(LOCK));
    let file = file.map_err(io)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match FileExt::try_lock_exclusive(&file) {
            Ok(true) => return Ok(file),
            Ok(false) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            Ok(false) => return Err(NodeDirError::Locked(path.to_owned())),
            Err(error) => return Err(io(error)),
        }
    }
}

fn write_sealed<T: Serialize>(path: &Path, value: &T) -> Result<(), NodeDirError> {
    let io = |source| NodeDirError::Io { path: path.to_owned(), source };
    let body = serde_json::to_string(value).map_err(|error| io(io::Error::other(error)))?;
    let sealed = Sealed { format: FORMAT, crc32: crc32fast::hash(body.as_bytes()), body };
    let bytes = serde_json::to_vec_pretty(&sealed).map_err(|error| io(io::Error::other(error)))?;
    write_atomic(path, &bytes, 0o600, Durability::Synced).map_err(io)
}

fn read_sealed<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, NodeDirError> {
    let damaged = |why: String| NodeDirError::Damaged { path: path.to_owned(), why };
    let bytes = std::fs::read(path).map_err(|source| NodeDirError::Io { path: path.to_owned(), source })?;
    let sealed: Sealed = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if sealed.format > FORMAT {
        return Err(NodeDirError::Newer { path: path.to_owned(), found: sealed.format });
    }
    if crc32fast::hash(sealed.body.as_bytes()) != sealed.crc32 {
        return Err(damaged("its checksum is wrong".to_owned()));
    }
    serde_json::from_str(&sealed.body).map_err(|error| damaged(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("data");
        let members = BTreeMap::from([(NodeId(1), "127.0.0.1:7421".to_owned())]);
        init(&path, "demo", NodeId(1), &members).unwrap();
        (root, path)
    }

    #[test]
    fn a_node_is_made_once_and_opened_by_one_process() {
        let (_root, path) = made();
        let open = NodeDir::open(&path).unwrap();
        assert_eq!((open.identity().cluster.as_str(), open.identity().node), ("demo", 1));
        assert!(matches!(NodeDir::open(&path), Err(NodeDirError::Locked(_))));
        drop(open);
        assert!(matches!(init(&path, "demo", NodeId(1), &BTreeMap::new()), Err(NodeDirError::NotEmpty(_))));
        NodeDir::open(&path).unwrap();
    }

    #[test]
    fn an_empty_directory_is_an_error_that_names_the_ways_out() {
        let root = tempfile::tempdir().unwrap();
        let error = NodeDir::open(root.path()).unwrap_err().to_string();
        assert!(error.contains("init") && error.contains("cluster add"), "{error}");
    }

    #[test]
    fn damage_and_newer_formats_are_refused() {
        let (_root, path) = made();
        let file = path.join(IDENTITY);
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("demo", "demp")).unwrap();
        assert!(matches!(NodeDir::open(&path), Err(NodeDirError::Damaged { .. })));
        std::fs::write(&file, &text[..text.len() / 2]).unwrap();
        assert!(matches!(NodeDir::open(&path), Err(NodeDirError::Damaged { .. })));
        std::fs::write(&file, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
        assert!(matches!(NodeDir::open(&path), Err(NodeDirError::Newer { found: 2, .. })));
    }

    #[test]
    fn a_node_that_was_removed_is_not_opened_again() {
        let (_root, path) = made();
        NodeDir::open(&path).unwrap().mark_removed().unwrap();
        let error = NodeDir::open(&path).unwrap_err();
        assert!(matches!(error, NodeDirError::Removed { node: 1, .. }), "{error}");
        assert!(error.to_string().contains("new id"), "{error}");
    }

    #[test]
    fn epochs_are_remembered_across_restarts() {
        let (_root, path) = made();
        let open = NodeDir::open(&path).unwrap();
        open.meet(NodeId(2), 7).unwrap();
        open.meet(NodeId(2), 7).unwrap();
        drop(open);
        let open = NodeDir::open(&path).unwrap();
        assert!(matches!(open.meet(NodeId(2), 8), Err(NodeDirError::EpochChanged { known: 7, found: 8, .. })));
        assert!(open.meet(NodeId(1), 1).is_err(), "our own id under another epoch");
    }
}
