//! The keys of the cluster's policy: what each is called, what it may be, and what it is for.
//!
//! One table for all who read, check or change policy. Every field of [`Policy`] has a row here; a test takes the record
//! apart and fails without one.

use std::fmt;

use helix_model::Measure;
use helix_model::limits::ATTEMPTS_PER_TASK_MAX;
use helix_model::parse::duration_text;

use crate::record::{DURATION_MS_MAX, Policy};
use crate::retention::{RULES_MAX, Rule};

/// Under this a heartbeat each third of the lease would be all that agents do.
const LEASE_MS_MIN: u64 = 300;

/// No size may be larger than an exbibyte, for the same reason.
const BYTES_MAX: u64 = 1 << 60;

/// Each open build is in memory whole.
const QUEUE_MAX: u64 = 10_000_000;

/// Of each finished build memory keeps a little.
const RETAIN_BUILDS_MAX: u64 = 100_000_000;

/// More copies than a cluster has coordinators mean one for each.
const COPIES_MAX: u64 = 100;

/// The smallest log that is kept of an attempt: below, the longest lines would not fit into its parts.
const LOG_BYTES_MIN: u64 = 1 << 20;

/// The builds that count against a worker stand in its row.
pub(crate) const QUARANTINE_AFTER_MAX: u32 = 100;

/// What a number counts. A key's name ends with it, or has it before `_max`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
}

/// Keys are told apart by their names.
impl PartialEq for PolicyKey {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for PolicyKey {}

impl Unit {
    /// A number of it for people: `1h30m`, `4 GiB`, `7`.
    #[must_use]
    pub fn text(self, value: u64) -> String {
        match self {
            Self::Ms => duration_text(value),
            Self::Bytes => Measure::Disk.text(value),
            Self::Count => value.to_string(),
        }
    }
}

/// One key of the policy.
#[derive(Debug)]
pub struct PolicyKey {
    /// Its name, with its unit.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// The smallest value allowed.
    pub min: u64,
    /// The largest value allowed.
    pub max: u64,
    /// What it is for, in a few words.
    pub about: &'static str,
    get: fn(&Policy) -> u64,
    set: fn(&mut Policy, u64),
}

/// A value that is not allowed.
#[derive(Clone, Copy, Debug)]
pub struct OutOfRange {
    /// Of which key.
    pub key: &'static PolicyKey,
    /// The value.
    pub given: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PolicyKey { name, unit, min, max, .. } = *self.key;
        write!(f, "{name} is {}: from {min} to {max} is allowed", self.given)?;
        match unit {
            Unit::Count => Ok(()),
            Unit::Ms | Unit::Bytes => write!(f, " ({} to {})", unit.text(min), unit.text(max)),
        }
    }
}

impl std::error::Error for OutOfRange {}

impl PolicyKey {
    /// The key of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        POLICY_KEYS.iter().find(|key| key.name == name)
    }

    /// Its value.
    #[must_use]
    pub fn value(&self, policy: &Policy) -> u64 {
        (self.get)(policy)
    }

    /// Checks a value for it.
    ///
    /// # Errors
    /// When the value is not allowed.
    pub fn check(&'static self, value: u64) -> Result<(), OutOfRange> {
        if (self.min..=self.max).contains(&value) { Ok(()) } else { Err(OutOfRange { key: self, given: value }) }
    }

    /// Gives it another value.
    ///
    /// # Errors
    /// When the value is not allowed; then nothing changed.
    pub fn put(&'static self, policy: &mut Policy, value: u64) -> Result<(), OutOfRange> {
        self.check(value)?;
        (self.set)(policy, value);
        Ok(())
    }
}

/// Something of the policy that has a name and a number: a key, or a rule of retention beside one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Setting {
    /// A key: it always has a value.
    Key(&'static PolicyKey),
    /// A rule: it may be there or not, and is allowed what its general key is.
    Rule(Rule),
}

impl Setting {
    /// What has this name; `None` if nothing can.
    ///
    /// # Errors
    /// What is wrong with a name that looks like a rule's.
    pub fn named(name: &str) -> Result<Option<Self>, String> {
        match Rule::parse(name) {
            Some(rule) => rule.map(Self::Rule).map(Some),
            None => Ok(PolicyKey::named(name).map(Self::Key)),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Key(key) => key.name.to_owned(),
            Self::Rule(rule) => rule.to_string(),
        }
    }

    /// The key that says what is allowed, and what it is for.
    #[must_use]
    pub fn key(&self) -> &'static PolicyKey {
        match self {
            Self::Key(key) => key,
            Self::Rule(rule) => PolicyKey::named(rule.kept.key()).unwrap_or(&POLICY_KEYS[0]),
        }
    }

    /// Its value; `None` of a rule that is not there.
    #[must_use]
    pub fn value(&self, policy: &Policy) -> Option<u64> {
        match self {
            Self::Key(key) => Some(key.value(policy)),
            Self::Rule(rule) => policy.retain_rules.get(rule).copied(),
        }
    }

    /// Gives it another value.
    ///
    /// # Errors
    /// When the value is not allowed; then nothing changed.
    pub fn put(&self, policy: &mut Policy, value: u64) -> Result<(), OutOfRange> {
        match self {
            Self::Key(key) => key.put(policy, value),
            Self::Rule(rule) => {
                self.key().check(value)?;
                policy.retain_rules.insert(rule.clone(), value);
                Ok(())
            }
        }
    }

    /// Takes it back: a rule is gone, a key has its default.
    pub fn reset(&self, policy: &mut Policy) {
        match self {
            Self::Key(key) => (key.set)(policy, key.value(&Policy::of_new_clusters())),
            Self::Rule(rule) => drop(policy.retain_rules.remove(rule)),
        }
    }

    /// All keys, and the rules that a policy has.
    pub fn all(policy: &Policy) -> impl Iterator<Item = Self> {
        POLICY_KEYS.iter().map(Self::Key).chain(policy.retain_rules.keys().cloned().map(Self::Rule))
    }
}

/// Checks all of a policy.
///
/// # Errors
/// The first value that is not allowed, in words.
pub fn check(policy: &Policy) -> Result<(), String> {
    POLICY_KEYS.iter().try_for_each(|key| key.check(key.value(policy))).map_err(|wrong| wrong.to_string())?;
    if policy.retain_rules.len() > RULES_MAX {
        return Err(format!("{} rules of retention are more than {RULES_MAX}", policy.retain_rules.len()));
    }
    policy.retain_rules.iter().try_for_each(|(rule, value)| {
        rule.of.check()?;
        Setting::Rule(rule.clone()).key().check(*value).map_err(|wrong| format!("{rule}: {wrong}"))
    })
}

macro_rules! key {
    ($field:ident: $unit:ident, $range:expr, $about:literal) => {
        PolicyKey {
            name: stringify!($field),
            unit: Unit::$unit,
            min: *$range.start(),
            max: *$range.end(),
            about: $about,
            get: |policy| u64::from(policy.$field),
            // What a narrower field cannot hold is out of range.
            set: |policy, value| policy.$field = value.try_into().unwrap_or_default(),
        }
    };
}

/// All keys, in the order in which they are shown.
pub const POLICY_KEYS: &[PolicyKey] = &[
    key!(queue_max: Count, (1..=QUEUE_MAX), "unfinished builds that the cluster takes"),
    key!(infra_retries: Count, (0..=ATTEMPTS_PER_TASK_MAX as u64), "retries of a task after failures that are not its own"),
    key!(retry_backoff_ms: Ms, (0..=DURATION_MS_MAX), "the first pause between attempts; it doubles, up to a minute"),
    key!(timeout_default_ms: Ms, (1..=DURATION_MS_MAX), "wall-clock limit of attempts whose build names none"),
    key!(timeout_grace_ms: Ms, (0..=DURATION_MS_MAX), "how much later than its agent a coordinator ends an attempt"),
    key!(worker_lease_ms: Ms, (LEASE_MS_MIN..=DURATION_MS_MAX), "how long a silent worker keeps its attempts"),
    key!(detach_for_ms: Ms, (0..=DURATION_MS_MAX), "how long an agent that detached may stay away"),
    key!(cancel_unverified_after_ms: Ms, (0..=DURATION_MS_MAX), "how long a stop waits for proof after the lease lapsed"),
    key!(quarantine_after: Count, (0..=QUARANTINE_AFTER_MAX as u64), "builds a worker may fail before it is quarantined; 0 for never"),
    key!(quarantine_ms: Ms, (0..=DURATION_MS_MAX), "the first quarantine; it doubles with each probe that fails"),
    key!(log_bytes_max: Bytes, (LOG_BYTES_MIN..=BYTES_MAX), "largest log of an attempt; beyond it the middle is dropped"),
    key!(blob_bytes_max: Bytes, (1..=BYTES_MAX), "largest artifact or upload"),
    key!(copies: Count, (0..=COPIES_MAX), "coordinators that hold an artifact before a success counts; 0 for 2, and 3 from five coordinators on"),
    key!(store_deadline_ms: Ms, (1..=DURATION_MS_MAX), "how long an agent tries to store artifacts and log"),
    key!(seal_lost_after_ms: Ms, (0..=DURATION_MS_MAX), "how long a lost worker may yet bring an attempt's log"),
    key!(scrub_bytes: Bytes, (0..=BYTES_MAX), "bytes of blobs that each coordinator reads and checks a second; 0 for none"),
    key!(disk_reserve_bytes: Bytes, (0..=BYTES_MAX), "a coordinator with less free disk takes neither submits nor bytes"),
    key!(retain_ms: Ms, (0..=DURATION_MS_MAX), "how long finished builds are kept"),
    key!(retain_logs_ms: Ms, (0..=DURATION_MS_MAX), "how long logs are kept, and no longer than their builds"),
    key!(retain_artifacts_ms: Ms, (0..=DURATION_MS_MAX), "how long artifacts are kept, and no longer than their builds"),
    key!(retain_builds: Count, (0..=RETAIN_BUILDS_MAX), "how many finished builds are kept, whatever else is said"),
    key!(tombstone_ms: Ms, (0..=DURATION_MS_MAX), "how long a purged id is remembered"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_field_has_a_key_of_its_name_and_unit() {
        let Policy {
            worker_lease_ms,
            cancel_unverified_after_ms,
            detach_for_ms,
            infra_retries,
            retry_backoff_ms,
            queue_max,
            copies,
            store_deadline_ms,
            timeout_default_ms,
            timeout_grace_ms,
            retain_ms,
            retain_builds,
            tombstone_ms,
            blob_bytes_max,
            log_bytes_max,
            disk_reserve_bytes,
            quarantine_after,
            quarantine_ms,
            retain_logs_ms,
            retain_artifacts_ms,
            seal_lost_after_ms,
            scrub_bytes,
            retain_rules,
        } = Policy::default();
        assert!(retain_rules.is_empty(), "rules have names of their own");
        let fields = BTreeMap::from([
            ("worker_lease_ms", worker_lease_ms),
            ("cancel_unverified_after_ms", cancel_unverified_after_ms),
            ("detach_for_ms", detach_for_ms),
            ("infra_retries", infra_retries.into()),
            ("retry_backoff_ms", retry_backoff_ms),
            ("queue_max", queue_max),
            ("copies", copies.into()),
            ("store_deadline_ms", store_deadline_ms),
            ("timeout_default_ms", timeout_default_ms),
            ("timeout_grace_ms", timeout_grace_ms),
            ("retain_ms", retain_ms),
            ("retain_builds", retain_builds),
            ("tombstone_ms", tombstone_ms),
            ("blob_bytes_max", blob_bytes_max),
            ("log_bytes_max", log_bytes_max),
            ("disk_reserve_bytes", disk_reserve_bytes),
            ("quarantine_after", quarantine_after.into()),
            ("quarantine_ms", quarantine_ms),
            ("retain_logs_ms", retain_logs_ms),
            ("retain_artifacts_ms", retain_artifacts_ms),
            ("seal_lost_after_ms", seal_lost_after_ms),
            ("scrub_bytes", scrub_bytes),
        ]);
        let keys: BTreeMap<_, _> = POLICY_KEYS.iter().map(|key| (key.name, key.value(&Policy::default()))).collect();
        assert_eq!(keys, fields);
        for key in POLICY_KEYS {
            let unit = match key.name {
                name if name.ends_with("_ms") => Unit::Ms,
                name if name.contains("_bytes") => Unit::Bytes,
                _ => Unit::Count,
            };
            assert_eq!(key.unit, unit, "{}", key.name);
        }
    }

    #[test]
    fn a_key_takes_what_is_allowed_and_nothing_else() {
        for key in POLICY_KEYS {
            let mut policy = Policy::default();
            for value in [key.min, key.max] {
                key.put(&mut policy, value).unwrap();
                assert_eq!(key.value(&policy), value, "{}", key.name);
                assert!(check(&policy).is_ok(), "{}", key.name);
            }
            let before = policy.clone();
            for value in [key.min.checked_sub(1), Some(key.max + 1)].into_iter().flatten() {
                let refused = key.put(&mut policy, value).unwrap_err().to_string();
                assert!(refused.starts_with(&format!("{} is {value}: from ", key.name)), "{refused}");
                assert_eq!(policy, before);
            }
        }
        assert!(check(&Policy::default()).is_ok());
    }
}
