//! Room on the host's disks: how much is left above the reserve, whether there is enough for new work, and what to do when there
//! is not. Nothing here touches what a running attempt uses.
//!
//! Three marks, from full to empty. Below the *reserve* the agent says so in its heartbeats and runs nothing new. Below one
//! and a half of it things are collected, until twice as much is free.

pub mod collect;
pub mod kept;
pub mod wall;

use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::{Mutex, watch};

use crate::config::DiskConfig;

/// The default reserve: a twentieth of the file system, but no more than this.
const RESERVE_BYTES_DEFAULT_MAX: u64 = 2 << 30;
const RESERVE_INODES_DEFAULT_MAX: u64 = 50_000;
const RESERVE_SHARE: u64 = 20;

/// What a file system has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Room {
    free: u64,
    total: u64,
}

/// Bytes and inodes of the file system that holds a path. One that does not count inodes has none in all.
fn measure(path: &Path) -> io::Result<(Room, Room)> {
    let stat = rustix::fs::statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    if stat.f_blocks == 0 {
        // A file system that counts nothing is bounded by nothing.
        let endless = Room { free: u64::MAX, total: 0 };
        return Ok((endless, endless));
    }
    Ok((
        Room { free: bytes(stat.f_bavail), total: bytes(stat.f_blocks) },
        Room { free: stat.f_favail, total: stat.f_files },
    ))
}

/// How far down the disks are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mark {
    /// Twice the reserve.
    Goal,
    /// One and a half of it.
    Low,
    /// The reserve itself.
    Reserve,
}

/// The disks that builds and the agent write to.
#[derive(Debug)]
pub struct Disks {
    places: Vec<PathBuf>,
    config: DiskConfig,
    pressure: watch::Sender<String>,
    /// Held while things are collected: one collection serves everybody who waits for it.
    collecting: Mutex<()>,
}

impl Disks {
    /// The disks that hold these places.
    #[must_use]
    pub fn new(places: Vec<PathBuf>, config: DiskConfig) -> Self {
        Self { places, config, pressure: watch::Sender::new(String::new()), collecting: Mutex::default() }
    }

    /// What was short when it was last looked at, in words; empty when nothing was.
    #[must_use]
    pub fn pressure(&self) -> String {
        self.pressure.borrow().clone()
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// What is below a mark, in words; empty when nothing is. Blocks.
    #[must_use]
    pub fn short_of(&self, mark: Mark) -> String {
        let (mut bytes_short, mut inodes_short) = (false, false);
        // A disk that does not answer is found out by whoever writes to it.
        for (bytes, inodes) in self.places.iter().filter_map(|place| measure(place).ok()) {
            bytes_short |= bytes.free < at(mark, self.reserve_bytes(bytes));
            inodes_short |= inodes.total > 0 && inodes.free < at(mark, self.reserve_inodes(inodes));
        }
        match (bytes_short, inodes_short) {
            (false, false) => "",
            (true, false) => "disk",
            (false, true) => "inodes",
            (true, true) => "disk inodes",
        }
        .to_owned()
    }

    /// Bytes above the reserve where `path` is. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn bytes_above_reserve(&self, path: &Path) -> io::Result<u64> {
        let (bytes, _) = measure(path)?;
        Ok(bytes.free.saturating_sub(self.reserve_bytes(bytes)))
    }

    /// Whether an attempt that asks for so many bytes below `path` may begin. Blocks.
    ///
    /// # Errors
    /// `StorageFull`, with what is short.
    pub fn admit(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let short = self.short_of(Mark::Reserve);
        if !short.is_empty() {
            let text = format!("this host is short of {short}");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let above = self.bytes_above_reserve(path)?;
        if bytes > above {
            let text = format!("the build asks for {bytes} bytes of disk, and this host has {above} above its reserve");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        Ok(())
    }

    fn reserve_bytes(&self, room: Room) -> u64 {
        self.config.reserve_bytes.unwrap_or_else(|| (room.total / RESERVE_SHARE).min(RESERVE_BYTES_DEFAULT_MAX))
    }

    fn reserve_inodes(&self, room: Room) -> u64 {
        self.config.reserve_inodes.unwrap_or_else(|| (room.total / RESERVE_SHARE).min(RESERVE_INODES_DEFAULT_MAX))
    }
}

fn at(mark: Mark, reserve: u64) -> u64 {
    match mark {
        Mark::Reserve => reserve,
        Mark::Low => reserve.saturating_add(reserve / 2),
        Mark::Goal => reserve.saturating_mul(2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(reserve_bytes: Option<u64>, reserve_inodes: Option<u64>) -> Disks {
        let config = DiskConfig { reserve_bytes, reserve_inodes, ..DiskConfig::default() };
        Disks::new(vec![std::env::temp_dir()], config)
    }

    #[test]
    fn what_is_below_its_mark_is_named() {
        assert_eq!(disks(Some(0), Some(0)).short_of(Mark::Goal), "");
        assert_eq!(disks(Some(u64::MAX), Some(0)).short_of(Mark::Reserve), "disk");
        assert_eq!(disks(Some(0), Some(u64::MAX)).short_of(Mark::Reserve), "inodes");
        assert_eq!(disks(Some(u64::MAX), Some(u64::MAX)).short_of(Mark::Reserve), "disk inodes");
        let free = measure(&std::env::temp_dir()).unwrap().0.free;
        let between = disks(Some(free / 4 * 3), Some(0));
        assert_eq!((between.short_of(Mark::Reserve), between.short_of(Mark::Goal)), (String::new(), "disk".to_owned()));
    }

    #[test]
    fn who_asks_for_more_than_there_is_does_not_begin() {
        let here = std::env::temp_dir();
        assert!(disks(Some(0), Some(0)).admit(&here, 1).is_ok());
        for (disks, bytes) in [(disks(Some(0), Some(0)), u64::MAX), (disks(Some(u64::MAX), Some(0)), 0)] {
            assert_eq!(disks.admit(&here, bytes).unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }
}
