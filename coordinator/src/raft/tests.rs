//! Consensus and storage together: the store suite, crashes, rebuilds, letting go, proposals in pieces, snapshots on their way, copied directories, and clusters of three over real TLS.

mod cluster;
mod copies;
mod crash;
pub(crate) mod harness;
mod letting_go;
mod link;
mod members;
mod offline;
mod proposals;
mod renewal;
mod snapshots;
mod storage;
mod versions;
