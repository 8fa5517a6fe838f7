//! The test's side: arming a point, and seeing who took it.

use std::io;
use std::path::{Path, PathBuf};

use crate::Point;

/// What happens at a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// SIGKILL, sent by the process to itself: no destructor runs, nothing is flushed.
    Kill,
    /// The call fails as one does on a disk that fails (EIO).
    FailedDisk,
    /// The call fails as one does on a disk that is full (ENOSPC).
    FullDisk,
}

/// Every action.
const ACTIONS: [Action; 3] = [Action::Kill, Action::FailedDisk, Action::FullDisk];

impl Action {
    /// Its word in a file.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::FailedDisk => "failed-disk",
            Self::FullDisk => "full-disk",
        }
    }
}

/// What a file of an armed point says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Armed {
    /// What is to happen,
    pub action: Action,
    /// at which passage of one process, counted from 1 since the file is there,
    pub passage: u32,
    /// and which arming this is: what tells two of the same point apart.
    pub serial: u32,
}

impl Armed {
    /// As it stands in a file.
    #[must_use]
    pub fn text(self) -> String {
        format!("{} {} {}", self.action.word(), self.passage, self.serial)
    }

    /// Reads a file.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (action, passage, serial) = (words.next()?, words.next()?, words.next()?);
        let action = ACTIONS.into_iter().find(|known| known.word() == action)?;
        let armed = Self { action, passage: passage.parse().ok()?, serial: serial.parse().ok()? };
        (words.next().is_none() && armed.passage > 0).then_some(armed)
    }
}

/// Between a point's name and the process that took it.
pub(crate) const TAKEN: &str = ".taken.";

/// Arms a point for all processes whose variable names this directory. Of a former arming nothing is left.
///
/// # Errors
/// Those of the file system.
pub fn arm(directory: &Path, point: Point, armed: Armed) -> io::Result<()> {
    disarm(directory, point)?;
    // Renamed, so that nobody reads half of it.
    let next = directory.join(format!(".{}", point.name()));
    std::fs::write(&next, armed.text())?;
    std::fs::rename(next, directory.join(point.name()))
}

/// Takes an arming back, and what tells who took it.
///
/// # Errors
/// Those of the file system.
pub fn disarm(directory: &Path, point: Point) -> io::Result<()> {
    match std::fs::remove_file(directory.join(point.name())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    takers(directory, point)?.into_iter().try_for_each(|(_, path)| std::fs::remove_file(path))
}

/// The process that took a point, once one has.
///
/// # Errors
/// Those of the file system.
pub fn taken(directory: &Path, point: Point) -> io::Result<Option<u32>> {
    Ok(takers(directory, point)?.into_iter().next().map(|(pid, _)| pid))
}

fn takers(directory: &Path, point: Point) -> io::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let pid = name.and_then(|name| name.strip_prefix(point.name())?.strip_prefix(TAKEN)?.parse().ok());
        found.extend(pid.map(|pid| (pid, path)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        for action in ACTIONS {
            let armed = Armed { action, passage: 3, serial: 17 };
            assert_eq!(Armed::parse(&armed.text()), Some(armed));
        }
        for wrong in ["", "kill", "kill 1", "kill 0 1", "kill 1 1 1", "Kill 1 1", "kill one 1", "kill -1 1"] {
            assert_eq!(Armed::parse(wrong), None, "{wrong:?}");
        }
    }
}
