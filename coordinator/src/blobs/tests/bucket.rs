//! Blobs on their way to a bucket and back: in parts, cut short at every step, met half-way, refused.

use super::cluster::{LEASE, cluster};
use super::endpoint::Fault;
use super::*;
use crate::blobs::bucket::BucketError;
use crate::blobs::large::Lies;
use crate::blobs::large::marker::{object_name, parse_object_name};
use crate::blobs::offload::MoveError;
use crate::blobs::store::blocking;

pub(super) const NOW: Moves = Moves { after: Duration::ZERO, recall: false };

pub(super) async fn upload(store: &Arc<BlobStore>, data: &Bytes) {
    let mut receiving = store.upload(digest_of(data), data.len() as u64, 0, room()).await.unwrap();
    let data = data.clone();
    blocking(move || {
        receiving.write(&data)?;
        receiving.finish()
    })
    .await
    .unwrap();
}

pub(super) fn open(place: &Place, root: &Path) -> (Arc<BlobStore>, Mover) {
    let bucket = place.open(root).map(Arc::new);
    let (store, damaged) = BlobStore::open(root, Duration::ZERO, bucket.clone()).unwrap();
    assert_eq!(damaged, []);
    (Arc::clone(&store), Mover::new(store, bucket.unwrap()))
}

async fn whole(store: &Arc<BlobStore>, digest: Digest) -> Result<Vec<u8>, BlobError> {
    let blob = store.read(digest).await?.ok_or(BlobError::Absent(digest))?;
    let mut out = Vec::new();
    while (out.len() as u64) < blob.size() {
        out.extend_from_slice(&blob.chunk(out.len() as u64).await?);
    }
    Ok(out)
}

pub(super) fn endpoint(place: &Place) -> &Endpoint {
    place.endpoint.as_ref().unwrap()
}

#[tokio::test]
async fn a_blob_goes_in_parts_and_comes_back_in_ranges() {
    let (place, root) = (Place::patient_bucket().await, tempfile::tempdir().unwrap());
    let (store, _) = open(&place, root.path());
    // One part, one part to the byte with its checksums, several, and several to the byte.
    let checksums = |len: usize| len.div_ceil(256 * 1024) * 4 + 20;
    let brim = (8 << 20) - checksums(8 << 20);
    for (seed, len) in
        [65_537, brim, brim + 1, (20 << 20) + 5, (16 << 20) - checksums(16 << 20)].into_iter().enumerate()
    {
        let data = bytes_of(seed as u64, len);
        let digest = digest_of(&data);
        upload(&store, &data).await;
        place.settle(&store).await;
        assert!(!file_of(root.path(), &digest).exists() && marker_of(root.path(), &digest).exists());
        let before = endpoint(&place).asked();
        assert_eq!(whole(&store, digest).await.unwrap(), data, "{len} bytes");
        // Whoever reads on asks for more at a time.
        assert!(
            endpoint(&place).asked() - before <= 5 + (len >> 22) as u64,
            "{} requests",
            endpoint(&place).asked() - before
        );
        let blob = store.read(digest).await.unwrap().unwrap();
        let middle = len / 2;
        assert!(data[middle..].starts_with(&blob.chunk(middle as u64).await.unwrap()));
        assert_eq!(blob.chunk(len as u64).await.unwrap(), Bytes::new());
    }
    let totals = store.totals();
    assert_eq!((totals.large, totals.bucket, endpoint(&place).objects().len()), (0, 5, 5));
}

#[tokio::test]
async fn what_was_cut_short_leaves_the_file_or_the_marker_and_its_object() {
    let (place, root) = (Place::patient_bucket().await, tempfile::tempdir().unwrap());
    let data = bytes_of(1, 700_000);
    let digest = digest_of(&data);
    let (store, mover) = open(&place, root.path());
    mover.check().await.unwrap();
    upload(&store, &data).await;
    let file = std::fs::read(file_of(root.path(), &digest)).unwrap();

    // The object is there, and nothing says so.
    let blob = store.large().read(&digest).unwrap().unwrap();
    store.bucket().unwrap().put(&object_name(&digest, 7), &blob).await.unwrap();
    drop((store, mover, blob));
    let (store, mover) = open(&place, root.path());
    assert_eq!(whole(&store, digest).await.unwrap(), data);
    assert_eq!((store.totals().large, endpoint(&place).objects().len()), (1, 1));
    // Young ones are left alone.
    assert_eq!(mover.remove_left_over(Duration::from_secs(3600)).await.unwrap(), 0);
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(endpoint(&place).objects().len(), 0);

    // Marker and file: the file counts, the marker goes, and the object is nobody's.
    assert!(mover.go(digest).await.unwrap());
    std::fs::write(file_of(root.path(), &digest), &file).unwrap();
    drop((store, mover));
    let (store, mover) = open(&place, root.path());
    assert_eq!((store.totals().large, store.totals().bucket), (1, 0));
    assert!(!marker_of(root.path(), &digest).exists());
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(whole(&store, digest).await.unwrap(), data);

    // A marker that was half-written under its other name.
    let half = marker_of(root.path(), &digest).with_file_name(format!(".{digest}.1.1.tmp"));
    std::fs::write(&half, b"half").unwrap();
    // Moved, and restarted: it is there, read from the bucket, as old as before.
    assert!(mover.go(digest).await.unwrap());
    drop((store, mover));
    let (store, mover) = open(&place, root.path());
    assert!(!half.exists());
    assert_eq!((store.totals().large, store.totals().bucket, store.totals().bucket_bytes), (0, 1, 700_000));
    assert_eq!(whole(&store, digest).await.unwrap(), data);
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 0, "what a marker names stays");

    // The marker went and the object did not: the blob is gone, and so is the object in the end.
    endpoint(&place).fails_with(Fault::Internal);
    store.remove(digest).await.unwrap();
    endpoint(&place).fails_with(Fault::None);
    assert_eq!((store.size(&digest), endpoint(&place).objects().len()), (None, 1));
    drop((store, mover));
    let (store, mover) = open(&place, root.path());
    assert_eq!(store.size(&digest), None);
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 1);
}

#[tokio::test]
async fn a_blob_that_goes_or_comes_again_while_it_is_moved_is_not_lost() {
    let (place, root) = (Place::patient_bucket().await, tempfile::tempdir().unwrap());
    let data = bytes_of(2, 300_000);
    let digest = digest_of(&data);
    let (store, mover) = open(&place, root.path());
    mover.check().await.unwrap();
    upload(&store, &data).await;
    let tail = || store.large().read(&digest).unwrap().unwrap();
    // Removed between object and marker.
    let blob = tail();
    store.remove(digest).await.unwrap();
    assert!(!store.large().went_to_bucket(&digest, 5, blob.tail()).unwrap());
    assert!(!marker_of(root.path(), &digest).exists());
    // Two uploads of the same: one ends and goes, then the other ends.
    let mut late = store.upload(digest, 300_000, 0, room()).await.unwrap();
    late.write(&data).unwrap();
    upload(&store, &data).await;
    assert!(mover.go(digest).await.unwrap());
    late.finish().unwrap();
    assert!(!marker_of(root.path(), &digest).exists());
    assert_eq!((store.totals().large, store.totals().bucket), (1, 0));
    // Goes again under another name; the first object is nobody's.
    assert!(mover.go(digest).await.unwrap());
    assert_eq!(endpoint(&place).objects().len(), 2);
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(whole(&store, digest).await.unwrap(), data);
    // An object that is being put is nobody's, and stays.
    let under_way = store.bucket().unwrap().begin(object_name(&digest, 9));
    store.bucket().unwrap().put(&under_way.name, &tail()).await.unwrap();
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 0);
    drop(under_way);
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 1);
}

#[tokio::test]
async fn a_file_that_is_damaged_does_not_go() {
    let (place, root) = (Place::patient_bucket().await, tempfile::tempdir().unwrap());
    let data = bytes_of(3, 300_000);
    let (store, mover) = open(&place, root.path());
    mover.check().await.unwrap();
    upload(&store, &data).await;
    let mut bytes = std::fs::read(file_of(root.path(), &digest_of(&data))).unwrap();
    bytes[280_000] ^= 1;
    std::fs::write(file_of(root.path(), &digest_of(&data)), bytes).unwrap();
    assert!(!mover.go(digest_of(&data)).await.unwrap());
    assert_eq!((store.size(&digest_of(&data)), endpoint(&place).objects().len()), (None, 0));
    assert_eq!(store.health().totals().found, 1);
    assert!(!store.bucket().unwrap().totals().failing, "that is no fault of the bucket");
}

#[tokio::test]
async fn blobs_go_when_they_are_old_enough_or_the_disk_presses() {
    let cluster = cluster(1, LEASE, Place::bucket().await).await;
    let node = &cluster.nodes[0].blobs;
    let data: Vec<_> = (20..23).map(|seed| bytes_of(seed, 200_000)).collect();
    for (at, data) in data.iter().enumerate() {
        node.put(announce(data, 1), chunks(data)).await.unwrap();
        let age = Duration::from_secs(1000 * (3 - at as u64));
        let file = file_of(cluster.nodes[0].root.path(), &digest_of(data));
        std::fs::File::options().append(true).open(file).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }
    // Ages are read at start.
    let plane = crate::plane::recorded::Recorded::new(1, &cluster.ledger);
    let root = cluster.nodes[0].root.path();
    let again = Blobs::open_with(root, plane, LEASE, cluster.place.open(root)).unwrap();
    let (store, mut offload) = (Arc::clone(again.blobs.store()), again.offload.unwrap());
    let lies = |data: &Bytes| store.large().read(&digest_of(data)).unwrap().unwrap().lies() != Lies::Here;
    let after = |secs| Moves { after: Duration::from_secs(secs), recall: false };
    cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = 0;
    assert_eq!(offload.pass(after(5000)).await.unwrap(), 0);
    assert_eq!(offload.pass(after(1500)).await.unwrap(), 2);
    assert_eq!(data.iter().map(lies).collect::<Vec<_>>(), [true, true, false]);
    let free = store.free_bytes().unwrap();
    cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = free / 2 + (1 << 30);
    assert_eq!(offload.pass(after(5000)).await.unwrap(), 1);
    // All of it back, and the objects are nobody's.
    cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = 0;
    assert_eq!(offload.pass(Moves { recall: true, ..NOW }).await.unwrap(), 3);
    assert_eq!((store.totals().large, store.totals().bucket), (3, 0));
    endpoint(&cluster.place).fails_with(Fault::Silent);
    for data in &data {
        assert_eq!(read_all(&again.blobs, digest_of(data)).await.unwrap(), *data);
        assert!(!marker_of(root, &digest_of(data)).exists());
    }
    endpoint(&cluster.place).fails_with(Fault::None);
    let mover = Mover::new(Arc::clone(&store), Arc::clone(store.bucket().unwrap()));
    assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 3);
}

#[tokio::test]
async fn blobs_that_never_go_do_not_keep_the_others() {
    let cluster = cluster(1, LEASE, Place::patient_bucket().await).await;
    let node = &cluster.nodes[0].blobs;
    let data: Vec<_> = (30..35).map(|seed| bytes_of(seed, 100_000)).collect();
    for data in &data {
        node.put(announce(data, 1), chunks(data)).await.unwrap();
    }
    let mut offload = Offload::new(Arc::clone(node), Arc::clone(node.store().bucket().unwrap()));
    let deny = |digests: &[Digest]| {
        endpoint(&cluster.place).fails_with(Fault::DeniedTo(digests.iter().map(Digest::to_string).collect()));
    };
    let lie = || (node.store().totals().large, node.store().totals().bucket);
    let digests: Vec<_> = data.iter().map(|data| digest_of(data)).collect();
    // So many in a row end a pass, and the next begins behind them.
    deny(&digests[..3]);
    for expected in [(5, 0), (3, 2)] {
        assert!(matches!(offload.pass(NOW).await, Err(MoveError::Bucket(BucketError::Refused(_)))));
        assert_eq!(lie(), expected);
    }
    deny(&digests[..1]);
    assert!(matches!(offload.pass(NOW).await, Err(MoveError::Bucket(BucketError::Refused(_)))));
    assert_eq!(lie(), (1, 4));
    // A bucket that takes none is not asked for each of them.
    let more: Vec<_> = (40..60).map(|seed| bytes_of(seed, 100_000)).collect();
    for data in &more {
        node.put(announce(data, 1), chunks(data)).await.unwrap();
    }
    endpoint(&cluster.place).fails_with(Fault::DeniedTo(vec!["sha256/".to_owned()]));
    let before = endpoint(&cluster.place).asked();
    assert!(offload.pass(NOW).await.is_err());
    let asked = endpoint(&cluster.place).asked() - before;
    assert!(asked < 10, "{asked} requests");
    endpoint(&cluster.place).fails_with(Fault::None);
    assert_eq!(offload.pass(NOW).await.unwrap(), 21);
    // Nor do those that it does not give keep the others there.
    deny(&node.store().large().in_bucket()[..3]);
    for expected in [(0, 25), (22, 3)] {
        assert!(offload.pass(Moves { recall: true, ..NOW }).await.is_err());
        assert_eq!(lie(), expected);
    }
}

#[tokio::test]
async fn what_is_on_its_way_out_is_not_taken_for_stale() {
    let (place, root) = (Place::patient_bucket().await, tempfile::tempdir().unwrap());
    let (store, _) = open(&place, root.path());
    let digest = digest_of(b"old");
    let [part, trash] = ["part", "7.trash"].map(|it| root.path().join("uploads").join(format!("{digest}.{it}")));
    let long_ago = SystemTime::now() - Duration::from_secs(2 * 86_400);
    for path in [&part, &trash] {
        std::fs::File::create(path).unwrap().set_modified(long_ago).unwrap();
    }
    store.remove_stale_uploads().await.unwrap();
    // Whoever is about to remove it has just given it its name.
    assert!(!part.exists() && trash.exists());
}

#[tokio::test]
async fn a_put_that_fails_leaves_the_file_and_can_be_repeated() {
    let (place, root) = (Place::bucket().await, tempfile::tempdir().unwrap());
    let data = bytes_of(12, (20 << 20) + 3);
    let digest = digest_of(&data);
    let (store, mover) = open(&place, root.path());
    mover.check().await.unwrap();
    upload(&store, &data).await;
    for fault in [Fault::Internal, Fault::Denied, Fault::Silent] {
        endpoint(&place).fails_with(fault);
        let error = mover.go(digest).await.unwrap_err();
        assert!(matches!(error, MoveError::Bucket(BucketError::Away(_) | BucketError::Refused(_))), "{error}");
        assert!(file_of(root.path(), &digest).exists() && !marker_of(root.path(), &digest).exists());
    }
    endpoint(&place).fails_with(Fault::None);
    assert!(mover.go(digest).await.unwrap());
    assert_eq!(whole(&store, digest).await.unwrap(), data);
}

#[test]
fn names_of_objects_are_read_as_they_are_made_and_no_other() {
    let digest = digest_of(b"x");
    let name = object_name(&digest, 0x1f);
    assert_eq!(parse_object_name(&name), Some((digest, 0x1f)));
    let hex = digest.to_string();
    for other in [
        String::new(),
        hex.clone(),
        format!("{hex}.1f"),
        format!("sha256/{}/{hex}", &hex[..2]),
        format!("sha256/{}/{hex}.1f", &hex[..2]),
        format!("sha256/zz/{hex}.000000000000001f"),
        name.to_uppercase(),
        format!("{name}.tmp"),
        format!("x/{name}"),
    ] {
        assert_eq!(parse_object_name(&other), None, "{other}");
    }
}
