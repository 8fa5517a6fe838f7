//! Buildbot as a peer: a master with SQLite and one worker, by the Python packages that its authors publish.
//!
//! Nobody follows: what is timed is how a log arrives where a reader would find it, which is Buildbot at its fastest.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use helix_common::ports;
use serde::Deserialize;

use super::machine::version;

const SCRIPT: &str = include_str!("buildbot.py");

/// Where the packages are, unless Python finds them anyway.
const PLACE: &str = "HELIX_BENCH_BUILDBOT";

/// A Buildbot that works here.
pub(super) struct Buildbot {
    place: Option<PathBuf>,
    version: String,
}

#[derive(Deserialize)]
struct Said {
    lines: usize,
    seconds: f64,
}

impl Buildbot {
    /// Finds it, or says how to install it.
    pub(super) fn find() -> Result<Self, String> {
        let mut found = Self { place: std::env::var_os(PLACE).map(PathBuf::from), version: String::new() };
        let mut python = found.python();
        python.args(["-c", "import buildbot, buildbot_worker; print(buildbot.version)"]);
        found.version = version(&mut python).ok_or_else(|| {
            format!(
                "Buildbot is absent: pip install --target DIR 'buildbot==4.3.*' 'buildbot-worker==4.3.*' setuptools, and {PLACE}=DIR"
            )
        })?;
        Ok(found)
    }

    /// What runs here and how.
    pub(super) fn describe(&self) -> String {
        format!("Buildbot {}, a master with SQLite and one worker, no TLS, no reader", self.version)
    }

    /// Prints so many lines in a step; million bytes a second, from the first line to the last.
    pub(super) fn log(&self, lines: usize, line: &str) -> anyhow::Result<f64> {
        let directory = tempfile::Builder::new().prefix("helix-bench-buildbot-").tempdir()?;
        let mut python = self.python();
        let (count, port) = (lines.to_string(), ports::free(2)?.to_string());
        python.args(["-c", SCRIPT, &count, line, &port]).current_dir(directory.path());
        let output = python.output().context("python3 does not start")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "Buildbot: {}: {errors}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        let said: Said = serde_json::from_str(last).with_context(|| format!("Buildbot said {text:?}: {errors}"))?;
        ensure!(said.lines >= lines, "{} of {lines} lines are there", said.lines);
        Ok((lines * (line.len() + 1)) as f64 / said.seconds / 1e6)
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
