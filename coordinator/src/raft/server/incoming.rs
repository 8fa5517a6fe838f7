//! A leader's snapshot as it arrives: one file, which grows over as many calls as it takes, and is then installed.
//!
//! What has arrived is gone on with only by the same file: same entry and membership, same length, same checksum at its end. It lives as
//! long as this process: what a former one left is swept at the start. Invariants: bytes that are acknowledged were checked; there is at
//! most one such file; it goes when another is sent, when it turns out damaged, when it is not wanted any more, and once openraft is
//! done with it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use helix_common::removal::remove_gradually;
use helix_common::status::status;
use helix_failpoint::{self as failpoint, Point};
use helix_model::ErrorCode;
use helix_proto::raft;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tonic::{Status, Streaming};

use crate::raft::snapshot::{self, SnapshotFile};
use crate::raft::transfer::Transfer;
use crate::raft::types::{Raft, Snapshot, SnapshotMeta, Vote};

const HOLD_WAIT: Duration = Duration::from_secs(1);

/// What tells a snapshot's file from every other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Announced {
    pub(super) meta: SnapshotMeta,
    pub(super) bytes: u64,
    /// The checksum at its end; older senders do not say it, and send all of it in one call.
    pub(super) crc32: u32,
}

/// The place for what arrives: who holds it receives or installs.
pub(in crate::raft) struct Incoming {
    directory: PathBuf,
    transfer: Transfer,
    place: Arc<Mutex<Option<Partial>>>,
    /// Whether it was said that there is too little room.
    short: AtomicBool,
}

/// The place, for one call.
pub(super) type Held = OwnedMutexGuard<Option<Partial>>;

/// The beginning of a file, or all of it; the file goes with this.
pub(super) struct Partial {
    of: Announced,
    path: PathBuf,
    file: File,
    received: u64,
    /// Of what was received.
    crc: crc32fast::Hasher,
    /// When something was last asked or sent of it.
    touched: Instant,
}

fn invalid(why: &str) -> Status {
    status(ErrorCode::DigestMismatch, why.to_owned())
}

/// The refusal of a file that is not all here. An older receiver says the same of whatever it does not know.
pub(super) fn missing() -> Status {
    invalid("bytes are missing")
}

impl Partial {
    fn begin(directory: &Path, of: &Announced) -> io::Result<Self> {
        let name = format!("{}.{:016x}.incoming", snapshot::name_of(&of.meta), rand::random::<u64>());
        let path = directory.join(name);
        let file = File::create_new(&path)?;
        Ok(Self { of: of.clone(), path, file, received: 0, crc: crc32fast::Hasher::new(), touched: Instant::now() })
    }

    fn put(&mut self, data: &[u8]) -> io::Result<()> {
        failpoint::hit(Point::SnapshotReceive)?;
        self.file.write_all(data)?;
        self.crc.update(data);
        self.received += data.len() as u64;
        self.touched = Instant::now();
        Ok(())
    }

    /// What reads it again: whether the file is what was received.
    fn check(&self) -> impl FnOnce() -> io::Result<()> + Send + use<> {
        let (path, expected) = (self.path.clone(), (self.received, self.crc.clone().finalize()));
        move || {
            let mut file = File::open(path)?;
            let (mut crc, mut buffer, mut length) = (crc32fast::Hasher::new(), vec![0; 1 << 18], 0);
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    read => {
                        crc.update(&buffer[..read]);
                        length += read as u64;
                    }
                }
            }
            if (length, crc.finalize()) == expected {
                return Ok(());
            }
            Err(io::Error::new(io::ErrorKind::InvalidData, "it is not what was received"))
        }
    }

    /// Makes it durable and checks all of it.
    fn verify(&self) -> io::Result<()> {
        self.file.sync_all()?;
        let meta = snapshot::verify(&self.path)?;
        failpoint::hit(Point::SnapshotReceived)?;
        if meta == self.of.meta {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the file is not what its header says"))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: what stays is swept at the next start. Under another name it is openraft's.
        let _ = remove_gradually(&self.path);
    }
}

impl Incoming {
    pub(in crate::raft) fn new(directory: PathBuf, transfer: Transfer) -> Self {
        Self { directory, transfer, place: Arc::default(), short: AtomicBool::new(false) }
    }

    /// Lets go of what arrived of a snapshot that this node is past by now, if nobody sends it any more: a new leader may send one
    /// before it knows how far this node is, and insists on it.
    pub(in crate::raft) fn forget(&self, applied: u64) {
        let Ok(mut held) = self.place.try_lock() else { return };
        let rests = self.transfer.stalled_after * 2;
        if held.as_ref().is_some_and(|partial| last_index(&partial.of) <= applied && partial.touched.elapsed() > rests)
        {
            *held = None;
        }
    }

    /// Whether it takes parts.
    pub(super) fn takes_parts(&self) -> bool {
        self.transfer.takes_parts
    }

    /// Waits a moment for whoever holds it: a call that was given up may not know it yet.
    pub(super) async fn hold(&self) -> Result<Held, Status> {
        let busy = "another snapshot is being received or installed here";
        let held = tokio::time::timeout(HOLD_WAIT, Arc::clone(&self.place).lock_owned()).await;
        held.map_err(|_| status(ErrorCode::PeerUnreachable, busy))
    }

    /// Takes what a call brings of a file. Answers how much of it is here.
    pub(super) async fn receive(
        &self,
        held: &mut Held,
        of: &Announced,
        parts: &mut Streaming<raft::SnapshotRequest>,
    ) -> Result<u64, Status> {
        if held.as_ref().is_some_and(|partial| partial.of != *of) {
            **held = None;
        }
        let mut came = false;
        while let Some(chunk) = self.next(parts).await? {
            came = true;
            self.take(held, of, &chunk)?;
        }
        if !came {
            return self.look(held, of).await;
        }
        Ok(held.as_ref().map_or(0, |partial| partial.received))
    }

    async fn next(&self, parts: &mut Streaming<raft::SnapshotRequest>) -> Result<Option<raft::SnapshotChunk>, Status> {
        let limit = self.transfer.stalled_after;
        let part = tokio::time::timeout(limit, parts.message()).await;
        let part = part.map_err(|_| status(ErrorCode::PeerUnreachable, format!("nothing came for {limit:?}")))??;
        match part.map(|part| part.part) {
            None => Ok(None),
            Some(Some(raft::snapshot_request::Part::Chunk(chunk))) => Ok(Some(chunk)),
            Some(_) => Err(invalid("a second header")),
        }
    }

    // A status is what the caller is answered with; boxing it would only be undone there.
    #[allow(clippy::result_large_err)]
    fn take(&self, held: &mut Held, of: &Announced, chunk: &raft::SnapshotChunk) -> Result<(), Status> {
        if chunk.offset == 0 {
            **held = None;
            self.expect_room(of.bytes, of.bytes)?;
            **held = Some(Partial::begin(&self.directory, of).map_err(|error| self.broken(&error))?);
        }
        let Some(partial) = held.as_mut() else { return Err(invalid("a chunk is out of place")) };
        if chunk.offset != partial.received || crc32fast::hash(&chunk.data) != chunk.crc32 {
            return Err(invalid("a chunk is damaged or out of place"));
        }
        if partial.received.saturating_add(chunk.data.len() as u64) > of.bytes {
            return Err(invalid("more bytes than announced"));
        }
        if let Err(error) = partial.put(&chunk.data) {
            // It is not known how much of the chunk is in the file; and where the disk is full, this makes room.
            **held = None;
            return Err(self.broken(&error));
        }
        Ok(())
    }

    /// How much of a file is here that can be gone on with; refuses one that there is no room for before any of it is sent.
    async fn look(&self, held: &mut Held, of: &Announced) -> Result<u64, Status> {
        if self.kept(of).is_some() {
            return Ok(of.bytes);
        }
        if let Some(partial) = held.as_mut() {
            partial.touched = Instant::now();
            // It stays in its place: a connection may break meanwhile, and this call with it.
            let checked = tokio::task::spawn_blocking(partial.check()).await;
            if let Err(error) = checked.map_err(io::Error::other).and_then(|checked| checked) {
                tracing::warn!(%error, "what arrived of a snapshot is of no use; it is sent anew");
                **held = None;
            }
        }
        let received = held.as_ref().map_or(0, |partial| partial.received);
        self.expect_room(of.bytes, of.bytes.saturating_sub(received)).inspect_err(|_| **held = None)?;
        Ok(received)
    }

    /// The very file among the snapshots that this node keeps: it was installed, and the answer was lost.
    fn kept(&self, of: &Announced) -> Option<SnapshotFile> {
        let file = SnapshotFile::open(&self.directory.join(snapshot::name_of(&of.meta))).ok()?;
        (file.bytes() == of.bytes && file.checksum().ok()? == of.crc32).then_some(file)
    }

    /// Checks what is here, and has openraft install it. Answers the vote that openraft answers.
    pub(super) async fn install(
        self: Arc<Self>,
        raft: Raft,
        leader: Vote,
        of: Announced,
        mut held: Held,
    ) -> Result<Vote, Status> {
        let stopped = |error: &dyn std::fmt::Display| super::stopped(error);
        if let Some(snapshot) = self.kept(&of) {
            // openraft has it, and says so.
            let snapshot = Snapshot { meta: of.meta, snapshot };
            let answer = raft.install_full_snapshot(leader, snapshot).await.map_err(|error| stopped(&error))?;
            return Ok(answer.vote);
        }
        let whole = |partial: &mut Partial| partial.of == of && partial.received == of.bytes;
        let Some(partial) = held.take_if(whole) else { return Err(missing()) };
        let verified = tokio::task::spawn_blocking(move || partial.verify().map(|()| partial)).await;
        let verified = verified.map_err(io::Error::other).and_then(|verified| verified);
        let partial = verified.map_err(|error| self.broken(&error))?;
        self.expect_room(of.bytes, 0)?;
        let file = SnapshotFile::open(&partial.path).map_err(|error| self.broken(&error))?;
        match raft.install_full_snapshot(leader, Snapshot { meta: of.meta, snapshot: file }).await {
            // Installed under its own name; or openraft did not want it, and it goes.
            Ok(answer) => Ok(answer.vote),
            Err(error) => {
                // It may still be about to be installed. The next start sweeps it.
                std::mem::forget(partial);
                Err(stopped(&error))
            }
        }
    }

    #[allow(clippy::result_large_err)]
    fn expect_room(&self, bytes: u64, to_come: u64) -> Result<(), Status> {
        let room = std::fs::create_dir_all(&self.directory);
        let room = room.and_then(|()| self.transfer.expect_room(&self.directory, bytes, to_come));
        room.map_err(|error| self.broken(&error))?;
        self.short.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// What a failure of the disk is called. That it is full is said here once, not whenever the leader tries.
    fn broken(&self, error: &io::Error) -> Status {
        let text = format!("{}: {error}", self.directory.display());
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskReserve,
            io::ErrorKind::InvalidData => ErrorCode::DigestMismatch,
            _ => ErrorCode::Internal,
        };
        if code == ErrorCode::DiskReserve && !self.short.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                code = code.as_str(),
                %error,
                "there is no room for the snapshot that this node needs to catch up: free some; it is tried again by itself"
            );
        }
        status(code, text)
    }
}

fn last_index(of: &Announced) -> u64 {
    of.meta.last_log_id.as_ref().map_or(0, openraft::LogId::index)
}
