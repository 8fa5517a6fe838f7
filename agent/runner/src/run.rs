//! A runner's life: take the order, run it, prove the death of all of it, write the result.
//!
//! Every way out after the order was taken leaves a result, unless the disk takes none.

mod attempt;
mod clock;
mod command;
mod connections;
mod fork;
mod isolated;
mod lines;
mod mask;
mod setup;
mod tree;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use helix_model::Room;
use helix_runner::journal::{self, Journal, JournalWriter};
use helix_runner::pids::Notes;
use helix_runner::processes::Process;
use helix_runner::{AttemptDir, End, LogTotals, MemoryKill, OUTCOME_BYTES_MAX, Order, Outcome};

use attempt::Attempt;
use clock::Clock;
use connections::Connections;

/// How often and how long writing the result is tried: a disk that is full for longer makes the agent find out alone.
const RESULT_TRIES: u32 = 600;
const RESULT_RETRY: Duration = Duration::from_millis(100);

/// Room in the journal for what is still to be noted: the command, and the result.
const RESERVED_BYTES: u32 = OUTCOME_BYTES_MAX as u32 + 512;

/// What standard input is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Input {
    /// Nothing of ours.
    Nothing,
    /// The first connection.
    Connection,
}

/// Runs the attempt in this directory.
pub(crate) fn run(dir: &Path, input: Input) -> ExitCode {
    let clock = Clock::start();
    match take(dir, input) {
        Ok(Some(mut taken)) => {
            let (outcome, connections) =
                perform(&mut taken, clock).unwrap_or_else(|error| (not_started(clock, &error), None));
            let code = finish(&mut taken.writer, &outcome);
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

/// What makes this process the attempt's runner. The lock is held as long as the journal is open.
struct Taken {
    dir: AttemptDir,
    journal: Journal,
    writer: JournalWriter,
    connection: Option<UnixStream>,
}

/// Takes the order, if nobody did before.
fn take(path: &Path, input: Input) -> io::Result<Option<Taken>> {
    setup::own_process()?;
    let connection = if input == Input::Connection { Some(setup::connection_from_input()?) } else { None };
    // From here on all names are relative, however long the path, and stay right if the directory is moved.
    std::env::set_current_dir(path)?;
    let dir = AttemptDir::new(".");
    // Who has the lock and finds no notes is the first. A runner that dies before its first note has done nothing.
    let Some((mut writer, journal)) = journal::take(&dir)? else { return Ok(None) };
    if journal.is_taken() || !journal.is_ordered() {
        return Ok(None);
    }
    let own = Process::read(std::process::id()).ok_or(io::ErrorKind::NotFound)?;
    Notes::write_runner(&mut writer, own.id)?;
    Ok(Some(Taken { dir, journal, writer, connection }))
}

/// Does what is ordered. An error is one from before the command was started.
fn perform(taken: &mut Taken, clock: Clock) -> io::Result<(Outcome, Option<Connections>)> {
    taken.writer.reserve(RESERVED_BYTES)?;
    let order = Order::of(&taken.journal)?;
    let mut attempt = Attempt::prepare(&taken.dir, order, clock, taken.connection.take())?;
    if attempt.start(&mut taken.writer) {
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
        room: Room::Host,
        leftovers_killed: 0,
        memory_kill: MemoryKill::NotSeen,
        log: LogTotals::default(),
    }
}

fn finish(journal: &mut JournalWriter, outcome: &Outcome) -> ExitCode {
    for _ in 0..RESULT_TRIES {
        match outcome.write(journal) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(_) => std::thread::sleep(RESULT_RETRY),
        }
    }
    ExitCode::FAILURE
}
