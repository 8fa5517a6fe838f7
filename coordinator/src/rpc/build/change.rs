//! What clients change in builds that exist: cancel, purge, pin, register an artifact.

use std::collections::BTreeSet;

use helix_common::status::{invalid, with_metadata};
use helix_common::tls::PeerInfo;
use helix_core::command::{CancelBuild, PinBuild, PurgeBuilds, RegisterArtifact};
use helix_core::record::{Artifact, BlobRef, Pinned};
use helix_core::state::Known;
use helix_core::{Command, Reply};
use helix_model::limits::PURGE_IDS_MAX;
use helix_model::{BuildId, BuildSpec, BuildState, Digest, ErrorCode, InvalidField, LogTime, NodeId, Outputs};
use helix_proto::v1;
use tonic::Status;

use super::BuildRpc;
use crate::registry::Consistency;
use crate::rpc::answer;
use crate::rpc::services::{authority, build_id};

/// The longest reason of a cancel; it is kept in the registry.
const REASON_BYTES_MAX: usize = 1024;

impl BuildRpc {
    pub(super) async fn cancel(
        &self,
        peer: &PeerInfo,
        request: v1::CancelBuildRequest,
    ) -> Result<v1::CancelBuildResponse, Status> {
        let build = build_id(&request.build_id)?;
        check_reason(&request.reason)?;
        let command =
            CancelBuild { build: build.clone(), authority: authority(&peer.identity), reason: request.reason };
        let reply = self.services.propose(Command::CancelBuild(command)).await?;
        answer::expect_done(&reply)?;
        let state = self.services.registry.with_state(|state| match state.build(&build) {
            Some(Known::Open(record)) => record.state,
            Some(Known::Finished(finished)) => finished.state,
            // A follower may not have heard of it yet; it was not running when it was cancelled so early.
            Some(Known::Purged(_)) | None => BuildState::Queued,
        });
        Ok(v1::CancelBuildResponse { cancelled: true, state: state.as_str().to_owned() })
    }

    pub(super) async fn purge(&self, request: v1::PurgeBuildsRequest) -> Result<v1::PurgeBuildsResponse, Status> {
        let cutoff =
            u64::try_from(request.before_ms).map_err(|_| invalid(&InvalidField::new("before_ms", "is before 1970")))?;
        let wanted = terminal_state(&request.state)?;
        self.services.freshen(Consistency::Linearizable).await?;
        // What ends from here on is not meant. Each proposal is checked again by `apply`.
        let (pinned, ids): (Vec<_>, Vec<_>) = self.services.registry.with_state(|state| {
            let finished = state.finished_builds().filter(|(_, build)| {
                build.completed_at <= LogTime(cutoff) && wanted.is_none_or(|wanted| build.state == wanted)
            });
            finished.map(|(id, build)| (id.clone(), build.pinned)).partition(|(_, pinned)| *pinned == Pinned::Yes)
        });
        let ids: Vec<BuildId> = ids.into_iter().map(|(id, _)| id).collect();
        let mut purged = 0;
        for chunk in ids.chunks(PURGE_IDS_MAX) {
            let command = PurgeBuilds { builds: chunk.to_vec(), cutoff: LogTime(cutoff) };
            match self.services.propose(Command::PurgeBuilds(command)).await? {
                Reply::Purged(count) => purged += count,
                Reply::Unchanged => {}
                Reply::Rejected(rejection) => return Err(answer::of_rejection(&rejection)),
                reply @ (Reply::Done
                | Reply::Submitted
                | Reply::SameBuild
                | Reply::SamePurged(_)
                | Reply::SourcePinned(_)) => return Err(answer::unexpected(&reply)),
            }
        }
        Ok(v1::PurgeBuildsResponse { purged, pinned: pinned.len() as u64 })
    }

    pub(super) async fn pin(
        &self,
        peer: &PeerInfo,
        request: v1::PinBuildRequest,
    ) -> Result<v1::PinBuildResponse, Status> {
        let pinned = if request.pinned { Pinned::Yes } else { Pinned::No };
        let command = PinBuild { build: build_id(&request.build_id)?, authority: authority(&peer.identity), pinned };
        answer::expect_done(&self.services.propose(Command::PinBuild(command)).await?)?;
        Ok(v1::PinBuildResponse {})
    }

    pub(super) async fn register_artifact(
        &self,
        peer: &PeerInfo,
        request: v1::RegisterArtifactRequest,
    ) -> Result<v1::RegisterArtifactResponse, Status> {
        let build = build_id(&request.build_id)?;
        check_artifact_name(&request.name)?;
        let digest =
            Digest::from_slice(&request.sha256).map_err(|wrong| invalid(&InvalidField::new("sha256", wrong.why)))?;
        let holders = self.holders(digest, request.size).await?;
        let artifact = Artifact { name: request.name, blob: BlobRef { digest, size: request.size, holders } };
        let command = RegisterArtifact { build, authority: authority(&peer.identity), artifact };
        answer::expect_done(&self.services.propose(Command::RegisterArtifact(command)).await?)?;
        Ok(v1::RegisterArtifactResponse {})
    }

    /// Who holds a blob; asking leases it, so that it is not collected before the registry names it.
    async fn holders(&self, digest: Digest, size: u64) -> Result<BTreeSet<NodeId>, Status> {
        let found = self.services.blobs.head(&[digest]).await.pop().unwrap_or_default();
        if found.holders.is_empty() {
            let text = format!("blob {digest} was not uploaded: put it first");
            return Err(with_metadata(ErrorCode::ArtifactUnknown, text, [("field", "sha256")]));
        }
        if found.size != size {
            let why = format!("the blob has {} bytes, not {size}", found.size);
            return Err(invalid(&InvalidField::new("size", why)));
        }
        Ok(found.holders)
    }
}

fn check_reason(reason: &str) -> Result<(), Status> {
    if reason.len() > REASON_BYTES_MAX || reason.chars().any(char::is_control) {
        let why = format!("has control characters, or over {REASON_BYTES_MAX} bytes");
        return Err(invalid(&InvalidField::new("reason", why)));
    }
    Ok(())
}

/// Artifacts bear the names that outputs may have.
fn check_artifact_name(name: &str) -> Result<(), Status> {
    let like_an_output = BuildSpec {
        repo_url: "https://h/p".to_owned(),
        outputs: Outputs::Named(vec![name.to_owned()]),
        ..BuildSpec::default()
    };
    like_an_output.validate().map_err(|wrong| invalid(&InvalidField::new("name", wrong.why)))
}

fn terminal_state(word: &str) -> Result<Option<BuildState>, Status> {
    if word.is_empty() {
        return Ok(None);
    }
    let state: BuildState = word.parse().map_err(|wrong| invalid(&wrong))?;
    if state.is_terminal() {
        Ok(Some(state))
    } else {
        let why = format!("{state} builds are never purged: succeeded, failed and cancelled ones are");
        Err(invalid(&InvalidField::new("state", why)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helix_common::status::metadata;

    #[test]
    fn only_finished_builds_are_purged() {
        assert_eq!(terminal_state("").unwrap(), None);
        assert_eq!(terminal_state("failed").unwrap(), Some(BuildState::Failed));
        for bad in ["queued", "running", "done"] {
            assert_eq!(metadata(&terminal_state(bad).unwrap_err(), "field").as_deref(), Some("state"), "{bad}");
        }
    }

    #[test]
    fn names_and_reasons_are_checked() {
        for bad in ["", "/x", "../x", "a//b", "a\nb", "."] {
            assert_eq!(metadata(&check_artifact_name(bad).unwrap_err(), "field").as_deref(), Some("name"), "{bad}");
        }
        assert!(check_artifact_name("bin/tool").is_ok());
        assert!(check_reason("no longer needed").is_ok());
        assert_eq!(metadata(&check_reason("a\nb").unwrap_err(), "field").as_deref(), Some("reason"));
        assert!(check_reason(&"x".repeat(REASON_BYTES_MAX + 1)).is_err());
    }
}
