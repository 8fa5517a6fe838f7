//! Happenings in words, as the trace and `--explain` have them.

use helix_core::command::{Command, FinishAttempt, Outcome};
use helix_core::{Rejection, Reply};
use helix_model::{BuildId, Death, Digest};

use super::client::{Answered, Op, Stage};
use super::host::Fate;

/// A command and what came of it.
pub(super) fn told(command: &Command, reply: &Reply) -> String {
    let what = match command {
        Command::SubmitBuild(c) => format!("submit {} for {}", c.build, c.submitted_by),
        Command::CancelBuild(c) => format!("cancel {}", c.build),
        Command::AssignTask(c) => format!("assign {} to {} (instance {})", c.key, c.worker, c.instance),
        Command::PinSource(c) => format!("{} builds commit {}, says {}", c.key, c.commit, c.worker),
        Command::RecordImage(c) => format!("{} pushed its image, says {}", c.key, c.worker),
        Command::FinishAttempt(c) => finish(c),
        Command::SealLog(c) => format!("the log of {} is stored, says {}", c.key, c.worker),
        Command::ExpireAttempt(c) => format!("ask {} to stop: {}", c.key, c.reason),
        Command::EndUnverified(c) => format!("give up on a proof that {} is dead", c.key),
        Command::ReleaseHold(c) => format!("{} is dead after all, proves {}", c.key, c.worker),
        Command::RegisterWorker(c) => {
            format!("{} introduces itself as {}, with room for {}", c.worker, c.instance, c.offer.capacity)
        }
        Command::DetachWorker(c) => format!("{} goes for an upgrade", c.worker),
        Command::LoseWorker(c) => format!("{} is lost", c.worker),
        Command::DrainWorker(c) => format!("drain {}", c.worker),
        Command::UndrainWorker(c) => format!("undrain {}", c.worker),
        Command::RemoveWorker(c) => format!("remove {}", c.worker),
        Command::ProbeWorker(c) => format!("try {} with one attempt", c.worker),
        Command::RegisterArtifact(c) => format!("register an artifact of {}", c.build),
        Command::PurgeBuilds(c) => format!("purge {}", ids(&c.builds)),
        Command::ExpireBytes(c) => format!("let go of {} of {}", c.kept.as_str(), ids(&c.builds)),
        Command::ExpireTombstones(c) => format!("forget that there ever were {}", ids(&c.builds)),
        Command::PinBuild(c) => format!("keep {} from being purged", c.build),
        Command::SetPolicy(_) => "set the policy".to_owned(),
        Command::RegisterNode(c) => format!("node {} makes itself known", c.node),
        Command::RetireNode(c) => format!("node {} is retired", c.node),
    };
    match answer(reply) {
        Some(answer) => format!("{what}: {answer}"),
        None => what,
    }
}

fn finish(c: &FinishAttempt) -> String {
    let how = match &c.outcome {
        Outcome::Succeeded { .. } => "succeeded".to_owned(),
        Outcome::Failed { reason, message } => format!("failed as {reason} ({message})"),
        Outcome::Stopped => "was stopped".to_owned(),
    };
    let death = if c.death == Death::Unproven { ", and may live on" } else { "" };
    let log = c.log.as_ref().map(|log| log.blob.holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    let stored = log.map_or_else(String::new, |nodes| format!(", its bytes on nodes {nodes}"));
    format!("{} {how}{death}{stored}, says {} (instance {})", c.key, c.worker, c.instance)
}

fn ids(builds: &[BuildId]) -> String {
    builds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What a reply adds to the command; `None` where it was simply done.
fn answer(reply: &Reply) -> Option<String> {
    Some(match reply {
        Reply::Done => return None,
        Reply::Unchanged => "it was so already".to_owned(),
        Reply::Submitted => "a new build".to_owned(),
        Reply::SameBuild => "the same build as before".to_owned(),
        Reply::SamePurged(state) => format!("the same build as before, which is {state} and purged"),
        Reply::SourcePinned(commit) => format!("the build is of {commit}"),
        Reply::Purged(count) => format!("{count} are gone"),
        Reply::Rejected(rejection) => format!("refused, {}", refusal(rejection)),
    })
}

fn refusal(rejection: &Rejection) -> String {
    match rejection {
        Rejection::StaleAttempt { current, .. } => format!("attempt {current} has its place"),
        Rejection::AttemptEnded(_) => "it has ended".to_owned(),
        Rejection::TooFewHolders { what, holders, needed } => {
            format!("{holders} coordinators hold its {what} instead of {needed}")
        }
        other => format!("{other:?}"),
    }
}

/// What a client asks for.
pub(super) fn wanted(op: &Op) -> String {
    match op {
        Op::Submit(id, _) => format!("submit {id}"),
        Op::Steal(id) => format!("submit something else as {id}"),
        Op::Cancel(id) => format!("cancel {id}"),
        Op::Pin(id) => format!("keep {id}"),
        Op::Look(id) => format!("look at {id}"),
    }
}

/// What a client is told.
pub(super) fn answered(answered: &Answered) -> String {
    match answered {
        Answered::Reply(reply) => answer(reply).unwrap_or_else(|| "done".to_owned()),
        Answered::Seen(stage) => stage_word(*stage),
    }
}

/// How far a build is.
pub(super) fn stage_word(stage: Stage) -> String {
    match stage {
        Stage::Absent => "there is none".to_owned(),
        Stage::There => "it is there".to_owned(),
        Stage::Ended(state) => format!("it is {state}"),
    }
}

/// What a process is going to do.
pub(super) fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Succeeds => "will succeed",
        Fate::Fails => "will fail",
        Fate::Breaks => "will fill the host's disk",
        Fate::Hangs => "will hang",
    }
}

/// Enough of a digest to tell it apart.
pub(super) fn short(digest: &Digest) -> String {
    format!("blob {}", digest.to_string().chars().take(12).collect::<String>())
}
