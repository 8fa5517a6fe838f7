//! Mistakes that the simulation can be told to make, each where real systems made it, and each to be found within a
//! budget of seeds. No core has a switch for them: they are made by the models around the cores, or on the way to them.

/// A mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A leader acknowledges submits before they are committed.
    AckBeforeCommit,
    /// A leader sends assignments before they are committed.
    AssignBeforeCommit,
    /// An agent says that an attempt is dead before it is.
    StoppedBeforeDead,
    /// An agent that restarts takes what it ran for a success.
    InventedSuccess,
    /// An agent that restarts runs again what its runners have.
    RanTwice,
    /// An agent that starts after a boot begins what was given to the life before.
    OutlivedAssignment,
    /// A coordinator that restarts from its rows passes over an entry of the log.
    SkippedEntry,
    /// A new leader sends nothing that the old one had promised to send.
    ForgottenEffects,
    /// An agent that stores bytes once more leaves out the log that it sealed behind its report.
    LateLogDropped,
    /// The log of an attempt that could not begin is not sealed.
    UnbegunUnsealed,
    /// An agent lets go of an attempt when it is given the next one of its task, whether the log is sealed or not.
    UnsealedForgotten,
    /// An agent that is cut off for longer than it may be stops nothing.
    CutOffIgnored,
    /// An agent calls dead what it cannot see.
    ClaimedProof,
    /// An agent offers more memory than its host has.
    InflatedOffer,
    /// No leader ends a quarantine.
    NeverProbed,
    /// A report is taken for the task's present attempt, whichever it is about.
    StaleResult,
    /// Leases are measured by a clock that somebody sets.
    WallClockLease,
    /// A new leader counts silence from before it listened.
    LostAfterFailover,
    /// A leader acts before it has applied what was committed before it led.
    LedBehind,
    /// A worker is lost as soon as its connection breaks.
    LostAtDisconnect,
    /// A submit that is repeated at another leader becomes another build.
    DuplicateSubmit,
    /// A submit under a known id is taken for a retry, whatever it asks for.
    IdAlone,
    /// A cancel is acknowledged from memory, and committed some time later.
    ForgottenCancel,
    /// Room on workers is counted from what this leader itself assigned.
    CapacityFromMemory,
    /// A failure of the user's is counted as ours, and tried again.
    RetriedUserFailure,
    /// A coordinator says that it holds bytes before they are synced.
    HeldBeforeSynced,
    /// Blobs are collected although somebody was promised them.
    CollectedLease,
    /// A blob's copies are counted from the registry, not asked for.
    RepairFromRecord,
    /// A worker that comes back with another life goes on as the one before.
    OldInstanceKept,
    /// A snapshot has rows as they were when the walk came by, not as of its beginning.
    UnsavedImage,
    /// Retention deletes the row of a build that runs.
    PurgedRunning,
    /// Purged ids are forgotten at once.
    ShortTombstone,
    /// A node answers reads from what it happens to have applied.
    StaleRead,
    /// Each attempt builds what its ref means by then.
    UnpinnedSource,
}

impl Bug {
    /// All of them, each with the seeds, from 0 on, within which it must be found.
    pub const ALL: [(Self, u64); 34] = [
        (Self::AckBeforeCommit, 10),
        (Self::AssignBeforeCommit, 40),
        (Self::StoppedBeforeDead, 10),
        (Self::InventedSuccess, 40),
        (Self::RanTwice, 20),
        (Self::OutlivedAssignment, 400),
        (Self::SkippedEntry, 10),
        (Self::ForgottenEffects, 50),
        (Self::LateLogDropped, 10),
        (Self::UnbegunUnsealed, 100),
        (Self::UnsealedForgotten, 40),
        (Self::CutOffIgnored, 100),
        (Self::ClaimedProof, 40),
        (Self::InflatedOffer, 10),
        (Self::NeverProbed, 10),
        (Self::StaleResult, 10),
        (Self::WallClockLease, 10),
        (Self::LostAfterFailover, 10),
        (Self::LedBehind, 40),
        (Self::LostAtDisconnect, 10),
        (Self::DuplicateSubmit, 10),
        (Self::IdAlone, 10),
        (Self::ForgottenCancel, 10),
        (Self::CapacityFromMemory, 40),
        (Self::RetriedUserFailure, 10),
        (Self::HeldBeforeSynced, 10),
        (Self::CollectedLease, 200),
        (Self::RepairFromRecord, 40),
        (Self::OldInstanceKept, 10),
        (Self::UnsavedImage, 20),
        (Self::PurgedRunning, 40),
        (Self::ShortTombstone, 10),
        (Self::StaleRead, 200),
        (Self::UnpinnedSource, 10),
    ];
}
