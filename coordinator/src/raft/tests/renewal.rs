//! Writing the store's file anew: it ends the growth, and at each step a start finds the rows of one moment.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use helix_core::command::{Authority, CancelBuild, PurgeBuilds};
use helix_core::{Command, RowChange, State};
use helix_model::LogTime;

use super::crash::{Image, Numbers, copy_of, judge};
use super::harness::{id, submit, submit_with};
use super::letting_go::register;
use super::storage::{ALWAYS, apply, meta};
use crate::codec::encode_row;
use crate::raft::rows::base_key;
use crate::raft::store::{Changes, Store};
use crate::raft::writer::{RenewWhen, Renewal};

/// A store that is written entry by entry.
struct Story {
    store: Arc<Store>,
    state: State,
    index: u64,
}

impl Story {
    fn new(root: &Path) -> Self {
        let store = Arc::new(Store::open(root, 1 << 20).unwrap());
        Self { store, state: State::default(), index: 0 }
    }

    /// Writes one entry, and returns what it did.
    fn write(&mut self, commands: &[Command]) -> Changes {
        self.index += 1;
        let mut changes = Changes::new();
        for change in apply(&mut self.state, self.index, commands).rows {
            match change {
                RowChange::Put(row) => drop(changes.insert(base_key(&row.key()), Some((encode_row(&row), row)))),
                RowChange::Delete(key) => drop(changes.insert(base_key(&key), None)),
                RowChange::DeleteAddenda(build) => {
                    changes.extend(self.store.addenda_keys(&build).unwrap().into_iter().map(|key| (key, None)));
                }
                RowChange::Expire(..) => unreachable!("nothing expires here"),
            }
        }
        self.store.write(&changes, &meta(self.index)).unwrap();
        changes
    }
}

fn cancel(build: &str) -> Command {
    let authority = Authority::Any("operator/o".to_owned());
    Command::CancelBuild(CancelBuild { build: id(build), authority, reason: String::new() })
}

#[test]
fn at_each_step_a_start_finds_the_rows_of_one_entry() {
    let root = tempfile::tempdir().unwrap();
    let (registry, scratch) = (root.path().join("registry"), root.path().join("copy"));
    let mut story = Story::new(&registry);
    let mut states = vec![story.state.clone()];
    for number in 0..300 {
        // Long rows lie in several parts.
        let name = format!("b{number}");
        story.write(&[submit_with(&name, &"y".repeat(number * 397 % 9_000))]);
        states.push(story.state.clone());
        // Some have ended and name blobs, each one of its own and one that all name.
        if number % 3 == 0 {
            let own = u8::try_from(number / 3 + 100).unwrap();
            story.write(&[cancel(&name), register(&name, "own", own), register(&name, "all", 1)]);
            states.push(story.state.clone());
        }
    }
    story.store.sync().unwrap();
    let synced = story.index;
    let mut copy = story.store.begin_copy().unwrap();
    let mut steps = 0;
    loop {
        let found = judge(&copy_of(&registry), &states, &scratch, &format!("step {steps}"));
        assert!(found.is_some_and(|index| index >= synced), "step {steps}: {found:?}");
        if copy.step(&story.store).unwrap() {
            break;
        }
        steps += 1;
        // Rows change behind the cursor and ahead of it, and come and go.
        let commands = [
            cancel(&format!("b{}", steps * 7)),
            cancel(&format!("b{}", 299 - steps * 7)),
            register(&format!("b{}", steps * 3), "own", 2),
            register(&format!("b{}", 297 - steps * 3), "own", 3),
            submit(&format!("b{}", 500 + steps)),
            submit(&format!("a{steps}")),
        ];
        let changes = story.write(&commands);
        copy.write(changes).unwrap();
        states.push(story.state.clone());
        let purge = PurgeBuilds { builds: vec![id(&format!("b{}", steps * 7))], cutoff: LogTime(u64::MAX) };
        let changes = story.write(&[Command::PurgeBuilds(purge)]);
        copy.write(changes).unwrap();
        states.push(story.state.clone());
    }
    assert!(steps >= 4, "{steps} steps");
    copy.finish(&story.store).unwrap();
    assert!(copy.pairs() == story.store.pairs(), "the copy is not what was copied");
    let before = copy_of(&registry);
    assert!(judge(&before, &states, &scratch, "a copy that does not count yet").is_some());
    let sync = story.store.syncs_later();
    story.store.switch_to(copy).unwrap();
    // A snapshot's end that began before, and comes late.
    sync().unwrap();
    drop(sync);
    assert!(story.store.load().unwrap().0 == story.state);
    let after = copy_of(&registry);
    assert!(after.keys().all(|name| name == Path::new("current") || name.starts_with("1")), "the old files are gone");
    assert_eq!(judge(&after, &states, &scratch, "the copy counts"), Some(story.index));
    // A crash that left files of the one before.
    let both: Image = before.into_iter().chain(after).collect();
    assert_eq!(judge(&both, &states, &scratch, "both are there"), Some(story.index));
    assert!(!scratch.join("db").exists() && scratch.join("1/db").exists());
    // And what is given up leaves nothing.
    let copy = story.store.begin_copy().unwrap();
    assert!(registry.join("2").exists());
    copy.discard();
    assert!(!registry.join("2").exists());
    drop(story);
    std::fs::rename(registry.join("current"), scratch.join("current")).unwrap();
    assert!(Store::open(&registry, 1 << 20).is_err(), "rows of which nobody says that they count");
    std::fs::rename(scratch.join("current"), registry.join("current")).unwrap();
    let again = Store::open(&registry, 1 << 20).unwrap();
    assert_eq!(again.head().unwrap().meta, meta(states.len() as u64 - 1));
}

#[test]
fn a_copy_that_lacks_a_row_does_not_count() {
    let root = tempfile::tempdir().unwrap();
    let mut story = Story::new(&root.path().join("registry"));
    story.write(&[submit("a"), submit("b")]);
    let mut copy = story.store.begin_copy().unwrap();
    while !copy.step(&story.store).unwrap() {}
    // Nobody told it of this.
    story.write(&[submit("c")]);
    let error = copy.finish(&story.store).unwrap_err();
    assert!(error.to_string().contains("does not add up"), "{error}");
}

#[test]
fn a_copy_that_fails_is_given_up_and_tried_again_later() {
    let root = tempfile::tempdir().unwrap();
    let registry = root.path().join("registry");
    let mut story = Story::new(&registry);
    story.write(&[submit("a"), submit("b")]);
    let mut renewal = Renewal::new(Arc::clone(&story.store), ALWAYS);
    renewal.look();
    assert!(renewal.due_in().is_some() && registry.join("1").exists());
    renewal.step().unwrap();
    // Nobody told it of this: it will not add up.
    story.write(&[submit("c")]);
    while renewal.due_in().is_some() {
        renewal.step().unwrap();
    }
    assert!(
        !registry.join("1").exists() && !registry.join("current").exists(),
        "the copy is gone, the old file counts"
    );
    renewal.look();
    assert!(renewal.due_in().is_none(), "not at once");
    // The store serves on, and the next renewal, as after a start, goes through.
    story.write(&[submit("d")]);
    let mut next = Renewal::new(Arc::clone(&story.store), ALWAYS);
    next.look();
    next.write(story.write(&[cancel("a")]));
    while next.due_in().is_some() {
        next.step().unwrap();
    }
    assert!(registry.join("1/db").exists() && registry.join("current").exists());
    assert!(story.store.load().unwrap().0 == story.state);
}

/// How large the store is after 200 turns of 40 builds, of which 200 are kept and the ids of all, and how large a copy of it is.
fn sizes(when: RenewWhen) -> (u64, u64) {
    let root = tempfile::tempdir().unwrap();
    let mut story = Story::new(&root.path().join("registry"));
    let mut renewal = Renewal::new(Arc::clone(&story.store), when);
    let mut kept: VecDeque<String> = VecDeque::new();
    let mut numbers = Numbers(1);
    for _ in 0..200 {
        // Ids that lie anywhere, as users' do.
        let names: Vec<String> = (0..40).map(|_| format!("{:016x}", numbers.below(usize::MAX))).collect();
        let submits: Vec<Command> = names.iter().map(|name| submit_with(name, &"x".repeat(300))).collect();
        let mut commands: Vec<Command> = names.iter().map(|name| cancel(name)).collect();
        kept.extend(names);
        let gone = kept.drain(..kept.len().saturating_sub(200)).map(|name| id(&name)).collect();
        commands.push(Command::PurgeBuilds(PurgeBuilds { builds: gone, cutoff: LogTime(u64::MAX) }));
        for commands in [submits, commands] {
            let changes = story.write(&commands);
            renewal.write(changes);
            renewal.look();
            while renewal.due_in().is_some() {
                renewal.step().unwrap();
            }
        }
    }
    assert!(story.store.load().unwrap().0 == story.state);
    let mut copy = story.store.begin_copy().unwrap();
    while !copy.step(&story.store).unwrap() {}
    copy.finish(&story.store).unwrap();
    let sizes = (story.store.sizes().0, copy.size());
    copy.discard();
    sizes
}

#[test]
fn a_store_whose_builds_come_and_go_does_not_grow_without_an_end() {
    const MIB: u64 = 1 << 20;
    let (size, copy) = sizes(RenewWhen { from_bytes: MIB, times: 2, rests: 3 });
    assert!(size <= 2 * copy + MIB, "{size} bytes, a copy {copy}");
    let (size, copy) = sizes(RenewWhen::NEVER);
    assert!(size > 2 * copy + 2 * MIB, "{size} bytes, a copy {copy}: nothing was proven");
}
