//! How long to wait for a leader before standing for election: long enough that a slow disk is no dead leader.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Consensus's clockwork.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Between heartbeats.
    pub heartbeat: Duration,
    /// Least wait without a leader before an election; also bounds a leader's lease.
    pub election_min: Duration,
    /// Most wait.
    pub election_max: Duration,
}

const HEARTBEAT: Duration = Duration::from_millis(30);
const ELECTION_LEAST: Duration = Duration::from_millis(80);
/// An election waits for ten times the slowest fsync, and no longer than for one of this: a fail-over that took longer would be worse than a
/// leader that changes for nothing.
pub(super) const FSYNC_MOST: Duration = Duration::from_millis(200);
const ALONE_LEAST: Duration = Duration::from_secs(1);
const PROBES: usize = 200;
const PROBE_TIME_MAX: Duration = Duration::from_secs(1);

impl Timing {
    /// Timing for a disk whose slowest fsync took so long.
    #[must_use]
    pub fn for_fsync(slowest: Duration) -> Self {
        let election_min = (slowest.min(FSYNC_MOST) * 10).max(ELECTION_LEAST);
        Self { heartbeat: HEARTBEAT, election_min, election_max: election_min * 15 / 8 }
    }

    /// A leader that no majority has answered for so long stands down. By then the others have elected another, if they are well; and
    /// agents still have half of a worker's lease to find that one, or more. Not sooner: a majority whose disks are slow answers late.
    #[must_use]
    pub fn alone_max(&self, worker_lease: Duration) -> Duration {
        (self.election_max * 2).max(worker_lease / 3).max(ALONE_LEAST).min(worker_lease / 2)
    }
}

/// The slowest of some two hundred fsyncs in a directory. Blocks for up to a second.
///
/// # Errors
/// When the directory cannot be written.
pub(super) fn slowest_fsync(directory: &Path) -> io::Result<Duration> {
    let path = directory.join("fsync.probe");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    for _ in 0..PROBES {
        file.write_all(&[0; 4096])?;
        let probe = Instant::now();
        file.sync_data()?;
        slowest = slowest.max(probe.elapsed());
        if began.elapsed() > PROBE_TIME_MAX {
            break;
        }
    }
    drop(file);
    std::fs::remove_file(path)?;
    Ok(slowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_disk_waits_longer_and_bounds_hold() {
        let ms = Duration::from_millis;
        assert_eq!(Timing::for_fsync(ms(1)).election_min, ms(80));
        assert_eq!(Timing::for_fsync(ms(20)).election_min, ms(200));
        assert_eq!(Timing::for_fsync(ms(150)).election_min, ms(1_500));
        assert_eq!(Timing::for_fsync(FSYNC_MOST).election_min, FSYNC_MOST * 10);
        assert_eq!(Timing::for_fsync(ms(2_000)).election_min, FSYNC_MOST * 10);
        assert_eq!(Timing::for_fsync(ms(1)).election_max, ms(150));
        assert_eq!(Timing::for_fsync(ms(1)).alone_max(ms(15_000)), ms(5_000));
        assert_eq!(Timing::for_fsync(FSYNC_MOST).alone_max(ms(30_000)), ms(10_000));
        assert_eq!(Timing::for_fsync(FSYNC_MOST).alone_max(ms(10_000)), ms(5_000));
        assert_eq!(Timing::for_fsync(ms(1)).alone_max(ms(2_400)), ms(1_000));
    }
}
