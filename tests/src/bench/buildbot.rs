//! Buildbot as a peer: a master with SQLite and one worker, by the Python packages that its authors publish.
//!
//! Nobody follows: what is timed is how a log arrives where a reader would find it, which is Buildbot at its fastest.

use anyhow::ensure;
use helix_common::ports;
use serde::Deserialize;

use super::python::Package;

const SCRIPT: &str = include_str!("buildbot.py");

/// A Buildbot that works here.
pub(super) struct Buildbot(Package);

#[derive(Deserialize)]
struct Said {
    lines: usize,
    seconds: f64,
}

impl Buildbot {
    /// Finds it, or says how to install it.
    pub(super) fn find() -> Result<Self, String> {
        let ask = "import buildbot, buildbot_worker; print(buildbot.version)";
        let wanted = "'buildbot==4.3.*' 'buildbot-worker==4.3.*' setuptools";
        Package::find("Buildbot", "HELIX_BENCH_BUILDBOT", ask, wanted).map(Self)
    }

    /// What runs here and how.
    pub(super) fn describe(&self) -> String {
        format!("Buildbot {}, a master with SQLite and one worker, no TLS, no reader", self.0.version)
    }

    /// Prints so many lines in a step; million bytes a second, from the first line to the last.
    pub(super) fn log(&self, lines: usize, line: &str) -> anyhow::Result<f64> {
        let directory = tempfile::Builder::new().prefix("helix-bench-buildbot-").tempdir()?;
        let (count, port) = (lines.to_string(), ports::free(2)?.to_string());
        let said: Said = self.0.run(SCRIPT, &[&count, line, &port], directory.path())?;
        ensure!(said.lines >= lines, "{} of {lines} lines are there", said.lines);
        Ok((lines * (line.len() + 1)) as f64 / said.seconds / 1e6)
    }
}
