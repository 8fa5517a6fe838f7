//! Consensus: openraft over our log, our store and our network. Nothing outside this folder names openraft, raft-log
//! or sled.
//!
//! The log is the truth: fsynced on a majority before anything is acknowledged. Memory answers; sled is written
//! behind it and can always be rebuilt from a snapshot file and the log.

mod driver;
mod formats;
mod log_check;
mod log_codec;
mod log_store;
mod network;
pub mod offline;
mod proposer;
mod reader;
mod rows;
mod saved;
mod server;
mod snapshot;
mod state_machine;
mod status;
mod store;
mod timing;
mod transfer;
mod types;
mod wire;
mod writer;

pub use driver::{Options, StartError, Started, start};
pub(crate) use proposer::upgrade_pending;
pub use saved::SavedSnapshot;
pub use server::{PeerHandler, RaftHandler};
pub use timing::Timing;
pub use transfer::Transfer;
pub use writer::RenewWhen;

#[cfg(test)]
use driver::open_for_test;
#[cfg(test)]
pub(crate) mod tests;
