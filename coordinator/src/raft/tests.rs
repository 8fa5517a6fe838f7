//! Consensus and storage together.
