//! Replacing damaged blobs by good copies of other coordinators, and telling where there is none.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt;
use helix_model::{Digest, NodeId};
use tonic::Status;

use super::health::Damage;
use super::store::blocking;
use super::{Announce, BlobError, Blobs, Room};

/// Copies for which nobody waits are taken down to so many times the reserve: uploads and the log, which go down to the reserve, must have
/// room beside what a dead node leaves to the others.
const SPARED_TIMES: u64 = 4;

/// What became of a damaged blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mended {
    /// There is a good copy here.
    Repaired,
    /// There was one already.
    Sound,
    /// Nothing names it: it would be collected.
    Unwanted,
    /// Everybody was asked, and nobody has a good copy.
    Lost,
    /// Somebody did not answer, or the disk is full.
    Later,
}

impl Blobs {
    /// Looks after everything that is known to be damaged here, once.
    pub(super) async fn mend_all(self: &Arc<Self>) {
        for (digest, damage) in self.health().list() {
            let mended = match self.mend(digest).await {
                // Once: reading it each time would be all that this disk does.
                Mended::Lost if damage == Damage::Waiting => self.look_again(digest).await,
                mended => mended,
            };
            match mended {
                Mended::Repaired => {
                    tracing::info!(%digest, "a damaged blob is here again");
                    self.health().repaired(&digest);
                }
                Mended::Sound => self.health().settled(&digest),
                Mended::Unwanted => {
                    self.store.small.give_up(&digest);
                    self.health().settled(&digest);
                }
                Mended::Lost => {
                    if self.health().lost(digest) {
                        tracing::error!(%digest, "a damaged blob has no good copy on any coordinator: its bytes are lost");
                    }
                }
                Mended::Later => {}
            }
        }
    }

    async fn mend(self: &Arc<Self>, digest: Digest) -> Mended {
        if self.store.size(&digest).is_some() {
            return Mended::Sound;
        }
        if self.is_unwanted(digest).await {
            return Mended::Unwanted;
        }
        match self.fetch(digest, self.room()).await {
            Ok(()) => Mended::Repaired,
            Err(error) => {
                let hopes = self.hopes(digest).await;
                if hopes.is_empty() && matches!(error, BlobError::Absent(_)) {
                    return Mended::Lost;
                }
                tracing::warn!(%digest, %error, ?hopes, "a damaged blob cannot be fetched again yet");
                Mended::Later
            }
        }
    }

    /// What was set aside may be all that is left, and nothing may be wrong with it: an error of the disk is not damage.
    async fn look_again(self: &Arc<Self>, digest: Digest) -> Mended {
        match self.store.reinstate(digest).await {
            Ok(true) => Mended::Repaired,
            Ok(false) => Mended::Lost,
            Err(error) => {
                tracing::warn!(%digest, %error, "what was set aside of a damaged blob cannot be read");
                Mended::Later
            }
        }
    }

    /// In doubt it is wanted.
    async fn is_unwanted(&self, digest: Digest) -> bool {
        if self.store.is_leased(&digest) || self.plane.barrier().await.is_err() {
            return false;
        }
        let plane = Arc::clone(&self.plane);
        blocking(move || Ok(!plane.names_blob(&digest))).await.unwrap_or(false)
    }

    /// Who may have it: they say so, and did not serve it just now, or they do not answer.
    async fn hopes(&self, digest: Digest) -> BTreeSet<NodeId> {
        let request = helix_proto::v1::HeadBlobsRequest { sha256: vec![digest.0.to_vec().into()], local: true };
        let asked = self.plane.others().into_iter().map(|node| {
            let request = request.clone();
            async move {
                let answer = self.ask_head(node, request).await;
                (node, answer.map_or(true, |answer| answer.blobs.first().is_some_and(|blob| blob.present)))
            }
        });
        futures::future::join_all(asked).await.into_iter().filter(|(_, hope)| *hope).map(|(node, _)| node).collect()
    }

    /// As [`Self::fetch`], and leases it; how large it is. `sparingly`, if it leaves room for more than the reserve.
    pub(crate) async fn obtain(self: &Arc<Self>, digest: Digest, sparingly: bool) -> Result<u64, BlobError> {
        let mut room = self.room();
        if sparingly {
            room.disk_reserve_bytes = room.disk_reserve_bytes.saturating_mul(SPARED_TIMES);
        }
        if sparingly && self.store.size(&digest).is_none() {
            // Before anybody is asked for it; when its size is known that counts.
            self.store.check_room(1, room)?;
        }
        self.fetch(digest, room).await?;
        self.store.lease(&digest).ok_or(BlobError::Absent(digest))
    }

    /// Fetches a blob of any size from a peer into the own store, as far as the room's reserve allows, unless it is there. A peer whose
    /// bytes have another digest is damaged, too: the next is asked.
    async fn fetch(self: &Arc<Self>, digest: Digest, room: Room) -> Result<(), BlobError> {
        let room = Room { blob_bytes_max: u64::MAX, ..room };
        let mut bad = BTreeSet::new();
        while self.store.size(&digest).is_none() {
            let (node, reading) = self.read_elsewhere(digest, bad.clone()).await?;
            let size = reading.size();
            let chunks = futures::stream::unfold(Some(reading), |reading| async {
                let mut reading = reading?;
                match reading.next().await {
                    Ok(Some(chunk)) => Some((Ok(chunk), Some(reading))),
                    Ok(None) => None,
                    Err(error) => Some((Err(Status::unavailable(error.to_string())), None)),
                }
            });
            match self.put_here(Announce { digest, size, offset: 0, copies: 1 }, chunks.boxed(), room).await {
                Ok(()) => return Ok(()),
                Err(error @ (BlobError::Digest { .. } | BlobError::Size { .. })) => {
                    tracing::error!(%digest, %node, %error, "a coordinator's copy of a blob is not what its name says");
                    bad.insert(node);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
