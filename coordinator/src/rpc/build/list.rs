//! Lists: unfinished builds first, newest first, then finished ones by their end.
//!
//! Ids are taken under the registry's lock in one go, records are read in pages while the answer streams, so a
//! long list neither holds the lock nor fills memory. A build purged meanwhile is left out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use futures::stream;
use helix_common::status::invalid;
use helix_core::state::Known;
use helix_model::{BuildId, BuildState};
use helix_proto::v1;
use tonic::Status;

use super::{Answers, BuildRpc, view};
use crate::rpc::answer;
use crate::rpc::services::consistency;

/// Builds listed unless told otherwise.
const LIMIT_DEFAULT: u64 = 100;

/// Records read at once.
const PAGE: usize = 128;

impl BuildRpc {
    pub(super) async fn list(
        &self,
        principal: &str,
        request: v1::ListBuildsRequest,
    ) -> Result<Answers<v1::BuildStatus>, Status> {
        let filter = Filter::of(principal, &request)?;
        self.services.freshen(consistency(request.stale)).await?;
        let left = match (request.limit, request.all) {
            (0, true) => u64::MAX,
            (0, false) => LIMIT_DEFAULT,
            (limit, _) => limit,
        };
        let candidates = self.candidates(&filter, left);
        let listing = Listing { service: self.clone(), filter, candidates, ready: VecDeque::new(), left };
        Ok(Box::pin(stream::try_unfold(listing, Listing::next)))
    }

    /// Ids that pass what memory knows of them. Without filters that need the record, no more than will be shown.
    fn candidates(&self, filter: &Filter, left: u64) -> VecDeque<BuildId> {
        let enough = if filter.needs_record() { usize::MAX } else { usize::try_from(left).unwrap_or(usize::MAX) };
        self.services.registry.with_state(|state| {
            let open = state.open_builds().filter(|build| {
                filter.fits(build.state, &build.submitted_by) && view::passes(build, &filter.repo_url, &filter.labels)
            });
            let finished = state.finished_builds().filter(|(_, build)| filter.fits(build.state, &build.submitted_by));
            open.map(|build| &build.id).chain(finished.map(|(id, _)| id)).take(enough).cloned().collect()
        })
    }
}

struct Filter {
    states: BTreeSet<BuildState>,
    repo_url: String,
    labels: BTreeMap<String, String>,
    mine: Option<String>,
}

impl Filter {
    fn of(principal: &str, request: &v1::ListBuildsRequest) -> Result<Self, Status> {
        let states = request.states.iter().map(|word| word.parse()).collect::<Result<_, _>>();
        Ok(Self {
            states: states.map_err(|wrong| invalid(&wrong))?,
            repo_url: request.repo_url.clone(),
            labels: request.labels.clone(),
            mine: request.mine.then(|| principal.to_owned()),
        })
    }

    fn needs_record(&self) -> bool {
        !self.repo_url.is_empty() || !self.labels.is_empty()
    }

    fn fits(&self, state: BuildState, submitted_by: &str) -> bool {
        (self.states.is_empty() || self.states.contains(&state))
            && self.mine.as_deref().is_none_or(|mine| mine == submitted_by)
    }
}

struct Listing {
    service: BuildRpc,
    filter: Filter,
    candidates: VecDeque<BuildId>,
    ready: VecDeque<v1::BuildStatus>,
    left: u64,
}

impl Listing {
    async fn next(mut self) -> Result<Option<(v1::BuildStatus, Self)>, Status> {
        while self.ready.is_empty() && !self.candidates.is_empty() && self.left > 0 {
            self.read_page().await?;
        }
        let next = if self.left > 0 { self.ready.pop_front() } else { None };
        Ok(next.map(|status| {
            self.left -= 1;
            (status, self)
        }))
    }

    async fn read_page(&mut self) -> Result<(), Status> {
        let size = self.candidates.len().min(PAGE).min(usize::try_from(self.left).unwrap_or(PAGE));
        let ids: Vec<BuildId> = self.candidates.drain(..size).collect();
        let registry = &self.service.services.registry;
        // Open builds were taken first, so what memory still has of this page comes before what the store has.
        let (mut records, mut ended) = (Vec::with_capacity(size), Vec::new());
        registry.with_state(|state| {
            for id in ids {
                match state.build(&id) {
                    Some(Known::Open(record)) => records.push(Arc::clone(record)),
                    Some(Known::Finished(_)) => ended.push(id),
                    Some(Known::Purged(_)) | None => {}
                }
            }
        });
        if !ended.is_empty() {
            let found = registry.finished_page(ended).await.map_err(|error| answer::of_store(&error))?;
            records.extend(found.into_iter().map(|view| view.record));
        }
        for record in &records {
            // Looked at again: a build may have moved on since its id was taken.
            if self.filter.fits(record.state, &record.submitted_by)
                && view::passes(record, &self.filter.repo_url, &self.filter.labels)
            {
                self.ready.push_back(view::status_of(record));
            }
        }
        Ok(())
    }
}
