//! `helix.v1.WorkerService`: workers as people see them. Workers come by their agents' sessions, never by a call here.

use std::collections::BTreeSet;

use helix_common::status::{invalid, status};
use helix_core::command::{DrainWorker, RemoveWorker, SecretFor, UndrainWorker};
use helix_core::record::{DrainedBy, Standing, Trust, WorkerRecord};
use helix_core::state::State;
use helix_core::{Command, Liveness, SessionState};
use helix_model::{ErrorCode, LogTime, WorkerName};
use helix_proto::v1;
use helix_proto::v1::worker_service_server::WorkerService;
use tonic::{Request, Response, Status};

use super::build::view::unix_ms;
use super::services::Services;
use super::{answer, totals_of};
use crate::registry::Consistency;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct WorkerRpc {
    services: Services,
}

impl WorkerRpc {
    /// The service on these handles.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }

    async fn worker(&self, name: &WorkerName) -> Result<v1::WorkerStatus, Status> {
        self.services.freshen(Consistency::Linearizable).await?;
        let heard = self.services.liveness.liveness().await.map_err(|error| answer::of_read(&error))?;
        let found = self
            .services
            .registry
            .with_state(|state| state.worker(name).map(|worker| status_of(state, &heard.liveness, worker)));
        found.ok_or_else(|| answer::worker_unknown(name.as_str()))
    }

    async fn change(&self, command: Command, name: &WorkerName) -> Result<v1::WorkerStatus, Status> {
        answer::expect_done(&self.services.propose(command).await?)?;
        self.worker(name).await
    }

    /// The leader's time. A follower's own is as old as the last entry it applied.
    async fn leader_now(&self) -> Result<LogTime, Status> {
        let heard = self.services.liveness.liveness().await.map_err(|error| answer::of_read(&error))?;
        Ok(heard.now)
    }
}

#[tonic::async_trait]
impl WorkerService for WorkerRpc {
    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        self.services.freshen(Consistency::Linearizable).await?;
        let heard = self.services.liveness.liveness().await.map_err(|error| answer::of_read(&error))?;
        let workers = self
            .services
            .registry
            .with_state(|state| state.workers().map(|worker| status_of(state, &heard.liveness, worker)).collect());
        Ok(Response::new(v1::ListWorkersResponse { workers }))
    }

    async fn get_worker(&self, request: Request<v1::GetWorkerRequest>) -> Result<Response<v1::WorkerStatus>, Status> {
        let name = worker_name(&request.into_inner().name)?;
        self.worker(&name).await.map(Response::new)
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::WorkerStatus>, Status> {
        let request = request.into_inner();
        let worker = worker_name(&request.name)?;
        let deadline = match request.deadline_ms {
            0 => None,
            ms => Some(self.leader_now().await?.plus_ms(ms)),
        };
        let command = Command::DrainWorker(DrainWorker { worker: worker.clone(), deadline, by: DrainedBy::Operator });
        self.change(command, &worker).await.map(Response::new)
    }

    async fn undrain_worker(
        &self,
        request: Request<v1::UndrainWorkerRequest>,
    ) -> Result<Response<v1::WorkerStatus>, Status> {
        let worker = worker_name(&request.into_inner().name)?;
        let command = Command::UndrainWorker(UndrainWorker { worker: worker.clone() });
        self.change(command, &worker).await.map(Response::new)
    }

    async fn remove_worker(
        &self,
        request: Request<v1::RemoveWorkerRequest>,
    ) -> Result<Response<v1::RemoveWorkerResponse>, Status> {
        let v1::RemoveWorkerRequest { name, force } = request.into_inner();
        let worker = worker_name(&name)?;
        // It would be back within the second.
        if !force && self.worker(&worker).await?.healthy {
            let text = format!(
                "the agent of worker {worker} is connected, and would register it anew: end the agent first, or force it"
            );
            return Err(status(ErrorCode::WrongState, text));
        }
        let reply = self.services.propose(Command::RemoveWorker(RemoveWorker { worker })).await?;
        answer::expect_done(&reply)?;
        Ok(Response::new(v1::RemoveWorkerResponse {}))
    }

    async fn get_totals(&self, _: Request<v1::GetTotalsRequest>) -> Result<Response<v1::GetTotalsResponse>, Status> {
        self.services.freshen(Consistency::Linearizable).await?;
        Ok(Response::new(self.services.registry.with_state(totals_of)))
    }
}

fn worker_name(text: &str) -> Result<WorkerName, Status> {
    WorkerName::new(text).map_err(|wrong| invalid(&helix_model::InvalidField::new("name", wrong.why)))
}

fn status_of(state: &State, liveness: &Liveness, worker: &WorkerRecord) -> v1::WorkerStatus {
    let heard = liveness.workers.get(&worker.name).filter(|heard| heard.instance == worker.instance);
    let connected = heard.is_some_and(|heard| heard.session == SessionState::Open);
    let offer = &worker.offer;
    let left = state.used_of(&worker.name).left_of(&offer.resources);
    let no_builds = BTreeSet::new();
    let (quarantined_until_ms, probing, failed) = match &worker.trust {
        Trust::Full { failed } => (0, false, failed),
        Trust::Quarantined { until, .. } => (unix_ms(*until), false, &no_builds),
        Trust::Probing { .. } => (0, true, &no_builds),
    };
    let secrets = |whom| {
        let given = offer.secrets.iter().flatten().filter(|(_, given)| **given == whom);
        given.map(|(name, _)| name.clone()).collect()
    };
    v1::WorkerStatus {
        name: worker.name.to_string(),
        instance: worker.instance.to_string(),
        address: offer.address.clone(),
        healthy: worker.standing == Standing::Present && connected,
        draining: worker.drain.is_some(),
        held: !worker.held.is_empty(),
        capacity: offer.capacity,
        load: state.load_of(&worker.name),
        platforms: offer.platforms.iter().map(ToString::to_string).collect(),
        labels: offer.labels.clone(),
        executors: offer.executors.iter().map(|executor| executor.as_str().to_owned()).collect(),
        isolation: offer.isolation.clone(),
        limits: offer.limits.clone(),
        podman: offer.podman.clone(),
        emulated: offer.emulated.iter().map(ToString::to_string).collect(),
        secrets: secrets(SecretFor::Anybody),
        restricted_secrets: secrets(SecretFor::CertainRepositories),
        last_seen_ms: heard.map_or(0, |heard| unix_ms(heard.last_seen)),
        certificate_not_after_ms: heard.map_or(0, |heard| heard.certificate_not_after_ms),
        version: offer.version.clone(),
        pressure: heard.map_or_else(String::new, |heard| heard.pressure.clone()),
        attempts: state.running_on(&worker.name).map(ToString::to_string).collect(),
        standing: standing_word(worker.standing).to_owned(),
        cpu_milli: offer.resources.cpu_milli,
        memory_bytes: offer.resources.memory_bytes,
        disk_bytes: offer.resources.disk_bytes,
        held_by: worker.held.iter().map(ToString::to_string).collect(),
        cpu_milli_left: left.cpu_milli,
        memory_bytes_left: left.memory_bytes,
        disk_bytes_left: left.disk_bytes,
        quarantined_until_ms,
        probing,
        failed_builds: failed.iter().map(ToString::to_string).collect(),
    }
}

fn standing_word(standing: Standing) -> &'static str {
    match standing {
        Standing::Present => "present",
        Standing::Detached { .. } => "detached",
        Standing::Lost => "lost",
    }
}
