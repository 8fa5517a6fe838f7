//! This node's own part of a bucket, where large blobs go that need not lie on its disk any more.
//!
//! Below `PREFIX/NAME/` there is nothing of anybody else's: the name is random, made once, and kept beside the blobs. An object
//! `owner` says whose it is, and is what tells a bucket that lost a blob from one that is not ours: only where `owner` is as it was
//! is a missing object damage. A bucket that does not answer says nothing about blobs. How it is spoken to is `client`'s.

#[cfg(feature = "s3")]
#[path = "bucket/s3.rs"]
mod client;
#[cfg(not(feature = "s3"))]
#[path = "bucket/none.rs"]
mod client;
mod object;
mod trouble;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use helix_common::files::{Durability, write_atomic};
use helix_model::ErrorCode;
use rand::Rng;

use self::client::Client;
pub(super) use self::object::InBucket;
pub use self::trouble::BucketTotals;
use self::trouble::Trouble;
use super::large::format::LargeBlob;
use super::large::place::Unread;
use crate::config::S3;

/// The file beside the blobs that keeps the name.
const NAME_FILE: &str = "bucket";

/// The object that says whose all the others are.
const OWNER: &str = "owner";

/// How long requests may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patience {
    /// Making a connection.
    pub connect: Duration,
    /// A request with all its bytes: at most a part of an upload.
    pub request: Duration,
    /// One try to read some chunks. Two of them are less than what a peer waits for the next bytes.
    pub read: Duration,
    /// How often a request is repeated that failed for a reason that may pass.
    pub retries: usize,
}

impl Default for Patience {
    fn default() -> Self {
        let [connect, request, read] = [5, 60, 15].map(Duration::from_secs);
        Self { connect, request, read, retries: 3 }
    }
}

/// Why the bucket did not do what it was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BucketError {
    /// It answers, and has no such object.
    #[error("there is no such object")]
    Missing,
    /// It answers, and will say the same again: no such bucket, denied, another's.
    #[error("{0}")]
    Refused(String),
    /// It does not answer, or fails.
    #[error("{0}")]
    Away(String),
    /// What was to be put there is damaged where it lies.
    #[error("the blob is damaged")]
    Damaged,
}

impl BucketError {
    /// The word for people.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(_) => ErrorCode::BucketRefused,
            Self::Missing | Self::Away(_) | Self::Damaged => ErrorCode::BucketUnreachable,
        }
    }
}

/// See the module.
pub struct Bucket {
    client: Client,
    name: String,
    is_ours: AtomicBool,
    /// Objects that are being put: no marker names them yet, and they are not left over.
    under_way: Mutex<HashSet<String>>,
    trouble: Trouble,
}

impl Bucket {
    /// Opens this node's part of the bucket for the blobs beneath `root`; makes its name if there is none. Nothing is sent yet. Blocks.
    ///
    /// # Errors
    /// When a file that the configuration names cannot be read, or the name not be kept.
    pub fn open(settings: &S3, root: &Path, node: &str) -> anyhow::Result<Self> {
        Self::open_with(settings, root, node, Patience::default())
    }

    pub(super) fn open_with(settings: &S3, root: &Path, node: &str, patience: Patience) -> anyhow::Result<Self> {
        std::fs::create_dir_all(root)?;
        let name = name_beside(root, node)?;
        let client = Client::new(settings, &name, patience)?;
        let (is_ours, under_way, trouble) = (AtomicBool::default(), Mutex::default(), Trouble::default());
        Ok(Self { client, name, is_ours, under_way, trouble })
    }

    /// Sees that the bucket answers and is the one that this node's blobs went to. Where none has gone yet (`fresh`) it is taken.
    pub(super) async fn check(&self, fresh: bool) -> Result<(), BucketError> {
        let checked = async {
            match self.client.get(OWNER, 0..self.name.len() as u64).await {
                Ok((found, whole)) if whole == self.name.len() as u64 && found == self.name.as_bytes() => Ok(()),
                Ok(_) => Err(BucketError::Refused("another's objects lie where this node's should".to_owned())),
                Err(BucketError::Missing) if fresh => {
                    self.client.put(OWNER, Bytes::from(self.name.clone().into_bytes())).await
                }
                Err(BucketError::Missing) => Err(BucketError::Refused(format!(
                    "it is not the bucket that this node's blobs went to: there is no {}/{OWNER}",
                    self.client.root()
                ))),
                Err(error) => Err(error),
            }
        };
        let outcome = self.note(checked.await);
        let was_ours = self.is_ours.swap(outcome.is_ok(), Ordering::Relaxed);
        if outcome.is_ok() && !was_ours {
            tracing::info!(keys = %self.client.root(), "large blobs may go to the bucket");
        }
        outcome
    }

    /// Whether the last look found it to be ours.
    pub(super) fn is_ours(&self) -> bool {
        self.is_ours.load(Ordering::Relaxed)
    }

    /// Some bytes of an object that is `whole` bytes long.
    pub(super) async fn get(&self, name: &str, range: Range<u64>, whole: u64) -> Result<Bytes, Unread> {
        let wanted = range.end - range.start;
        match self.client.get(name, range).await {
            Ok((bytes, found)) if found == whole && bytes.len() as u64 == wanted => {
                self.trouble.answered();
                Ok(bytes)
            }
            Ok((_, found)) => Err(Unread::Damaged(format!("the object has {found} bytes, and had {whole}"))),
            Err(BucketError::Missing) => match self.check(false).await {
                Ok(()) => Err(Unread::Damaged("the object is not in the bucket any more".to_owned())),
                Err(error) => Err(Unread::Away(error.to_string())),
            },
            Err(error) => {
                self.trouble.failed(&error);
                Err(Unread::Away(error.to_string()))
            }
        }
    }

    /// Puts a whole file there, checked chunk by chunk as it is read, and sees that all of it arrived. In memory is one part.
    pub(super) async fn put(&self, name: &str, blob: &LargeBlob) -> Result<(), BucketError> {
        let outcome = async {
            self.client.put_file(name, blob).await?;
            // Each part was signed with its digest; that they were put together is seen at the end.
            let (tail, size, whole) = (blob.tail().bytes(), blob.size(), blob.tail().whole());
            match self.client.get(name, size..whole).await? {
                (found, found_whole) if found_whole == whole && found == *tail => Ok(()),
                (_, found) => Err(BucketError::Away(format!("{found} bytes arrived of {whole}, or others"))),
            }
        };
        self.note(outcome.await)
    }

    /// Removes an object; one that is not there is as good.
    pub(super) async fn delete(&self, name: &str) -> Result<(), BucketError> {
        match self.note(self.client.delete(name).await) {
            Err(BucketError::Missing) => Ok(()),
            outcome => outcome,
        }
    }

    /// Names of this node's objects that are not needed, as `needed` says, of those that were put at least `age` ago.
    pub(super) async fn left_over(
        &self,
        age: Duration,
        needed: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>, BucketError> {
        let left_over = |name: &str| name != OWNER && !self.under_way().contains(name) && !needed(name);
        self.note(self.client.list(age, left_over).await)
    }

    /// Keeps an object that is being put from being taken for left over.
    pub(super) fn begin(&self, name: String) -> UnderWay<'_> {
        self.under_way().insert(name.clone());
        UnderWay { bucket: self, name }
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn totals(&self) -> BucketTotals {
        self.trouble.totals()
    }

    fn note<T>(&self, outcome: Result<T, BucketError>) -> Result<T, BucketError> {
        match &outcome {
            Ok(_) | Err(BucketError::Missing | BucketError::Damaged) => self.trouble.answered(),
            Err(error) => self.trouble.failed(error),
        }
        outcome
    }

    fn under_way(&self) -> MutexGuard<'_, HashSet<String>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An object that is being put.
pub(super) struct UnderWay<'a> {
    bucket: &'a Bucket,
    pub(super) name: String,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.bucket.under_way().remove(&self.name);
    }
}

/// The name of what is this node's in any bucket. It does not change when the node gets another id or epoch.
fn name_beside(root: &Path, node: &str) -> io::Result<String> {
    let path = root.join(NAME_FILE);
    match std::fs::read_to_string(&path) {
        Ok(name) => {
            let name = name.trim();
            let fits =
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
            let why =
                || format!("{} is damaged: it says what this node's part of the bucket is called", path.display());
            if fits { Ok(name.to_owned()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, why())) }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = format!("{node}.{:016x}", rand::rng().random::<u64>());
            write_atomic(&path, name.as_bytes(), 0o600, Durability::Synced)?;
            Ok(name)
        }
        Err(error) => Err(error),
    }
}
