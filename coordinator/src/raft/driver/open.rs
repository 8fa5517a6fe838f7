//! Opening what is on disk, and rebuilding the store where it is gone, broken, or behind the log; one that is ahead of it stays.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use helix_common::files::{Durability, write_atomic};
use helix_common::removal::remove_gradually;
use helix_common::wall;
use helix_core::State;

use super::{FSYNC_MOST, LogLimits, LogStore, Options, StartError, Timing, slowest_fsync};
use crate::codec::CodecError;
use crate::node_dir::NodeDir;
use crate::raft::snapshot;
use crate::raft::store::{Store, guarded};
use crate::raft::types::{LogId, SnapshotMeta};
use crate::registry::Counters;

/// Everything from disk.
pub(super) struct Opened {
    pub(super) log: LogStore,
    pub(super) store: Store,
    pub(super) state: State,
    pub(super) meta: SnapshotMeta,
    pub(super) snapshots: Vec<(SnapshotMeta, PathBuf)>,
    pub(super) snapshots_path: PathBuf,
    pub(super) timing: Timing,
}

/// Opens log, snapshots and store. Blocks.
pub(super) fn open(dir: &NodeDir, options: &Options, counters: &Arc<Counters>) -> Result<Opened, StartError> {
    let root = dir.path();
    let timing = match options.timing {
        Some(timing) => timing,
        None => measure(root)?,
    };
    let log = open_log(root, options, counters)?;
    let snapshots_path = root.join("snapshots");
    let mut snapshots = good_snapshots(&snapshots_path).map_err(at(&snapshots_path))?;
    let (purged, last) = log.bounds();
    // Between one that ends before the log begins and the log something is missing: of no use to us, nor to others.
    snapshots.retain(|(meta, _)| meta.last_log_id >= purged);
    let path = root.join("registry");
    let (store, state, meta) = open_registry(&path, options, &snapshots, purged.as_ref())?;
    if meta.last_log_id > last {
        // Entries are applied before they are flushed here, and a crash took some of them. openraft lets the log begin behind what
        // is applied: from then on nothing but the store has what is before. A snapshot that does not reach that far would be sent
        // to whoever lags again and again; where none is left, openraft has one written before anything else.
        let (applied, flushed) = (index(meta.last_log_id.as_ref()), index(last.as_ref()));
        tracing::warn!(applied, flushed, "the log ends before what is applied: it begins anew behind that");
        store.sync().map_err(at(&path))?;
        snapshots.retain(|(snapshot, _)| snapshot.last_log_id >= meta.last_log_id);
    }
    tracing::info!(
        applied = index(meta.last_log_id.as_ref()),
        purged = index(purged.as_ref()),
        snapshots = snapshots.len(),
        "registry opened"
    );
    Ok(Opened { log, store, state, meta, snapshots, snapshots_path, timing })
}

fn at(path: &Path) -> impl Fn(io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::Io { path: path.clone(), source }
}

fn index(id: Option<&LogId>) -> u64 {
    id.map_or(0, openraft::LogId::index)
}

fn measure(root: &Path) -> Result<Timing, StartError> {
    let slowest = slowest_fsync(root).map_err(at(root))?;
    let timing = Timing::for_fsync(slowest);
    tracing::info!(?slowest, ?timing, "disk measured");
    if slowest > FSYNC_MOST {
        tracing::warn!(?slowest, "the disk is too slow for a coordinator: leaders may change for no other reason");
    }
    Ok(timing)
}

/// Opens the log. Once there was one, an empty directory is a loss, not a beginning.
fn open_log(root: &Path, options: &Options, counters: &Arc<Counters>) -> Result<LogStore, StartError> {
    let path = root.join("log");
    let marker = root.join("log.made");
    if marker.exists() && !LogStore::is_in(&path) {
        return Err(StartError::LogLost(path));
    }
    let limits = LogLimits { chunk_bytes: options.log_chunk_bytes };
    let log = LogStore::open(&path, limits, Arc::clone(counters)).map_err(at(&path))?;
    if !marker.exists() {
        helix_common::files::sync_directory(&path).map_err(at(&path))?;
        write_atomic(&marker, b"", 0o600, Durability::Synced).map_err(at(&marker))?;
    }
    Ok(log)
}

/// Snapshots that are whole, newest first, and no more than are kept: a crash may have come before an older one went. Others are
/// put aside.
fn good_snapshots(directory: &Path) -> io::Result<Vec<(SnapshotMeta, PathBuf)>> {
    std::fs::create_dir_all(directory)?;
    snapshot::sweep(directory)?;
    let mut good = Vec::new();
    for path in snapshot::list(directory)? {
        match snapshot::verify(&path) {
            Ok(meta) => good.push((meta, path)),
            Err(error) if is_newer(&error) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a snapshot is damaged and put aside");
                std::fs::rename(&path, path.with_extension("damaged"))?;
            }
        }
    }
    for (_, older) in good.split_off(snapshot::KEPT.min(good.len())) {
        remove_gradually(&older)?;
    }
    Ok(good)
}

fn is_newer(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<CodecError>());
    matches!(inner, Some(CodecError::Newer { .. }))
}

fn open_registry(
    path: &Path,
    options: &Options,
    snapshots: &[(SnapshotMeta, PathBuf)],
    purged: Option<&LogId>,
) -> Result<(Store, State, SnapshotMeta), StartError> {
    match try_open(path, options.store_cache_bytes) {
        Ok((store, state, meta)) if meta.last_log_id.as_ref() >= purged => return Ok((store, state, meta)),
        Ok((_, _, meta)) => {
            let applied = index(meta.last_log_id.as_ref());
            tracing::warn!(applied, purged = index(purged), "the store is behind the log's beginning: rebuilding it");
        }
        // A full disk or a missing right is no damage: what is there stays as it is.
        Err(error) if is_newer(&error) || error.raw_os_error().is_some() => return Err(at(path)(error)),
        Err(error) => tracing::warn!(%error, "the store cannot be used: rebuilding it"),
    }
    set_aside(path).map_err(at(path))?;
    // All reach back to the log; the newest comes first.
    if let Some((_, file)) = snapshots.first() {
        let store = Store::open(path, options.store_cache_bytes).map_err(at(path))?;
        store.replace(file).map_err(at(file))?;
        let (state, meta) = store.load().map_err(at(path))?;
        tracing::info!(from = %file.display(), applied = index(meta.last_log_id.as_ref()), "the store was rebuilt");
        return Ok((store, state, meta));
    }
    if let Some(purged) = purged {
        return Err(StartError::RegistryLost { purged: purged.index() });
    }
    let store = Store::open(path, options.store_cache_bytes).map_err(at(path))?;
    let (state, meta) = store.load().map_err(at(path))?;
    Ok((store, state, meta))
}

pub(in crate::raft) fn try_open(path: &Path, cache_bytes: u64) -> io::Result<(Store, State, SnapshotMeta)> {
    guarded(|| {
        let store = Store::open(path, cache_bytes)?;
        let (state, meta) = store.load()?;
        Ok((store, state, meta))
    })
}

/// Keeps a broken store for people to look at; only the last one, or disks would fill.
fn set_aside(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    for entry in std::fs::read_dir(parent)? {
        let old = entry?.path();
        let name = old.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("registry.aside-") {
            std::fs::remove_dir_all(old)?;
        }
    }
    std::fs::rename(path, parent.join(format!("registry.aside-{}", wall::now_ms())))
}
