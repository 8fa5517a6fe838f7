//! What every program of the system needs around its core: identity, TLS, connections, gRPC statuses,
//! configuration, telemetry, signals, careful files, and the form of sealed logs.
//!
//! Deliberately not here: anything that knows a build, an RPC's message or the registry. Sees `helix-model` only.

pub mod accept;
pub mod auth;
pub mod backoff;
pub mod backup;
pub mod channel;
pub mod config;
pub mod endpoints;
pub mod files;
pub mod identity;
pub mod pki;
pub mod ports;
pub mod removal;
pub mod sealed_log;
pub mod sha256;
pub mod shutdown;
pub mod status;
pub mod telemetry;
pub mod tls;
pub mod wall;
