//! The agent: the process on a build host that talks to the cluster and runs what it is given.
//!
//! `helix-agent-core` decides; `helix-runner` owns builds' processes; here are the session, sources, workdirs, uploads and
//! the loop that ties them together. Deliberately not here: anything about scheduling or the registry.
//! Invariant: nothing a build does, and no coordinator that is silent, keeps the heartbeat from going out.

pub mod agent;
pub mod allowed;
pub mod attempt;
mod blocking;
pub mod config;
pub mod control;
pub mod data_dir;
pub mod disk;
pub mod executor;
pub mod host;
pub mod isolation;
pub mod limits;
mod output;
pub mod policy;
pub mod program;
pub mod secrets;
pub mod services;
pub mod session;
pub mod settings;
pub mod source;
pub mod starter;
pub mod stores;
pub mod wire;

#[cfg(test)]
mod testing;
