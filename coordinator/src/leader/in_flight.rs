//! Book-keeping of proposals under way: what a command concerns is entered when it is proposed and left when its fate is known.

use helix_core::{Command, InFlight};

/// Marks what `command` concerns as under way. Only commands that the leader itself proposes are kept.
pub(crate) fn enter(in_flight: &mut InFlight, command: &Command) {
    match command {
        Command::AssignTask(assign) => {
            in_flight.assigning.insert((assign.key.build.clone(), assign.key.task), assign.worker.clone());
        }
        Command::ExpireAttempt(expire) => {
            in_flight.attempts.insert(expire.key.clone());
        }
        Command::EndUnverified(end) => {
            in_flight.attempts.insert(end.key.clone());
        }
        Command::LoseWorker(lose) => {
            in_flight.workers.insert(lose.worker.clone());
        }
        Command::ProbeWorker(probe) => {
            in_flight.workers.insert(probe.worker.clone());
        }
        Command::PurgeBuilds(purge) => in_flight.purging.extend(purge.builds.iter().cloned()),
        Command::ExpireBytes(expire) => {
            in_flight.letting_go.extend(expire.builds.iter().map(|build| (build.clone(), expire.kept)));
        }
        Command::ExpireTombstones(expire) => in_flight.expiring.extend(expire.builds.iter().cloned()),
        _ => {}
    }
}

/// Forgets that `command` is under way: it was applied, refused, or nobody knows, and then the state tells.
pub(crate) fn leave(in_flight: &mut InFlight, command: &Command) {
    match command {
        Command::AssignTask(assign) => {
            in_flight.assigning.remove(&(assign.key.build.clone(), assign.key.task));
        }
        Command::ExpireAttempt(expire) => {
            in_flight.attempts.remove(&expire.key);
        }
        Command::EndUnverified(end) => {
            in_flight.attempts.remove(&end.key);
        }
        Command::LoseWorker(lose) => {
            in_flight.workers.remove(&lose.worker);
        }
        Command::ProbeWorker(probe) => {
            in_flight.workers.remove(&probe.worker);
        }
        Command::PurgeBuilds(purge) => {
            for build in &purge.builds {
                in_flight.purging.remove(build);
            }
        }
        Command::ExpireBytes(expire) => {
            for build in &expire.builds {
                in_flight.letting_go.remove(&(build.clone(), expire.kept));
            }
        }
        Command::ExpireTombstones(expire) => {
            for build in &expire.builds {
                in_flight.expiring.remove(build);
            }
        }
        _ => {}
    }
}
