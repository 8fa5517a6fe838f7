//! How rows lie in the store: keys in order, long values in parts, and which blobs a row names.
//!
//! A key is a kind's byte, the identity in bytes whose order is the identity's, and the part's number. Part 0
//! begins with how many parts there are. Values stay below 4 KiB, because longer ones sled keeps in files it never syncs.

use std::collections::BTreeSet;

use helix_common::sha256::Sha256;
use helix_core::record::{Addendum, BlobRef, BuildRecord};
use helix_core::{Row, RowKey};
use helix_model::{BuildId, Digest};

/// Bytes of a row in one value.
const PART_BYTES: usize = 4_000;

/// The first byte of no row's key, and greater than that of every row's.
pub(super) const ROWS_END: u8 = 0x10;

/// Where the store keeps how far it is.
pub(super) const META_KEY: &[u8] = &[0x20];

const INDEX: u8 = 0x30;

/// A row's key without a part number.
pub(super) fn base_key(key: &RowKey) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    match key {
        RowKey::Counters => out.push(0x01),
        RowKey::Policy => out.push(0x02),
        RowKey::Node(node) => {
            out.push(0x03);
            out.extend_from_slice(&node.0.to_be_bytes());
        }
        RowKey::Worker(worker) => {
            out.push(0x04);
            out.extend_from_slice(worker.as_str().as_bytes());
        }
        RowKey::Build(build) => {
            out.push(0x05);
            out.extend_from_slice(build.as_str().as_bytes());
        }
        RowKey::Addendum(attempt, text) => {
            out = addenda_prefix(&attempt.build);
            out.extend_from_slice(&attempt.task.0.to_be_bytes());
            out.extend_from_slice(&attempt.attempt.0.to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        RowKey::Tombstone(build) => {
            out.push(0x07);
            out.extend_from_slice(build.as_str().as_bytes());
        }
    }
    out
}

/// What all keys of a build's addenda begin with. Ids contain no zero byte, so no other build's do.
pub(super) fn addenda_prefix(build: &BuildId) -> Vec<u8> {
    let mut out = vec![0x06];
    out.extend_from_slice(build.as_str().as_bytes());
    out.push(0);
    out
}

/// What all index keys of a blob begin with.
pub(super) fn index_prefix(digest: &Digest) -> Vec<u8> {
    let mut out = vec![INDEX];
    out.extend_from_slice(&digest.0);
    out
}

/// What no index key is smaller than.
pub(super) fn index_begin() -> Vec<u8> {
    vec![INDEX]
}

/// Greater than all index keys of a blob, and than those of no blob behind it: ids of builds are letters, digits and few
/// signs.
pub(super) fn index_end(digest: &Digest) -> Vec<u8> {
    let mut out = index_prefix(digest);
    out.push(0xff);
    out
}

/// The blob of an index key; `None` for other keys.
pub(super) fn index_digest(key: &[u8]) -> Option<Digest> {
    let (kind, rest) = key.split_first()?;
    if *kind == INDEX { rest.first_chunk().map(|digest| Digest(*digest)) } else { None }
}

/// "This build names this blob."
pub(super) fn index_key(digest: &Digest, build: &BuildId) -> Vec<u8> {
    let mut out = index_prefix(digest);
    out.extend_from_slice(build.as_str().as_bytes());
    out
}

/// The key of one part.
pub(super) fn part_key(base: &[u8], part: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(base.len() + 2);
    out.extend_from_slice(base);
    out.extend_from_slice(&part.to_be_bytes());
    out
}

/// The base of a part-0 key; `None` for other parts.
pub(super) fn base_of(key: &[u8]) -> Option<&[u8]> {
    let (base, part) = key.split_at_checked(key.len().checked_sub(2)?)?;
    (part == [0, 0]).then_some(base)
}

/// A row's bytes as the values of its parts.
pub(super) fn split(row: &[u8]) -> Vec<Vec<u8>> {
    let mut pieces = row.chunks(PART_BYTES);
    let count = parts_of(row.len());
    let mut first = count.to_be_bytes().to_vec();
    first.extend_from_slice(pieces.next().unwrap_or_default());
    std::iter::once(first).chain(pieces.map(<[u8]>::to_vec)).collect()
}

/// How many parts a row has, and what part 0 holds of it.
pub(super) fn first_part(value: &[u8]) -> Option<(u16, &[u8])> {
    let (count, rest) = value.split_first_chunk::<2>()?;
    Some((u16::from_be_bytes(*count), rest))
}

/// What one row adds to the sum over all rows. Sums wrap around, so that a row can be taken out again.
pub(super) fn sum_of(base: &[u8], row: &[u8]) -> u128 {
    let mut hash = Sha256::new();
    hash.update(&u64::try_from(base.len()).unwrap_or(u64::MAX).to_be_bytes());
    hash.update(base);
    hash.update(row);
    hash.finalize().0.first_chunk().map_or(0, |half| u128::from_be_bytes(*half))
}

/// How many parts a row of so many bytes has.
pub(super) fn parts_of(length: usize) -> u16 {
    u16::try_from(length.div_ceil(PART_BYTES).max(1)).unwrap_or(u16::MAX)
}

/// The build a row belongs to and the blobs it names.
pub(super) fn blobs_of(row: &Row) -> Option<(BuildId, BTreeSet<Digest>)> {
    match row {
        Row::Build(record) => Some((record.id.clone(), blobs_of_build(record))),
        Row::Addendum(key, Addendum::Log(log)) => Some((key.build.clone(), BTreeSet::from([log.blob.digest]))),
        Row::Addendum(key, Addendum::Artifact(it)) => Some((key.build.clone(), BTreeSet::from([it.blob.digest]))),
        Row::Addendum(_, Addendum::Pinned(_))
        | Row::Counters(_)
        | Row::Policy(_)
        | Row::Node(_)
        | Row::Worker(_)
        | Row::Tombstone(_) => None,
    }
}

fn blobs_of_build(record: &BuildRecord) -> BTreeSet<Digest> {
    let digest = |blob: &BlobRef| blob.digest;
    let mut out: BTreeSet<Digest> = record.artifacts.iter().map(|artifact| digest(&artifact.blob)).collect();
    out.extend(record.spec.source.map(|source| source.digest));
    for attempt in record.tasks.iter().flat_map(|task| &task.attempts) {
        out.extend(attempt.artifacts.iter().map(|artifact| digest(&artifact.blob)));
        out.extend(attempt.log.iter().map(|log| digest(&log.blob)));
    }
    out
}

#[cfg(test)]
mod tests {
    use helix_model::{AttemptKey, AttemptNumber, TaskIndex};

    use super::*;

    #[test]
    fn rows_are_split_and_their_parts_lie_together() {
        for length in [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES] {
            let row: Vec<u8> = (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let parts = split(&row);
            assert!(parts.iter().all(|part| part.len() <= 4096));
            let (count, first) = first_part(&parts[0]).unwrap();
            assert_eq!(usize::from(count), parts.len());
            let mut joined = first.to_vec();
            parts[1..].iter().for_each(|part| joined.extend_from_slice(part));
            assert_eq!(joined, row);
        }
        let a = base_key(&RowKey::Build(BuildId::new("a").unwrap()));
        let ab = base_key(&RowKey::Build(BuildId::new("a-b").unwrap()));
        assert!(part_key(&a, 0) < part_key(&a, 9) && part_key(&a, 9) < part_key(&ab, 0));
        assert_eq!(base_of(&part_key(&a, 0)), Some(&a[..]));
        assert_eq!(base_of(&part_key(&a, 1)), None);
    }

    #[test]
    fn a_builds_addenda_have_a_prefix_of_their_own() {
        let key = |id: &str| {
            let key = AttemptKey { build: BuildId::new(id).unwrap(), task: TaskIndex(1), attempt: AttemptNumber(2) };
            base_key(&RowKey::Addendum(key, "out".to_owned()))
        };
        let prefix = addenda_prefix(&BuildId::new("a").unwrap());
        assert!(key("a").starts_with(&prefix));
        assert!(!key("a.1").starts_with(&prefix) && !key("ab").starts_with(&prefix));
    }
}
