//! Lists: unfinished builds first, newest first, then finished ones by their end.
//!
//! The registry is walked in steps while the answer streams, so neither a long list nor one of few among many holds up what is
//! applied, and memory holds a page and the numbers of open builds listed. A build purged meanwhile is left out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use futures::stream;
use helix_common::status::invalid;
use helix_core::record::BuildRecord;
use helix_core::state::{Listed, Walk};
use helix_proto::v1;
use tonic::Status;

use super::{Answers, BuildRpc, view};
use crate::rpc::answer;
use crate::rpc::services::consistency;

/// Builds listed unless told otherwise.
const LIMIT_DEFAULT: u64 = 100;

/// Records read at once.
const PAGE: usize = 128;

/// Builds looked at in one go: some milliseconds, for which nothing is applied.
const LOOKS: usize = 4_096;

impl BuildRpc {
    pub(super) async fn list(
        &self,
        principal: &str,
        request: v1::ListBuildsRequest,
    ) -> Result<Answers<v1::BuildStatus>, Status> {
        let (walk, filter) = wanted(principal, &request)?;
        self.services.freshen(consistency(request.stale)).await?;
        let left = match (request.limit, request.all) {
            (0, true) => u64::MAX,
            (0, false) => LIMIT_DEFAULT,
            (limit, _) => limit,
        };
        let listing = Listing { service: self.clone(), walk, filter, ready: VecDeque::new(), left };
        Ok(Box::pin(stream::try_unfold(listing, Listing::next)))
    }
}

fn wanted(principal: &str, request: &v1::ListBuildsRequest) -> Result<(Walk, Filter), Status> {
    let states = request.states.iter().map(|word| word.parse()).collect::<Result<BTreeSet<_>, _>>();
    let filter = Filter {
        repo_url: request.repo_url.clone(),
        labels: request.labels.clone(),
        mine: request.mine.then(|| principal.to_owned()),
    };
    Ok((Walk::new(states.map_err(|wrong| invalid(&wrong))?), filter))
}

/// What is wanted beside the state.
struct Filter {
    repo_url: String,
    labels: BTreeMap<String, String>,
    mine: Option<String>,
}

impl Filter {
    /// As far as memory knows: of a finished build, whose it was.
    fn may_fit(&self, build: Listed<'_>) -> bool {
        match build {
            Listed::Open(build) => self.is_by(&build.submitted_by) && self.fits(build),
            Listed::Finished(_, build) => self.is_by(&build.submitted_by),
        }
    }

    fn is_by(&self, submitted_by: &str) -> bool {
        self.mine.as_deref().is_none_or(|mine| mine == submitted_by)
    }

    fn fits(&self, record: &BuildRecord) -> bool {
        view::passes(record, &self.repo_url, &self.labels)
    }
}

struct Listing {
    service: BuildRpc,
    walk: Walk,
    filter: Filter,
    ready: VecDeque<v1::BuildStatus>,
    left: u64,
}

impl Listing {
    async fn next(mut self) -> Result<Option<(v1::BuildStatus, Self)>, Status> {
        while self.ready.is_empty() && !self.walk.is_over() && self.left > 0 {
            self.read_page().await?;
        }
        let next = if self.left > 0 { self.ready.pop_front() } else { None };
        Ok(next.map(|status| {
            self.left -= 1;
            (status, self)
        }))
    }

    async fn read_page(&mut self) -> Result<(), Status> {
        let size = usize::try_from(self.left).unwrap_or(PAGE).min(PAGE);
        let registry = &self.service.services.registry;
        let (mut records, mut ended) = (Vec::new(), Vec::new());
        registry.with_state(|state| {
            for build in self.walk.step(state, LOOKS, size, |build| self.filter.may_fit(build)) {
                match build {
                    Listed::Open(record) => records.push(Arc::clone(record)),
                    Listed::Finished(id, _) => ended.push(id.clone()),
                }
            }
        });
        if ended.is_empty() {
            // Others want the processor, and the lock, too.
            tokio::task::yield_now().await;
        } else {
            let found = registry.finished_page(ended).await.map_err(|error| answer::of_store(&error))?;
            // Repositories and labels of finished builds are in the store alone.
            records.extend(found.into_iter().map(|view| view.record).filter(|record| self.filter.fits(record)));
        }
        self.ready.extend(records.iter().map(|record| view::status_of(record)));
        Ok(())
    }
}
