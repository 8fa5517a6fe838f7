//! What clients saw of builds, and whether one order of events explains all of it.
//!
//! A build only ever goes forward: it is not there, is there, is asked to stop, has ended. For such an object a history is
//! linearizable exactly if nobody saw an earlier stage after somebody else had finished seeing a later one (Herlihy and
//! Wing 1990: real-time order, on an object whose states are totally ordered), and what never changes was the same to all.

use std::collections::BTreeMap;
use std::time::Duration;

/// How far a build has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Stage {
    /// Nobody knows it.
    Absent,
    /// It waits or runs.
    Live,
    /// It was asked to stop.
    Stopping,
    /// It has ended.
    Ended,
}

/// What never changes once a build has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct End {
    /// Its state.
    pub(super) state: String,
    /// When, by the cluster's clock, in Unix milliseconds.
    pub(super) at_ms: i64,
    /// The attempt that decided.
    pub(super) attempt: u32,
    /// The result's digest.
    pub(super) digest: String,
}

/// What an answer said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    /// A submit with this content was taken.
    Submitted(String),
    /// A submit with this content was refused: the id has another.
    Taken(String),
    /// A cancel was committed.
    Cancelled,
    /// A cancel came too late.
    TooLate,
    /// There is no such build.
    Absent,
    /// It is there, with this content.
    Live {
        /// What tells submits of one id apart.
        content: String,
        /// It was asked to stop.
        stopping: bool,
    },
    /// It has ended.
    Ended {
        /// What tells submits of one id apart.
        content: String,
        /// What can no longer change.
        end: End,
    },
}

impl Seen {
    /// The stages in which this can have been seen.
    fn stages(&self) -> (Stage, Stage) {
        match self {
            Self::Submitted(_) | Self::Taken(_) => (Stage::Live, Stage::Ended),
            Self::Cancelled => (Stage::Stopping, Stage::Ended),
            Self::TooLate | Self::Ended { .. } => (Stage::Ended, Stage::Ended),
            Self::Absent => (Stage::Absent, Stage::Absent),
            Self::Live { stopping: false, .. } => (Stage::Live, Stage::Live),
            Self::Live { stopping: true, .. } => (Stage::Stopping, Stage::Stopping),
        }
    }
}

/// One call that got an answer. Calls whose outcome is unknown say nothing, except that a submit may have taken place.
#[derive(Clone, Debug)]
pub(super) struct Event {
    /// When the call was made, since the run began.
    pub(super) begin: Duration,
    /// When its answer was there.
    pub(super) end: Duration,
    /// What it said.
    pub(super) seen: Seen,
}

/// All events, by build.
#[derive(Default, Debug)]
pub(super) struct History {
    events: BTreeMap<String, Vec<Event>>,
    /// When a submit of it was first tried.
    tried: BTreeMap<String, Duration>,
}

impl History {
    /// A submit is about to be tried.
    pub(super) fn trying(&mut self, build: &str, at: Duration) {
        self.tried.entry(build.to_owned()).or_insert(at);
    }

    /// An answer.
    pub(super) fn note(&mut self, build: &str, event: Event) {
        self.events.entry(build.to_owned()).or_default().push(event);
    }

    /// Builds of which a submit was tried before some time.
    pub(super) fn tried_before(&self, before: Duration) -> Vec<String> {
        let tried = self.tried.iter().filter(|(_, at)| **at < before);
        tried.map(|(build, _)| build.clone()).collect()
    }

    /// Answers in all.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.events.values().map(Vec::len).sum()
    }

    /// All that is known of a build, in order: for people.
    #[must_use]
    pub(super) fn story(&self, build: &str) -> Option<Vec<String>> {
        let tried = self.tried.get(build)?;
        let mut lines = vec![format!("first submit tried at {:.3} s", tried.as_secs_f64())];
        let mut events: Vec<&Event> = self.events.get(build).into_iter().flatten().collect();
        events.sort_by_key(|event| event.begin);
        lines.extend(events.into_iter().map(|event| {
            format!("{:8.3} to {:8.3}: {:?}", event.begin.as_secs_f64(), event.end.as_secs_f64(), event.seen)
        }));
        Some(lines)
    }

    /// Ends as they were seen first, by build.
    pub(super) fn ends(&self) -> impl Iterator<Item = (&String, &Event, &End)> {
        self.events.iter().filter_map(|(build, events)| {
            events.iter().find_map(|event| match &event.seen {
                Seen::Ended { end, .. } => Some((build, event, end)),
                _ => None,
            })
        })
    }

    /// Everything that no order of events explains, in words.
    #[must_use]
    pub(super) fn check(&self) -> Vec<String> {
        let all = self.events.iter();
        all.flat_map(|(build, events)| {
            self.check_build(build, events).into_iter().map(move |why| format!("{build}: {why}"))
        })
        .collect()
    }

    fn check_build(&self, build: &str, events: &[Event]) -> Vec<String> {
        let mut wrong = Vec::new();
        let tried = self.tried.get(build).copied().unwrap_or(Duration::MAX);
        let mut by_end: Vec<&Event> = events.iter().collect();
        by_end.sort_by_key(|event| event.end);
        let mut by_begin = by_end.clone();
        by_begin.sort_by_key(|event| event.begin);
        // The latest stage that somebody had finished seeing before the event at hand began.
        let mut past: Option<&Event> = None;
        let mut ended = by_end.iter().peekable();
        for event in by_begin {
            while let Some(earlier) = ended.next_if(|earlier| earlier.end < event.begin) {
                if past.is_none_or(|past| past.seen.stages().0 < earlier.seen.stages().0) {
                    past = Some(earlier);
                }
            }
            if let Some(past) = past.filter(|past| past.seen.stages().0 > event.seen.stages().1) {
                wrong.push(format!("{event:?} was seen after {past:?}"));
            }
            if event.seen.stages().0 > Stage::Absent && event.end < tried {
                wrong.push(format!("{event:?} was seen before anybody had submitted it"));
            }
        }
        wrong.extend(one_content(events));
        wrong.extend(one_end(events));
        wrong
    }
}

/// Of several submits of one id with different content, one was taken, and all see its content.
fn one_content(events: &[Event]) -> Vec<String> {
    let said = |event: &Event| match &event.seen {
        Seen::Submitted(content) | Seen::Live { content, .. } | Seen::Ended { content, .. } => Some(content.clone()),
        _ => None,
    };
    let Some(content) = events.iter().find_map(said) else { return Vec::new() };
    let differs = |event: &&Event| match &event.seen {
        Seen::Taken(refused) => *refused == content,
        _ => said(event).is_some_and(|other| other != content),
    };
    events.iter().filter(differs).map(|event| format!("its content is {content:?}, but {event:?}")).collect()
}

/// Whoever saw its end saw the same.
fn one_end(events: &[Event]) -> Vec<String> {
    let end = |event: &Event| match &event.seen {
        Seen::Ended { end, .. } => Some(end.clone()),
        _ => None,
    };
    let Some(first) = events.iter().find_map(end) else { return Vec::new() };
    let differs = |event: &&Event| end(event).is_some_and(|other| other != first);
    events.iter().filter(differs).map(|event| format!("it ended as {first:?}, but {event:?}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tried: u64, events: &[(u64, u64, Seen)]) -> usize {
        let mut history = History::default();
        history.trying("b", Duration::from_millis(tried));
        for (begin, end, seen) in events {
            let event =
                Event { begin: Duration::from_millis(*begin), end: Duration::from_millis(*end), seen: seen.clone() };
            history.note("b", event);
        }
        history.check().len()
    }

    fn live(stopping: bool) -> Seen {
        Seen::Live { content: "x".to_owned(), stopping }
    }

    fn ended(state: &str) -> Seen {
        let end = End { state: state.to_owned(), at_ms: 1, attempt: 1, digest: String::new() };
        Seen::Ended { content: "x".to_owned(), end }
    }

    fn submitted() -> Seen {
        Seen::Submitted("x".to_owned())
    }

    #[test]
    fn what_one_order_explains_is_fine() {
        // The read overlaps the submit; the second submit is a repetition after the end.
        let fine = [
            (0, 10, submitted()),
            (1, 9, Seen::Absent),
            (11, 12, live(false)),
            (12, 20, Seen::Cancelled),
            (13, 19, live(false)),
            (21, 22, live(true)),
            (23, 30, ended("cancelled")),
            (31, 32, submitted()),
            (31, 32, Seen::TooLate),
            (33, 34, Seen::Taken("y".to_owned())),
        ];
        assert_eq!(check(0, &fine), 0);
    }

    #[test]
    fn stale_lost_changed_and_phantom_builds_are_found() {
        assert_eq!(check(0, &[(0, 1, submitted()), (2, 3, Seen::Absent)]), 1, "an acknowledged submit is lost");
        assert_eq!(check(0, &[(0, 1, ended("failed")), (2, 3, live(false))]), 1, "a read is stale");
        assert_eq!(check(0, &[(0, 1, Seen::Cancelled), (2, 3, live(false))]), 1, "a cancel is lost");
        assert_eq!(check(0, &[(0, 1, ended("failed")), (2, 3, ended("succeeded"))]), 1, "it ended twice");
        assert_eq!(check(5, &[(0, 1, live(false))]), 1, "it was there before its submit");
        let other = Seen::Live { content: "y".to_owned(), stopping: false };
        assert_eq!(check(0, &[(0, 1, submitted()), (0, 3, other)]), 1, "somebody else's content");
        assert_eq!(check(0, &[(0, 9, submitted()), (0, 9, Seen::Taken("x".to_owned()))]), 1, "refused for itself");
    }
}
