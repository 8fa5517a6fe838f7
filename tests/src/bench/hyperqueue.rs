//! HyperQueue as a peer: a server and one worker, by the Python package that its authors publish.
//!
//! The package runs both in one process and offers no journal, so what it acknowledges does not survive it: this is the peer at
//! its fastest. Each turn is a process of its own, whose processor time is all that the turn cost.

use anyhow::ensure;
use serde::Deserialize;

use super::no_op::Turn;
use super::python::Package;

const SCRIPT: &str = include_str!("hyperqueue.py");

/// A HyperQueue that works here.
pub(super) struct HyperQueue(Package);

#[derive(Deserialize)]
struct Said {
    finished: usize,
    seconds: f64,
    cpu_seconds: f64,
}

impl HyperQueue {
    /// Finds it, or says how to install it.
    pub(super) fn find() -> Result<Self, String> {
        let ask = "import hyperqueue.ffi.client as f; print(f.ffi.get_hq_version())";
        Package::find("HyperQueue", "HELIX_BENCH_HYPERQUEUE", ask, "'hyperqueue==0.27.*'").map(Self)
    }

    /// What runs here and how.
    pub(super) fn describe(&self) -> String {
        format!("HyperQueue {}, server and one worker by its Python package, without a journal", self.0.version)
    }

    /// Runs so many times `/bin/true` as one job, from submit until all have finished.
    pub(super) fn run(&self, count: usize, slots: u32) -> anyhow::Result<Turn> {
        let directory = tempfile::Builder::new().prefix("helix-bench-hq-").tempdir()?;
        let said: Said = self.0.run(SCRIPT, &[&count.to_string(), &slots.to_string()], directory.path())?;
        ensure!(said.finished == count, "{} of {count} finished", said.finished);
        let all = count as f64;
        Ok(Turn { rate: all / said.seconds, cpu_ms: said.cpu_seconds * 1000.0 / all })
    }
}
