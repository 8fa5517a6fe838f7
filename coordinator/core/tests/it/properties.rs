//! Properties over arbitrary logs: equal logs make equal states, rows and tail make the whole, repeats change
//! nothing, no worker is given more than it can take, and effects agree with what state derives. The story checks
//! the last three and all invariants after each command.

use std::collections::{BTreeMap, BTreeSet};

use helix_core::command::{self as cmd, Command, Outcome, WorkerOffer};
use helix_core::record::{Pinned, Policy};
use helix_core::retention::{Kept, Rules};
use helix_core::{Applied, State};
use helix_model::{BuildSpec, Executor, LogTime, NodeId, OnWorkerLoss, Reason, Resources};
use proptest::prelude::*;

use crate::story::*;

/// A step of a story: time passes, then a command that mostly makes sense.
#[derive(Clone, Debug)]
enum Step {
    Apply(Box<Command>),
    Schedule(usize),
    Due,
    Hear(u8),
    Wait(u64),
    Claim,
}

fn any_key() -> impl Strategy<Value = String> {
    (0..6u8, 0..2u16, 1..4u32).prop_map(|(build, task, attempt)| format!("b{build}.{task}.{attempt}"))
}

fn any_life() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just("data1.boot1".to_owned()), 1 => Just("data2.boot1".to_owned()), 1 => Just("data2.boot2".to_owned())]
}

fn any_worker() -> impl Strategy<Value = String> {
    (0..3u8).prop_map(|number| format!("w{number}"))
}

/// Few enough to meet, and one that no sum of 64 bits holds twice.
fn any_amounts() -> impl Strategy<Value = Resources> {
    let amount = || prop_oneof![6 => 0..4u64, 1 => Just(u64::MAX)];
    (amount(), amount()).prop_map(|(cpu_milli, memory_bytes)| Resources { cpu_milli, memory_bytes, disk_bytes: 0 })
}

fn any_spec() -> impl Strategy<Value = BuildSpec> {
    let platforms = prop_oneof![3 => Just(0usize), 1 => Just(1), 1 => Just(2)];
    let timeout = prop_oneof![Just(0u64), Just(5_000)];
    (platforms, -1..2i32, 0..3u32, any::<bool>(), timeout, any::<bool>(), any_amounts()).prop_map(
        |(platforms, priority, retries, fail, timeout_ms, command, resources)| {
            let platforms = ["linux/amd64", "linux/arm64"][..platforms].iter().map(|text| platform(text)).collect();
            let on_worker_loss = if fail { OnWorkerLoss::Fail } else { OnWorkerLoss::Rerun };
            let command = spec().command.filter(|_| command);
            let silence_timeout_ms = timeout_ms;
            // Without a command, and for two platforms: one with an index of images.
            let podman = command.is_none();
            BuildSpec {
                executor: Some(if podman { Executor::Podman } else { Executor::Exec }),
                push: if podman { "registry/app:1".to_owned() } else { String::new() },
                platforms,
                labels: if command.is_some() { [("k".to_owned(), "v".to_owned())].into() } else { BTreeMap::new() },
                priority,
                retries,
                on_worker_loss,
                timeout_ms,
                silence_timeout_ms,
                command,
                resources,
                ..spec()
            }
        },
    )
}

fn any_outcome() -> impl Strategy<Value = Outcome> {
    let reason = prop::sample::select(Reason::ALL);
    prop_oneof![3 => Just(success()), 2 => reason.prop_map(failed), 1 => Just(Outcome::Stopped)]
}

fn any_command() -> impl Strategy<Value = Command> {
    let build_id = || (0..6u8).prop_map(|number| format!("b{number}"));
    prop_oneof![
        6 => (build_id(), any_spec()).prop_map(|(id, spec)| submit(&id, spec)),
        2 => build_id().prop_map(|id| cancel(&id)),
        3 => (any_key(), any_worker(), any_life()).prop_map(|(key, worker, life)| assign(&key, &worker, &life)),
        6 => (any_key(), any_worker(), any_life(), any_outcome())
            .prop_map(|(key, worker, life, outcome)| finish(&key, &worker, &life, outcome)),
        3 => (any_key(), any_worker(), any_life(), 0..3u8)
            .prop_map(|(key, worker, life, byte)| record_image(&key, &worker, &life, image(byte))),
        3 => (any_key(), any_worker(), any_life(), 0..3u8, prop::option::of(0..3u8))
            .prop_map(|(key, worker, life, byte, index)| finish_image(&key, &worker, &life, image(byte), index.map(digest))),
        1 => (any_key(), any_worker(), any_life(), any_outcome())
            .prop_map(|(key, worker, life, outcome)| unproven(finish(&key, &worker, &life, outcome))),
        1 => (any_key(), any_worker()).prop_map(|(key, worker)| seal(&key, &worker)),
        2 => (any_key(), prop::sample::select(vec![Reason::Timeout, Reason::Silence, Reason::Drained]))
            .prop_map(|(key, reason)| expire(&key, reason)),
        1 => any_key().prop_map(|key| end_unverified(&key)),
        4 => (any_worker(), any_life(), 1..4u32, any::<bool>(), any_amounts()).prop_map(|(worker, life, capacity, arm, has)| {
            let mut offer = WorkerOffer { resources: has, ..offer(capacity) };
            if arm {
                offer.executors.insert(Executor::Podman);
                offer.platforms.insert(platform("linux/arm64"));
                offer.has_own_command = true;
            }
            register(&worker, &life, offer)
        }),
        2 => (any_worker(), any_life()).prop_map(|(worker, life)| lose(&worker, &life)),
        1 => (any_worker(), any_life()).prop_map(|(name, life)| {
            Command::DetachWorker(cmd::DetachWorker { worker: worker(&name), instance: instance(&life) })
        }),
        1 => (any_worker(), any::<bool>()).prop_map(|(worker, at)| drain(&worker, at.then_some(2_000))),
        1 => any_worker().prop_map(|name| Command::UndrainWorker(cmd::UndrainWorker { worker: worker(&name) })),
        1 => any_worker().prop_map(|name| Command::ProbeWorker(cmd::ProbeWorker { worker: worker(&name) })),
        1 => any_worker().prop_map(|name| Command::RemoveWorker(cmd::RemoveWorker { worker: worker(&name) })),
        1 => (any_worker(), any_life(), any_key()).prop_map(|(name, life, attempt)| {
            let (worker, instance, key) = (worker(&name), instance(&life), key(&attempt));
            Command::ReleaseHold(cmd::ReleaseHold { worker, instance, key })
        }),
        1 => (build_id(), 0..3u8).prop_map(|(id, byte)| register_artifact(&id, "x", byte)),
        1 => (build_id(), 0..200_000u64).prop_map(|(id, cutoff)| purge(&[&id], cutoff)),
        1 => (build_id(), any::<bool>())
            .prop_map(|(id, logs)| let_go(if logs { Kept::Logs } else { Kept::Artifacts }, &[&id])),
        1 => build_id().prop_map(|id| Command::ExpireTombstones(cmd::ExpireTombstones { builds: vec![build(&id)] })),
        1 => (build_id(), any::<bool>()).prop_map(|(id, yes)| pin(&id, if yes { Pinned::Yes } else { Pinned::No })),
        1 => (any_key(), any_worker()).prop_map(|(key, worker)| pin_source(&key, &worker, &"a".repeat(40))),
        1 => (1..4u64, 1..3u64).prop_map(|(node, epoch)| register_node(node, epoch)),
        1 => (1..4u64).prop_map(retire_node),
        1 => (1..10u64, 0..3u32, 0..3u32, any_rules()).prop_map(|(queue_max, infra_retries, quarantine_after, retain_rules)| {
            let policy = Policy {
                queue_max,
                infra_retries,
                quarantine_after,
                tombstone_ms: 1_000,
                retain_logs_ms: if queue_max > 5 { 10_000 } else { Policy::default().retain_logs_ms },
                retain_rules,
                ..Policy::default()
            };
            Command::SetPolicy(cmd::SetPolicy { policy, expected: None })
        }),
    ]
}

fn any_rules() -> impl Strategy<Value = Rules> {
    let name = (0..3usize, prop::sample::select(vec!["failed", "succeeded", "failed,k=v", "k=v", "cancelled"]));
    let rules = name.prop_map(|(kept, of)| rule(&format!("{}[{of}]", Kept::ALL[kept].key())));
    prop::collection::btree_map(rules, 0..60_000u64, 0..3)
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => any_command().prop_map(|command| Step::Apply(Box::new(command))),
        4 => (1..5usize).prop_map(Step::Schedule),
        2 => Just(Step::Due),
        1 => Just(Step::Claim),
        3 => (0..3u8).prop_map(Step::Hear),
        2 => prop_oneof![Just(1u64), Just(1_000), Just(16_000), Just(61_000)].prop_map(Step::Wait),
    ]
}

fn tell(steps: Vec<Step>) -> Story {
    let mut story = Story::new();
    for step in steps {
        match step {
            Step::Apply(command) => drop(story.apply(*command)),
            Step::Schedule(max) => drop(story.schedule(max)),
            Step::Due => {
                for command in story.due() {
                    story.apply(command);
                }
            }
            Step::Hear(number) => {
                let name = format!("w{number}");
                let life = story.state.worker(&worker(&name)).map(|worker| worker.instance.to_string());
                if let Some(life) = life {
                    story.hear(&name, &life);
                }
            }
            Step::Wait(ms) => drop(story.wait(ms)),
            Step::Claim => story.claim(),
        }
    }
    story
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equal_logs_make_equal_states_and_rows_make_them_again(steps in prop::collection::vec(any_step(), 1..80)) {
        let story = tell(steps);
        let mut again = State::default();
        let mut rows = BTreeMap::new();
        let cut = story.log.len() / 2;
        let mut loaded = None;
        for (place, (at, command)) in story.log.iter().enumerate() {
            if place == cut {
                loaded = Some((State::load(rows.values().cloned()).unwrap(), rows.clone()));
            }
            let mut out = Applied::default();
            again.apply(LogTime(*at), command, &mut out);
            again.finish_entry(&mut out);
            store(&mut rows, &out.rows);
        }
        prop_assert_eq!(&again, &story.state);
        prop_assert_eq!(&rows, &story.rows);
        prop_assert_eq!(&story.load(), &story.state);
        helix_core::invariants::check(&story.load()).unwrap();
        if let Some((mut tail, mut rows)) = loaded {
            for (at, command) in &story.log[cut..] {
                let mut out = Applied::default();
                tail.apply(LogTime(*at), command, &mut out);
                tail.finish_entry(&mut out);
                store(&mut rows, &out.rows);
            }
            prop_assert_eq!(&tail, &story.state);
            prop_assert_eq!(&rows, &story.rows);
        }
    }

    #[test]
    fn every_row_that_memory_holds_was_written(steps in prop::collection::vec(any_step(), 1..60)) {
        let story = tell(steps);
        for row in story.state.rows() {
            let key = row.key();
            let written = story.rows.get(&key);
            let default = matches!(key, helix_core::RowKey::Counters | helix_core::RowKey::Policy) && written.is_none();
            prop_assert!(default || written == Some(&row), "{:?}", key);
        }
    }

    #[test]
    fn a_success_needs_holders_whatever_the_voters(
        voters in prop::collection::btree_set(1..8u64, 0..7),
        holders in prop::collection::btree_set(1..8u64, 1..5),
        copies in 0..5u32,
    ) {
        let mut story = Story::new();
        story.apply(Command::SetPolicy(cmd::SetPolicy { policy: Policy { copies, ..Policy::default() }, expected: None }));
        let nodes = |ids: BTreeSet<u64>| ids.into_iter().map(NodeId).collect::<BTreeSet<_>>();
        let (voters, holders) = (nodes(voters), nodes(holders));
        story.state.apply_membership(voters.clone(), &mut Applied::default());
        story.worker("w0", 1);
        story.submit("b");
        story.assign("b.0.1", "w0");
        let Command::FinishAttempt(mut report) = finish("b.0.1", "w0", "data1.boot1", success()) else { panic!("no report") };
        for blob in report.artifacts.iter_mut().map(|it| &mut it.blob).chain(report.log.iter_mut().map(|it| &mut it.blob)) {
            blob.holders.clone_from(&holders);
        }
        let counted = holders.iter().filter(|node| voters.is_empty() || voters.contains(node)).count();
        // None asked for: two, and three where five or more vote.
        let copies = if copies > 0 { copies as usize } else { 2 + usize::from(voters.len() > 4) };
        let needed = copies.min(voters.len()).max(1);
        let done = story.apply(Command::FinishAttempt(report)) == helix_core::Reply::Done;
        prop_assert_eq!(done, counted >= needed);
    }
}
