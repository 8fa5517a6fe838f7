//! What each command does when nothing stands in its way, and twice.

use std::collections::BTreeSet;

use helix_core::command::{self as cmd, Command, Outcome};
use helix_core::effect::Effect;
use helix_core::record::{Addendum, DrainedBy, FinishedBuild, Pinned, Policy, Row, RowKey, Standing};
use helix_core::state::{Listed, Offered, Walk};
use helix_core::{Known, Reply, State};
use helix_model::{BuildSpec, BuildState, LogTime, NodeId, OnWorkerLoss, Reason};

use crate::story::*;

fn finished<'a>(story: &'a Story, id: &str) -> &'a FinishedBuild {
    match story.state.build(&build(id)) {
        Some(Known::Finished(finished)) => finished,
        other => panic!("{id} is not finished: {other:?}"),
    }
}

/// One worker of capacity 2 and one build `b` that runs there.
fn running() -> Story {
    running_spec(spec())
}

fn running_spec(spec: BuildSpec) -> Story {
    let mut story = Story::new();
    story.worker("w1", 2);
    story.submit_as("b", spec);
    assert_eq!(story.assign("b.0.1", "w1"), Reply::Done);
    story
}

#[test]
fn a_build_goes_from_queued_to_succeeded() {
    let mut story = Story::new();
    assert_eq!(story.submit("b"), Reply::Submitted);
    assert_eq!(story.show("b"), "queued: waits from 1000 after 0");
    story.worker("w1", 2);
    story.wait(10);
    assert_eq!(story.assign("b.0.1", "w1"), Reply::Done);
    assert_eq!(story.show("b"), "running: attempt 1 on w1");
    let sent = Effect::SendAssignment { key: key("b.0.1"), worker: worker("w1"), instance: instance("data1.boot1") };
    assert_eq!(story.effects, [Effect::BuildChanged(build("b")), sent]);
    assert_eq!(story.state.load_of(&worker("w1")), 1);
    assert_eq!(story.state.remaining(&worker("w1")), 1);
    story.wait(10);
    assert_eq!(story.finish("b.0.1", "w1", success()), Reply::Done);
    assert_eq!(story.show("b"), "succeeded: succeeded after 1");
    let record = story.record("b").unwrap();
    assert_eq!(record.started_at, Some(LogTime(1_010)));
    assert_eq!(record.completed_at, Some(LogTime(1_020)));
    assert_eq!(finished(&story, "b").state, BuildState::Succeeded);
    let forget = Effect::SendForget { key: key("b.0.1"), worker: worker("w1") };
    assert_eq!(story.effects, [Effect::BuildChanged(build("b")), Effect::LogSealed(key("b.0.1")), forget]);
    let totals = story.state.totals();
    assert_eq!((totals.queued, totals.running, totals.succeeded, totals.load), (0, 0, 1, 0));
}

#[test]
fn the_same_submit_is_the_same_build_at_every_stage() {
    let mut story = running();
    assert_eq!(story.submit("b"), Reply::SameBuild);
    story.finish("b.0.1", "w1", success());
    assert_eq!(story.submit("b"), Reply::SameBuild);
    story.apply(purge(&["b"], story.now));
    assert_eq!(story.submit("b"), Reply::SamePurged(BuildState::Succeeded));
}

#[test]
fn a_users_failure_is_retried_only_as_often_as_the_build_says() {
    let mut story = running_spec(BuildSpec { retries: 1, ..spec() });
    story.finish("b.0.1", "w1", failed(Reason::Exit));
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    story.wait(1_000).assign("b.0.2", "w1");
    story.finish("b.0.2", "w1", failed(Reason::Exit));
    assert_eq!(story.show("b"), "failed (exit): failed (exit) after 2");
}

#[test]
fn what_a_retry_cannot_mend_is_not_retried() {
    for reason in [Reason::NoCommand, Reason::Policy] {
        let mut story = running_spec(BuildSpec { retries: 5, ..spec() });
        story.finish("b.0.1", "w1", failed(reason));
        assert_eq!(story.show("b"), format!("failed ({reason}): failed ({reason}) after 1"));
    }
}

#[test]
fn our_failures_are_paid_by_the_policy_and_back_off_doubles() {
    let mut story = running();
    story.finish("b.0.1", "w1", failed(Reason::DiskFull));
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    story.wait(1_000).assign("b.0.2", "w1");
    story.finish("b.0.2", "w1", failed(Reason::Internal));
    assert_eq!(story.show("b"), "running: waits from 4000 after 2");
    story.wait(2_000).assign("b.0.3", "w1");
    story.finish("b.0.3", "w1", failed(Reason::ImagePull));
    assert_eq!(story.show("b"), "failed (image_pull): failed (image_pull) after 3");
}

#[test]
fn a_build_of_several_platforms_ends_when_all_its_tasks_have() {
    let platforms = vec![platform("linux/amd64"), platform("linux/arm64")];
    let mut story = Story::new();
    let mut both = offer(4);
    both.platforms.insert(platform("linux/arm64"));
    story.worker_life("w1", "data1.boot1", both);
    story.submit_as("b", BuildSpec { platforms, ..spec() });
    story.assign("b.0.1", "w1");
    story.assign("b.1.1", "w1");
    story.finish("b.1.1", "w1", failed(Reason::Oom));
    assert_eq!(story.show("b"), "running: attempt 1 on w1, failed (oom) after 1");
    story.finish("b.0.1", "w1", failed(Reason::Exit));
    assert_eq!(story.show("b"), "failed (exit): failed (exit) after 1, failed (oom) after 1");
}

#[test]
fn cancel_ends_what_waits_at_once() {
    let mut story = Story::new();
    story.submit("b");
    assert_eq!(story.cancel("b"), Reply::Done);
    assert_eq!(story.show("b"), "cancelled (cancelled): cancelled (cancelled) after 0");
    assert_eq!(story.cancel("b"), Reply::Unchanged);
}

#[test]
fn cancel_waits_for_the_proof_of_what_runs() {
    for outcome in [Outcome::Stopped, success(), failed(Reason::Signal)] {
        let mut story = running();
        assert_eq!(story.cancel("b"), Reply::Done);
        assert_eq!(story.show("b"), "running: attempt 1 on w1 stopping (cancelled)");
        let stop = Effect::SendStop { key: key("b.0.1"), worker: worker("w1"), reason: Reason::Cancelled };
        assert_eq!(story.effects, [Effect::BuildChanged(build("b")), stop]);
        assert_eq!(story.cancel("b"), Reply::Unchanged);
        assert_eq!(story.finish("b.0.1", "w1", outcome), Reply::Done);
        assert_eq!(story.show("b"), "cancelled (cancelled): cancelled (cancelled) after 1");
        assert!(story.record("b").unwrap().tasks[0].attempts[0].artifacts.is_empty());
    }
}

#[test]
fn cancel_beats_a_retry() {
    let mut story = running();
    story.finish("b.0.1", "w1", failed(Reason::DiskFull));
    story.cancel("b");
    assert_eq!(story.show("b"), "cancelled (cancelled): cancelled (cancelled) after 1");
}

#[test]
fn a_time_out_stands_even_if_a_success_is_reported_later() {
    let mut story = running_spec(BuildSpec { timeout_ms: 5_000, ..spec() });
    story.wait(15_000);
    assert_eq!(story.apply(expire("b.0.1", Reason::Timeout)), Reply::Done);
    assert_eq!(story.show("b"), "running: attempt 1 on w1 stopping (timeout)");
    assert_eq!(story.apply(expire("b.0.1", Reason::Timeout)), Reply::Unchanged);
    story.finish("b.0.1", "w1", success());
    assert_eq!(story.show("b"), "failed (timeout): failed (timeout) after 1");
}

#[test]
fn a_drain_moves_work_without_spending_a_budget() {
    let mut story = running();
    story.apply(drain("w1", Some(2_000)));
    story.wait(1_000);
    assert_eq!(story.apply(expire("b.0.1", Reason::Drained)), Reply::Done);
    story.finish("b.0.1", "w1", Outcome::Stopped);
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    assert_eq!(story.record("b").unwrap().tasks[0].infra_retries, 0);
    let undrain = Command::UndrainWorker(cmd::UndrainWorker { worker: worker("w1") });
    assert_eq!(story.apply(undrain.clone()), Reply::Done);
    assert_eq!(story.apply(undrain), Reply::Unchanged);
}

#[test]
fn an_agents_own_drain_ends_when_it_registers_again_and_an_operators_does_not() {
    let mut story = running();
    let wish = |by| Command::DrainWorker(cmd::DrainWorker { worker: worker("w1"), deadline: None, by });
    assert_eq!(story.apply(wish(DrainedBy::Agent)), Reply::Done);
    assert_eq!(story.worker("w1", 2), Reply::Done);
    assert_eq!(story.state.worker(&worker("w1")).unwrap().drain, None);
    assert_eq!(story.apply(wish(DrainedBy::Operator)), Reply::Done);
    assert_eq!(story.apply(wish(DrainedBy::Agent)), Reply::Unchanged);
    assert_eq!(story.worker("w1", 2), Reply::Unchanged);
    assert!(story.state.worker(&worker("w1")).unwrap().drain.is_some());
}

#[test]
fn a_lost_worker_gives_its_work_back_or_fails_it() {
    let mut story = running();
    assert_eq!(story.apply(lose("w1", "data1.boot1")), Reply::Done);
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    assert_eq!(story.apply(lose("w1", "data1.boot1")), Reply::Unchanged);
    let mut story = running_spec(BuildSpec { on_worker_loss: OnWorkerLoss::Fail, ..spec() });
    story.apply(lose("w1", "data1.boot1"));
    assert_eq!(story.show("b"), "failed (worker_lost) unverified: failed (worker_lost) after 1");
}

#[test]
fn a_stop_on_a_lost_worker_ends_unverified_and_holds_the_worker_until_it_proves_the_death() {
    let mut story = running();
    story.cancel("b");
    story.apply(lose("w1", "data1.boot1"));
    assert_eq!(story.show("b"), "running: attempt 1 on w1 stopping (cancelled)");
    story.wait(60_000);
    assert_eq!(story.apply(end_unverified("b.0.1")), Reply::Done);
    assert_eq!(story.show("b"), "cancelled (cancelled) unverified: cancelled (cancelled) after 1");
    story.worker("w1", 2);
    story.submit("c");
    assert_eq!(story.scheduled(9), Vec::<String>::new());
    let release = |life: &str| {
        let (worker, instance, key) = (worker("w1"), instance(life), key("b.0.1"));
        Command::ReleaseHold(cmd::ReleaseHold { worker, instance, key })
    };
    assert_eq!(story.apply(release("data1.boot1")), Reply::Done);
    assert_eq!(story.apply(release("data1.boot1")), Reply::Unchanged);
    assert_eq!(story.scheduled(9), ["c.0.1@w1"]);
}

#[test]
fn a_late_report_of_an_unverified_end_is_the_proof() {
    let mut story = running();
    story.cancel("b");
    story.apply(lose("w1", "data1.boot1"));
    story.wait(60_000).apply(end_unverified("b.0.1"));
    story.worker("w1", 2);
    assert_eq!(story.finish("b.0.1", "w1", Outcome::Stopped), Reply::Done);
    assert!(story.state.worker(&worker("w1")).unwrap().held.is_empty());
}

#[test]
fn an_end_that_its_agent_cannot_prove_is_an_end_and_holds_the_worker_until_a_boot_or_its_removal() {
    for (outcome, cancelled, shown) in [
        (Outcome::Stopped, true, "cancelled (cancelled) unverified: cancelled (cancelled) after 1"),
        (failed(Reason::Internal), true, "cancelled (cancelled) unverified: cancelled (cancelled) after 1"),
        (failed(Reason::Internal), false, "running: waits from 2000 after 1"),
        (Outcome::Stopped, false, "running: waits from 2000 after 1"),
    ] {
        let mut story = running();
        if cancelled {
            story.cancel("b");
        }
        let report = unproven(finish("b.0.1", "w1", "data1.boot1", outcome));
        assert_eq!(story.apply(report.clone()), Reply::Done);
        assert_eq!(story.show("b"), shown);
        let end = story.record("b").unwrap().tasks[0].attempts[0].end.clone().unwrap();
        assert!(!end.verified && (!cancelled || story.due().is_empty()));
        story.submit("c");
        story.wait(60_000);
        story.hear("w1", "data1.boot1");
        assert_eq!(story.scheduled(9), Vec::<String>::new(), "it is held");
        // Said again it is no proof, and a new data directory is none either.
        assert!(matches!(story.apply(report), Reply::Rejected(_)));
        story.worker_life("w1", "data2.boot1", offer(2));
        assert_eq!(story.scheduled(1), Vec::<String>::new());
        story.worker_life("w1", "data2.boot2", offer(2));
        assert_eq!(story.scheduled(1).len(), 1);
    }
    let mut story = running();
    story.apply(unproven(finish("b.0.1", "w1", "data1.boot1", failed(Reason::Internal))));
    story.worker("w2", 1);
    story.wait(1_000).hear("w2", "data1.boot1");
    assert_eq!(story.schedule(9), 1);
    story.finish("b.0.2", "w2", success());
    assert_eq!(story.show("b"), "succeeded: succeeded after 2");
    assert!(story.record("b").unwrap().verified, "its result is the second attempt's");
    story.apply(Command::RemoveWorker(cmd::RemoveWorker { worker: worker("w1") }));
    story.worker("w1", 2);
    assert!(story.state.worker(&worker("w1")).unwrap().held.is_empty());
}

#[test]
fn a_build_that_must_not_run_twice_fails_where_its_death_is_unproven() {
    let mut story = running_spec(BuildSpec { on_worker_loss: OnWorkerLoss::Fail, ..spec() });
    story.apply(unproven(finish("b.0.1", "w1", "data1.boot1", failed(Reason::Internal))));
    assert_eq!(story.show("b"), "failed (internal) unverified: failed (internal) after 1");
    let mut story = running_spec(BuildSpec { on_worker_loss: OnWorkerLoss::Fail, ..spec() });
    story.finish("b.0.1", "w1", failed(Reason::Internal));
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
}

#[test]
fn the_same_life_takes_up_what_it_ran() {
    let mut story = running();
    assert_eq!(story.worker("w1", 2), Reply::Unchanged);
    let detach = Command::DetachWorker(cmd::DetachWorker { worker: worker("w1"), instance: instance("data1.boot1") });
    assert_eq!(story.apply(detach.clone()), Reply::Done);
    assert_eq!(story.apply(detach), Reply::Unchanged);
    let until = LogTime(1_000 + Policy::default().detach_for_ms);
    assert_eq!(story.state.worker(&worker("w1")).unwrap().standing, Standing::Detached { until });
    assert_eq!(story.worker("w1", 3), Reply::Done);
    assert_eq!(story.show("b"), "running: attempt 1 on w1");
}

#[test]
fn another_life_ends_the_earlier_ones_attempts() {
    let mut story = running();
    story.worker_life("w1", "data2.boot1", offer(2));
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    assert!(!story.record("b").unwrap().tasks[0].attempts[0].end.as_ref().unwrap().verified);
    let mut story = running();
    story.worker_life("w1", "data2.boot2", offer(2));
    assert!(story.record("b").unwrap().tasks[0].attempts[0].end.as_ref().unwrap().verified);
}

#[test]
fn another_life_on_the_same_boot_is_held_for_a_stop_that_nobody_proved() {
    let mut story = running();
    story.cancel("b");
    story.worker_life("w1", "data2.boot1", offer(2));
    assert_eq!(story.show("b"), "cancelled (cancelled) unverified: cancelled (cancelled) after 1");
    assert_eq!(story.state.worker(&worker("w1")).unwrap().held, BTreeSet::from([key("b.0.1")]));
    story.worker_life("w1", "data2.boot2", offer(2));
    assert!(story.state.worker(&worker("w1")).unwrap().held.is_empty());
}

#[test]
fn a_removed_worker_leaves_nothing_behind() {
    let mut story = running();
    story.submit("c");
    story.assign("c.0.1", "w1");
    story.cancel("c");
    assert_eq!(story.apply(Command::RemoveWorker(cmd::RemoveWorker { worker: worker("w1") })), Reply::Done);
    assert_eq!(story.show("b"), "running: waits from 2000 after 1");
    assert_eq!(story.show("c"), "cancelled (cancelled) unverified: cancelled (cancelled) after 1");
    assert_eq!(story.state.totals().capacity, 0);
}

#[test]
fn a_smaller_capacity_stops_new_work_and_nothing_else() {
    let mut story = running();
    story.submit("c");
    story.assign("c.0.1", "w1");
    story.worker("w1", 1);
    assert_eq!(story.state.load_of(&worker("w1")), 2);
    story.submit("d");
    story.finish("b.0.1", "w1", success());
    assert_eq!(story.scheduled(9), Vec::<String>::new());
    story.finish("c.0.1", "w1", success());
    assert_eq!(story.scheduled(9), ["d.0.1@w1"]);
}

#[test]
fn the_first_commit_reported_is_every_attempts() {
    let (first, second) = ("a".repeat(40), "b".repeat(40));
    let mut story = running();
    assert_eq!(story.apply(pin_source("b.0.1", "w1", &first)), Reply::SourcePinned(first.clone()));
    assert_eq!(story.apply(pin_source("b.0.1", "w1", &second)), Reply::SourcePinned(first.clone()));
    let told = Effect::SendCommit { key: key("b.0.1"), worker: worker("w1"), commit: first };
    assert_eq!(story.effects, [told]);
}

#[test]
fn logs_are_sealed_behind_a_failure_on_open_and_on_finished_builds() {
    let mut story = running_spec(BuildSpec { retries: 1, ..spec() });
    story.finish("b.0.1", "w1", failed(Reason::Exit));
    assert!(story.state.wants_log(&key("b.0.1"), &worker("w1")));
    assert_eq!(story.apply(seal("b.0.1", "w1")), Reply::Done);
    assert_eq!(story.apply(seal("b.0.1", "w1")), Reply::Unchanged);
    assert!(story.state.names_blob(&digest(5)));
    story.wait(1_000).assign("b.0.2", "w1");
    story.finish("b.0.2", "w1", failed(Reason::Exit));
    assert!(!story.state.names_blob(&digest(5)));
    assert_eq!(story.apply(seal("b.0.2", "w1")), Reply::Done);
    let row = story.rows.get(&RowKey::Addendum(key("b.0.2"), String::new()));
    assert_eq!(row, Some(&Row::Addendum(key("b.0.2"), Addendum::Log(sealed(5)))));
    assert_eq!(story.apply(seal("b.0.2", "w1")), Reply::Unchanged);
    assert_eq!(story.apply(seal("b.0.2", "w2")), Reply::Unchanged);
    assert_eq!(story.load(), story.state);
}

#[test]
fn artifacts_and_pins_of_finished_builds_are_rows_of_their_own() {
    let mut story = running();
    assert_eq!(story.apply(register_artifact("b", "x", 1)), Reply::Done);
    assert_eq!(story.apply(register_artifact("b", "x", 1)), Reply::Unchanged);
    story.finish("b.0.1", "w1", success());
    assert_eq!(story.apply(register_artifact("b", "x", 1)), Reply::Unchanged);
    assert_eq!(story.apply(register_artifact("b", "y", 2)), Reply::Done);
    assert_eq!(story.apply(pin("b", Pinned::Yes)), Reply::Done);
    assert_eq!(story.apply(pin("b", Pinned::Yes)), Reply::Unchanged);
    assert_eq!(story.apply(purge(&["b"], 9_999)), Reply::Purged(0));
    assert_eq!(story.load(), story.state);
    assert_eq!(story.apply(pin("b", Pinned::No)), Reply::Done);
    assert_eq!(story.apply(purge(&["b"], 9_999)), Reply::Purged(1));
    assert_eq!(story.effects, [Effect::BuildPurged(build("b"))]);
    assert_eq!(story.load(), story.state);
    let left: Vec<&RowKey> = story.rows.keys().filter(|key| matches!(key, RowKey::Addendum(..))).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn purge_takes_only_what_ended_by_the_cutoff_and_tombstones_expire() {
    let mut story = running();
    story.submit("c");
    story.finish("b.0.1", "w1", success());
    story.wait(10).cancel("c");
    assert_eq!(story.apply(purge(&["b", "c", "nobody"], 1_000)), Reply::Purged(1));
    let expire = Command::ExpireTombstones(cmd::ExpireTombstones { builds: vec![build("b")] });
    assert_eq!(story.apply(expire.clone()), Reply::Purged(0));
    story.wait(Policy::default().tombstone_ms);
    assert_eq!(story.apply(expire), Reply::Purged(1));
    assert!(story.state.build(&build("b")).is_none());
    assert!(!story.rows.contains_key(&RowKey::Tombstone(build("b"))));
}

#[test]
fn policy_nodes_and_voters() {
    let mut story = Story::new();
    let policy = Policy { queue_max: 5, ..Policy::default() };
    assert_eq!(story.apply(Command::SetPolicy(cmd::SetPolicy { policy: policy.clone(), expected: None })), Reply::Done);
    assert_eq!(story.apply(Command::SetPolicy(cmd::SetPolicy { policy, expected: None })), Reply::Unchanged);
    assert_eq!(story.apply(register_node(1, 11)), Reply::Done);
    assert_eq!(story.apply(register_node(1, 11)), Reply::Unchanged);
    let mut out = helix_core::Applied::default();
    story.state.apply_membership(BTreeSet::from([NodeId(1), NodeId(2)]), &mut out);
    story.state.finish_entry(&mut out);
    store(&mut story.rows, &out.rows);
    assert_eq!(story.state.voters().len(), 2);
    assert_eq!(story.load(), story.state);
}

#[test]
fn an_agent_that_offers_what_it_has_is_told_what_becomes_of_it() {
    let mut story = running();
    let offered =
        |story: &Story, attempt: &str, life: &str| story.state.offered(&key(attempt), &worker("w1"), &instance(life));
    assert_eq!(offered(&story, "b.0.1", "data1.boot1"), Offered::Current);
    assert_eq!(offered(&story, "b.0.2", "data1.boot1"), Offered::Superseded { log_wanted: false });
    assert_eq!(offered(&story, "b.0.1", "data2.boot1"), Offered::Superseded { log_wanted: false });
    story.cancel("b");
    assert_eq!(offered(&story, "b.0.1", "data1.boot1"), Offered::Stop(Reason::Cancelled));
    story.finish("b.0.1", "w1", Outcome::Stopped);
    assert_eq!(offered(&story, "b.0.1", "data1.boot1"), Offered::Superseded { log_wanted: true });
}

#[test]
fn lists_prefixes_and_newest() {
    let mut story = Story::new();
    story.worker("w1", 5);
    for id in ["a1", "a2", "b1"] {
        story.wait(1).submit(id);
    }
    story.assign("a2.0.1", "w1");
    story.finish("a2.0.1", "w1", success());
    let open: Vec<String> = story.state.open_builds().map(|build| build.id.to_string()).collect();
    assert_eq!(open, ["b1", "a1"]);
    assert_eq!(story.state.finished_builds().count(), 1);
    assert_eq!(story.state.builds_with_prefix("a", 9), [build("a1"), build("a2")]);
    assert_eq!(story.state.builds_with_prefix("a", 1), [build("a1")]);
    assert_eq!(story.state.newest_of("client/ann"), Some(build("b1")));
    assert_eq!(story.state.newest_of("client/bob"), None);
}

fn listed(walk: &mut Walk, state: &State, looks: usize, wanted: usize) -> Vec<String> {
    let step = walk.step(state, looks, wanted, |_| true);
    let id = |build: Listed<'_>| match build {
        Listed::Open(build) => build.id.to_string(),
        Listed::Finished(id, _) => id.to_string(),
    };
    step.into_iter().map(id).collect()
}

#[test]
fn a_list_that_is_taken_in_steps_has_each_build_once() {
    let mut story = Story::new();
    story.worker("w1", 5);
    for id in ["a", "b", "c", "d", "e"] {
        story.wait(1).submit(id);
    }
    for id in ["a", "b", "d"] {
        story.assign(&format!("{id}.0.1"), "w1");
    }
    story.wait(1).finish("a.0.1", "w1", success());
    let mut walk = Walk::new(BTreeSet::from([BuildState::Running]));
    assert_eq!(listed(&mut walk, &story.state, 2, 9), ["d", "b"], "queued ones are not even looked at");
    let mut walk = Walk::new(BTreeSet::from([BuildState::Failed, BuildState::Queued]));
    assert_eq!(listed(&mut walk, &story.state, 9, 1), ["e"]);
    assert_eq!(listed(&mut walk, &story.state, 1, 9), [""; 0], "one look, at a build that runs");
    assert_eq!(listed(&mut walk, &story.state, 9, 9), ["c"]);
    assert!(walk.is_over());

    let mut walk = Walk::new(BTreeSet::new());
    let mut found = listed(&mut walk, &story.state, 9, 2);
    // One that was listed ends, and one that was not.
    story.wait(1).finish("d.0.1", "w1", success());
    story.wait(1).finish("b.0.1", "w1", success());
    while !walk.is_over() {
        found.extend(listed(&mut walk, &story.state, 1, 9));
    }
    assert_eq!(found, ["e", "d", "c", "b", "a"]);
}

#[test]
fn log_time_never_runs_backwards_and_the_counters_row_follows_it() {
    let mut story = Story::new();
    story.submit("a");
    story.now = 5;
    story.submit("b");
    assert_eq!(story.record("b").unwrap().created_at, LogTime(1_000));
    let Some(Row::Counters(counters)) = story.rows.get(&RowKey::Counters) else { panic!("no counters") };
    assert_eq!((counters.next_sequence, counters.last_at), (2, LogTime(1_000)));
}

#[test]
fn rows_that_contradict_each_other_make_no_state() {
    let mut story = running();
    story.finish("b.0.1", "w1", success());
    story.submit("c");
    story.assign("c.0.1", "w1");
    let row = |key: RowKey| story.rows.get(&key).unwrap().clone();
    let (finished, open) = (row(RowKey::Build(build("b"))), row(RowKey::Build(build("c"))));
    assert!(State::load([finished.clone(), finished.clone()]).unwrap_err().to_string().contains("exists twice"));
    assert!(State::load([open]).unwrap_err().to_string().contains("w1, which has no row"));
    let astray = Row::Addendum(key("z.0.1"), Addendum::Log(sealed(1)));
    assert!(State::load([finished.clone(), astray]).unwrap_err().to_string().contains("z.0.1"));
    let Row::Build(record) = finished else { panic!("not a build") };
    let mut broken = (*record).clone();
    broken.completed_at = None;
    assert!(State::load([Row::Build(broken.into())]).unwrap_err().to_string().contains("go together"));
}
