//! One coordinator's store.

use std::os::unix::fs::FileExt;

use super::*;
use crate::blobs::frame::FrameHeader;
use crate::blobs::store::blocking;

const HOUR: Duration = Duration::from_secs(3600);

fn open(root: &Path) -> (Arc<BlobStore>, Vec<Digest>) {
    BlobStore::open(root, HOUR, None).unwrap()
}

fn open_in(place: &Place, root: &Path) -> Arc<BlobStore> {
    BlobStore::open(root, HOUR, place.open(root).map(Arc::new)).unwrap().0
}

in_both_places! {
    an_upload_goes_on_where_it_stopped_even_after_a_restart,
    uploads_of_one_blob_at_a_time_do_not_harm_each_other,
    a_flipped_byte_of_a_large_blob_is_never_served,
}

async fn put(store: &Arc<BlobStore>, data: &Bytes) -> Digest {
    let digest = digest_of(data);
    store.put_small(vec![(digest, data.clone())], room()).await.unwrap();
    digest
}

async fn get(store: &Arc<BlobStore>, digest: Digest) -> Option<Bytes> {
    let blob = store.read(digest).await.unwrap()?;
    Some(blob.chunk(0).await.unwrap())
}

async fn upload(store: &Arc<BlobStore>, data: &Bytes) -> Result<(), BlobError> {
    let mut receiving = store.upload(digest_of(data), data.len() as u64, 0, room()).await?;
    let data = data.clone();
    blocking(move || {
        receiving.write(&data)?;
        receiving.finish()
    })
    .await
}

fn only_segment(root: &Path) -> std::path::PathBuf {
    let mut paths = segments(root);
    assert_eq!(paths.len(), 1);
    paths.remove(0)
}

#[tokio::test]
async fn small_blobs_survive_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let data: Vec<_> = (0..50).map(|seed| bytes_of(seed, 100 + usize::try_from(seed).unwrap() * 1000)).collect();
    let (store, damaged) = open(root.path());
    assert!(damaged.is_empty());
    for data in &data {
        put(&store, data).await;
    }
    put(&store, &Bytes::new()).await;
    drop(store);
    let (store, damaged) = open(root.path());
    assert!(damaged.is_empty());
    for data in data.iter().chain([&Bytes::new()]) {
        assert_eq!(get(&store, digest_of(data)).await.as_ref(), Some(data));
    }
    assert_eq!(get(&store, digest_of(b"never put")).await, None);
}

#[tokio::test]
async fn a_commit_torn_at_any_byte_loses_nothing_before_it() {
    let root = tempfile::tempdir().unwrap();
    let (first, second) = (bytes_of(1, 40), bytes_of(2, 50));
    let (store, _) = open(root.path());
    put(&store, &first).await;
    let path = only_segment(root.path());
    let before = std::fs::metadata(&path).unwrap().len();
    put(&store, &second).await;
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    for cut in usize::try_from(before).unwrap()..whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let (store, damaged) = open(root.path());
        assert!(damaged.is_empty());
        assert_eq!(get(&store, digest_of(&first)).await, Some(first.clone()), "cut at {cut}");
        assert_eq!(store.size(&digest_of(&second)), None, "cut at {cut}");
        drop(store);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), before, "the torn end is cut off");
    }
    for cut in 0..12 {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let (store, _) = open(root.path());
        put(&store, &first).await;
        drop(store);
        let (store, _) = open(root.path());
        assert_eq!(get(&store, digest_of(&first)).await, Some(first.clone()), "header cut at {cut}");
        drop(store);
        std::fs::remove_dir_all(root.path().join("segments")).unwrap();
        std::fs::create_dir(root.path().join("segments")).unwrap();
    }
}

#[tokio::test]
async fn a_flipped_byte_costs_one_small_blob_and_is_never_served() {
    let root = tempfile::tempdir().unwrap();
    let data: Vec<_> = (0..3).map(|seed| bytes_of(seed, 30)).collect();
    let (store, _) = open(root.path());
    for data in &data {
        put(&store, data).await;
    }
    drop(store);
    let path = only_segment(root.path());
    let whole = std::fs::read(&path).unwrap();
    let frame = 60 + 30;
    for at in 12 + frame..12 + 2 * frame {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        std::fs::write(&path, &bytes).unwrap();
        let (store, damaged) = open(root.path());
        assert_eq!(get(&store, digest_of(&data[0])).await.as_ref(), Some(&data[0]), "byte {at}");
        assert_eq!(get(&store, digest_of(&data[1])).await, None, "byte {at}");
        assert_eq!(get(&store, digest_of(&data[2])).await.as_ref(), Some(&data[2]), "byte {at}");
        assert_eq!(damaged.len(), usize::from(at >= 12 + frame + 60), "damaged data is reported by name");
    }
    // Damaged while it is open: noticed when read, then absent, then stored again.
    std::fs::write(&path, &whole).unwrap();
    let (store, _) = open(root.path());
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"?", 12 + 60 + 5).unwrap();
    assert!(matches!(store.read(digest_of(&data[0])).await, Err(BlobError::Damaged(_))));
    assert_eq!(store.size(&digest_of(&data[0])), None);
    put(&store, &data[0]).await;
    assert_eq!(get(&store, digest_of(&data[0])).await.as_ref(), Some(&data[0]));
}

#[tokio::test]
async fn frames_in_a_blob_are_never_taken_for_what_they_say() {
    let root = tempfile::tempdir().unwrap();
    let (before, behind) = (bytes_of(1, 30), bytes_of(2, 30));
    let (name, other) = (digest_of(b"a name"), bytes_of(3, 40));
    // Other bytes under a name, bytes that are what their name says, a removal, and a header that hides all behind it.
    let mut data = bytes_of(4, 100).to_vec();
    for (digest, inner) in [(name, &other), (digest_of(&other), &other)] {
        FrameHeader::put(digest, inner, 0).encode(&mut data);
        data.extend_from_slice(inner);
    }
    FrameHeader::remove(digest_of(&before), 0).encode(&mut data);
    FrameHeader { len: 200, ..FrameHeader::put(name, b"", 0) }.encode(&mut data);
    let (store, _) = open(root.path());
    put(&store, &before).await;
    let path = only_segment(root.path());
    let at = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
    put(&store, &data.into()).await;
    let to = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
    put(&store, &behind).await;
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[at] ^= 1;
    for (bytes, is_behind) in [(&whole[..], true), (&damaged, true), (&whole[..to - 1], false)] {
        let searched = bytes != whole;
        std::fs::write(&path, bytes).unwrap();
        let (store, damaged) = open(root.path());
        assert_eq!(damaged, []);
        assert_eq!(get(&store, digest_of(&before)).await.as_ref(), Some(&before), "it was removed by what a blob says");
        assert_eq!(get(&store, digest_of(&behind)).await.is_some(), is_behind);
        assert_eq!(store.size(&name), None);
        assert_eq!(get(&store, digest_of(&other)).await.is_some(), searched, "that is what its name says");
    }
}

#[tokio::test]
async fn many_callers_share_an_fsync() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = open(root.path());
    let puts = (0..400).map(|seed| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { put(&store, &bytes_of(seed, 500)).await })
    });
    futures::future::join_all(puts).await.into_iter().for_each(|joined| assert!(joined.is_ok()));
    let totals = store.totals();
    assert_eq!(totals.small, 400);
    assert!(totals.segment_syncs < 200, "{} fsyncs for 400 blobs", totals.segment_syncs);
    // The same blob from many at once is one blob.
    let data = bytes_of(9999, 500);
    let same = (0..50).map(|_| put(&store, &data));
    futures::future::join_all(same).await;
    assert_eq!(store.totals().small, 401);
}

fn segments(root: &Path) -> Vec<std::path::PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(root.join("segments")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Two full segments, and a third that is written; what is in them. How much a segment takes depends on how writes were grouped.
async fn three_segments(store: &Arc<BlobStore>, root: &Path) -> Vec<Bytes> {
    let mut blobs = Vec::new();
    while segments(root).len() < 3 {
        assert!(blobs.len() < 3000, "segments take more than they should");
        let some: Vec<_> = (0..100).map(|seed| bytes_of(blobs.len() as u64 + seed, 64 * 1024)).collect();
        let batch = some.iter().map(|data| (digest_of(data), data.clone())).collect();
        store.put_small(batch, room()).await.unwrap();
        blobs.extend(some);
    }
    blobs
}

/// Removes all but every tenth.
async fn thin_out(store: &Arc<BlobStore>, blobs: &[Bytes]) {
    for data in blobs.iter().enumerate().filter(|(at, _)| at % 10 != 0).map(|(_, data)| data) {
        store.remove(digest_of(data)).await.unwrap();
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

async fn every_tenth_is_left(store: &Arc<BlobStore>, root: &Path, blobs: &[Bytes]) {
    for store in [Arc::clone(store), open(root).0] {
        for (at, data) in blobs.iter().enumerate() {
            let expected = (at % 10 == 0).then(|| data.clone());
            assert_eq!(get(&store, digest_of(data)).await, expected, "{at}");
        }
    }
}

#[tokio::test]
async fn what_was_removed_is_compacted_away_and_the_rest_stays() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = BlobStore::open(root.path(), Duration::ZERO, None).unwrap();
    let blobs = three_segments(&store, root.path()).await;
    thin_out(&store, &blobs).await;
    until("segments are compacted", || segments(root.path()).len() <= 2).await;
    every_tenth_is_left(&store, root.path(), &blobs).await;
}

#[tokio::test]
async fn compaction_destroys_nothing_that_it_cannot_read() {
    for disk_fails in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let (store, _) = BlobStore::open(root.path(), Duration::ZERO, None).unwrap();
        let blobs = three_segments(&store, root.path()).await;
        let full = &segments(root.path())[..2];
        let first = std::fs::OpenOptions::new().write(true).open(&full[0]).unwrap();
        // The first byte of the first blob, or all that lies there.
        if disk_fails {
            store.small.reopen(std::fs::OpenOptions::new().write(true));
        } else {
            first.write_all_at(&[!blobs[0][0]], 12 + 60).unwrap();
        }
        thin_out(&store, &blobs).await;
        let found = || store.health().totals().found;
        if disk_fails {
            // One of each: a disk that fails is not asked for more.
            until("both were given up", || found() == 2).await;
        } else {
            until("the other is compacted", || !full[1].exists()).await;
            assert_eq!(found(), 1);
        }
        assert!(full[0].exists());
        first.write_all_at(&blobs[0][..1], 12 + 60).unwrap();
        store.small.reopen(std::fs::OpenOptions::new().read(true).write(true));
        for (digest, _) in store.health().list() {
            assert!(store.reinstate(digest).await.unwrap(), "{digest} is not here any more");
        }
        // What was to be removed while it was set aside.
        thin_out(&store, &blobs).await;
        put(&store, &bytes_of(9999, 500)).await;
        until("both are compacted", || !full.iter().any(|path| path.exists())).await;
        every_tenth_is_left(&store, root.path(), &blobs).await;
    }
}

#[tokio::test]
async fn bytes_under_a_wrong_name_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = open(root.path());
    let wrong = digest_of(b"other");
    let small = store.put_small(vec![(wrong, Bytes::from_static(b"small"))], room()).await;
    assert!(matches!(small, Err(BlobError::Digest { resumed: false, .. })));
    let mut receiving = store.upload(wrong, 100_000, 0, room()).await.unwrap();
    let large = blocking(move || {
        receiving.write(&bytes_of(1, 100_000))?;
        receiving.finish()
    });
    assert!(matches!(large.await, Err(BlobError::Digest { .. })));
    assert_eq!((store.size(&wrong), store.upload_offset(wrong).await.unwrap()), (None, 0));
}

async fn an_upload_goes_on_where_it_stopped_even_after_a_restart(place: Place) {
    let root = tempfile::tempdir().unwrap();
    let data = bytes_of(7, 1_000_000);
    let digest = digest_of(&data);
    for stop in [1usize, 262_143, 262_144, 700_001] {
        let store = open_in(&place, root.path());
        let mut receiving = store.upload(digest, 1_000_000, 0, room()).await.unwrap();
        receiving.write(&data[..stop]).unwrap();
        drop(receiving);
        drop(store);
        let store = open_in(&place, root.path());
        let offset = store.upload_offset(digest).await.unwrap();
        assert_eq!(offset, stop as u64);
        let past = store.upload(digest, 1_000_000, offset + 1, room()).await;
        assert!(matches!(past.err(), Some(BlobError::Offset { have }) if have == offset));
        let mut receiving = store.upload(digest, 1_000_000, offset, room()).await.unwrap();
        assert_eq!(receiving.offset(), offset);
        receiving.write(&data[stop..]).unwrap();
        receiving.finish().unwrap();
        place.settle(&store).await;
        let blob = store.read(digest).await.unwrap().unwrap();
        assert_eq!(blob.chunk(0).await.unwrap(), data[..262_144]);
        assert_eq!(blob.chunk(999_999).await.unwrap(), data[999_999..]);
        drop(blob);
        drop(store);
        let held = if place.is_bucket() { marker_of(root.path(), &digest) } else { file_of(root.path(), &digest) };
        std::fs::remove_file(held).unwrap();
    }
}

#[tokio::test]
async fn a_resumed_upload_whose_first_part_rotted_says_so_and_begins_anew() {
    let root = tempfile::tempdir().unwrap();
    let data = bytes_of(8, 300_000);
    let digest = digest_of(&data);
    let (store, _) = open(root.path());
    let mut receiving = store.upload(digest, 300_000, 0, room()).await.unwrap();
    receiving.write(&data[..200_000]).unwrap();
    drop(receiving);
    std::fs::write(root.path().join("uploads").join(format!("{digest}.part")), vec![0; 200_000]).unwrap();
    let mut receiving = store.upload(digest, 300_000, 200_000, room()).await.unwrap();
    receiving.write(&data[200_000..]).unwrap();
    assert!(matches!(receiving.finish(), Err(BlobError::Digest { resumed: true, .. })));
    assert_eq!(store.upload_offset(digest).await.unwrap(), 0);
    upload(&store, &data).await.unwrap();
}

async fn uploads_of_one_blob_at_a_time_do_not_harm_each_other(place: Place) {
    let root = tempfile::tempdir().unwrap();
    let data = bytes_of(9, 400_000);
    let digest = digest_of(&data);
    let store = open_in(&place, root.path());
    let mut first = store.upload(digest, 400_000, 0, room()).await.unwrap();
    first.write(&data[..300_000]).unwrap();
    // A stranger with the same blob has a file of its own.
    upload(&store, &data).await.unwrap();
    place.settle(&store).await;
    first.write(&data[300_000..]).unwrap();
    first.finish().unwrap();
    // Whoever goes on where the first stopped takes over from it.
    let other = bytes_of(10, 400_000);
    let mut broken = store.upload(digest_of(&other), 400_000, 0, room()).await.unwrap();
    broken.write(&other[..100_000]).unwrap();
    let mut resumed = store.upload(digest_of(&other), 400_000, 100_000, room()).await.unwrap();
    assert!(matches!(broken.write(&other[100_000..]), Err(BlobError::TakenOver)));
    drop(broken);
    resumed.write(&other[100_000..]).unwrap();
    resumed.finish().unwrap();
    assert_eq!(std::fs::read_dir(root.path().join("uploads")).unwrap().count(), 0);
    // At once, from many.
    let data = bytes_of(11, 500_000);
    let uploads = (0..8).map(|_| {
        let (store, data) = (Arc::clone(&store), data.clone());
        tokio::spawn(async move { upload(&store, &data).await })
    });
    for outcome in futures::future::join_all(uploads).await {
        outcome.unwrap().unwrap();
    }
    assert_eq!(std::fs::read_dir(root.path().join("uploads")).unwrap().count(), 0);
    place.settle(&store).await;
    for data in [bytes_of(9, 400_000), other, data] {
        let blob = store.read(digest_of(&data)).await.unwrap().unwrap();
        assert_eq!(blob.chunk(0).await.unwrap(), data[..262_144]);
    }
}

#[test]
fn an_upload_that_ends_keeps_nobody_who_only_looks_until_it_is_durable() {
    let root = tempfile::tempdir().unwrap();
    let data = bytes_of(13, 100_000);
    let (store, _) = open(root.path());
    let looking = store.large().read_index();
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| {
            let mut upload = store.large().upload(digest_of(&data), 100_000, 0)?;
            upload.write(&data)?;
            upload.finish()
        });
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !file_of(root.path(), &digest_of(&data)).exists() {
            assert!(std::time::Instant::now() < deadline, "it waits for the index before it has its name");
            std::thread::yield_now();
        }
        assert!(!looking.contains_key(&digest_of(&data)));
        drop(looking);
        ending.join().unwrap().unwrap();
    });
    assert_eq!(store.size(&digest_of(&data)), Some(100_000));
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_the_first_byte() {
    let root = tempfile::tempdir().unwrap();
    let (store, _) = open(root.path());
    let small_room = Room { blob_bytes_max: 99_999, disk_reserve_bytes: 0 };
    let refused = store.upload(digest_of(b"x"), 100_000, 0, small_room).await;
    assert!(matches!(refused.err(), Some(BlobError::TooLarge { size: 100_000, max: 99_999 })));
    let full = Room { blob_bytes_max: u64::MAX, disk_reserve_bytes: u64::MAX / 2 };
    assert!(matches!(store.upload(digest_of(b"x"), 100_000, 0, full).await.err(), Some(BlobError::DiskReserve { .. })));
    let small = store.put_small(vec![(digest_of(b"x"), Bytes::from_static(b"x"))], full).await;
    assert!(matches!(small, Err(BlobError::DiskReserve { .. })));
    assert_eq!(std::fs::read_dir(root.path().join("uploads")).unwrap().count(), 0);
    let mut receiving = store.upload(digest_of(b"x"), 100_000, 0, room()).await.unwrap();
    assert!(matches!(receiving.write(&[0; 100_001]), Err(BlobError::Size { .. })));
}

async fn a_flipped_byte_of_a_large_blob_is_never_served(place: Place) {
    let root = tempfile::tempdir().unwrap();
    let data = bytes_of(12, 600_000);
    let digest = digest_of(&data);
    let store = open_in(&place, root.path());
    // What is behind the bytes is read from this node's disk, wherever they lie.
    let behind = [600_000u64, 600_011, 600_012, 600_031].into_iter().filter(|_| !place.is_bucket());
    for at in [0u64, 262_143, 262_144, 599_999].into_iter().chain(behind) {
        upload(&store, &data).await.unwrap();
        place.settle(&store).await;
        let path = place.file_of(root.path(), &digest);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let mut served = Vec::new();
        let outcome: Result<(), BlobError> = async {
            let blob = store.read(digest).await?.unwrap();
            while (served.len() as u64) < blob.size() {
                served.extend_from_slice(&blob.chunk(served.len() as u64).await?);
            }
            Ok(())
        }
        .await;
        assert!(matches!(outcome, Err(BlobError::Damaged(_))), "byte {at}: {outcome:?}");
        assert_eq!(served, data[..served.len()], "byte {at}");
        assert_eq!(store.size(&digest), None, "byte {at}");
        assert!(!file_of(root.path(), &digest).exists() && !marker_of(root.path(), &digest).exists());
        // Its object stays for whoever looks at it once more; the next has another name.
        if place.is_bucket() {
            std::fs::remove_file(path).unwrap();
        }
    }
}
