//! Consensus and storage together: the store suite, crashes, rebuilds, and clusters of three over real TLS.

mod cluster;
mod harness;
mod members;
mod offline;
mod storage;
mod versions;
