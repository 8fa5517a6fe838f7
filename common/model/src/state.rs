//! The five states of a build and the moves between them that the specification allows.

use std::fmt;
use std::str::FromStr;

use crate::error::InvalidField;

/// A build's state, or a task's. The last three are terminal: nothing leaves them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum BuildState {
    /// Not yet assigned to a worker.
    Queued,
    /// From the first assignment to the end.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended badly; a [`crate::Reason`] says how.
    Failed,
    /// Ended because somebody asked for it.
    Cancelled,
}

impl BuildState {
    /// All states, in the order of a build's life.
    pub const ALL: [Self; 5] = [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// The state's name on the wire and in every output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing leaves this state.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether the specification allows the move from this state to `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        match self {
            Self::Queued => matches!(next, Self::Running | Self::Cancelled),
            Self::Running => next.is_terminal(),
            Self::Succeeded | Self::Failed | Self::Cancelled => false,
        }
    }
}

impl fmt::Display for BuildState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for BuildState {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let wrong = || {
            let why = format!("{text:?} is not one of queued, running, succeeded, failed, cancelled");
            InvalidField::new("state", why)
        };
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::BuildState::{Cancelled, Failed, Queued, Running, Succeeded};
    use super::*;

    #[test]
    fn the_transition_table_is_the_specification() {
        let allowed =
            [(Queued, Running), (Queued, Cancelled), (Running, Succeeded), (Running, Failed), (Running, Cancelled)];
        for from in BuildState::ALL {
            for to in BuildState::ALL {
                assert_eq!(from.may_become(to), allowed.contains(&(from, to)), "{from} to {to}");
            }
        }
    }
}
