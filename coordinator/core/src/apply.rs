//! Carrying out commands: the only way the registry changes.
//!
//! `apply` is total. Stale, repeated or absurd input is a rejection and changes nothing; the same command twice is harmless.
//! Each command has its function, named after it, in the file of its name or of its group.

use std::collections::BTreeSet;

use helix_model::{AttemptKey, AttemptNumber, BuildId, Instance, LogTime, NodeId, WorkerName};

use crate::command::{Authority, Command};
use crate::record::{Applied, BlobRef};
use crate::reply::{Rejection, Reply};
use crate::state::{Known, State};

mod artifact;
mod assign_task;
mod cancel_build;
mod ending;
mod expire;
mod finish_attempt;
mod hold;
mod leave;
mod node;
mod pin;
mod policy;
mod purge;
mod record_image;
mod register_worker;
mod seal_log;
mod submit_build;
mod trust;

pub(crate) use expire::deadline;
pub(crate) use record_image::{check_indexing, settle_index};

impl State {
    /// Carries out one command at log time `at`, which never runs backwards: an earlier `at` counts as the last one.
    ///
    /// Rows and effects are appended to `out`. The counters' row is left to [`State::finish_entry`].
    pub fn apply(&mut self, at: LogTime, command: &Command, out: &mut Applied) -> Reply {
        let at = self.advance(at);
        let outcome = match command {
            Command::SubmitBuild(c) => submit_build::submit_build(self, at, c, out),
            Command::CancelBuild(c) => cancel_build::cancel_build(self, at, c, out),
            Command::AssignTask(c) => assign_task::assign_task(self, at, c, out),
            Command::PinSource(c) => pin::pin_source(self, c, out),
            Command::RecordImage(c) => record_image::record_image(self, c, out),
            Command::FinishAttempt(c) => finish_attempt::finish_attempt(self, at, c, out),
            Command::SealLog(c) => seal_log::seal_log(self, c, out),
            Command::ExpireAttempt(c) => expire::expire_attempt(self, at, c, out),
            Command::EndUnverified(c) => expire::end_unverified(self, at, c, out),
            Command::ReleaseHold(c) => hold::release_hold(self, c, out),
            Command::RegisterWorker(c) => register_worker::register_worker(self, at, c, out),
            Command::DetachWorker(c) => leave::detach_worker(self, at, c, out),
            Command::LoseWorker(c) => leave::lose_worker(self, at, c, out),
            Command::DrainWorker(c) => hold::drain_worker(self, c, out),
            Command::UndrainWorker(c) => hold::undrain_worker(self, c, out),
            Command::RemoveWorker(c) => leave::remove_worker(self, at, c, out),
            Command::ProbeWorker(c) => trust::probe_worker(self, at, c, out),
            Command::RegisterArtifact(c) => artifact::register_artifact(self, c, out),
            Command::PurgeBuilds(c) => purge::purge_builds(self, at, c, out),
            Command::ExpireBytes(c) => purge::expire_bytes(self, at, c, out),
            Command::ExpireTombstones(c) => purge::expire_tombstones(self, at, c, out),
            Command::PinBuild(c) => pin::pin_build(self, c, out),
            Command::SetPolicy(c) => policy::set_policy(self, c, out),
            Command::RegisterNode(c) => node::register_node(self, c, out),
            Command::RetireNode(c) => node::retire_node(self, at, c, out),
        };
        outcome.unwrap_or_else(Reply::Rejected)
    }

    /// Takes in the cluster's voters by a membership entry of the log.
    pub fn apply_membership(&mut self, voters: BTreeSet<NodeId>, out: &mut Applied) {
        if voters != *self.voters() {
            self.set_voters(voters);
            out.effects.push(crate::effect::Effect::NodeChanged);
        }
    }
}

/// What a command's function answers; `Err` means that nothing changed.
type Outcome = Result<Reply, Rejection>;

/// Why a build cannot be found among the open ones.
fn not_open(state: &State, id: &BuildId) -> Rejection {
    match state.build(id) {
        Some(Known::Purged(_)) => Rejection::BuildPurged(id.clone()),
        Some(Known::Open(_) | Known::Finished(_)) | None => Rejection::BuildUnknown(id.clone()),
    }
}

/// Whether a report is the current attempt's, by the worker and the life that were given it.
fn check_current(state: &State, key: &AttemptKey, worker: &WorkerName, instance: &Instance) -> Result<(), Rejection> {
    if state.finished.contains_key(&key.build) {
        return Err(Rejection::AttemptEnded(key.clone()));
    }
    let Some(build) = state.open.get(&key.build) else { return Err(not_open(state, &key.build)) };
    let Some(task) = build.task(key.task) else { return Err(Rejection::TaskUnknown(key.clone())) };
    let stale = |current| Err(Rejection::StaleAttempt { key: key.clone(), current });
    let Some(attempt) = task.attempts.last() else { return stale(AttemptNumber(0)) };
    if attempt.number != key.attempt || attempt.worker != *worker || attempt.instance != *instance {
        return stale(attempt.number);
    }
    if attempt.end.is_some() {
        return Err(Rejection::AttemptEnded(key.clone()));
    }
    Ok(())
}

fn check_authority(id: &BuildId, owner: &str, authority: &Authority) -> Result<(), Rejection> {
    match authority {
        Authority::Any(_) => Ok(()),
        Authority::Owner(name) if name == owner => Ok(()),
        Authority::Owner(_) => Err(Rejection::NotOwner { build: id.clone(), owner: owner.to_owned() }),
    }
}

/// Whether as many voters hold the bytes as policy demands, or all voters, if they are fewer. Before any
/// membership is known, whoever holds them counts, and one is enough.
fn check_holders(state: &State, what: &str, blob: &BlobRef) -> Result<(), Rejection> {
    let voters = state.voters();
    let holders = blob.holders.iter().filter(|node| voters.is_empty() || voters.contains(node)).count();
    let holders = u32::try_from(holders).unwrap_or(u32::MAX);
    let needed = state.policy.copies_of(voters.len());
    if holders < needed {
        return Err(Rejection::TooFewHolders { what: what.to_owned(), holders, needed });
    }
    Ok(())
}
