//! What an agent and its runners share: the order, the log spool, the control messages, the result, and what can be
//! found out about an attempt from its directory. The program `helix-runner` beside it does what is ordered.
//!
//! # How an agent uses it
//!
//! 1. Make the attempt's directory, mode 0700 ([`AttemptDir`]). Write own lines with [`SpoolWriter`], if any; drop it.
//! 2. [`Order::write`], then [`Forker::start_runner`]. Only the first runner that comes to a directory runs the command;
//!    starting one again after a doubt is safe.
//! 3. Over the connection that came of that, or by [`control::connect`] once it is gone (retry shortly), send [`control::Request::Watch`], and
//!    on every [`control::Event::Grew`] read with [`SpoolReader::next_record`] and [`Growth::Open`] until `None`.
//! 4. To end it early, send [`control::Request::Stop`].
//! 5. When the connection closes, ask [`inspect`]. `Ended`: the result is there and no process is left; add last
//!    words with [`SpoolWriter`] and read to the end with [`Growth::Ended`]. `RunnerDied`: [`sweep`], which says whether
//!    death is proven.
//! 6. An agent that returns does 3 to 5 for every directory that it finds. A runner needs no agent.
//!
//! # What a runner promises
//!
//! The command sees descriptors 0, 1 and 2, the ordered environment, a session of its own, and nothing else of ours.
//! Whatever it starts is a descendant of the runner, and the runner ends only when the kernel says that none is left.
//! Limits are enforced with or without an agent. The output is kept as it was, each line once and numbered, within a
//! bound on disk and in memory. Processes that the command leaves behind are killed after [`Order::leftover_ms`].
//!
//! Not here: TLS, tokio, sources, artifacts, what a result means for a build.

pub mod cgroup;
pub mod codec;
pub mod control;
pub mod disk;
pub mod forker;
mod inspect;
pub mod isolation;
pub mod journal;
pub mod limits;
pub mod locks;
mod order;
mod outcome;
mod paths;
pub mod pids;
pub mod processes;
mod spool;
pub mod step;
mod sweep;

pub use codec::FormatError;
pub use forker::Forker;
pub use inspect::{AttemptState, inspect};
pub use order::{Order, Privileges, User};
pub use outcome::{End, LogTotals, MemoryKill, OUTCOME_BYTES_MAX, Outcome};
pub use paths::AttemptDir;
pub use spool::{Growth, LOG_BYTES_MIN, Position, Record, SpoolError, SpoolReader, SpoolWriter, Stream};
pub use sweep::{Sweep, sweep};
