//! A client records an artifact of a build by digest. A name keeps its first digest.

use helix_model::limits::REGISTERED_ARTIFACTS_MAX;
use helix_model::{AttemptKey, AttemptNumber, Digest, TaskIndex};

use crate::command::RegisterArtifact;
use crate::record::{Addendum, Applied};
use crate::reply::{Rejection, Reply};
use crate::retention::Kept;
use crate::state::State;

use super::{Outcome, check_authority, check_holders, not_open};

pub(super) fn register_artifact(state: &mut State, c: &RegisterArtifact, out: &mut Applied) -> Outcome {
    let artifact = &c.artifact;
    if let Some(finished) = state.finished.get(&c.build) {
        check_authority(&c.build, &finished.submitted_by, &c.authority)?;
        let known = finished.registered.get(&artifact.name).copied();
        if is_known(known, c)? {
            return Ok(Reply::Unchanged);
        }
        if finished.expired.artifacts.is_some() {
            return Err(Rejection::Expired(c.build.clone(), Kept::Artifacts));
        }
        check_room(finished.registered.len())?;
        check_holders(state, &format!("artifact {:?}", artifact.name), &artifact.blob)?;
        let key = AttemptKey { build: c.build.clone(), task: TaskIndex(0), attempt: AttemptNumber(0) };
        state.put_addendum(key, Addendum::Artifact(artifact.clone()), out);
        return Ok(Reply::Done);
    }
    let Some(mut build) = state.open_copy(&c.build) else { return Err(not_open(state, &c.build)) };
    check_authority(&c.build, &build.submitted_by, &c.authority)?;
    let known = build.artifacts.iter().find(|known| known.name == artifact.name);
    if is_known(known.map(|known| known.blob.digest), c)? {
        return Ok(Reply::Unchanged);
    }
    check_room(build.artifacts.len())?;
    check_holders(state, &format!("artifact {:?}", artifact.name), &artifact.blob)?;
    build.artifacts.push(artifact.clone());
    state.put_build(build, out);
    Ok(Reply::Done)
}

fn is_known(known: Option<Digest>, c: &RegisterArtifact) -> Result<bool, Rejection> {
    match known {
        None if c.artifact.name.is_empty() => Err(Rejection::ReportInvalid("an artifact without a name")),
        None => Ok(false),
        Some(digest) if digest == c.artifact.blob.digest => Ok(true),
        Some(_) => Err(Rejection::ArtifactTaken(c.artifact.name.clone())),
    }
}

fn check_room(registered: usize) -> Result<(), Rejection> {
    if registered >= REGISTERED_ARTIFACTS_MAX {
        return Err(Rejection::ReportInvalid("a build takes at most 256 registered artifacts"));
    }
    Ok(())
}
