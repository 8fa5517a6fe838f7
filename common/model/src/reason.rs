//! Why an attempt, a task or a build did not succeed, and whose fault that is.

use std::fmt;
use std::str::FromStr;

use crate::error::InvalidField;

/// Who has to change something for the next attempt to fare better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The build's own: the same attempt would end the same way.
    User,
    /// The hosts' or the cluster's: another attempt elsewhere may succeed.
    Infrastructure,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $word:literal, $fault:ident;)*) => {
        /// Why something did not succeed. The words are a contract with scripts.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All reasons.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word on the wire and in every output.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// Whose fault it is; decides which retry budget pays.
            #[must_use]
            pub fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)* }
            }
        }
    };
}

reasons! {
    /// The command ended with a code other than 0.
    Exit = "exit", User;
    /// The command was killed by a signal that we did not send.
    Signal = "signal", User;
    /// The wall-clock limit was reached.
    Timeout = "timeout", User;
    /// Nothing was printed for longer than the silence limit.
    Silence = "silence", User;
    /// A memory limit was reached.
    Oom = "oom", User;
    /// There was nothing to run.
    NoCommand = "no_command", User;
    /// Exit 0, but a promised output does not exist or may not be read.
    ArtifactMissing = "artifact_missing", User;
    /// The agent's owner does not allow what the build asks for.
    Policy = "policy", User;
    /// The repository, ref or uploaded source could not be had.
    Source = "source", User;
    /// Somebody asked for the end.
    Cancelled = "cancelled", User;
    /// The host had no room.
    DiskFull = "disk_full", Infrastructure;
    /// A base image could not be pulled.
    ImagePull = "image_pull", Infrastructure;
    /// An image could not be pushed.
    Push = "push", Infrastructure;
    /// Artifacts or the log could not be stored in time; the exit code is kept.
    Artifact = "artifact", Infrastructure;
    /// The worker fell silent for longer than its lease, or came back as another instance.
    WorkerLost = "worker_lost", Infrastructure;
    /// The worker was drained and its deadline passed.
    Drained = "drained", Infrastructure;
    /// A fault of ours on the host.
    Internal = "internal", Infrastructure;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let found = Self::ALL.iter().copied().find(|reason| reason.as_str() == text);
        found.ok_or_else(|| InvalidField::new("reason", format!("{text:?} is not a reason")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse::<Reason>().unwrap(), *reason);
        }
        assert!("nonsense".parse::<Reason>().is_err());
    }
}
