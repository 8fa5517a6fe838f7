//! How long what of a finished build is kept: its record, the logs, the artifacts; by its state and its labels.
//!
//! The policy has a general lifetime for each and may have rules beside it. Of the rules that fit a build the longest counts, whatever
//! their order, and where none fits the general one: so a rule may shorten what nobody asked to keep, and no two rules
//! take away from each other. Logs and artifacts never outlive the record that names them. When something is due is in
//! [`crate::due`], what follows in [`crate::apply`].

use std::collections::BTreeMap;
use std::fmt;

use helix_model::limits::LABEL_BYTES_MAX;
use helix_model::{BuildState, LogTime};

use crate::record::{Addendum, BuildRecord, FinishedBuild, Policy, RowKey};

/// Rules in one policy: each finished build is held against all of them once, when it ends.
pub const RULES_MAX: usize = 64;

/// What is kept of a finished build.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kept {
    /// All of it: when the record goes, so does the rest.
    Build,
    /// The logs of all its attempts.
    Logs,
    /// What it made, and what clients registered.
    Artifacts,
}

impl Kept {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Build, Self::Logs, Self::Artifacts];

    /// The policy's key of its general lifetime; rules bear it, too.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Build => "retain_ms",
            Self::Logs => "retain_logs_ms",
            Self::Artifacts => "retain_artifacts_ms",
        }
    }

    /// One word for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Logs => "logs",
            Self::Artifacts => "artifacts",
        }
    }

    /// What a row beside a build's own tells of.
    #[must_use]
    pub fn of_addendum(addendum: &Addendum) -> Self {
        match addendum {
            Addendum::Log(_) => Self::Logs,
            Addendum::Artifact(_) => Self::Artifacts,
            Addendum::Pinned(_) => Self::Build,
        }
    }

    /// As [`Self::of_addendum`], by the row's key; `None` of other rows.
    #[must_use]
    pub fn of_key(key: &RowKey) -> Option<Self> {
        match key {
            // A pin is of no attempt, and attempts are numbered from 1.
            RowKey::Addendum(attempt, name) if name.is_empty() && attempt.attempt.0 == 0 => Some(Self::Build),
            RowKey::Addendum(_, name) if name.is_empty() => Some(Self::Logs),
            RowKey::Addendum(..) => Some(Self::Artifacts),
            RowKey::Counters
            | RowKey::Policy
            | RowKey::Node(_)
            | RowKey::Worker(_)
            | RowKey::Build(_)
            | RowKey::Tombstone(_) => None,
        }
    }
}

/// Which builds a rule is for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Selector {
    /// Those that ended so.
    pub state: Option<BuildState>,
    /// Those with this label.
    pub label: Option<(String, String)>,
}

/// A rule's name, `retain_logs_ms[failed,kind=nightly]`; its lifetime is the value under it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// What it says a lifetime of.
    pub kept: Kept,
    /// Of which builds.
    pub of: Selector,
}

/// All rules of a policy.
pub type Rules = BTreeMap<Rule, u64>;

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.kept.key())?;
        if let Some(state) = self.of.state {
            write!(f, "{state}")?;
        }
        if self.of.state.is_some() && self.of.label.is_some() {
            f.write_str(",")?;
        }
        if let Some((key, value)) = &self.of.label {
            write!(f, "{key}={value}")?;
        }
        f.write_str("]")
    }
}

impl Rule {
    /// Reads a rule's name; `None` where it is none at all.
    ///
    /// # Errors
    /// What is wrong with a name that looks like one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Result<Self, String>> {
        let (key, rest) = name.split_once('[')?;
        let kept = Kept::ALL.into_iter().find(|kept| kept.key() == key)?;
        let Some(inside) = rest.strip_suffix(']') else {
            return Some(Err(format!("{name:?} lacks its closing bracket")));
        };
        Some(Selector::parse(inside).map(|of| Self { kept, of }))
    }
}

impl Selector {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither a state that builds end in, nor a label K=V, nor STATE,K=V");
        let ended = |word: &str| word.parse::<BuildState>().ok().filter(|state| state.is_terminal());
        if let Some(state) = ended(text) {
            return Ok(Self { state: Some(state), label: None });
        }
        let (state, label) = match text.split_once(',') {
            Some((word, rest)) if ended(word).is_some() => (ended(word), rest),
            Some(_) | None => (None, text),
        };
        let (key, value) = label.split_once('=').ok_or_else(wrong)?;
        let selector = Self { state, label: Some((key.to_owned(), value.to_owned())) };
        selector.check().map(|()| selector)
    }

    /// Whether it can fit any build, and is of a size that the registry takes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.state.is_some_and(|state| !state.is_terminal()) || (self.state.is_none() && self.label.is_none()) {
            return Err("a rule of retention names a state that builds end in, a label, or both".to_owned());
        }
        let Some((key, value)) = &self.label else { return Ok(()) };
        let sound = |text: &str| text.len() <= LABEL_BYTES_MAX && !text.chars().any(char::is_control);
        if key.is_empty() || key.contains('=') || !sound(key) || !sound(value) {
            return Err(format!("{key}={value} is not a label"));
        }
        Ok(())
    }

    fn fits(&self, build: &FinishedBuild) -> bool {
        self.state.is_none_or(|state| state == build.state)
            && self.label.as_ref().is_none_or(|(key, value)| build.labels.has(key, value))
    }
}

/// A build's labels in one piece: memory keeps them of every finished build.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Labels(Box<str>);

impl Labels {
    /// Of a spec's labels, whose characters are no control characters.
    #[must_use]
    pub fn of(labels: &BTreeMap<String, String>) -> Self {
        let mut text = String::new();
        for (key, value) in labels {
            text.extend([key, "=", value, "\n"]);
        }
        Self(text.into_boxed_str())
    }

    /// Whether the label is among them.
    #[must_use]
    pub fn has(&self, key: &str, value: &str) -> bool {
        self.0.lines().any(|line| line.split_once('=') == Some((key, value)))
    }
}

/// What of a finished build has gone before the rest, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Expired {
    /// Its logs.
    pub logs: Option<LogTime>,
    /// Its artifacts.
    pub artifacts: Option<LogTime>,
}

impl Expired {
    /// When that went; the record itself never has.
    #[must_use]
    pub fn at(&self, kept: Kept) -> Option<LogTime> {
        match kept {
            Kept::Build => None,
            Kept::Logs => self.logs,
            Kept::Artifacts => self.artifacts,
        }
    }

    pub(crate) fn note(&mut self, kept: Kept, at: LogTime) {
        match kept {
            Kept::Build => {}
            Kept::Logs => self.logs = Some(at),
            Kept::Artifacts => self.artifacts = Some(at),
        }
    }
}

impl BuildRecord {
    /// Forgets the logs, or the artifacts: nothing of them is named any more.
    pub fn expire(&mut self, kept: Kept, at: LogTime) {
        self.expired.note(kept, at);
        match kept {
            Kept::Build => {}
            Kept::Logs => {
                self.tasks.iter_mut().flat_map(|task| &mut task.attempts).for_each(|attempt| attempt.log = None);
            }
            Kept::Artifacts => {
                self.tasks.iter_mut().flat_map(|task| &mut task.attempts).for_each(|it| it.artifacts.clear());
                self.artifacts.clear();
            }
        }
    }
}

impl Policy {
    /// How long that of a build is kept after its end, in milliseconds.
    #[must_use]
    pub fn lifetime_ms(&self, kept: Kept, build: &FinishedBuild) -> u64 {
        let fitting = self.retain_rules.iter().filter(|(rule, _)| rule.kept == kept && rule.of.fits(build));
        fitting.map(|(_, keep_ms)| *keep_ms).max().unwrap_or(match kept {
            Kept::Build => self.retain_ms,
            Kept::Logs => self.retain_logs_ms,
            Kept::Artifacts => self.retain_artifacts_ms,
        })
    }

    /// Whether lifetimes are what they were under another policy.
    pub(crate) fn retains_as(&self, other: &Self) -> bool {
        let of = |policy: &Self| (policy.retain_ms, policy.retain_logs_ms, policy.retain_artifacts_ms);
        of(self) == of(other) && self.retain_rules == other.retain_rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rules_name_reads_back() {
        for name in [
            "retain_ms[failed]",
            "retain_logs_ms[kind=nightly]",
            "retain_artifacts_ms[succeeded,kind=a=b,c]",
            "retain_ms[failed=x]",
            "retain_ms[a,b=]",
        ] {
            assert_eq!(Rule::parse(name).unwrap().unwrap().to_string(), name);
        }
        for name in ["retain_ms", "retain_builds[failed]", "queue_max[x=y]"] {
            assert!(Rule::parse(name).is_none(), "{name}");
        }
        for name in ["retain_ms[failed", "retain_ms[]", "retain_ms[running]", "retain_ms[x]", "retain_ms[=x]"] {
            assert!(Rule::parse(name).unwrap().is_err(), "{name}");
        }
    }

    #[test]
    fn labels_are_found_whole() {
        let labels =
            Labels::of(&BTreeMap::from([("a", "b=c"), ("k", ""), ("ab", "x")].map(|(k, v)| (k.into(), v.into()))));
        assert!(labels.has("a", "b=c") && labels.has("k", "") && labels.has("ab", "x"));
        assert!(!labels.has("a", "b") && !labels.has("b", "x") && !labels.has("a=b", "c") && !labels.has("x", ""));
        assert_eq!(Labels::of(&BTreeMap::new()), Labels::default());
    }
}
