//! Questions about builds: status, waiting, ids, artifacts, why.

use std::sync::Arc;
use std::time::Duration;

use helix_common::status::{invalid, status, with_metadata};
use helix_core::record::BuildRecord;
use helix_core::state::Known;
use helix_model::{BuildId, ErrorCode, InvalidField};
use helix_proto::v1;
use tokio::time::Instant;
use tonic::Status;

use super::{BuildRpc, explanation, view};
use crate::registry::Consistency;
use crate::rpc::answer;
use crate::rpc::services::{WAIT_MAX, build_id, consistency};

/// Candidates named when a prefix fits several builds.
const CANDIDATES_SHOWN: usize = 10;

/// The word that stands for the newest build of whoever asks.
const LAST: &str = "last";

impl BuildRpc {
    pub(super) async fn status(&self, request: v1::GetBuildStatusRequest) -> Result<v1::BuildStatus, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(consistency(request.stale)).await?;
        Ok(view::status_of(&*self.services.record(&id).await?))
    }

    pub(super) async fn wait(&self, request: v1::WaitBuildRequest) -> Result<v1::BuildStatus, Status> {
        let id = build_id(&request.build_id)?;
        let end = Instant::now() + Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
        // The order matters: listen, then read, so that no change falls in between.
        let mut changed = self.services.changes.watch(&id);
        self.services.freshen(Consistency::Linearizable).await?;
        loop {
            let record = self.services.record(&id).await?;
            if record.state.is_terminal() {
                return Ok(view::status_of(&record));
            }
            tokio::select! {
                () = self.services.stopping.cancelled() => return Err(self.services.moved()),
                () = tokio::time::sleep_until(end) => return Ok(view::status_of(&record)),
                heard = changed.changed() => if heard.is_err() {
                    // Nobody listens to effects any more, which happens at the end only.
                    return Err(self.services.moved());
                },
            }
        }
    }

    pub(super) async fn resolve(
        &self,
        principal: &str,
        request: v1::ResolveBuildRequest,
    ) -> Result<v1::ResolveBuildResponse, Status> {
        let text = request.text;
        self.services.freshen(consistency(request.stale)).await?;
        let found = if text == LAST { self.newest_of(principal)? } else { self.by_prefix(&text)? };
        Ok(v1::ResolveBuildResponse { build_id: found.to_string() })
    }

    fn newest_of(&self, principal: &str) -> Result<BuildId, Status> {
        let newest = self.services.registry.with_state(|state| state.newest_of(principal));
        newest
            .ok_or_else(|| status(ErrorCode::BuildUnknown, format!("{principal} has submitted no build that is kept")))
    }

    fn by_prefix(&self, text: &str) -> Result<BuildId, Status> {
        // Whatever begins an id is an id itself, but for the reserved word.
        let exact = BuildId::new(text).map_err(|wrong| invalid(&InvalidField::new("build_id", wrong.why)))?;
        let found = self.services.registry.with_state(|state| match state.build(&exact) {
            Some(Known::Open(_) | Known::Finished(_) | Known::Purged(_)) => vec![exact.clone()],
            None => state.builds_with_prefix(text, CANDIDATES_SHOWN + 1),
        });
        match found.as_slice() {
            [] => Err(answer::build_unknown(&exact)),
            [only] => Ok(only.clone()),
            several => Err(ambiguous(text, several)),
        }
    }

    pub(super) async fn artifacts(&self, request: v1::GetArtifactsRequest) -> Result<v1::GetArtifactsResponse, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(consistency(request.stale)).await?;
        let record = self.services.record(&id).await?;
        if record.expired.artifacts.is_some() {
            return Err(answer::expired(&id, "artifacts"));
        }
        Ok(v1::GetArtifactsResponse { artifacts: view::artifacts_of(&record) })
    }

    pub(super) async fn explain(&self, request: v1::ExplainBuildRequest) -> Result<v1::ExplainBuildResponse, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(Consistency::Linearizable).await?;
        let record: Arc<BuildRecord> = self.services.record(&id).await?;
        let status = view::status_of(&record);
        if record.state.is_terminal() {
            return Ok(v1::ExplainBuildResponse { status: Some(status), tasks: explanation::of_ended(&record) });
        }
        let heard = self.services.liveness.liveness().await.map_err(|error| answer::of_read(&error))?;
        let explanation = self
            .services
            .registry
            .with_state(|state| helix_core::explain::explain(state, &heard.liveness, &id, heard.now));
        let tasks = explanation::of_open(explanation);
        Ok(v1::ExplainBuildResponse { status: Some(status), tasks })
    }
}

fn ambiguous(text: &str, found: &[BuildId]) -> Status {
    let shown: Vec<_> = found.iter().take(CANDIDATES_SHOWN).map(BuildId::as_str).collect();
    let more = if found.len() > CANDIDATES_SHOWN { ", ..." } else { "" };
    let list = shown.join(", ");
    let message = format!("{text:?} begins several builds: {list}{more}");
    with_metadata(ErrorCode::BuildAmbiguous, message, [("candidates", list)])
}
