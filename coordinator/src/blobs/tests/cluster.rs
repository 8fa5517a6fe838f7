//! Several coordinators.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use helix_common::status::is_worth_beginning_anew;
use helix_model::limits::CHUNK_BYTES;
use helix_model::placement::rendezvous;
use helix_proto::v1::blob_service_server::BlobServiceServer;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Server as TonicServer;

use super::*;
use crate::plane::recorded::{Ledger, Recorded, Server, listen, serve};
use crate::rpc::blob::BlobRpc;

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) root: TempDir,
    pub(super) blobs: Arc<Blobs>,
    pub(super) collection: Collection,
    pub(super) scrub: Scrub,
    pub(super) server: Option<Server>,
}

pub(super) struct Cluster {
    pub(super) ledger: Arc<Ledger>,
    pub(super) nodes: Vec<Node>,
    pub(super) place: Place,
}

pub(super) async fn cluster(size: u64, lease: Duration, place: Place) -> Cluster {
    let ledger = Ledger::new();
    let mut nodes = Vec::new();
    for id in 1..=size {
        nodes.push(node(id, tempfile::tempdir().unwrap(), lease, &ledger, &place));
    }
    Cluster { ledger, nodes, place }
}

/// One more, with what lies beneath `root`.
fn node(id: u64, root: TempDir, lease: Duration, ledger: &Arc<Ledger>, place: &Place) -> Node {
    let listener = listen(id, ledger);
    let Opened { blobs, collection, scrub, .. } =
        Blobs::open_with(root.path(), Recorded::new(id, ledger), lease, place.open(root.path())).unwrap();
    let service = BlobServiceServer::new(BlobRpc::new(Arc::clone(&blobs)))
        .max_decoding_message_size(helix_model::limits::MESSAGE_BYTES_MAX);
    let server = serve(listener, TonicServer::builder().add_service(service));
    Node { id: NodeId(id), root, blobs, collection, scrub, server: Some(server) }
}

impl Cluster {
    fn client(&self, node: usize) -> BlobServiceClient<Channel> {
        let plane = Recorded::new(99, &self.ledger);
        BlobServiceClient::new(plane.bulk(self.nodes[node].id).unwrap())
    }

    /// Moves all large blobs to where they lie in this test.
    pub(super) async fn settle(&self) {
        for node in &self.nodes {
            self.place.settle(node.blobs.store()).await;
        }
    }

    fn by_id(&self, id: NodeId) -> &Node {
        self.nodes.iter().find(|node| node.id == id).unwrap()
    }
}

in_both_places! {
    a_blob_is_stored_here_and_on_the_first_peers_in_its_order,
    copies_on_nodes_without_a_vote_do_not_count,
    a_lost_or_damaged_copy_is_read_elsewhere_and_repaired,
    a_reader_goes_on_elsewhere_when_its_holder_dies,
    only_what_is_unnamed_unleased_and_old_is_collected,
    a_leased_blob_stays,
    the_wire_stores_resumes_and_serves,
}

pub(super) const LEASE: Duration = Duration::from_secs(3600);

fn requests(data: &Bytes, copies: u32, offset: usize) -> Vec<v1::PutBlobRequest> {
    let header = v1::PutBlobHeader {
        sha256: digest_of(data).0.to_vec().into(),
        size: data.len() as u64,
        offset: offset as u64,
        copies,
    };
    let mut out = vec![v1::PutBlobRequest { part: Some(v1::put_blob_request::Part::Header(header)) }];
    for at in (offset..data.len()).step_by(CHUNK_BYTES) {
        let part = data.slice(at..data.len().min(at + CHUNK_BYTES));
        out.push(v1::PutBlobRequest { part: Some(v1::put_blob_request::Part::Data(part)) });
    }
    out
}

fn others(cluster: &Cluster, digest: &Digest, own: NodeId) -> Vec<NodeId> {
    let nodes = cluster.nodes.iter().map(|node| node.id).filter(|node| *node != own);
    rendezvous(&digest.0, nodes)
}

async fn a_blob_is_stored_here_and_on_the_first_peers_in_its_order(place: Place) {
    let cluster = cluster(4, LEASE, place).await;
    for len in [10, 65_536, 65_537, 3_000_000] {
        let data = bytes_of(len as u64, len);
        let digest = digest_of(&data);
        let holders = cluster.nodes[0].blobs.put(announce(&data, 3), chunks(&data)).await.unwrap();
        let order = others(&cluster, &digest, NodeId(1));
        assert_eq!(holders, BTreeSet::from([NodeId(1), order[0], order[1]]), "{len} bytes");
        for node in &cluster.nodes {
            assert_eq!(node.blobs.store().size(&digest).is_some(), holders.contains(&node.id), "{len} bytes");
        }
        let seen = cluster.nodes[3].blobs.head(&[digest]).await;
        assert_eq!(seen, [Presence { size: len as u64, holders }]);
        cluster.settle().await;
        // Read where it is not.
        let without = cluster.by_id(order[2]);
        assert_eq!(read_all(&without.blobs, digest).await.unwrap(), data);
        assert_eq!(without.blobs.read_range(digest, 5, 3).await.unwrap(), data[5..8]);
    }
}

async fn copies_on_nodes_without_a_vote_do_not_count(place: Place) {
    let cluster = cluster(4, LEASE, place).await;
    cluster.ledger.learners.lock().unwrap().extend([NodeId(1), NodeId(2)]);
    for len in [10, 100_000] {
        let data = bytes_of(900 + len as u64, len);
        let holders = cluster.nodes[0].blobs.put(announce(&data, 2), chunks(&data)).await.unwrap();
        assert_eq!(holders, BTreeSet::from([1, 3, 4].map(NodeId)), "it was put where nothing counts, and {len} bytes");
        cluster.settle().await;
        // Whoever stores something is told of those that count.
        let digest = digest_of(&data);
        let mut client = cluster.client(0);
        for (local, expected) in [(false, vec![3, 4]), (true, vec![1])] {
            let asked = v1::HeadBlobsRequest { sha256: vec![digest.0.to_vec().into()], local };
            let seen = client.head_blobs(asked).await.unwrap().into_inner().blobs.remove(0);
            assert_eq!((seen.present, seen.holders), (true, expected));
        }
        let put = client.put_blob(futures::stream::iter(requests(&data, 2, 0))).await.unwrap().into_inner();
        assert_eq!(put.holders, [3, 4]);
        let small = v1::SmallBlob { sha256: digest_of(b"small").0.to_vec().into(), data: Bytes::from_static(b"small") };
        let request = v1::PutSmallBlobsRequest { blobs: vec![small], copies: 2 };
        let put = client.put_small_blobs(request).await.unwrap().into_inner();
        assert_eq!(put.blobs[0].holders, [3, 4]);
        // Read and copied from there all the same.
        // With twice the reserve there is room for what somebody waits for, and not for more copies.
        let reserve = cluster.nodes[1].blobs.store().free_bytes().unwrap() / 2;
        cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = reserve;
        let spared = cluster.nodes[1].blobs.obtain(digest, true).await;
        assert!(matches!(spared, Err(BlobError::DiskReserve { .. })), "{spared:?}");
        assert_eq!(cluster.nodes[1].blobs.obtain(digest, false).await.unwrap(), len as u64);
        cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = 0;
        assert!(cluster.nodes[1].blobs.store().leased(None, 9).contains(&digest));
        assert_eq!(cluster.nodes[1].blobs.store().leased(Some(Digest([0xff; 32])), 9), []);
    }
}

#[tokio::test]
async fn a_spare_copy_is_not_taken_where_its_whole_size_would_not_leave_the_room() {
    let cluster = cluster(1, LEASE, Place::files()).await;
    let blobs = &cluster.nodes[0].blobs;
    let free = blobs.store().free_bytes().unwrap();
    // A peer says that it has one that takes most of that. It is a file without bytes, whose checksums only match each other.
    let (root, digest) = (tempfile::tempdir().unwrap(), digest_of(b"large"));
    let count = free / 10 * 7 / CHUNK_BYTES as u64;
    let size = count * CHUNK_BYTES as u64;
    let mut tail = vec![0; usize::try_from(count * 4).unwrap()];
    tail.extend_from_slice(&size.to_le_bytes());
    tail.extend_from_slice(&crc32fast::hash(&tail).to_le_bytes());
    tail.extend_from_slice(b"HELIXBLB");
    let path = file_of(root.path(), &digest);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(&path).unwrap().write_all_at(&tail, size).unwrap();
    let peer = node(2, root, LEASE, &cluster.ledger, &cluster.place);
    assert_eq!(peer.blobs.store().size(&digest), Some(size));
    // One byte of it would fit beside four times the reserve, all of it beside the reserve alone.
    cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = free / 8;
    let spared = blobs.obtain(digest, true).await;
    assert!(matches!(spared, Err(BlobError::DiskReserve { reserve, .. }) if reserve == free / 8 * 4), "{spared:?}");
}

#[tokio::test]
async fn a_peer_that_is_down_is_replaced_by_the_next() {
    let mut cluster = cluster(4, LEASE, Place::files()).await;
    for len in [10, 2_000_000] {
        let data = bytes_of(77 + len as u64, len);
        let order = others(&cluster, &digest_of(&data), NodeId(1));
        let down = usize::try_from(order[0].0).unwrap() - 1;
        cluster.nodes[down].server = None;
        let holders = cluster.nodes[0].blobs.put(announce(&data, 2), chunks(&data)).await.unwrap();
        let up: BTreeSet<_> = holders.iter().copied().filter(|id| cluster.by_id(*id).server.is_some()).collect();
        assert_eq!((holders.len(), up), (2, holders), "{len} bytes");
    }
    // With nobody left the answer is honest.
    cluster.nodes[1..].iter_mut().for_each(|node| node.server = None);
    let data = bytes_of(5, 10);
    let holders = cluster.nodes[0].blobs.put(announce(&data, 2), chunks(&data)).await.unwrap();
    assert_eq!(holders, BTreeSet::from([NodeId(1)]));
}

async fn a_lost_or_damaged_copy_is_read_elsewhere_and_repaired(place: Place) {
    let mut cluster = cluster(3, LEASE, place).await;
    let data = bytes_of(21, 1_500_000);
    let digest = digest_of(&data);
    cluster.nodes[0].blobs.put(announce(&data, 3), chunks(&data)).await.unwrap();
    cluster.settle().await;
    let path = cluster.place.file_of(cluster.nodes[0].root.path(), &digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1_000_000] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    // The first chunks are good and are served from here, the rest from a peer.
    assert_eq!(read_all(&cluster.nodes[0].blobs, digest).await.unwrap(), data);
    assert_eq!(cluster.nodes[0].blobs.store().size(&digest), None);
    let node = cluster.nodes.remove(0);
    let shutdown = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn(node.collection.run(Schedule::default(), shutdown.clone()));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while node.blobs.store().size(&digest).is_none() {
        assert!(tokio::time::Instant::now() < deadline, "no repair");
        tokio::task::yield_now().await;
    }
    shutdown.cancel();
    running.await.unwrap();
    cluster.nodes.iter_mut().for_each(|node| node.server = None);
    assert_eq!(read_all(&node.blobs, digest).await.unwrap(), data);
}

async fn a_reader_goes_on_elsewhere_when_its_holder_dies(place: Place) {
    let mut cluster = cluster(3, LEASE, place).await;
    let data = bytes_of(22, 8_000_000);
    let digest = digest_of(&data);
    for node in 1..3 {
        cluster.nodes[node].blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
    }
    cluster.settle().await;
    let mut reading = cluster.nodes[0].blobs.read(digest, 0, 0, Reach::Cluster).await.unwrap();
    let mut out = reading.next().await.unwrap().unwrap().to_vec();
    let source = reading.peer().unwrap();
    cluster.nodes.iter_mut().filter(|node| node.id == source).for_each(|node| {
        node.server = None;
        std::fs::remove_file(cluster.place.file_of(node.root.path(), &digest)).unwrap();
    });
    while let Some(chunk) = reading.next().await.unwrap() {
        out.extend_from_slice(&chunk);
    }
    assert_eq!(out, data);
}

async fn only_what_is_unnamed_unleased_and_old_is_collected(place: Place) {
    let mut cluster = cluster(1, Duration::ZERO, place).await;
    let data: Vec<_> = [100, 200, 100_000, 200_000].map(|len| bytes_of(len, usize::try_from(len).unwrap())).into();
    for data in &data {
        cluster.nodes[0].blobs.put(announce(data, 1), chunks(data)).await.unwrap();
    }
    cluster.settle().await;
    cluster.ledger.named.lock().unwrap().extend([digest_of(&data[0]), digest_of(&data[2])]);
    let objects = || cluster.place.endpoint.as_ref().map(|endpoint| endpoint.objects().len());
    assert_eq!(objects(), cluster.place.endpoint.as_ref().map(|_| 2));
    let node = &mut cluster.nodes[0];
    let held = |node: &Node| data.iter().filter(|data| node.blobs.store().size(&digest_of(data)).is_some()).count();
    // Young.
    assert_eq!((node.collection.pass(LEASE).await, node.collection.pass(LEASE).await), (0, 0));
    // The registry does not answer.
    cluster.ledger.reachable.store(false, std::sync::atomic::Ordering::SeqCst);
    let age = Duration::ZERO;
    assert_eq!((node.collection.pass(age).await, node.collection.pass(age).await), (0, 0));
    cluster.ledger.reachable.store(true, std::sync::atomic::Ordering::SeqCst);
    // The first pass marks, the second removes.
    assert_eq!((node.collection.pass(age).await, held(node)), (0, 4));
    assert_eq!((node.collection.pass(age).await, held(node)), (2, 2));
    assert_eq!((node.collection.pass(age).await, node.collection.pass(age).await), (0, 0));
    assert_eq!(objects(), cluster.place.endpoint.as_ref().map(|_| 1), "the object goes with its blob");
}

async fn a_leased_blob_stays(place: Place) {
    let mut cluster = cluster(1, LEASE, place).await;
    for len in [100, 100_000] {
        let data = bytes_of(len, usize::try_from(len).unwrap());
        cluster.nodes[0].blobs.put(announce(&data, 1), chunks(&data)).await.unwrap();
        cluster.settle().await;
        let node = &mut cluster.nodes[0];
        assert_eq!((node.collection.pass(Duration::ZERO).await, node.collection.pass(Duration::ZERO).await), (0, 0));
        // Even when it is to be removed in this very moment.
        node.blobs.store().remove(digest_of(&data)).await.unwrap();
        assert_eq!(node.blobs.store().size(&digest_of(&data)), Some(len));
    }
    assert_eq!(cluster.place.endpoint.as_ref().map_or(1, |endpoint| endpoint.objects().len()), 1);
}

async fn the_wire_stores_resumes_and_serves(place: Place) {
    let cluster = cluster(2, LEASE, place).await;
    let mut client = cluster.client(0);
    let data = bytes_of(31, 5_000_000);
    let sha256 = Bytes::from(digest_of(&data).0.to_vec());
    // Cut off in the middle.
    let some = requests(&data, 0, 0).into_iter().take(8);
    let cut = client.put_blob(futures::stream::iter(some.collect::<Vec<_>>())).await;
    assert!(cut.is_err());
    let offset = client.upload_offset(v1::UploadOffsetRequest { sha256: sha256.clone() }).await.unwrap();
    let offset = usize::try_from(offset.into_inner().offset).unwrap();
    assert!(offset > 0 && offset < data.len(), "{offset}");
    let put = client.put_blob(futures::stream::iter(requests(&data, 0, offset))).await.unwrap().into_inner();
    assert_eq!(put.holders, [1, 2]);
    cluster.settle().await;
    // Again: answered at once, without the bytes.
    let header = requests(&data, 0, 0).into_iter().take(1).collect::<Vec<_>>();
    let again = client.put_blob(futures::stream::iter(header)).await.unwrap().into_inner();
    assert_eq!(again.holders, [1, 2]);

    let request = v1::GetBlobRequest { sha256: sha256.clone(), offset: 1_000_000, length: 3_000_000, local: false };
    let stream = client.get_blob(request).await.unwrap().into_inner();
    let body = stream.map(|message| message.map(|message| message.data));
    assert_eq!(all(body).await, data[1_000_000..4_000_000]);

    let small: Vec<_> = (0..20).map(|seed| bytes_of(seed, 1000)).collect();
    let blobs =
        small.iter().map(|data| v1::SmallBlob { sha256: digest_of(data).0.to_vec().into(), data: data.clone() });
    let request = v1::PutSmallBlobsRequest { blobs: blobs.collect(), copies: 2 };
    let put = client.put_small_blobs(request).await.unwrap().into_inner();
    assert_eq!(put.blobs.len(), 20);
    assert!(put.blobs.iter().all(|blob| blob.holders == [1, 2]));
    let asked = small.iter().map(|data| digest_of(data).0.to_vec().into()).chain([vec![0; 32].into()]);
    let heads = client.head_blobs(v1::HeadBlobsRequest { sha256: asked.collect(), local: false }).await.unwrap();
    let heads = heads.into_inner().blobs;
    assert!(heads[..20].iter().all(|blob| blob.present && blob.size == 1000 && blob.holders == [1, 2]));
    assert!(!heads[20].present && heads[20].holders.is_empty());
}

#[tokio::test]
async fn the_wire_refuses_with_stable_words() {
    let cluster = cluster(1, LEASE, Place::files()).await;
    cluster.ledger.policy.lock().unwrap().blob_bytes_max = 1_000_000;
    let mut client = cluster.client(0);
    let word = |status: Status| helix_common::status::error_code(&status).map_or("", helix_model::ErrorCode::as_str);

    let large = requests(&bytes_of(1, 1_000_001), 0, 0);
    assert_eq!(word(client.put_blob(futures::stream::iter(large)).await.unwrap_err()), "blob_too_large");
    let mut mismatched = requests(&bytes_of(2, 100_000), 0, 0);
    mismatched[1] = requests(&bytes_of(3, 100_000), 0, 0).remove(1);
    let refused = client.put_blob(futures::stream::iter(mismatched)).await.unwrap_err();
    assert!(!is_worth_beginning_anew(&refused));
    assert_eq!(word(refused), "digest_mismatch");
    // What an upload goes on from may be what is wrong: that is said, and gone.
    let data = bytes_of(2, 200_000);
    let part = cluster.nodes[0].root.path().join("uploads").join(format!("{}.part", digest_of(&data)));
    std::fs::write(&part, [0; 100_000]).unwrap();
    let refused = client.put_blob(futures::stream::iter(requests(&data, 0, 100_000))).await.unwrap_err();
    assert!(is_worth_beginning_anew(&refused) && !part.exists(), "{refused}");
    assert_eq!(word(refused), "digest_mismatch");
    cluster.ledger.policy.lock().unwrap().disk_reserve_bytes = u64::MAX / 2;
    let refused = client.put_blob(futures::stream::iter(requests(&bytes_of(4, 100_000), 0, 0))).await.unwrap_err();
    assert_eq!(word(refused), "disk_reserve");
    let absent = v1::GetBlobRequest { sha256: vec![1; 32].into(), ..Default::default() };
    assert_eq!(word(client.get_blob(absent).await.unwrap_err()), "artifact_unknown");
    // A name is 32 bytes and nothing else: no text that could be a path ever reaches a file.
    for name in [&b""[..], b"../../../../etc/passwd", &[0; 31], &[0; 33], "ab".repeat(32).as_bytes()] {
        let request = v1::GetBlobRequest { sha256: Bytes::copy_from_slice(name), ..Default::default() };
        assert_eq!(client.get_blob(request).await.unwrap_err().code(), Code::InvalidArgument);
        let request = v1::UploadOffsetRequest { sha256: Bytes::copy_from_slice(name) };
        assert_eq!(client.upload_offset(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let no_header = vec![v1::PutBlobRequest { part: None }];
    assert_eq!(client.put_blob(futures::stream::iter(no_header)).await.unwrap_err().code(), Code::InvalidArgument);
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn a_large_blob_passes_through_in_little_memory() {
    const SIZE: u64 = 512 << 20;
    let cluster = cluster(2, LEASE, Place::files()).await;
    let piece = bytes_of(41, CHUNK_BYTES);
    let mut hash = Sha256::new();
    let count = SIZE / CHUNK_BYTES as u64;
    (0..count).for_each(|_| hash.update(&piece));
    let digest = Digest(hash.finalize().into());
    let before = resident_bytes();
    let part = piece.clone();
    let stream = futures::stream::iter((0..count).map(move |_| Ok(part.clone())));
    let announce = Announce { digest, size: SIZE, offset: 0, copies: 2 };
    let holders = cluster.nodes[0].blobs.put(announce, stream).await.unwrap();
    assert_eq!(holders.len(), 2);
    std::fs::remove_file(file_of(cluster.nodes[0].root.path(), &digest)).unwrap();
    let mut reading =
        cluster.nodes[0].blobs.read(digest, 0, 0, Reach::Cluster).await.unwrap_or_else(|_| panic!("gone"));
    let mut seen = 0;
    while let Some(chunk) = reading.next().await.unwrap() {
        seen += chunk.len() as u64;
    }
    assert_eq!(seen, SIZE);
    // Other tests of this process take memory too: the bound is generous, and far below the blob.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < SIZE / 2, "{grown} bytes");
}
