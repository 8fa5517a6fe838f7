//! What a figure was measured on: processor, kernel, file system, programs, and how busy it was with other things.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::programs;

/// How long others are watched.
const LOOK: Duration = Duration::from_secs(1);

/// A machine just before a measurement.
#[derive(Clone, Debug)]
pub struct Machine {
    cpu: String,
    cores: usize,
    memory: String,
    kernel: String,
    file_system: String,
    date: String,
    /// How much of all cores others used while we did nothing, 0 to 1.
    used: f64,
    helix: String,
}

impl Machine {
    /// Looks at it now.
    #[must_use]
    pub fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let line = |text: &str, name: &str| {
            let found = text.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(':'));
            found.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
        };
        Self {
            cpu: line(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: line(&read("/proc/meminfo"), "MemTotal"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            file_system: file_system(&std::env::temp_dir(), &read("/proc/self/mountinfo")),
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            used: used(),
            helix: version(Command::new(programs().join("helix")).arg("--version")).unwrap_or_default(),
        }
    }

    /// Says so if others had much of it: then ratios may still mean something, figures do not.
    #[must_use]
    pub fn busy(&self) -> Option<String> {
        let busy = self.used > 0.1;
        busy.then(|| format!("the machine was busy: just before, others used {:.0} % of all cores", self.used * 100.0))
    }

    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{}, {} cores, {}, Linux {}, {}, {}, {}",
            self.cpu, self.cores, self.memory, self.kernel, self.file_system, self.date, self.helix
        )
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "cpu": self.cpu, "cores": self.cores, "memory": self.memory, "kernel": self.kernel, "helix": self.helix,
            "file_system": self.file_system, "date": self.date, "used_by_others_before": self.used, "busy": self.busy(),
        })
    }
}

/// The share of all cores that is used by whoever else is there.
fn used() -> f64 {
    let now = || {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let first = text.lines().next().unwrap_or_default();
        let ticks: Vec<f64> = first.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        // Idle and waiting for a disk; what guests used is counted as the user's already.
        (ticks.iter().take(8).sum::<f64>(), ticks.iter().skip(3).take(2).sum::<f64>())
    };
    let (all, idle) = now();
    std::thread::sleep(LOOK);
    let (all, idle) = {
        let (later, later_idle) = now();
        (later - all, later_idle - idle)
    };
    if all > 0.0 { 1.0 - idle / all } else { 0.0 }
}

/// The first line a program says of its version.
#[must_use]
pub fn version(command: &mut Command) -> Option<String> {
    let said = command.output().ok().filter(|said| said.status.success())?;
    String::from_utf8_lossy(&said.stdout).lines().next().map(|line| line.trim().to_owned())
}

/// The kind of file system that a directory is on.
fn file_system(directory: &Path, mounts: &str) -> String {
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let (place, kind) = (place.split_whitespace().nth(4)?, kind.split_whitespace().next()?);
        directory.starts_with(place).then(|| (place.len(), kind.to_owned()))
    };
    // Of two mounted upon the same place the later one is seen.
    mounts.lines().filter_map(mount).max_by_key(|(length, _)| *length).map_or("unknown".to_owned(), |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_on_the_mount_nearest_to_it() {
        let mounts =
            "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / /tmp rw shared:1 - tmpfs tmpfs rw\n3 1 0:3 / /t rw - xfs x";
        assert_eq!(file_system(Path::new("/tmp/x"), mounts), "tmpfs");
        assert_eq!(file_system(Path::new("/home"), mounts), "ext4");
        assert_eq!(file_system(Path::new("/home"), ""), "unknown");
    }
}
