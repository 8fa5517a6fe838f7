//! Whose disk it was that had no more room.

/// What was full when an attempt ended as `disk_full`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Room {
    /// The host's, or too little of it was left.
    #[default]
    Host,
    /// What the attempt itself may fill: the limit that it asked for, or its agent's for every build.
    Own,
}
