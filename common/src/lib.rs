//! What every program of the system needs around its core: identity, TLS, connections, gRPC statuses,
//! configuration, telemetry, signals and careful files.
//!
//! Deliberately not here: anything that knows a build, an RPC's message or the registry. Sees `helix-model` only.

pub mod sealed_log;
