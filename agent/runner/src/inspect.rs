//! What an agent that returns finds: whether an attempt's runner lives, ended, or died, and what to do about the last.

use std::fs::File;
use std::io;

use crate::journal::Journal;
use crate::locks;
use crate::outcome::Outcome;
use crate::paths::AttemptDir;

/// Where an attempt stands, by what is in its directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AttemptState {
    /// No runner has taken the order. One may be about to: it can be started again safely, because only the first one
    /// that comes runs the command.
    NotStarted,
    /// A runner lives. Unless whoever started it holds the first connection, it answers on its socket, at once or very soon.
    Running {
        /// The runner's pid.
        pid: u32,
    },
    /// It ended, and no process of it is left.
    Ended(Outcome),
    /// A runner took the order, is gone, and left no result. Processes may be left: see [`crate::sweep`].
    RunnerDied,
}

/// Looks at an attempt's directory. Disturbs nothing.
///
/// # Errors
/// Those of the file system. A result that is damaged counts as none.
pub fn inspect(dir: &AttemptDir) -> io::Result<AttemptState> {
    // Order matters. A runner locks, notes its pid, writes its result, and unlocks by dying; so who noted its pid before
    // the look at the lock and holds none has written what it ever will before the second look for the result.
    let file = match File::open(dir.journal()) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(AttemptState::NotStarted),
        Err(error) => return Err(error),
    };
    let journal = Journal::of(&file)?;
    if let Some(outcome) = result(&journal) {
        return Ok(AttemptState::Ended(outcome));
    }
    if let Some(pid) = locks::holder(&file)? {
        return Ok(AttemptState::Running { pid });
    }
    if !journal.is_taken() {
        return Ok(AttemptState::NotStarted);
    }
    Ok(result(&Journal::of(&file)?).map_or(AttemptState::RunnerDied, AttemptState::Ended))
}

/// One that cannot be understood tells as little as none, and must not keep anybody from clearing up.
fn result(journal: &Journal) -> Option<Outcome> {
    Outcome::of(journal).ok().flatten()
}
