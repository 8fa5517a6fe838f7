//! Moving large blobs from this node's disk to its part of a bucket, and back.
//!
//! Nobody waits for this: a blob was acknowledged when it was on the disk, and stays there until the bucket has it. The order is what
//! keeps it: the object is put and looked at, then a durable marker says so, then the file goes. Wherever that is cut short there is
//! the file, or the marker with its object; an object that no marker names is found by listing, and removed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use helix_model::Digest;
use rand::Rng;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bucket::{Bucket, BucketError};
use super::large::Lies;
use super::large::format::LargeBlob;
use super::large::marker::{object_name, parse_object_name};
use super::store::{BlobStore, blocking, set_aside};
use super::{BlobError, Blobs, Room};

/// Between looks for blobs that should go. Doubles while the bucket fails.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The longest pause of a bucket that fails.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// Between searches for objects that are left over.
const SEARCH_EVERY: Duration = Duration::from_secs(3600);

/// Younger objects are never taken for left over, whatever they look like.
const LEFT_OVER_AFTER: Duration = Duration::from_secs(86_400);

/// With less than so many times the reserve free, blobs go at once.
const PRESSED_BELOW: u64 = 2;

/// So many blobs in a row that do not move end a pass, and the next begins behind them: some that the bucket will never take, or give, do
/// not keep the others.
const FAILED_IN_A_ROW_MAX: u32 = 3;

/// Which blobs go, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moves {
    /// How long a blob stays here, where most who read it do so.
    pub after: Duration,
    /// Bring all back instead, and put none there.
    pub recall: bool,
}

/// See [`Offload::run`].
pub struct Offload {
    blobs: Arc<Blobs>,
    mover: Mover,
    searched: Option<Instant>,
    /// The last of those that ended the pass before.
    gave_up_at: Option<Digest>,
}

/// Moves single blobs of a store.
pub(super) struct Mover {
    store: Arc<BlobStore>,
    bucket: Arc<Bucket>,
}

/// Why a blob did not move.
#[derive(thiserror::Error, Debug)]
pub(super) enum MoveError {
    #[error(transparent)]
    Bucket(#[from] BucketError),
    #[error(transparent)]
    Here(#[from] BlobError),
}

/// What became of the blobs of a pass.
#[derive(Default)]
struct Tally {
    moved: usize,
    first: Option<MoveError>,
    failed_in_a_row: u32,
    gave_up_at: Option<Digest>,
}

impl Tally {
    /// One more. Its error is only returned when so many failed in a row that the pass is to end.
    fn note(&mut self, digest: Digest, moved: Result<bool, MoveError>) -> Result<(), MoveError> {
        match moved {
            Ok(moved) => {
                self.moved += usize::from(moved);
                self.failed_in_a_row = 0;
            }
            Err(error) => {
                self.failed_in_a_row += 1;
                if self.failed_in_a_row == FAILED_IN_A_ROW_MAX {
                    self.gave_up_at = Some(digest);
                    return Err(error);
                }
                self.first.get_or_insert(error);
            }
        }
        Ok(())
    }

    fn outcome(self) -> Result<usize, MoveError> {
        self.first.map_or(Ok(self.moved), Err)
    }
}

impl Offload {
    pub(super) fn new(blobs: Arc<Blobs>, bucket: Arc<Bucket>) -> Self {
        let mover = Mover::new(Arc::clone(blobs.store()), bucket);
        Self { blobs, mover, searched: None, gave_up_at: None }
    }

    /// Runs until `shutdown`.
    pub async fn run(mut self, moves: Moves, shutdown: CancellationToken) {
        let forever = async {
            let mut pause = LOOK_EVERY;
            loop {
                pause = match self.pass(moves).await {
                    Ok(_) => LOOK_EVERY,
                    // The bucket says itself what is wrong with it, once a minute.
                    Err(MoveError::Bucket(_)) => (pause * 2).min(PAUSE_MAX),
                    Err(MoveError::Here(error)) => {
                        tracing::warn!(%error, "no blobs move between this disk and the bucket for now");
                        (pause * 2).min(PAUSE_MAX)
                    }
                };
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = forever => {}
        }
    }

    /// Moves what should move, one after the other; how many did.
    ///
    /// # Errors
    /// One of the bucket's or of the disk's: what has not moved is for the next pass.
    pub(super) async fn pass(&mut self, moves: Moves) -> Result<usize, MoveError> {
        let mover = &self.mover;
        if !mover.bucket.is_ours() || mover.bucket.totals().failing {
            mover.check().await?;
        }
        if self.searched.is_none_or(|searched| searched.elapsed() >= SEARCH_EVERY) {
            mover.remove_left_over(LEFT_OVER_AFTER).await?;
            self.searched = Some(Instant::now());
        }
        let mut tally = Tally::default();
        let moved = self.move_all(moves, &mut tally).await;
        self.gave_up_at = tally.gave_up_at;
        moved.and_then(|()| tally.outcome())
    }

    async fn move_all(&self, moves: Moves, tally: &mut Tally) -> Result<(), MoveError> {
        let (mover, large) = (&self.mover, self.mover.store.large());
        if moves.recall {
            for digest in self.in_turn(large.in_bucket()) {
                tally.note(digest, mover.bring_back(digest, self.room_for_any()).await)?;
            }
            return Ok(());
        }
        // A clock that went back makes one young, and the disk may press all the same.
        let now = SystemTime::now();
        let is_due = |stored_at| now.duration_since(stored_at).unwrap_or_default() >= moves.after;
        let (due, young): (Vec<_>, Vec<_>) =
            large.in_files().into_iter().partition(|(stored_at, _)| is_due(*stored_at));
        let digests = |blobs: Vec<(SystemTime, Digest)>| blobs.into_iter().map(|(_, digest)| digest).collect();
        for digest in self.in_turn(digests(due)) {
            tally.note(digest, mover.go(digest).await)?;
        }
        for digest in self.in_turn(digests(young)) {
            if !self.is_pressed()? {
                break;
            }
            tally.note(digest, mover.go(digest).await)?;
        }
        Ok(())
    }

    /// The same, from behind where the pass before was given up.
    fn in_turn(&self, mut blobs: Vec<Digest>) -> Vec<Digest> {
        let last = self.gave_up_at.and_then(|last| blobs.iter().position(|digest| *digest == last));
        blobs.rotate_left(last.map_or(0, |at| at + 1));
        blobs
    }

    fn is_pressed(&self) -> Result<bool, BlobError> {
        let reserve = self.blobs.plane.policy().disk_reserve_bytes;
        Ok(self.blobs.store().free_bytes()? < reserve.saturating_mul(PRESSED_BELOW))
    }

    fn room_for_any(&self) -> Room {
        Room { blob_bytes_max: u64::MAX, ..self.blobs.room() }
    }
}

impl Mover {
    pub(super) fn new(store: Arc<BlobStore>, bucket: Arc<Bucket>) -> Self {
        Self { store, bucket }
    }

    /// Sees that the bucket answers and is the one that holds what went there.
    pub(super) async fn check(&self) -> Result<(), BucketError> {
        self.bucket.check(self.store.large().has_nothing_in_bucket()).await
    }

    /// Moves a blob to the bucket; whether it did.
    pub(super) async fn go(&self, digest: Digest) -> Result<bool, MoveError> {
        let Some(blob) = self.open(digest).await? else { return Ok(false) };
        let object = rand::rng().random();
        let under_way = self.bucket.begin(object_name(&digest, object));
        match self.bucket.put(&under_way.name, &blob).await {
            Ok(()) => {}
            // It is damaged here: the others go on.
            Err(BucketError::Damaged) => {
                set_aside(self.store.large(), digest, &blob).await;
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        let large = Arc::clone(self.store.large());
        // After an error nothing is sure but that the search for what is left over knows which objects are needed.
        let went = blocking(move || Ok(large.went_to_bucket(&digest, object, blob.tail())?)).await?;
        if !went {
            // It was removed meanwhile.
            self.bucket.delete(&under_way.name).await?;
        }
        Ok(went)
    }

    /// Opens a blob that lies here; `None` if it does not, or is damaged.
    async fn open(&self, digest: Digest) -> Result<Option<LargeBlob>, BlobError> {
        let large = Arc::clone(self.store.large());
        match blocking(move || large.read(&digest)).await {
            Ok(blob) => Ok(blob.filter(|blob| blob.lies() == Lies::Here)),
            Err(BlobError::Damaged(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Moves a blob back to this disk; whether it did. One that is damaged there is set aside and mended from others.
    pub(super) async fn bring_back(&self, digest: Digest, room: Room) -> Result<bool, MoveError> {
        let Some(blob) = self.store.read(digest).await? else { return Ok(false) };
        let mut receiving = self.store.upload(digest, blob.size(), 0, room).await?;
        let mut at = 0;
        while at < blob.size() {
            let chunk = match blob.chunk(at).await {
                Ok(chunk) => chunk,
                Err(BlobError::Damaged(_)) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            at += chunk.len() as u64;
            receiving = blocking(move || receiving.write(&chunk).map(|()| receiving)).await?;
        }
        blocking(move || receiving.finish()).await?;
        Ok(true)
    }

    /// Removes objects that no marker names: what was cut short left them.
    pub(super) async fn remove_left_over(&self, age: Duration) -> Result<usize, BucketError> {
        let large = self.store.large();
        // What we did not name so we do not touch.
        let needed =
            |name: &str| parse_object_name(name).is_none_or(|(digest, object)| large.needs_object(&digest, object));
        let left_over = self.bucket.left_over(age, needed).await?;
        for name in &left_over {
            self.bucket.delete(name).await?;
        }
        if !left_over.is_empty() {
            tracing::info!(removed = left_over.len(), "objects of the bucket that no blob needs were removed");
        }
        Ok(left_over.len())
    }
}
