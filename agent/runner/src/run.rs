//! A runner's life: take the order, run it, prove the death of all of it, write the result.
//!
//! Every way out after the order was taken leaves a result, unless the disk takes none.

mod attempt;
mod clock;
mod command;
mod connections;
mod disk;
mod fork;
mod isolated;
mod lines;
mod setup;
mod tree;

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use helix_runner::pids::{PidFile, boot_id};
use helix_runner::processes::Process;
use helix_runner::{AttemptDir, End, LogTotals, MemoryKill, Order, Outcome, locks};

use attempt::Attempt;
use clock::Clock;
use connections::Connections;

/// How often and how long writing the result is tried: a disk that is full for longer makes the agent find out alone.
const RESULT_TRIES: u32 = 600;
const RESULT_RETRY: Duration = Duration::from_millis(100);

/// Runs the attempt in this directory.
pub(crate) fn run(dir: &Path) -> ExitCode {
    let clock = Clock::start();
    match take(dir) {
        Ok(Some(taken)) => {
            let (outcome, connections) =
                perform(&taken, clock).unwrap_or_else(|error| (not_started(clock, &error), None));
            let code = finish(&taken, &outcome);
            // Only now: to whoever is connected, the end of the connection says that the result is there.
            drop(connections);
            code
        }
        // Another runner has it, or had it: what it did stands.
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("helix-runner: {}: {error}", dir.display());
            ExitCode::FAILURE
        }
    }
}

/// What makes this process the attempt's runner. The lock is held as long as the notes are open.
struct Taken {
    dir: AttemptDir,
    notes: File,
}

/// Takes the order, if nobody did before.
fn take(path: &Path) -> io::Result<Option<Taken>> {
    setup::own_process()?;
    // From here on all names are relative, however long the path, and stay right if the directory is moved.
    std::env::set_current_dir(path)?;
    let dir = AttemptDir::new(".");
    let mut options = OpenOptions::new();
    let mut notes = options.append(true).create(true).mode(0o600).open(dir.pid())?;
    // Who has the lock and finds no notes is the first. A runner that dies before its first note has done nothing.
    if !locks::take(&notes)? || notes.metadata()?.len() > 0 {
        return Ok(None);
    }
    let own = Process::read(std::process::id()).ok_or(io::ErrorKind::NotFound)?;
    notes.write_all(PidFile::runner_line(own.id, &boot_id()?).as_bytes())?;
    Ok(Some(Taken { dir, notes }))
}

/// Does what is ordered. An error is one from before the command was started.
fn perform(taken: &Taken, clock: Clock) -> io::Result<(Outcome, Option<Connections>)> {
    setup::reserve_result(&taken.dir)?;
    let order = Order::read(&taken.dir)?;
    let mut attempt = Attempt::prepare(&taken.dir, order, clock)?;
    if attempt.start(&taken.notes) {
        attempt.work();
    }
    let (outcome, connections) = attempt.end();
    Ok((outcome, Some(connections)))
}

fn not_started(clock: Clock, error: &io::Error) -> Outcome {
    Outcome {
        started_at_ms: clock.started_at_ms(),
        ended_at_ms: clock.now_ms(),
        end: End::NotStarted { errno: error.raw_os_error().unwrap_or(0), error: error.to_string() },
        stopped: None,
        leftovers_killed: 0,
        memory_kill: MemoryKill::NotSeen,
        log: LogTotals::default(),
    }
}

fn finish(taken: &Taken, outcome: &Outcome) -> ExitCode {
    for _ in 0..RESULT_TRIES {
        match outcome.write(&taken.dir) {
            Ok(()) => return ExitCode::SUCCESS,
            // The directory was removed: nobody wants to know.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return ExitCode::FAILURE,
            Err(_) => std::thread::sleep(RESULT_RETRY),
        }
    }
    ExitCode::FAILURE
}
