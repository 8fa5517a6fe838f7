//! The agent core told as stories: events, and exactly the commands that must follow.

use super::*;
use crate::attempt::RESEND_MS;
use crate::message::{Blob, Image, PlatformImage, Verdict};
use helix_model::{AttemptNumber, BuildId, BuildSpec, Digest, NodeId, Platform, Reason, TaskIndex};

const FIRST: SessionNumber = SessionNumber(1);

fn key(attempt: u32) -> AttemptKey {
    AttemptKey { build: BuildId::new("b").unwrap(), task: TaskIndex(0), attempt: AttemptNumber(attempt) }
}

fn assignment(attempt: u32) -> Box<Assignment> {
    let (spec, previous) = (BuildSpec::default(), String::new());
    Box::new(Assignment { key: key(attempt), spec, commit: None, platform: None, previous })
}

fn failed() -> Report {
    let verdict = Verdict::Failed { reason: Reason::Exit, message: "exit code 1".to_owned() };
    Report { exit_code: Some(1), ..Report::bare(verdict) }
}

fn log(holder: u64) -> SealedLog {
    SealedLog { blob: Blob { digest: Digest([1; 32]), size: 5, holders: vec![NodeId(holder)] }, lines: 2 }
}

fn finished(attempt: u32, report: Report) -> Command {
    Command::Send(Message::Finished { key: key(attempt), report: Arc::new(report) })
}

/// Runs a story: each event with exactly the commands that must follow.
struct Story {
    agent: Agent,
    now_ms: u64,
}

impl Story {
    /// An agent with a session.
    fn connected() -> Self {
        Self::alone().then(Event::SessionOpened(FIRST), &[])
    }

    fn alone() -> Self {
        Self { agent: Agent::default(), now_ms: 0 }
    }

    fn then(mut self, event: Event, expected: &[Command]) -> Self {
        let mut out = Vec::new();
        let described = format!("{event:?}");
        self.agent.on(self.now_ms, event, &mut out);
        assert_eq!(out, expected, "after {described}");
        self
    }

    fn said(self, order: Order, expected: &[Command]) -> Self {
        self.then(Event::Said(FIRST, order), expected)
    }

    fn assigned(self, attempt: u32) -> Self {
        self.said(Order::Assign(assignment(attempt)), &[Command::Start(assignment(attempt))])
    }

    fn ended(self, attempt: u32) -> Self {
        let ended = Event::AttemptEnded(key(attempt), Box::new(failed()));
        self.then(ended, &[finished(attempt, failed())])
    }

    fn later(mut self, ms: u64) -> Self {
        self.now_ms += ms;
        self
    }
}

#[test]
fn a_build_with_a_ref_waits_for_its_commit_and_reports_until_forgotten() {
    let resolved = Command::Send(Message::SourceResolved { key: key(1), commit: "c1".to_owned() });
    Story::connected()
        .assigned(1)
        .then(Event::SourceResolved(key(1), "c1".to_owned()), std::slice::from_ref(&resolved))
        .then(Event::Ticked, &[])
        .later(RESEND_MS)
        .then(Event::Ticked, &[resolved])
        .said(Order::Commit(key(1), "c2".to_owned()), &[Command::GiveCommit(key(1), "c2".to_owned())])
        .said(Order::Commit(key(1), "c3".to_owned()), &[])
        .then(Event::CommandStarted(key(1)), &[])
        .ended(1)
        .later(RESEND_MS - 1)
        .then(Event::Ticked, &[])
        .later(1)
        .then(Event::Ticked, &[finished(1, failed())])
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .said(Order::Forget(key(1)), &[])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[])
        .said(Order::Forget(key(1)), &[]);
}

#[test]
fn a_pushed_image_is_reported_until_it_is_known_who_pushes_the_index() {
    let (digest, id) = (Digest([2; 32]), Digest([3; 32]));
    let image = Image { digest, size: 4, id, manifest_size: 0, media_type: String::new() };
    let pushed = Command::Send(Message::ImagePushed { key: key(1), image: image.clone() });
    let images = vec![PlatformImage { platform: Platform::new("linux/amd64").unwrap(), digest }];
    let given = |images: &[PlatformImage]| Command::GiveImages(key(1), images.to_vec());
    Story::connected()
        .assigned(1)
        // Before there can be an image there is nothing to say of it.
        .then(Event::ImagePushed(key(1), image.clone()), &[])
        .said(Order::Images(key(1), images.clone()), &[])
        .then(Event::CommandStarted(key(1)), &[])
        .then(Event::CommandEnded(key(1)), &[])
        .then(Event::ImagePushed(key(1), image.clone()), std::slice::from_ref(&pushed))
        .later(RESEND_MS - 1)
        .then(Event::Ticked, &[])
        .later(1)
        .then(Event::Ticked, std::slice::from_ref(&pushed))
        .then(Event::SessionClosed(FIRST), &[])
        .then(Event::SessionOpened(SessionNumber(2)), std::slice::from_ref(&pushed))
        .said(Order::Images(key(1), images.clone()), &[])
        .then(Event::Said(SessionNumber(2), Order::Images(key(1), images.clone())), &[given(&images)])
        .then(Event::Said(SessionNumber(2), Order::Images(key(1), Vec::new())), &[])
        .later(RESEND_MS)
        .then(Event::Ticked, &[])
        .ended(1);
    // A stop ends the wait; an agent that begins again pushes again, and says so again.
    let stop = Command::Stop(key(1), StopCause::Registry(Reason::Cancelled));
    Story::alone()
        .then(Event::AttemptFound(key(1), Found::Started), &[Command::Resume(key(1))])
        .then(Event::SessionOpened(FIRST), &[])
        .then(Event::CommandEnded(key(1)), &[])
        .then(Event::ImagePushed(key(1), image), &[pushed])
        .said(Order::Stop(key(1), Reason::Cancelled), &[stop])
        .said(Order::Images(key(1), Vec::new()), &[given(&[])])
        .ended(1);
}

#[test]
fn a_late_log_follows_the_report_and_is_repeated_with_it() {
    let sealed = Command::Send(Message::LogSealed { key: key(1), log: log(1) });
    Story::connected()
        .assigned(1)
        .ended(1)
        .then(Event::LogSealed(key(1), log(1)), &[finished(1, failed()), sealed.clone()])
        .then(Event::SessionClosed(FIRST), &[])
        .then(Event::SessionOpened(SessionNumber(2)), &[finished(1, failed()), sealed]);
}

#[test]
fn an_assignment_repeated_starts_nothing_twice() {
    Story::connected()
        .assigned(1)
        .said(Order::Assign(assignment(1)), &[])
        .ended(1)
        .said(Order::Assign(assignment(1)), &[finished(1, failed())]);
}

#[test]
fn a_later_attempt_stops_an_earlier_one_that_still_runs_and_never_the_other_way() {
    let stop = Command::Stop(key(1), StopCause::Registry(Reason::WorkerLost));
    let stopped = Report { verdict: Verdict::Stopped, ..failed() };
    Story::connected()
        .assigned(1)
        .said(Order::Assign(assignment(2)), &[stop, Command::Start(assignment(2))])
        .said(Order::Assign(assignment(1)), &[])
        .then(Event::AttemptEnded(key(1), Box::new(stopped.clone())), &[finished(1, stopped)])
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[])
        .said(Order::Assign(assignment(1)), &[]);
}

#[test]
fn a_log_that_is_not_sealed_yet_outlives_the_next_attempt() {
    let sealed = Command::Send(Message::LogSealed { key: key(1), log: log(1) });
    Story::connected()
        .assigned(1)
        .ended(1)
        .assigned(2)
        .then(Event::LogSealed(key(1), log(1)), &[finished(1, failed()), sealed])
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))]);
}

#[test]
fn a_stop_is_passed_on_once_and_answered_by_the_report() {
    let cause = StopCause::Registry(Reason::Cancelled);
    let stopped = Report { verdict: Verdict::Stopped, ..failed() };
    Story::connected()
        .assigned(1)
        .said(Order::Stop(key(1), Reason::Cancelled), &[Command::Stop(key(1), cause)])
        .said(Order::Stop(key(1), Reason::Timeout), &[])
        .then(Event::AttemptEnded(key(1), Box::new(stopped.clone())), &[finished(1, stopped.clone())])
        .said(Order::Stop(key(1), Reason::Cancelled), &[finished(1, stopped)]);
}

#[test]
fn a_stop_of_what_is_not_here_is_proof_and_of_what_goes_is_proof_when_gone() {
    let proof = Command::Send(Message::ProvenDead { key: key(1) });
    Story::connected()
        .said(Order::Stop(key(1), Reason::Cancelled), std::slice::from_ref(&proof))
        .assigned(1)
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .said(Order::Stop(key(1), Reason::Cancelled), &[])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[proof]);
    Story::connected()
        .assigned(1)
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[]);
}

#[test]
fn what_is_assigned_again_while_it_goes_is_told_to_be_gone() {
    let proof = Command::Send(Message::ProvenDead { key: key(1) });
    Story::connected()
        .assigned(1)
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .said(Order::Assign(assignment(1)), &[])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[proof]);
}

#[test]
fn what_was_removed_without_proof_is_never_called_dead() {
    let report = Report { death: Death::Unproven, ..Report::bare(Verdict::Stopped) };
    let said = Command::Send(Message::Finished { key: key(1), report: Arc::new(report) });
    Story::connected()
        .assigned(1)
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .said(Order::Stop(key(1), Reason::Cancelled), &[])
        .then(Event::AttemptRemoved(key(1), Death::Unproven), std::slice::from_ref(&said))
        .said(Order::Stop(key(1), Reason::Cancelled), &[said]);
}

#[test]
fn silence_of_the_cluster_stops_nothing_and_reports_wait() {
    Story::connected()
        .assigned(1)
        .then(Event::SessionClosed(FIRST), &[])
        .then(Event::CommandStarted(key(1)), &[])
        .later(3_600_000)
        .then(Event::Ticked, &[])
        .then(Event::AttemptEnded(key(1), Box::new(failed())), &[])
        .then(Event::SessionOpened(SessionNumber(2)), &[finished(1, failed())]);
}

/// An agent with an attempt that may be cut off for a minute, and is from now on.
fn cut_off() -> Story {
    Story::connected()
        .then(Event::CutOffLimitSet(60_000), &[])
        .assigned(1)
        .later(3_600_000)
        .then(Event::Ticked, &[])
        .then(Event::SessionClosed(FIRST), &[])
}

fn cut_off_stop(attempt: u32, limit_ms: u64) -> Command {
    Command::Stop(key(attempt), StopCause::CutOff { limit_ms })
}

#[test]
fn an_agent_that_is_cut_off_for_too_long_stops_what_it_has_and_reports_later() {
    let report = Report::bare(Verdict::Failed { reason: Reason::Drained, message: "cut off".to_owned() });
    cut_off()
        .then(Event::CommandStarted(key(1)), &[])
        .later(59_999)
        .then(Event::Ticked, &[])
        .later(1)
        .then(Event::Ticked, &[cut_off_stop(1, 60_000)])
        .then(Event::Ticked, &[])
        .then(Event::AttemptEnded(key(1), Box::new(report.clone())), &[])
        .later(60_000)
        .then(Event::Ticked, &[])
        .then(Event::SessionOpened(SessionNumber(2)), &[finished(1, report)])
        // The next attempt is none of those that nobody could stop.
        .then(Event::Said(SessionNumber(2), Order::Assign(assignment(2))), &[Command::Start(assignment(2))])
        .then(Event::Ticked, &[]);
}

#[test]
fn what_had_not_begun_when_the_agent_was_cut_off_is_stopped_too_and_what_has_ended_is_not() {
    let other = AttemptKey { task: TaskIndex(1), ..key(1) };
    let ended = Event::AttemptFound(other, Found::Reported(Box::new(failed())));
    let resolved = Event::SourceResolved(key(1), "c".to_owned());
    let mut story = cut_off();
    story.agent.on(story.now_ms, ended, &mut Vec::new());
    story.then(resolved, &[]).later(60_000).then(Event::Ticked, &[cut_off_stop(1, 60_000)]);
}

#[test]
fn a_session_in_time_begins_the_count_anew() {
    cut_off()
        .later(59_999)
        .then(Event::SessionOpened(SessionNumber(2)), &[])
        .later(60_000)
        .then(Event::Ticked, &[])
        // Of a session that was over already.
        .then(Event::SessionClosed(FIRST), &[])
        .then(Event::Ticked, &[])
        .then(Event::SessionClosed(SessionNumber(2)), &[])
        .later(59_999)
        .then(Event::Ticked, &[])
        .later(1)
        .then(Event::Ticked, &[cut_off_stop(1, 60_000)]);
}

#[test]
fn an_agent_that_starts_counts_from_its_start() {
    Story::alone()
        .later(1_000_000)
        .then(Event::CutOffLimitSet(60_000), &[])
        .then(Event::AttemptFound(key(1), Found::Started), &[Command::Resume(key(1))])
        .then(Event::Ticked, &[])
        .later(59_999)
        .then(Event::Ticked, &[])
        .later(1)
        .then(Event::Ticked, &[cut_off_stop(1, 60_000)]);
}

#[test]
fn another_limit_counts_at_once_and_none_stops_nothing() {
    cut_off()
        .later(59_999)
        .then(Event::CutOffLimitSet(0), &[])
        .later(3_600_000)
        .then(Event::Ticked, &[])
        .then(Event::CutOffLimitSet(30_000), &[])
        .then(Event::Ticked, &[cut_off_stop(1, 30_000)]);
}

#[test]
fn an_agent_that_goes_for_an_upgrade_while_it_is_cut_off_stops_nothing() {
    cut_off()
        .later(59_999)
        .then(Event::DetachAsked, &[])
        .later(1)
        .then(Event::Ticked, &[])
        .then(Event::DetachTimedOut, &[Command::Exit(ExitKind::DetachedUnheard)]);
}

#[test]
fn a_closed_session_has_no_say() {
    Story::connected()
        .then(Event::SessionOpened(SessionNumber(2)), &[])
        .then(Event::SessionClosed(FIRST), &[])
        .then(Event::Said(FIRST, Order::Assign(assignment(1))), &[])
        .then(Event::Said(SessionNumber(2), Order::Assign(assignment(1))), &[Command::Start(assignment(1))]);
}

#[test]
fn what_is_found_at_start_goes_on_and_is_offered() {
    let story = Story::alone()
        .then(Event::AttemptFound(key(1), Found::Started), &[Command::Resume(key(1))])
        .then(Event::AttemptFound(key(2), Found::Reported(Box::new(failed()))), &[Command::Resume(key(2))])
        .then(Event::SessionOpened(FIRST), &[finished(2, failed())]);
    let offered: Vec<_> = story.agent.offered().map(|(key, ended)| (key.clone(), ended)).collect();
    assert_eq!(offered, [(key(1), false), (key(2), true)]);
}

#[test]
fn bytes_are_stored_again_once_at_a_time() {
    let held = |holder| Report {
        log: Some(log(holder)),
        verdict: Verdict::Succeeded { image_tag: String::new() },
        ..failed()
    };
    let again = Command::StoreAgain(key(1), Arc::new(held(1)));
    Story::connected()
        .assigned(1)
        .said(Order::StoreAgain(key(1)), &[])
        .then(Event::AttemptEnded(key(1), Box::new(held(1))), &[finished(1, held(1))])
        .said(Order::StoreAgain(key(1)), &[again])
        .said(Order::StoreAgain(key(1)), &[])
        .later(RESEND_MS)
        .then(Event::Ticked, &[])
        .then(Event::StoredAgain(key(1), Box::new(held(2))), &[finished(1, held(2))]);
}

#[test]
fn a_late_log_is_stored_again_as_a_late_log() {
    let sealed = |holder| Command::Send(Message::LogSealed { key: key(1), log: log(holder) });
    let whole = |holder| Report { log: Some(log(holder)), ..failed() };
    let story = Story::connected()
        .assigned(1)
        .ended(1)
        .then(Event::LogSealed(key(1), log(1)), &[finished(1, failed()), sealed(1)])
        .said(Order::StoreAgain(key(1)), &[Command::StoreAgain(key(1), Arc::new(whole(1)))])
        .then(Event::StoredAgain(key(1), Box::new(whole(2))), &[finished(1, failed()), sealed(2)]);
    story
        .said(Order::StoreAgain(key(1)), &[Command::StoreAgain(key(1), Arc::new(whole(2)))])
        .then(Event::StoredAgain(key(1), Box::new(failed())), &[finished(1, failed()), sealed(2)]);
    // The log is sealed while something else is being stored.
    Story::connected()
        .assigned(1)
        .ended(1)
        .said(Order::StoreAgain(key(1)), &[Command::StoreAgain(key(1), Arc::new(failed()))])
        .then(Event::LogSealed(key(1), log(1)), &[])
        .then(Event::StoredAgain(key(1), Box::new(failed())), &[finished(1, failed()), sealed(1)]);
}

#[test]
fn an_agent_that_leaves_finishes_first() {
    let leaving = || Command::Send(Message::Leaving);
    Story::connected().then(Event::DrainAsked, &[leaving(), Command::Exit(ExitKind::Done)]);
    Story::connected()
        .assigned(1)
        .then(Event::DrainAsked, &[leaving()])
        .then(Event::DrainAsked, &[])
        .ended(1)
        .said(Order::Forget(key(1)), &[Command::Remove(key(1))])
        .then(Event::AttemptRemoved(key(1), Death::Proven), &[Command::Exit(ExitKind::Done)])
        .then(Event::Ticked, &[]);
}

#[test]
fn an_agent_that_must_go_now_stops_everything_and_waits_a_while() {
    let stop = |attempt| Command::Stop(key(attempt), StopCause::Drained);
    Story::connected()
        .assigned(1)
        .then(Event::DrainAsked, &[Command::Send(Message::Leaving)])
        .then(Event::StopAllAsked, &[stop(1)])
        .then(Event::StopAllAsked, &[])
        .said(Order::Stop(key(1), Reason::Cancelled), &[])
        .said(Order::Assign(assignment(2)), &[Command::Start(assignment(2)), stop(2)])
        .then(Event::StopAllTimedOut, &[Command::Exit(ExitKind::Done)])
        .then(Event::StopAllTimedOut, &[]);
}

#[test]
fn a_detach_waits_for_the_leader_but_not_for_ever_and_stops_nothing() {
    let detaching = || Command::Send(Message::Detaching);
    Story::connected()
        .assigned(1)
        .said(Order::DetachAck, &[])
        .then(Event::DetachAsked, &[detaching()])
        .said(Order::DetachAck, &[Command::Exit(ExitKind::Detached)]);
    Story::alone()
        .then(Event::DetachAsked, &[])
        .then(Event::SessionOpened(FIRST), &[detaching()])
        .then(Event::DetachTimedOut, &[Command::Exit(ExitKind::DetachedUnheard)]);
    Story::connected().then(Event::DetachTimedOut, &[]).then(Event::StopAllTimedOut, &[]);
}

#[test]
fn late_facts_about_attempts_that_are_gone_change_nothing() {
    let late = [
        Event::SourceResolved(key(1), "c".to_owned()),
        Event::CommandStarted(key(1)),
        Event::CommandEnded(key(1)),
        Event::AttemptEnded(key(1), Box::new(failed())),
        Event::LogSealed(key(1), log(1)),
        Event::StoredAgain(key(1), Box::new(failed())),
        Event::AttemptRemoved(key(1), Death::Proven),
        Event::Said(FIRST, Order::Commit(key(1), "c".to_owned())),
        Event::Said(FIRST, Order::StoreAgain(key(1))),
    ];
    late.into_iter().fold(Story::connected(), |story, event| story.then(event, &[]));
}

#[test]
fn phases_have_their_words() {
    let mut attempt = Attempt::new(Phase::Building);
    assert_eq!(attempt.phase_word(), "building");
    attempt.stop = Some(StopCause::Drained);
    assert_eq!(attempt.phase_word(), "cancelling");
}
