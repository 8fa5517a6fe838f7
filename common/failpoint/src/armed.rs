//! The process's side: looking whether a point is armed, taking it, acting. Not in a release.

#![allow(unsafe_code)] // kill: the one system call that the standard library has no name for.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::arming::TAKEN;
use crate::{Action, Armed, Point, VARIABLE};

// The same on all processors that Linux runs on.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Where points are armed; none in a process that was not told of any.
static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Passages counted, by point, of the arming that is in force. Whoever is forked counts on from what its parent had.
static PASSED: Mutex<BTreeMap<&'static str, (u32, u32)>> = Mutex::new(BTreeMap::new());

pub(crate) fn hit(point: Point) -> io::Result<()> {
    due(point, |_| true).map_or(Ok(()), act)
}

fn act(action: Action) -> io::Result<()> {
    match action {
        Action::Kill => die(),
        Action::FailedDisk => Err(io::Error::from_raw_os_error(EIO)),
        Action::FullDisk => Err(io::Error::from_raw_os_error(ENOSPC)),
    }
}

pub(crate) fn pass(point: Point) {
    // An error that nobody can be told of would make the arming pass for one that acted.
    if due(point, |armed| armed.action == Action::Kill).is_some() {
        die();
    }
}

fn due(point: Point, fits: impl FnOnce(&Armed) -> bool) -> Option<Action> {
    let directory = DIRECTORY.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)).as_deref()?;
    take(directory, point, fits)
}

/// Counts a passage; at the one that is armed, takes the arming, which nobody else then can.
fn take(directory: &Path, point: Point, fits: impl FnOnce(&Armed) -> bool) -> Option<Action> {
    let path = directory.join(point.name());
    let armed = Armed::parse(&std::fs::read_to_string(&path).ok()?).filter(fits)?;
    {
        let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
        let (serial, count) = passed.entry(point.name()).or_default();
        if *serial != armed.serial {
            (*serial, *count) = (armed.serial, 0);
        }
        *count += 1;
        if *count < armed.passage {
            return None;
        }
    }
    let taken = directory.join(format!("{}{TAKEN}{}", point.name(), std::process::id()));
    std::fs::rename(path, taken).ok().map(|()| armed.action)
}

fn die() -> ! {
    unsafe extern "C" {
        fn kill(pid: i32, signal: i32) -> i32;
    }
    const SIGKILL: i32 = 9;
    // SAFETY: no memory is touched; the signal cannot be caught, and is sent to this process alone.
    unsafe { kill(std::process::id().cast_signed(), SIGKILL) };
    loop {
        // Whichever thread the signal is delivered to, this one goes no step further.
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{arm, disarm, taken};

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("helix-failpoint-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn passes(directory: &Path, point: Point) -> Option<Action> {
        take(directory, point, |_| true)
    }

    #[test]
    fn an_arming_acts_once_at_its_passage_and_tells_who_took_it() {
        let directory = directory("once");
        let point = Point::SegmentSynced;
        assert_eq!(passes(&directory, point), None);
        for serial in [1, 2] {
            arm(&directory, point, Armed { action: Action::FullDisk, passage: 2, serial }).unwrap();
            assert_eq!(taken(&directory, point).unwrap(), None);
            let acted = [(); 4].map(|()| passes(&directory, point));
            assert_eq!(acted, [None, Some(Action::FullDisk), None, None]);
            assert_eq!(taken(&directory, point).unwrap(), Some(std::process::id()));
            assert_eq!(passes(&directory, Point::SegmentWritten), None, "another point");
        }
        disarm(&directory, point).unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        std::fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn what_cannot_fail_leaves_an_error_that_is_armed_where_it_is() {
        let directory = directory("infallible");
        let point = Point::ReportSend;
        arm(&directory, point, Armed { action: Action::FailedDisk, passage: 1, serial: 1 }).unwrap();
        assert_eq!(take(&directory, point, |armed| armed.action == Action::Kill), None);
        assert_eq!(taken(&directory, point).unwrap(), None);
        disarm(&directory, point).unwrap();
        std::fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn errors_are_those_of_the_disk() {
        assert_eq!(act(Action::FullDisk).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(act(Action::FailedDisk).unwrap_err().to_string().contains("os error 5"));
    }
}
