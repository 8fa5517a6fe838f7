//! A list of builds, taken in steps: open ones first, newest first, then finished ones, newest end first.
//!
//! A step looks at so many builds and no more, because nothing is applied while it looks. A build that ends between two steps
//! is listed once. One that is submitted after the first step may be left out.

use std::collections::BTreeSet;
use std::sync::Arc;

use helix_model::{BuildId, BuildState};

use crate::record::{BuildRecord, FinishedBuild};

use super::State;
use super::index::Ended;

/// A build in a list.
#[derive(Clone, Copy, Debug)]
pub enum Listed<'a> {
    /// All of it.
    Open(&'a Arc<BuildRecord>),
    /// What memory knows of it.
    Finished(&'a BuildId, &'a FinishedBuild),
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Open { after: Option<u64> },
    Finished { after: Option<Ended> },
    Over,
}

/// How far a list is.
#[derive(Clone, Debug)]
pub struct Walk {
    states: BTreeSet<BuildState>,
    place: Place,
    /// Numbers of the open builds that were listed: they may stand among the finished ones later.
    listed: BTreeSet<u64>,
}

impl Walk {
    /// Along all builds of some states; of every state, if none is named.
    #[must_use]
    pub fn new(states: BTreeSet<BuildState>) -> Self {
        Self { states, place: Place::Open { after: None }, listed: BTreeSet::new() }
    }

    /// Whether there is no more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.place == Place::Over
    }

    /// The next builds that fit, at most `wanted`, among the next `looks`.
    pub fn step<'a>(
        &mut self,
        state: &'a State,
        mut looks: usize,
        wanted: usize,
        fits: impl Fn(Listed<'a>) -> bool,
    ) -> Vec<Listed<'a>> {
        let mut found = Vec::new();
        if let Place::Open { after } = self.place {
            if self.wants(BuildState::Queued) || self.wants(BuildState::Running) {
                let begun_alone = !self.wants(BuildState::Queued);
                for build in state.open_builds_after(after, begun_alone) {
                    if looks == 0 || found.len() >= wanted {
                        return found;
                    }
                    looks -= 1;
                    self.place = Place::Open { after: Some(build.sequence) };
                    if self.wants(build.state) && fits(Listed::Open(build)) {
                        self.listed.insert(build.sequence);
                        found.push(Listed::Open(build));
                    }
                }
            }
            self.place = Place::Finished { after: None };
        }
        if let Place::Finished { after } = self.place.clone() {
            let mut last: Option<&Ended> = None;
            if BuildState::ALL.into_iter().any(|it| it.is_terminal() && self.wants(it)) {
                for (place, build) in state.finished_builds_after(after.as_ref()) {
                    if looks == 0 || found.len() >= wanted {
                        self.place = Place::Finished { after: last.cloned().or(after) };
                        return found;
                    }
                    looks -= 1;
                    last = Some(place);
                    let (_, sequence, id) = place;
                    let listed = Listed::Finished(id, build);
                    if self.wants(build.state) && !self.listed.contains(sequence) && fits(listed) {
                        found.push(listed);
                    }
                }
            }
            self.place = Place::Over;
        }
        found
    }

    fn wants(&self, state: BuildState) -> bool {
        self.states.is_empty() || self.states.contains(&state)
    }
}
