//! The configuration's tables about what builds may take of the host.

use serde::{Deserialize, Serialize};

use super::{ConfigWrong, wrong};

/// See `Config::limits`. 0 means none, except where it is said otherwise.
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Thousandths of a processor for builds that ask for none, and at most.
    pub cpu_milli: u64,
    /// See above.
    pub cpu_milli_max: u64,
    /// Bytes of memory, swap included, for builds that ask for none, and at most.
    pub memory_bytes: u64,
    /// See above.
    pub memory_bytes_max: u64,
    /// Bytes of disk for builds that ask for none (0: what is free above the reserve when it starts), and at most.
    pub disk_bytes: u64,
    /// See above.
    pub disk_bytes_max: u64,
    /// How those bytes are limited: `quota`, `loop`, `tmpfs`, `watch`; `auto` is the first of quota, loop, watch that works.
    pub disk: String,
    /// Files and directories in a build's workdir.
    pub files: u64,
    /// Processes and threads of a build.
    pub processes: u64,
    /// Open files of each process.
    pub open_files: u64,
}

/// See `Config::disk`.
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// Bytes that stay free: with less, nothing new is run. By default a twentieth of the file system, 2 GiB at most.
    pub reserve_bytes: Option<u64>,
    /// As above, in inodes; by default a twentieth, 50,000 at most.
    pub reserve_inodes: Option<u64>,
    /// Workdirs of failed builds that are kept, at most; the oldest go first.
    pub kept_max: usize,
    /// For how long one is kept, at most, whatever the build asks for.
    pub kept_ms_max: u64,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self { reserve_bytes: None, reserve_inodes: None, kept_max: 16, kept_ms_max: 7 * 24 * 3600 * 1000 }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            cpu_milli: 0,
            cpu_milli_max: 0,
            memory_bytes: 0,
            memory_bytes_max: 0,
            disk_bytes: 0,
            disk_bytes_max: 0,
            disk: "auto".to_owned(),
            files: 0,
            // Enough for a large build on a large host; a fork bomb ends there.
            processes: 4096,
            open_files: 65_536,
        }
    }
}

impl LimitsConfig {
    pub(super) fn check(&self) -> Result<(), ConfigWrong> {
        for (key, default, most) in [
            ("limits.cpu_milli", self.cpu_milli, self.cpu_milli_max),
            ("limits.memory_bytes", self.memory_bytes, self.memory_bytes_max),
            ("limits.disk_bytes", self.disk_bytes, self.disk_bytes_max),
        ] {
            if most > 0 && default > most {
                return wrong(key, format!("{default} is more than {key}_max, which is {most}"));
            }
        }
        if !crate::disk::wall::is_known(&self.disk) {
            return wrong("limits.disk", format!("{:?} is none of auto, quota, loop, tmpfs, watch", self.disk));
        }
        if (1..16).contains(&self.processes) {
            return wrong("limits.processes", "is at least 16: a shell alone needs some; 0 means no limit");
        }
        if (1..16).contains(&self.open_files) {
            return wrong("limits.open_files", "is at least 16; 0 means no limit");
        }
        if (1..1 << 20).contains(&self.memory_bytes) {
            return wrong("limits.memory_bytes", "is less than a mebibyte; it is in bytes, and 0 means no limit");
        }
        Ok(())
    }
}
