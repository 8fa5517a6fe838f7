//! What an agent and the leader tell each other, as far as decisions depend on it.

use std::sync::Arc;

use helix_model::{AttemptKey, BuildSpec, Death, Digest, NodeId, Platform, Reason, Room};

/// An attempt to run.
#[derive(Clone, PartialEq, Debug)]
pub struct Assignment {
    /// The attempt.
    pub key: AttemptKey,
    /// What the client submitted.
    pub spec: BuildSpec,
    /// The commit to build; `None`: resolve the ref, report it, and wait.
    pub commit: Option<String>,
    /// The task's platform; `None` for any.
    pub platform: Option<Platform>,
    /// How the attempt before ended, for people; empty for the first.
    pub previous: String,
}

/// Bytes that coordinators hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blob {
    /// Their sha256.
    pub digest: Digest,
    /// How many.
    pub size: u64,
    /// Who holds them, fsynced.
    pub holders: Vec<NodeId>,
}

/// An output, stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Artifact {
    /// Its path in the workdir.
    pub name: String,
    /// Its bytes.
    pub blob: Blob,
}

/// An image that a podman build made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// Its manifest's digest, as a registry tells it.
    pub digest: Digest,
    /// Bytes of its layers, unpacked.
    pub size: u64,
    /// Its configuration's digest: podman's image id.
    pub id: Digest,
    /// Its manifest's bytes; 0 where the manifest is a registry's alone.
    pub manifest_size: u64,
    /// Its manifest's media type.
    pub media_type: String,
}

/// The image of one platform of a build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlatformImage {
    /// The platform.
    pub platform: Platform,
    /// Its manifest's digest.
    pub digest: Digest,
}

/// A log, sealed and stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedLog {
    /// The sealed file.
    pub blob: Blob,
    /// Lines in it.
    pub lines: u64,
}

/// How an attempt ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All that was promised is stored.
    Succeeded {
        /// The content-addressed tag; empty without outputs.
        image_tag: String,
    },
    /// It did not succeed.
    Failed {
        /// Why.
        reason: Reason,
        /// One line for people.
        message: String,
    },
    /// It was stopped because the registry asked.
    Stopped,
}

/// All that is said about an attempt's end. A success has its log; another's may follow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// How it ended.
    pub verdict: Verdict,
    /// The command's exit code, if it exited.
    pub exit_code: Option<i32>,
    /// The signal that ended the command, if one did.
    pub signal: Option<i32>,
    /// What it made; the first is the result.
    pub artifacts: Vec<Artifact>,
    /// Its log.
    pub log: Option<SealedLog>,
    /// Whether its processes were seen dead; always so for a success.
    pub death: Death,
    /// Whose disk was full, of a `disk_full`.
    pub room: Room,
    /// The image, of a podman build that succeeded.
    pub image: Option<Image>,
    /// The digest of the index that names the images of all platforms, where this attempt pushed one.
    pub index: Option<Digest>,
}

impl Report {
    /// The end of an attempt that made nothing, whose processes are dead.
    #[must_use]
    pub fn bare(verdict: Verdict) -> Self {
        Self {
            verdict,
            exit_code: None,
            signal: None,
            artifacts: Vec::new(),
            log: None,
            death: Death::Proven,
            room: Room::Host,
            image: None,
            index: None,
        }
    }
}

/// What an agent says on its session.
#[derive(Clone, PartialEq, Debug)]
pub enum Message {
    /// A ref was resolved; nothing runs before the commit comes back.
    SourceResolved {
        /// The attempt.
        key: AttemptKey,
        /// The full commit.
        commit: String,
    },
    /// An attempt's image of one platform of several is at its registry; the attempt goes on when it is known who pushes
    /// the index of all.
    ImagePushed {
        /// The attempt.
        key: AttemptKey,
        /// What was pushed.
        image: Image,
    },
    /// An attempt ended.
    Finished {
        /// The attempt.
        key: AttemptKey,
        /// How.
        report: Arc<Report>,
    },
    /// The log of an attempt whose end was reported without it.
    LogSealed {
        /// The attempt.
        key: AttemptKey,
        /// The log.
        log: SealedLog,
    },
    /// Nothing of the attempt lives here.
    ProvenDead {
        /// The attempt.
        key: AttemptKey,
    },
    /// The agent goes for an upgrade; its runners go on.
    Detaching,
    /// The agent takes no more work.
    Leaving,
}
