//! Reading all blobs again: whatever is flipped or cut short is found, never served, and replaced while anybody has it.

use std::os::unix::fs::FileExt;

use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, LEASE, cluster};
use super::*;

in_both_places! {
    what_is_damaged_is_found_set_aside_and_replaced,
    a_reader_of_damaged_bytes_gets_them_elsewhere,
    that_no_good_copy_is_left_is_only_said_when_everybody_was_asked,
    what_nothing_names_is_not_mourned,
    a_copy_that_is_another_blob_is_found_by_its_name,
    what_was_set_aside_for_an_error_that_has_passed_is_put_back,
}

/// Where the bytes of a blob lie on a node's disk, and how many there are.
fn place_of(place: &Place, root: &Path, data: &Bytes) -> (std::path::PathBuf, u64) {
    let file = place.file_of(root, &digest_of(data));
    if file.exists() {
        return (file, 0);
    }
    for entry in std::fs::read_dir(root.join("segments")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(data.len()).position(|window| window == &data[..]) {
            return (path, at as u64);
        }
    }
    panic!("the blob is not on the disk");
}

fn flip(place: &Place, root: &Path, data: &Bytes, offset: u64) {
    let (path, at) = place_of(place, root, data);
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at + offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at + offset).unwrap();
}

fn cut(place: &Place, root: &Path, data: &Bytes, offset: u64) {
    let (path, at) = place_of(place, root, data);
    std::fs::File::options().write(true).open(path).unwrap().set_len(at + offset).unwrap();
}

/// Gives the marker of `to` the checksums of `from`, and leaves the object that it names.
fn swap_tails(root: &Path, from: &Digest, to: &Digest) {
    let (from, to) = (std::fs::read(marker_of(root, from)).unwrap(), marker_of(root, to));
    let old = std::fs::read(&to).unwrap();
    let own_at = from.len() - 20;
    let mut new = [&from[..own_at], &old[own_at..own_at + 8]].concat();
    let crc = crc32fast::hash(&new).to_le_bytes();
    new.extend_from_slice(&crc);
    new.extend_from_slice(&old[own_at + 12..]);
    std::fs::write(to, new).unwrap();
}

/// Reads as fast as it goes.
fn hurry(cluster: &Cluster) {
    cluster.ledger.policy.lock().unwrap().scrub_bytes = 1 << 40;
}

fn name(cluster: &Cluster, data: &Bytes) {
    cluster.ledger.named.lock().unwrap().insert(digest_of(data));
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn what_is_damaged_is_found_set_aside_and_replaced(place: Place) {
    let mut cluster = cluster(3, LEASE, place).await;
    hurry(&cluster);
    let sound: Vec<Bytes> = [40, 70_000, 1_000_000].map(|len| bytes_of(len as u64, len)).into();
    // In a segment, and in files: in the first chunk, in the last, in the table, in the footer.
    let flipped: Vec<(Bytes, u64)> =
        [(50, 7), (65_536, 65_535), (300_000, 5), (600_000, 599_999), (300_001, 300_003), (300_002, 300_020)]
            .map(|(len, at)| (bytes_of(1_000 + len as u64, len), at))
            .into_iter()
            // What is behind the bytes is read from this node's disk, wherever they lie.
            .filter(|(data, at)| !cluster.place.is_bucket() || *at < data.len() as u64)
            .collect();
    let short: Vec<(Bytes, u64)> =
        [(400_000, 399_000), (80_000, 0)].map(|(len, at)| (bytes_of(2_000 + len as u64, len), at)).into();
    for data in sound.iter().chain(flipped.iter().chain(&short).map(|(data, _)| data)) {
        cluster.nodes[0].blobs.put(announce(data, 2), chunks(data)).await.unwrap();
        name(&cluster, data);
    }
    // The last in its segment, which is then cut short while it is in use.
    let last = bytes_of(3_000, 900);
    cluster.nodes[0].blobs.put(announce(&last, 2), chunks(&last)).await.unwrap();
    name(&cluster, &last);
    cluster.settle().await;
    let root = cluster.nodes[0].root.path().to_owned();
    flipped.iter().for_each(|(data, at)| flip(&cluster.place, &root, data, *at));
    short.iter().for_each(|(data, at)| cut(&cluster.place, &root, data, *at));
    cut(&cluster.place, &root, &last, 100);
    let node = cluster.nodes.remove(0);
    node.scrub.pass().await;
    let bad: Vec<Digest> =
        flipped.iter().chain(&short).map(|(data, _)| digest_of(data)).chain([digest_of(&last)]).collect();
    for digest in &bad {
        assert_eq!(node.blobs.store().size(digest), None, "{digest} is served no more");
        assert!(matches!(node.blobs.read(*digest, 0, 0, Reach::Local).await, Err(BlobError::Absent(_))));
    }
    for data in &sound {
        assert_eq!(read_all(&node.blobs, digest_of(data)).await.unwrap(), *data);
    }
    let totals = node.blobs.health().totals();
    assert_eq!((totals.found, totals.waiting, totals.lost, totals.passes), (bad.len() as u64, bad.len() as u64, 0, 1));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(node.collection.run(Schedule::default(), shutdown.clone()));
    until("all are replaced", || node.blobs.health().list().is_empty()).await;
    assert_eq!(node.blobs.health().totals().repaired, bad.len() as u64);
    for data in flipped.iter().chain(&short).map(|(data, _)| data).chain([&last]) {
        assert_eq!(read_all(&node.blobs, digest_of(data)).await.unwrap(), *data);
        assert_eq!(node.blobs.store().size(&digest_of(data)), Some(data.len() as u64));
    }
    node.scrub.pass().await;
    assert_eq!(node.blobs.health().totals().found, bad.len() as u64, "what was fetched is sound");
    shutdown.cancel();
    running.await.unwrap();
}

async fn a_reader_of_damaged_bytes_gets_them_elsewhere(place: Place) {
    let cluster = cluster(2, LEASE, place).await;
    for (len, at) in [(900, 450), (800_000, 700_000)] {
        let data = bytes_of(len as u64, len);
        cluster.nodes[0].blobs.put(announce(&data, 2), chunks(&data)).await.unwrap();
        cluster.settle().await;
        flip(&cluster.place, cluster.nodes[0].root.path(), &data, at);
        assert_eq!(read_all(&cluster.nodes[0].blobs, digest_of(&data)).await.unwrap(), data);
        assert!(cluster.nodes[0].blobs.health().list().contains(&(digest_of(&data), Damage::Waiting)));
    }
}

async fn that_no_good_copy_is_left_is_only_said_when_everybody_was_asked(place: Place) {
    let mut cluster = cluster(3, LEASE, place).await;
    hurry(&cluster);
    let data = bytes_of(5, 300_000);
    let (digest, small) = (digest_of(&data), bytes_of(6, 80));
    for data in [&data, &small] {
        let holders = cluster.nodes[0].blobs.put(announce(data, 3), chunks(data)).await.unwrap();
        assert_eq!(holders.len(), 3);
        name(&cluster, data);
    }
    cluster.settle().await;
    // Two copies go bad, and who has the third is away.
    for node in &cluster.nodes[..2] {
        flip(&cluster.place, node.root.path(), &data, 5);
        flip(&cluster.place, node.root.path(), &small, 5);
        node.scrub.pass().await;
    }
    cluster.nodes[2].server = None;
    let blobs = Arc::clone(&cluster.nodes[0].blobs);
    blobs.mend_all().await;
    let stands = |damage| vec![(digest.min(digest_of(&small)), damage), (digest.max(digest_of(&small)), damage)];
    assert_eq!(blobs.health().list(), stands(Damage::Waiting), "it may be back");
    // Away for good, as far as the registry knows.
    cluster.ledger.addresses.lock().unwrap().remove(&NodeId(3));
    blobs.mend_all().await;
    assert_eq!(blobs.health().list(), stands(Damage::Lost));
    assert_eq!(blobs.health().totals().lost, 2);
    assert!(matches!(read_all(&blobs, digest).await, Err(BlobError::Absent(_))), "never wrong bytes");
    // Somebody brings it again.
    blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
    blobs.mend_all().await;
    assert_eq!(blobs.health().list(), [(digest_of(&small), Damage::Lost)]);
}

async fn what_nothing_names_is_not_mourned(place: Place) {
    let cluster = cluster(1, Duration::ZERO, place).await;
    hurry(&cluster);
    let data = bytes_of(5, 300_000);
    cluster.nodes[0].blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
    cluster.settle().await;
    flip(&cluster.place, cluster.nodes[0].root.path(), &data, 5);
    cluster.nodes[0].scrub.pass().await;
    assert_eq!(cluster.nodes[0].blobs.health().totals().waiting, 1);
    // While the registry cannot be asked, it may be named.
    cluster.ledger.reachable.store(false, std::sync::atomic::Ordering::SeqCst);
    cluster.nodes[0].blobs.mend_all().await;
    assert_eq!(cluster.nodes[0].blobs.health().list().len(), 1);
    cluster.ledger.reachable.store(true, std::sync::atomic::Ordering::SeqCst);
    cluster.nodes[0].blobs.mend_all().await;
    assert_eq!(cluster.nodes[0].blobs.health().list(), []);
}

async fn a_copy_that_is_another_blob_is_found_by_its_name(place: Place) {
    let cluster = cluster(3, LEASE, place).await;
    hurry(&cluster);
    let (data, other) = (bytes_of(5, 300_000), bytes_of(6, 300_000));
    for data in [&data, &other] {
        assert_eq!(cluster.nodes[0].blobs.put(announce(data, 3), chunks(data)).await.unwrap().len(), 3);
        name(&cluster, data);
    }
    cluster.settle().await;
    // Sound checksums, wrong name.
    for node in &cluster.nodes[..2] {
        let of = |data| cluster.place.file_of(node.root.path(), &digest_of(data));
        std::fs::copy(of(&other), of(&data)).unwrap();
        if cluster.place.is_bucket() {
            swap_tails(node.root.path(), &digest_of(&other), &digest_of(&data));
        }
    }
    let blobs = &cluster.nodes[0].blobs;
    cluster.nodes[0].scrub.pass().await;
    assert_eq!(blobs.health().list(), [(digest_of(&data), Damage::Waiting)]);
    // Whoever is asked first, the copy that is not what it should be is refused, and the third is taken.
    blobs.mend_all().await;
    assert_eq!(blobs.health().totals().repaired, 1);
    assert_eq!(read_all(blobs, digest_of(&data)).await.unwrap(), data);
}

async fn what_was_set_aside_for_an_error_that_has_passed_is_put_back(place: Place) {
    let mut cluster = cluster(1, LEASE, place).await;
    hurry(&cluster);
    let data = bytes_of(5, 300_000);
    let digest = digest_of(&data);
    let node = cluster.nodes.pop().unwrap();
    node.blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
    name(&cluster, &data);
    cluster.place.settle(node.blobs.store()).await;
    let damaged = node.root.path().join("damaged");
    let object = cluster.place.is_bucket().then(|| cluster.place.file_of(node.root.path(), &digest));
    let aside = damaged.join(if object.is_some() { format!("{digest}.marker") } else { digest.to_string() });
    let right_again = || {
        let file = std::fs::File::options().write(true).open(object.as_ref().unwrap_or(&aside)).unwrap();
        file.write_all_at(&data[5..6], 5).unwrap();
    };
    flip(&cluster.place, node.root.path(), &data, 5);
    node.scrub.pass().await;
    assert!(aside.exists());
    right_again();
    node.blobs.mend_all().await;
    assert_eq!((node.blobs.health().totals().repaired, node.blobs.health().list()), (1, Vec::new()));
    assert_eq!(read_all(&node.blobs, digest).await.unwrap(), data);

    // Nothing else has it: it is given up, kept, and looked for again by the next life of this node.
    flip(&cluster.place, node.root.path(), &data, 5);
    node.scrub.pass().await;
    node.blobs.mend_all().await;
    assert_eq!(node.blobs.health().list(), [(digest, Damage::Lost)]);
    node.blobs.store().remove_stale_uploads().await.unwrap();
    let (next, _) =
        BlobStore::open(node.root.path(), LEASE, cluster.place.open(node.root.path()).map(Arc::new)).unwrap();
    assert_eq!(next.health().list(), [(digest, Damage::Waiting)]);
    assert!(!next.reinstate(digest).await.unwrap());
    right_again();
    assert!(next.reinstate(digest).await.unwrap());
    assert_eq!(next.size(&digest), Some(300_000));
}

#[tokio::test]
async fn a_small_blob_that_was_set_aside_is_put_back_or_given_up() {
    let cluster = cluster(1, Duration::ZERO, Place::files()).await;
    hurry(&cluster);
    let data = bytes_of(5, 900);
    let (digest, node) = (digest_of(&data), &cluster.nodes[0]);
    node.blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
    name(&cluster, &data);
    let (path, at) = place_of(&cluster.place, node.root.path(), &data);
    let right_again = || {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&data, at).unwrap();
    };
    flip(&cluster.place, node.root.path(), &data, 5);
    node.scrub.pass().await;
    assert_eq!(node.blobs.store().size(&digest), None);
    right_again();
    node.blobs.mend_all().await;
    assert_eq!((node.blobs.health().totals().repaired, node.blobs.health().list()), (1, Vec::new()));
    assert_eq!(read_all(&node.blobs, digest).await.unwrap(), data);

    // The next life of this node looks at it again, too.
    flip(&cluster.place, node.root.path(), &data, 5);
    let (next, damaged) = BlobStore::open(node.root.path(), LEASE, None).unwrap();
    assert_eq!((next.size(&digest), damaged), (None, vec![digest]));
    right_again();
    assert!(next.reinstate(digest).await.unwrap());
    drop(next);

    // An error of the disk that lasts is told as a loss, and the disk is not asked again and again.
    let open = std::fs::OpenOptions::new();
    node.blobs.store().small.reopen(open.clone().write(true));
    node.scrub.pass().await;
    node.blobs.mend_all().await;
    assert_eq!(node.blobs.health().list(), [(digest, Damage::Lost)]);
    node.blobs.store().small.reopen(open.clone().read(true).write(true));
    assert!(node.blobs.store().reinstate(digest).await.unwrap());
    node.blobs.mend_all().await;
    assert_eq!(node.blobs.health().list(), []);

    // Nothing names it any more: its bytes may go.
    flip(&cluster.place, node.root.path(), &data, 5);
    node.scrub.pass().await;
    cluster.ledger.named.lock().unwrap().clear();
    node.blobs.mend_all().await;
    assert_eq!(node.blobs.health().list(), []);
    right_again();
    assert!(!node.blobs.store().reinstate(digest).await.unwrap());
}
