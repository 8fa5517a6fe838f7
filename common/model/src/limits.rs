//! Named limits that hold everywhere, with their reasons. Limits that may differ between clusters are
//! replicated policy (see the coordinator's core), not constants.

/// A spec's canonical bytes, at most: Raft entries stay small, so that heartbeats are never behind them.
pub const SPEC_BYTES_MAX: usize = 64 * 1024;

/// Rows a single command may touch: bounds the time `apply` holds everybody up.
pub const ROWS_PER_COMMAND_MAX: usize = 256;

/// Ids in one purge or retention proposal; under [`ROWS_PER_COMMAND_MAX`] with room for what hangs on them.
pub const PURGE_IDS_MAX: usize = 200;

/// Concurrent attempts of one worker: losing it changes a row for each, in one command.
pub const WORKER_CAPACITY_MAX: u32 = 250;

/// Attempts of one task, whatever its budgets say: a build's record stays bounded.
pub const ATTEMPTS_PER_TASK_MAX: usize = 100;

/// Artifacts that clients may register for one build.
pub const REGISTERED_ARTIFACTS_MAX: usize = 256;

/// Tasks of a build, one per platform.
pub const TASKS_PER_BUILD_MAX: usize = 16;

/// Outputs a build may name.
pub const OUTPUTS_MAX: usize = 64;

/// Entries in one of a spec's maps (build args, environment, labels, requirements).
pub const MAP_ENTRIES_MAX: usize = 256;

/// A label's or requirement's key or value, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;

/// Blobs up to this many bytes share segment files, so that one fsync covers many.
pub const SMALL_BLOB_BYTES_MAX: u64 = 64 * 1024;

/// A log line longer than this many bytes is split, each part with its own number.
pub const LOG_LINE_BYTES_MAX: usize = 64 * 1024;

/// A gRPC message, at most; larger things are streamed in chunks.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes in a chunk of a blob or log stream.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// The default output of an exec build, relative to its workdir.
pub const OUTPUT_NAME_DEFAULT: &str = "artifact.out";

/// A secret has at least so many bytes: shorter ones are everywhere in a log, and cannot be masked.
pub const SECRET_BYTES_MIN: usize = 4;

/// A secret has at most so many bytes: what masks it needs a few dozen times as many.
pub const SECRET_BYTES_MAX: usize = 64 * 1024;
