//! HyperQueue as a peer: a server and one worker, by the Python package that its authors publish.
//!
//! The package runs both in one process and offers no journal, so what it acknowledges does not survive it: this is the peer at
//! its fastest. Each turn is a process of its own, whose processor time is all that the turn cost.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::machine::version;
use super::no_op::Turn;

const SCRIPT: &str = include_str!("hyperqueue.py");

/// Where the package is, unless Python finds it anyway.
const PLACE: &str = "HELIX_BENCH_HYPERQUEUE";

/// A HyperQueue that works here.
pub(super) struct HyperQueue {
    place: Option<PathBuf>,
    version: String,
}

#[derive(Deserialize)]
struct Said {
    finished: usize,
    seconds: f64,
    cpu_seconds: f64,
}

impl HyperQueue {
    /// Finds it, or says how to install it.
    pub(super) fn find() -> Result<Self, String> {
        let place = std::env::var_os(PLACE).map(PathBuf::from);
        let mut found = Self { place, version: String::new() };
        let mut python = found.python();
        python.args(["-c", "import hyperqueue.ffi.client as f; print(f.ffi.get_hq_version())"]);
        found.version = version(&mut python).ok_or_else(|| {
            format!("HyperQueue is absent: pip install --target DIR 'hyperqueue==0.27.*', and {PLACE}=DIR")
        })?;
        Ok(found)
    }

    /// What runs here and how.
    pub(super) fn describe(&self) -> String {
        format!("HyperQueue {}, server and one worker by its Python package, without a journal", self.version)
    }

    /// Runs so many times `/bin/true` as one job, from submit until all have finished.
    pub(super) fn run(&self, count: usize, slots: u32) -> anyhow::Result<Turn> {
        let directory = tempfile::Builder::new().prefix("helix-bench-hq-").tempdir()?;
        let mut python = self.python();
        python.args(["-c", SCRIPT, &count.to_string(), &slots.to_string()]).current_dir(directory.path());
        let output = python.output().context("python3 does not start")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "HyperQueue: {}: {errors}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        let said: Said = serde_json::from_str(last).with_context(|| format!("HyperQueue said {text:?}: {errors}"))?;
        ensure!(said.finished == count, "{} of {count} finished", said.finished);
        let all = count as f64;
        Ok(Turn { rate: all / said.seconds, cpu_ms: said.cpu_seconds * 1000.0 / all })
    }

    fn python(&self) -> Command {
        let mut python = Command::new("python3");
        python.stdin(Stdio::null());
        if let Some(place) = &self.place {
            python.env("PYTHONPATH", place);
        }
        python
    }
}
