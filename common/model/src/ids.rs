//! Identities: builds, tasks, attempts, workers, instances, nodes.
//!
//! Each is a newtype, so that no bare string or integer stands for an identity across a function boundary.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::InvalidField;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks the text and wraps it.
            ///
            /// # Errors
            /// [`InvalidField`] when the text does not have the form that the type's documentation gives.
            pub fn new(text: &str) -> Result<Self, InvalidField> {
                $check(text)?;
                Ok(Self(Arc::from(text)))
            }

            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidField;
            fn from_str(text: &str) -> Result<Self, InvalidField> {
                Self::new(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", &self.0)
            }
        }
    };
}

text_id! {
    /// A build's id: `[a-z0-9][a-z0-9._-]{0,63}`, and never `last`, which the command line gives a meaning.
    BuildId, check_build_id
}

text_id! {
    /// A worker's name: `[a-z0-9][a-z0-9._-]{0,63}`; the same as the NAME in its agent's certificate.
    WorkerName, check_worker_name
}

text_id! {
    /// One life of a worker's host and data: the random id in the agent's data directory and the kernel's
    /// boot id, joined by `.`; 1 to 128 characters of `[a-z0-9.-]`. Equal instances share their spool.
    Instance, check_instance
}

impl Instance {
    /// The kernel's boot id: what follows the first `.`, or everything where there is none. While it stays the
    /// same, processes of an earlier instance may still live; once it differs, none does.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        self.0.split_once('.').map_or(&*self.0, |(_, boot)| boot)
    }
}

fn check_name(field: &'static str, text: &str) -> Result<(), InvalidField> {
    let mut bytes = text.bytes();
    let head = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let tail = bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
    if head && tail && text.len() <= 64 {
        Ok(())
    } else {
        Err(InvalidField::new(field, format!("{text:?} does not match [a-z0-9][a-z0-9._-]{{0,63}}")))
    }
}

fn check_build_id(text: &str) -> Result<(), InvalidField> {
    check_name("build_id", text)?;
    if text == "last" {
        return Err(InvalidField::new("build_id", "\"last\" is reserved: it names the newest build".to_owned()));
    }
    Ok(())
}

fn check_worker_name(text: &str) -> Result<(), InvalidField> {
    check_name("worker", text)
}

fn check_instance(text: &str) -> Result<(), InvalidField> {
    let fine = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b));
    if fine && !text.is_empty() && text.len() <= 128 {
        Ok(())
    } else {
        Err(InvalidField::new("instance", format!("{text:?} is not 1 to 128 characters of [a-z0-9.-]")))
    }
}

/// A coordinator's number in its cluster: at least 1, never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A task's place among its build's platforms, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TaskIndex(pub u16);

/// The number of a task's attempt, from 1; 0 stands for none yet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AttemptNumber(pub u32);

impl fmt::Display for TaskIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for AttemptNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `(build, task, attempt number)`: the fencing token. What an agent reports counts only under the
/// number that is current in the registry.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AttemptKey {
    /// The build.
    pub build: BuildId,
    /// Its task.
    pub task: TaskIndex,
    /// The task's attempt.
    pub attempt: AttemptNumber,
}

impl fmt::Display for AttemptKey {
    /// `BUILD.TASK.ATTEMPT`, as used in directory names: the last two parts are numbers, so it reads back uniquely.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.build, self.task, self.attempt)
    }
}

impl FromStr for AttemptKey {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let wrong = || InvalidField::new("attempt", format!("{text:?} is not BUILD.TASK.ATTEMPT"));
        let (rest, attempt) = text.rsplit_once('.').ok_or_else(wrong)?;
        let (build, task) = rest.rsplit_once('.').ok_or_else(wrong)?;
        Ok(Self {
            build: BuildId::new(build)?,
            task: TaskIndex(task.parse().map_err(|_| wrong())?),
            attempt: AttemptNumber(attempt.parse().map_err(|_| wrong())?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_ids_follow_their_pattern() {
        for good in ["a", "0", "a.b_c-d", &"x".repeat(64)] {
            assert!(BuildId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "last", "A", ".a", "-a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(BuildId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn attempt_keys_read_back_what_they_print() {
        let key = AttemptKey { build: BuildId::new("a.1.2").unwrap(), task: TaskIndex(3), attempt: AttemptNumber(4) };
        assert_eq!(key.to_string().parse::<AttemptKey>().unwrap(), key);
        for bad in ["", "a", "a.1", "a.x.1", "a.1.x", ".1.1"] {
            assert!(bad.parse::<AttemptKey>().is_err(), "{bad}");
        }
    }
}
