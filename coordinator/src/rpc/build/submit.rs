//! Submits: one, or many over one stream.
//!
//! Everything that can be said of a spec alone is said here, before the log sees it. What depends on other
//! builds (the id, the queue) is `apply`'s to say. A repeated submit must be answered like the first, so the
//! refusals that depend on the moment (workers, disk, source) are skipped for a build that exists already.

use std::sync::Arc;

use futures::StreamExt;
use helix_common::sha256::Sha256;
use helix_common::status::{error_code, invalid, metadata, status, with_metadata};
use helix_core::command::SubmitBuild;
use helix_core::record::Standing;
use helix_core::{Command, Reply};
use helix_failpoint::{self as failpoint, Point};
use helix_model::{BuildId, BuildSpec, ErrorCode, Executor, InvalidField, Outputs, Source};
use helix_proto::{convert, v1};
use tonic::{Code, Status};

use super::{BuildRpc, explanation};
use crate::registry::{Consistency, ProposeError};
use crate::rpc::answer;
use crate::rpc::services::build_id;

/// Submits of one batch under way at once: enough to fill a few log entries, few enough to bound memory.
const BATCH_IN_FLIGHT: usize = 256;

/// How often a submit whose outcome is unknown is proposed again. That is harmless, because the id is checked in
/// `apply`; without it a client that gave no id could never learn which build it had made.
const UNKNOWN_RETRIES: u32 = 3;

/// Letters of generated ids: 32, none that is mistaken for another.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// Characters of generated ids: 60 random bits.
const GENERATED_LENGTH: usize = 12;

impl BuildRpc {
    pub(super) async fn submit(
        &self,
        principal: &str,
        request: v1::SubmitBuildRequest,
    ) -> Result<v1::SubmitBuildResponse, Status> {
        let submit = self.read_submit(principal, request)?;
        self.admit_and_commit(submit).await
    }

    /// Answers in the order given, many under way at once. Specs are checked before they are queued, so that what
    /// waits is never larger than a spec may be.
    pub(super) fn submit_all(
        &self,
        principal: &str,
        requests: tonic::Streaming<v1::SubmitBuildRequest>,
    ) -> super::Answers<v1::SubmitBuildResult> {
        let principal: Arc<str> = Arc::from(principal);
        let service = self.clone();
        let answers = requests.enumerate().map(move |(index, request)| {
            let read = request.map(|request| service.read_submit(&principal, request));
            let service = service.clone();
            async move {
                // A broken stream ends the batch; a bad spec is one line's error.
                let result = match read? {
                    Ok(submit) => service.admit_and_commit(submit).await,
                    Err(refusal) => Err(refusal),
                };
                Ok(batch_result(index as u64, result))
            }
        });
        Box::pin(answers.buffered(BATCH_IN_FLIGHT).take_until(self.services.stopping.clone().cancelled_owned()))
    }

    /// Submits a finished build's spec anew.
    pub(super) async fn retry(
        &self,
        principal: &str,
        request: v1::RetryBuildRequest,
    ) -> Result<v1::SubmitBuildResponse, Status> {
        let id = build_id(&request.build_id)?;
        self.services.freshen(Consistency::Linearizable).await?;
        let record = self.services.record(&id).await?;
        if !record.state.is_terminal() {
            let text = format!("build {id} is {}: only a build that has ended can be retried", record.state);
            return Err(with_metadata(
                ErrorCode::WrongState,
                text,
                [("from", record.state.as_str()), ("to", "queued")],
            ));
        }
        let given = Given::of(&request.new_build_id);
        let submit = Submission {
            command: SubmitBuild {
                build: given.id("new_build_id", &request.new_build_id)?,
                spec: Arc::clone(&record.spec),
                spec_digest: record.spec_digest,
                submitted_by: principal.to_owned(),
                retry_of: Some(id),
            },
            given,
        };
        self.admit_and_commit(submit).await
    }

    fn read_submit(&self, principal: &str, request: v1::SubmitBuildRequest) -> Result<Submission, Status> {
        let given = Given::of(&request.build_id);
        let build = given.id("build_id", &request.build_id)?;
        let mut spec = convert::spec_of_submit(request).map_err(|wrong| invalid(&wrong))?;
        spec.validate().map_err(|wrong| invalid_spec(&wrong))?;
        let spec_digest = Sha256::digest(&spec.canonical_bytes());
        if spec.executor.is_none() {
            spec.executor = Some(executor_for(&spec, || self.podman_is_offered()));
        }
        let command = SubmitBuild {
            build,
            spec: Arc::new(spec),
            spec_digest,
            submitted_by: principal.to_owned(),
            retry_of: None,
        };
        Ok(Submission { command, given })
    }

    fn podman_is_offered(&self) -> bool {
        self.services.registry.with_state(|state| {
            let mut workers = state.workers().filter(|worker| worker.standing != Standing::Lost);
            workers.any(|worker| worker.offer.executors.contains(&Executor::Podman))
        })
    }

    async fn admit_and_commit(&self, submit: Submission) -> Result<v1::SubmitBuildResponse, Status> {
        if self.admit(&submit.command).await.is_err() {
            // This node may be behind: a worker may have come, or the build may exist. A refusal must be true.
            self.services.freshen(Consistency::Linearizable).await?;
            if !self.exists(&submit) {
                self.admit(&submit.command).await?;
            }
        }
        self.commit(submit).await
    }

    fn exists(&self, submit: &Submission) -> bool {
        submit.given == Given::ByClient
            && self.services.registry.with_state(|state| state.build(&submit.command.build).is_some())
    }

    /// What speaks against a new build at this moment.
    async fn admit(&self, submit: &SubmitBuild) -> Result<(), Status> {
        let reserve = self.services.registry.with_state(|state| state.policy().disk_reserve_bytes);
        self.services.disk.expect_above(reserve)?;
        expect_outputs(&submit.spec).map_err(|wrong| invalid(&wrong))?;
        self.expect_runnable(&submit.spec)?;
        match &submit.spec.source {
            Some(source) => self.expect_uploaded(source).await,
            None => Ok(()),
        }
    }

    fn expect_runnable(&self, spec: &BuildSpec) -> Result<(), Status> {
        if spec.park {
            return Ok(());
        }
        let verdict = self.services.registry.with_state(|state| helix_core::explain::could_ever_run(state, spec));
        match verdict {
            Ok(()) => Ok(()),
            Err(against) => Err(status(ErrorCode::Unsatisfiable, explanation::unsatisfiable_text(against))),
        }
    }

    async fn expect_uploaded(&self, source: &Source) -> Result<(), Status> {
        let found = self.services.blobs.head(&[source.digest]).await;
        match found.first() {
            Some(blob) if blob.holders.is_empty() => {
                let text = format!("source {} was not uploaded: put the blob first", source.digest);
                Err(with_metadata(ErrorCode::ArtifactUnknown, text, [("field", "source")]))
            }
            Some(blob) if blob.size != source.size => {
                let why = format!("the blob has {} bytes, not {}", blob.size, source.size);
                Err(invalid(&InvalidField::new("source", why)))
            }
            _ => Ok(()),
        }
    }

    async fn commit(&self, submit: Submission) -> Result<v1::SubmitBuildResponse, Status> {
        let Submission { command, given } = submit;
        let id = command.build.clone();
        let mut tries = 0;
        let begun = std::time::Instant::now();
        let reply = loop {
            match self.services.registry.propose(Command::SubmitBuild(command.clone())).await {
                Ok(reply) => break reply,
                Err(ProposeError::OutcomeUnknown) if tries < UNKNOWN_RETRIES => tries += 1,
                Err(error) => return Err(with_build_id(answer::of_propose(&error), &id)),
            }
        };
        self.services.metrics.committed(begun.elapsed());
        failpoint::pass(Point::SubmitAnswer);
        match reply {
            Reply::Submitted => Ok(accepted(&id, false, String::new())),
            // Our own earlier proposal may have made it; under an id of the client's nobody can tell.
            Reply::SameBuild => Ok(accepted(&id, given == Given::ByClient, String::new())),
            Reply::SamePurged(state) => Ok(accepted(&id, true, state.as_str().to_owned())),
            Reply::Rejected(rejection) => Err(answer::of_rejection(&rejection)),
            Reply::Done | Reply::Unchanged | Reply::SourcePinned(_) | Reply::Purged(_) => {
                Err(answer::unexpected(&reply))
            }
        }
    }
}

/// A submit whose form is right.
struct Submission {
    command: SubmitBuild,
    given: Given,
}

/// Who chose the id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Given {
    ByClient,
    ByUs,
}

impl Given {
    fn of(text: &str) -> Self {
        if text.is_empty() { Self::ByUs } else { Self::ByClient }
    }

    fn id(self, field: &'static str, text: &str) -> Result<BuildId, Status> {
        match self {
            Self::ByClient => BuildId::new(text).map_err(|wrong| invalid(&InvalidField::new(field, wrong.why))),
            Self::ByUs => generated_id(),
        }
    }
}

/// The default executor, as the interface says it.
fn executor_for(spec: &BuildSpec, podman_is_offered: impl FnOnce() -> bool) -> Executor {
    if spec.command.is_some() {
        Executor::Exec
    } else if !spec.dockerfile_path.is_empty() || podman_is_offered() {
        Executor::Podman
    } else {
        Executor::Exec
    }
}

/// A podman build makes an image and nothing else. Its executor may follow from what workers offer at this moment, so this is
/// not the spec's own affair.
fn expect_outputs(spec: &BuildSpec) -> Result<(), InvalidField> {
    if spec.executor != Some(Executor::Podman) {
        return Ok(());
    }
    match &spec.outputs {
        Outputs::Named(_) => {
            let why =
                "a podman build makes an image, and no other outputs: leave them out, or choose the executor exec";
            Err(InvalidField::new("outputs", why))
        }
        Outputs::None if !spec.push.is_empty() => {
            let why = "an image that is pushed is an output: say either push or no_output";
            Err(InvalidField::new("no_output", why))
        }
        Outputs::None | Outputs::Default => Ok(()),
    }
}

/// A random id. Ids are not secrets, but they must not collide: the operating system's randomness.
fn generated_id() -> Result<BuildId, Status> {
    // The low 60 bits of a version 4 UUID are all random (RFC 9562, section 5.4).
    let mut bits = uuid::Uuid::new_v4().as_u64_pair().1;
    let mut text = String::with_capacity(GENERATED_LENGTH);
    for _ in 0..GENERATED_LENGTH {
        text.push(char::from(ALPHABET[(bits & 31) as usize]));
        bits >>= 5;
    }
    BuildId::new(&text).map_err(|wrong| status(ErrorCode::Internal, wrong.to_string()))
}

fn invalid_spec(wrong: &InvalidField) -> Status {
    if wrong.field == "spec" {
        with_metadata(ErrorCode::SpecTooLarge, wrong.to_string(), [("field", "spec")])
    } else {
        invalid(wrong)
    }
}

fn accepted(id: &BuildId, existed: bool, purged_state: String) -> v1::SubmitBuildResponse {
    v1::SubmitBuildResponse { build_id: id.to_string(), queued: true, existed, purged_state }
}

fn batch_result(index: u64, result: Result<v1::SubmitBuildResponse, Status>) -> v1::SubmitBuildResult {
    match result {
        Ok(response) => v1::SubmitBuildResult { index, response: Some(response), error: None },
        Err(refusal) => v1::SubmitBuildResult { index, response: None, error: Some(batch_error(&refusal)) },
    }
}

fn batch_error(refusal: &Status) -> v1::BatchError {
    v1::BatchError {
        code: i32::from(refusal.code()),
        reason: error_code(refusal).map_or_else(String::new, |code| code.as_str().to_owned()),
        message: refusal.message().to_owned(),
        field: metadata(refusal, "field").unwrap_or_default(),
    }
}

/// An unknown outcome names the id, so that a client that gave none can look for it or repeat it.
fn with_build_id(refusal: Status, id: &BuildId) -> Status {
    if refusal.code() == Code::Aborted {
        let text = format!("whether build {id} was submitted is unknown: repeat the submit with this id");
        with_metadata(ErrorCode::OutcomeUnknown, text, [("build_id", id.as_str())])
    } else {
        refusal
    }
}
