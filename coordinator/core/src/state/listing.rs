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

/// What one step may do, and what it found.
struct Page<'a> {
    looks: usize,
    wanted: usize,
    found: Vec<Listed<'a>>,
}

impl Page<'_> {
    /// Whether one more build may be looked at, which counts as a look.
    fn takes_a_look(&mut self) -> bool {
        if self.looks == 0 || self.found.len() >= self.wanted {
            return false;
        }
        self.looks -= 1;
        true
    }
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
        looks: usize,
        wanted: usize,
        fits: impl Fn(Listed<'a>) -> bool,
    ) -> Vec<Listed<'a>> {
        let mut page = Page { looks, wanted, found: Vec::new() };
        if let Place::Open { after } = self.place {
            if !self.has_walked_open(state, after, &mut page, &fits) {
                return page.found;
            }
            self.place = Place::Finished { after: None };
        }
        if let Place::Finished { after } = self.place.clone() {
            if !self.has_walked_finished(state, after, &mut page, &fits) {
                return page.found;
            }
            self.place = Place::Over;
        }
        page.found
    }

    /// Whether all open builds were looked at.
    fn has_walked_open<'a>(
        &mut self,
        state: &'a State,
        after: Option<u64>,
        page: &mut Page<'a>,
        fits: impl Fn(Listed<'a>) -> bool,
    ) -> bool {
        if !self.wants(BuildState::Queued) && !self.wants(BuildState::Running) {
            return true;
        }
        for build in state.open_builds_after(after, !self.wants(BuildState::Queued)) {
            if !page.takes_a_look() {
                return false;
            }
            self.place = Place::Open { after: Some(build.sequence) };
            if self.wants(build.state) && fits(Listed::Open(build)) {
                self.listed.insert(build.sequence);
                page.found.push(Listed::Open(build));
            }
        }
        true
    }

    /// Whether all finished builds were looked at.
    fn has_walked_finished<'a>(
        &mut self,
        state: &'a State,
        after: Option<Ended>,
        page: &mut Page<'a>,
        fits: impl Fn(Listed<'a>) -> bool,
    ) -> bool {
        if !BuildState::ALL.into_iter().any(|it| it.is_terminal() && self.wants(it)) {
            return true;
        }
        let mut last: Option<&Ended> = None;
        for (place, build) in state.finished_builds_after(after.as_ref()) {
            if !page.takes_a_look() {
                self.place = Place::Finished { after: last.cloned().or(after) };
                return false;
            }
            last = Some(place);
            let (_, sequence, id) = place;
            let listed = Listed::Finished(id, build);
            if self.wants(build.state) && !self.listed.contains(sequence) && fits(listed) {
                page.found.push(listed);
            }
        }
        true
    }

    fn wants(&self, state: BuildState) -> bool {
        self.states.is_empty() || self.states.contains(&state)
    }
}
