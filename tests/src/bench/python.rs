//! Peers that are Python packages: found by asking Python, driven by a script that prints what came of it as JSON in its last line.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde::de::DeserializeOwned;

use super::machine::version;

/// Packages that Python can load.
pub(super) struct Package {
    name: &'static str,
    /// Where they are, unless Python finds them anyway.
    place: Option<PathBuf>,
    /// Their version.
    pub(super) version: String,
}

impl Package {
    /// Finds them: in the directory that the variable `place` names, or where Python looks. `ask` prints their version; `wanted`
    /// is what pip is to install if they are not there.
    pub(super) fn find(name: &'static str, place: &str, ask: &str, wanted: &str) -> Result<Self, String> {
        let mut found = Self { name, place: std::env::var_os(place).map(PathBuf::from), version: String::new() };
        let mut python = found.python();
        python.args(["-c", ask]);
        found.version = version(&mut python)
            .ok_or_else(|| format!("{name} is absent: pip install --target DIR {wanted}, and {place}=DIR"))?;
        Ok(found)
    }

    /// Runs a script in a directory, to its end.
    pub(super) fn run<T: DeserializeOwned>(&self, script: &str, arguments: &[&str], here: &Path) -> anyhow::Result<T> {
        let mut python = self.python();
        let output = python.args(["-c", script]).args(arguments).current_dir(here).output();
        let output = output.context("python3 does not start")?;
        let (name, errors) = (self.name, String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{name}: {}: {errors}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("{name} said {text:?}: {errors}"))
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
