//! Taking blobs from a directory of a backup into a store that nobody serves yet.
//!
//! A name is not believed: what has other bytes than its name says counts as absent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use helix_common::backup::blob_path;
use helix_common::sha256::Sha256;
use helix_model::limits::{CHUNK_BYTES, SMALL_BLOB_BYTES_MAX};
use helix_model::{BuildId, Digest};

use super::BlobError;
use super::store::{BlobStore, Room, blocking};

/// Small blobs that share a sync.
const TOGETHER: usize = 256;

/// An operator decides what a restored node's disk is filled with, not yet a policy.
const ALL_ROOM: Room = Room { blob_bytes_max: u64::MAX, disk_reserve_bytes: 0 };

/// What was found of many blobs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Adopted {
    /// How many are in the store now.
    pub held: usize,
    /// Those that are not, with a build that names each.
    pub missing: BTreeMap<Digest, BuildId>,
    /// Those of them that were there under their name, with other bytes.
    pub damaged: usize,
}

impl BlobStore {
    /// Takes what it lacks of `named` from a directory, if there is one, and tells what is missing still.
    ///
    /// # Errors
    /// When the store cannot be written, or the directory not be read.
    pub async fn adopt(
        self: &Arc<Self>,
        named: BTreeMap<Digest, BuildId>,
        directory: Option<&Path>,
    ) -> Result<Adopted, BlobError> {
        let mut adopted = Adopted::default();
        let mut together: Vec<(Digest, Bytes)> = Vec::new();
        for (digest, build) in named {
            if self.size(&digest).is_some() {
                adopted.held += 1;
                continue;
            }
            let found = match directory.map(|directory| open(directory, &digest)).transpose()?.flatten() {
                Some((file, size)) if size <= SMALL_BLOB_BYTES_MAX => match small(file, &digest)? {
                    Some(data) => {
                        together.push((digest, data));
                        Found::Whole
                    }
                    None => Found::Damaged,
                },
                Some((file, size)) => self.adopt_large(digest, size, file).await?,
                None => Found::Nothing,
            };
            match found {
                Found::Whole => adopted.held += 1,
                Found::Damaged | Found::Nothing => {
                    adopted.damaged += usize::from(found == Found::Damaged);
                    adopted.missing.insert(digest, build);
                }
            }
            if together.len() >= TOGETHER {
                self.put_small(std::mem::take(&mut together), ALL_ROOM).await?;
            }
        }
        self.put_small(together, ALL_ROOM).await?;
        Ok(adopted)
    }

    async fn adopt_large(self: &Arc<Self>, digest: Digest, size: u64, mut file: File) -> Result<Found, BlobError> {
        let mut receiving = self.upload(digest, size, 0, ALL_ROOM).await?;
        let stored = blocking(move || {
            let mut buffer = vec![0; CHUNK_BYTES];
            loop {
                let length = file.read(&mut buffer)?;
                if length == 0 {
                    return receiving.finish();
                }
                receiving.write(&buffer[..length])?;
            }
        });
        match stored.await {
            Ok(()) => Ok(Found::Whole),
            Err(BlobError::Digest { .. } | BlobError::Size { .. }) => Ok(Found::Damaged),
            Err(error) => Err(error),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Whole,
    Damaged,
    Nothing,
}

fn open(directory: &Path, digest: &Digest) -> io::Result<Option<(File, u64)>> {
    match File::open(blob_path(directory, digest)) {
        Ok(file) => {
            let size = file.metadata()?.len();
            Ok(Some((file, size)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn small(file: File, digest: &Digest) -> io::Result<Option<Bytes>> {
    let mut data = Vec::new();
    // It may grow while it is read.
    file.take(SMALL_BLOB_BYTES_MAX + 1).read_to_end(&mut data)?;
    let actual = Sha256::digest(&data);
    Ok((actual == *digest).then(|| data.into()))
}
