//! Damaged blobs: taken out of service, kept for whoever wants to know what happened, looked at once more before they are given up.
//!
//! `damaged/HEX` is a file that was set aside, `damaged/HEX.marker` the marker of one in the bucket, whose object stays as long.

use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use helix_common::removal::remove_gradually;
use helix_model::Digest;

use super::format::LargeBlob;
use super::marker::Marker;
use super::upload::digest_of_part;
use super::{Held, Large, Lies, PART_KEPT_FOR, make_shelf};
use crate::blobs::BlobError;
use crate::blobs::store::blocking;

/// How long a damaged blob is kept that nothing has replaced.
const DAMAGED_KEPT_FOR: Duration = Duration::from_secs(30 * 86_400);

const MARKER: &str = ".marker";

/// What was set aside.
pub(super) struct Aside {
    pub(super) digest: Digest,
    path: PathBuf,
    pub(super) is_marker: bool,
}

impl Large {
    /// Takes a blob out of service that is damaged where it lies, unless it has another place by now. Keeps its bytes until there is a
    /// good copy here, and a day for whoever wants to know what happened.
    pub(in crate::blobs) fn set_aside(&self, digest: &Digest, lies: Lies) {
        let _names = self.names();
        let mut index = self.write_index();
        if index.get(digest).is_some_and(|held| held.lies == lies) {
            index.remove(digest);
            self.move_aside(*digest, lies);
            self.health.damaged(*digest);
        }
    }

    pub(super) fn move_aside(&self, digest: Digest, lies: Lies) {
        let (path, aside) = match lies {
            Lies::Here => (self.path_of(&digest), self.damaged.join(digest.to_string())),
            Lies::Bucket(_) => (self.marker_of(&digest), self.marker_aside(&digest)),
        };
        // Its age counts from now.
        let moved = std::fs::rename(&path, &aside)
            .and_then(|()| File::options().append(true).open(&aside)?.set_modified(SystemTime::now()));
        if let Err(error) = moved {
            tracing::error!(%digest, %error, "a damaged blob cannot be set aside");
        }
    }

    fn marker_aside(&self, digest: &Digest) -> PathBuf {
        self.damaged.join(format!("{digest}{MARKER}"))
    }

    /// Whether a marker was set aside; in doubt it was.
    pub(super) fn has_marker_aside(&self, digest: &Digest) -> bool {
        self.marker_aside(digest).try_exists().unwrap_or(true)
    }

    pub(super) fn set_aside_before(&self) -> io::Result<Vec<Aside>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.damaged)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let (hex, is_marker) = name.strip_suffix(MARKER).map_or((name, false), |hex| (hex, true));
            if let Ok(digest) = Digest::parse(hex) {
                found.push(Aside { digest, path, is_marker });
            }
        }
        Ok(found)
    }

    /// Puts a blob back into service that was set aside, if its bytes are what its name says after all, as after an error of the
    /// disk that has passed; whether it is here. Reads all of it.
    pub(in crate::blobs) async fn reinstate(self: &Arc<Self>, digest: Digest) -> Result<bool, BlobError> {
        let store = Arc::clone(self);
        let candidates = blocking(move || {
            let mut candidates = Vec::new();
            for aside in store.set_aside_before()?.into_iter().filter(|aside| aside.digest == digest) {
                match store.open_aside(&aside) {
                    Ok(blob) => candidates.push((aside, blob)),
                    // It has just gone, or its checksums are what is damaged.
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(candidates)
        });
        for (aside, blob) in candidates.await? {
            if blob.is_what_its_name_says().await? {
                let store = Arc::clone(self);
                return blocking(move || Ok(store.put_back(&aside, &blob)?)).await.map(|()| true);
            }
        }
        Ok(false)
    }

    fn open_aside(&self, aside: &Aside) -> io::Result<LargeBlob> {
        if aside.is_marker {
            Marker::read(&aside.path).map(|marker| self.in_object(aside.digest, marker))
        } else {
            LargeBlob::open(&aside.path, aside.digest)
        }
    }

    fn put_back(&self, aside: &Aside, blob: &LargeBlob) -> io::Result<()> {
        let _names = self.names();
        let (root, path) = match blob.lies() {
            Lies::Here => (&self.files, self.path_of(&aside.digest)),
            Lies::Bucket(_) => (&self.markers, self.marker_of(&aside.digest)),
        };
        make_shelf(root, &path)?;
        let mut index = self.write_index();
        if let Entry::Vacant(place) = index.entry(aside.digest) {
            std::fs::rename(&aside.path, &path)?;
            place.insert(Held { size: blob.size(), stored_at: SystemTime::now(), lies: blob.lies() });
        }
        Ok(())
    }

    /// Removes parts of uploads that are older than a day, and damaged blobs: those that were replaced as soon, others after a month, since
    /// they may be the last there is.
    pub(in crate::blobs) fn remove_stale(&self) {
        let uploads = std::fs::read_dir(&self.uploads).into_iter().flatten().flatten().map(|entry| entry.path());
        // What else lies there is somebody's who is about to remove it.
        let given_up = |path: &Path| digest_of_part(path).is_some_and(|digest| !self.owners().contains_key(&digest));
        let uploads = uploads.filter(|path| given_up(path) && is_older(path, PART_KEPT_FOR));
        let damaged = self.set_aside_before().unwrap_or_default().into_iter().filter(|aside| {
            let kept_for = if self.size(&aside.digest).is_some() { PART_KEPT_FOR } else { DAMAGED_KEPT_FOR };
            is_older(&aside.path, kept_for)
        });
        for path in uploads.chain(damaged.map(|aside| aside.path)) {
            tracing::info!(path = %path.display(), "a stale file is removed");
            if let Err(error) = remove_gradually(&path) {
                tracing::warn!(path = %path.display(), %error, "a stale file cannot be removed");
            }
        }
    }
}

fn is_older(path: &Path, than: Duration) -> bool {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > than))
}
