//! `helix-runner`: owns one attempt's processes and output.
fn main() {}
