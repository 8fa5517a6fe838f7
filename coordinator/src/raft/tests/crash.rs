//! Crash images of the registry: whatever a power cut or a bad disk leaves of its files, a node that starts has the rows of
//! one moment, whole, or knows that it has not, and builds them anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use helix_core::State;
use helix_core::command::{Authority, CancelBuild};
use helix_core::{Command, Reply};

use super::harness::{id, submit_with};
use super::storage::{meta, open_machine};
use crate::raft::driver::open::try_open;
use crate::raft::writer::RenewWhen;
use helix_core::record::Applied as Changes;
use helix_model::LogTime;

/// Times that the store is closed, and its files are copied.
const IMAGES: u64 = 4;
/// Entries between two of them.
const ENTRIES: u64 = 40;
/// What a disk writes whole or not at all.
const BLOCK: usize = 4096;

/// All files of a store, by their names.
pub(super) type Image = BTreeMap<PathBuf, Vec<u8>>;

/// Numbers that look random, the same every time (splitmix64).
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end.max(1) as u64).unwrap()
    }

    /// A byte of a file, each as likely as any other.
    fn place<'a>(&mut self, image: &'a Image) -> (&'a PathBuf, usize) {
        let mut at = self.below(image.values().map(Vec::len).sum());
        for (name, bytes) in image {
            if at < bytes.len() {
                return (name, at);
            }
            at -= bytes.len();
        }
        unreachable!("a place is inside")
    }
}

pub(super) fn copy_of(directory: &Path) -> Image {
    let mut image = Image::new();
    let mut left = vec![PathBuf::new()];
    while let Some(inside) = left.pop() {
        for entry in std::fs::read_dir(directory.join(&inside)).unwrap() {
            let entry = entry.unwrap();
            let name = inside.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                left.push(name);
            } else {
                image.insert(name, std::fs::read(entry.path()).unwrap());
            }
        }
    }
    image
}

pub(super) fn lay_out(image: &Image, directory: &Path) {
    if directory.exists() {
        std::fs::remove_dir_all(directory).unwrap();
    }
    for (name, bytes) in image {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// A store that grows: its state after each entry, and its files whenever it was closed.
async fn story(root: &Path) -> (Vec<State>, Vec<Image>) {
    let mut state = State::default();
    let (mut states, mut images) = (vec![state.clone()], Vec::new());
    for image in 0..IMAGES {
        let (_, writer) = open_machine(root, RenewWhen::NEVER);
        for index in image * ENTRIES + 1..=(image + 1) * ENTRIES {
            let command = if index % 3 == 0 {
                let (build, authority) = (id(&format!("b{}", index - 1)), Authority::Any("operator/o".to_owned()));
                Command::CancelBuild(CancelBuild { build, authority, reason: String::new() })
            } else {
                // Long rows lie in several parts.
                submit_with(&format!("b{index}"), &"y".repeat(usize::try_from(index * 397 % 9_000).unwrap()))
            };
            let mut changes = Changes::default();
            let reply = state.apply(LogTime(index), &command, &mut changes);
            assert!(!matches!(reply, Reply::Rejected(_)), "{reply:?}");
            state.finish_entry(&mut changes);
            writer.room().await.unwrap();
            writer.push(changes.rows, meta(index));
            states.push(state.clone());
        }
        writer.stop().await;
        drop(writer);
        images.push(copy_of(&root.join("registry")));
    }
    (states, images)
}

/// What a start makes of an image: the number of the entry up to which it is, or nothing, where it was refused.
pub(super) fn judge(image: &Image, states: &[State], directory: &Path, what: &str) -> Option<u64> {
    lay_out(image, directory);
    // One that is refused is built anew from snapshot and log: see `storage`.
    let (_store, state, meta) = try_open(directory, 1 << 20).ok()?;
    let index = meta.last_log_id.map_or(0, |id| id.index());
    assert!(states[usize::try_from(index).unwrap()] == state, "{what}: the rows are not those of entry {index}");
    Some(index)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_as_of_one_entry_or_refused_whatever_its_files_have_become() {
    let root = tempfile::tempdir().unwrap();
    let (states, images) = story(root.path()).await;
    let directory = root.path().join("copy");
    for (number, image) in images.iter().enumerate() {
        let whole = (number as u64 + 1) * ENTRIES;
        assert_eq!(judge(image, &states, &directory, "untouched"), Some(whole));
    }
    let last = images.last().unwrap();
    let mut numbers = Numbers(1);
    let (mut used, mut refused) = (0, 0);
    let mut count = |found: Option<u64>| if found.is_some() { used += 1 } else { refused += 1 };
    for round in 0..100 {
        let mut image = last.clone();
        let (name, at) = numbers.place(last);
        let bit = numbers.below(8);
        image.get_mut(name).unwrap()[at] ^= 1 << bit;
        count(judge(&image, &states, &directory, &format!("round {round}: bit {bit} of byte {at} of {name:?}")));
    }
    for round in 0..50 {
        let mut image = last.clone();
        let (name, at) = numbers.place(last);
        image.get_mut(name).unwrap().truncate(at);
        count(judge(&image, &states, &directory, &format!("round {round}: {name:?} cut to {at}")));
    }
    for round in 0..50 {
        let mut image = last.clone();
        let (name, at) = numbers.place(last);
        let bytes = image.get_mut(name).unwrap();
        let from = at - at % BLOCK;
        let end = bytes.len().min(from + BLOCK);
        bytes[from..end].fill(0);
        count(judge(&image, &states, &directory, &format!("round {round}: {name:?} is empty from {from} to {end}")));
    }
    // A power cut before anything was synced: of what was written since, each block is on the disk or is not.
    for round in 0..100 {
        let at = 1 + numbers.below(images.len() - 1);
        let (old, new) = (&images[at - 1], &images[at]);
        let mut image = new.clone();
        for (name, bytes) in &mut image {
            let before = old.get(name).map_or(&[][..], Vec::as_slice);
            for from in (0..bytes.len()).step_by(BLOCK) {
                let end = bytes.len().min(from + BLOCK);
                if numbers.below(2) == 0 {
                    let mut block = vec![0; end - from];
                    let there = before.get(from..before.len().min(end)).unwrap_or_default();
                    block[..there.len()].copy_from_slice(there);
                    bytes[from..end].copy_from_slice(&block);
                }
            }
        }
        count(judge(&image, &states, &directory, &format!("round {round}: image {at} over the one before")));
    }
    assert!(used >= 10 && refused >= 10, "{used} used, {refused} refused: too few to prove anything");
}
