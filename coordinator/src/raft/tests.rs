//! Consensus and storage together: the store suite, crashes, rebuilds, letting go, and clusters of three over real TLS.

mod cluster;
mod crash;
pub(crate) mod harness;
mod letting_go;
mod members;
mod offline;
mod renewal;
mod storage;
mod versions;
