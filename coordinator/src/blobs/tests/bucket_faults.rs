//! What only a bucket can do to blobs: be away, refuse, hang, lose and lie.

use helix_common::identity::Role;
use helix_common::pki::{Authority, VALID_FOR_DEFAULT};
use helix_model::ErrorCode;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::bucket::{NOW, endpoint, open, upload};
use super::cluster::{Cluster, LEASE, cluster};
use super::endpoint::Fault;
use super::*;
use crate::blobs::offload::MoveError;

/// One node with a blob in the bucket, and one peer that has a copy in its own part.
async fn two_with_copies(data: &Bytes) -> Cluster {
    let cluster = cluster(2, LEASE, Place::bucket().await).await;
    assert_eq!(cluster.nodes[0].blobs.put(announce(data, 2), chunks(data)).await.unwrap().len(), 2);
    cluster.ledger.named.lock().unwrap().insert(digest_of(data));
    cluster.settle().await;
    cluster
}

#[tokio::test]
async fn while_the_bucket_is_away_blobs_are_taken_stay_and_are_read_elsewhere() {
    let data = bytes_of(4, 1_000_000);
    let digest = digest_of(&data);
    let mut cluster = two_with_copies(&data).await;
    // The peer's copy is on its own disk.
    let peer = Arc::clone(&cluster.nodes[1].blobs);
    let mover = Mover::new(Arc::clone(peer.store()), Arc::clone(peer.store().bucket().unwrap()));
    assert!(mover.bring_back(digest, room()).await.unwrap());
    let node = Arc::clone(&cluster.nodes[0].blobs);
    cluster.place.endpoint.as_mut().unwrap().close().await;

    assert_eq!(read_all(&node, digest).await.unwrap(), data, "the peer has it");
    let alone = node.read(digest, 0, 0, Reach::Local).await.unwrap().next().await;
    assert!(matches!(alone, Err(BlobError::Bucket(_))), "{alone:?}");
    // What is new is stored and acknowledged.
    let new = bytes_of(5, 500_000);
    assert_eq!(node.put(announce(&new, 2), chunks(&new)).await.unwrap().len(), 2);
    let mut offload = Offload::new(Arc::clone(&node), Arc::clone(node.store().bucket().unwrap()));
    assert!(matches!(offload.pass(NOW).await, Err(MoveError::Bucket(_))));
    assert_eq!(read_all(&node, digest_of(&new)).await.unwrap(), new);
    // Scrubbing and mending find nothing to do.
    cluster.ledger.policy.lock().unwrap().scrub_bytes = 1 << 40;
    cluster.nodes[0].scrub.pass().await;
    node.mend_all().await;
    let totals = node.health().totals();
    assert_eq!((totals.found, totals.waiting, totals.lost), (0, 0, 0), "a bucket that is away is not damage");
    assert!(marker_of(cluster.nodes[0].root.path(), &digest).exists());
    let bucket = node.store().bucket().unwrap().totals();
    assert!(bucket.failing && bucket.errors > 0);
    // The last copy: the reader is told that it is out of reach, not that there is none.
    cluster.nodes[1].server = None;
    let error = read_all(&node, digest).await.unwrap_err();
    assert!(matches!(error, BlobError::Bucket(_)), "{error}");
    let word = helix_common::status::error_code(&crate::rpc::blob::to_status(error));
    assert_eq!(word, Some(ErrorCode::BucketUnreachable));

    cluster.place.endpoint.as_mut().unwrap().reopen().await;
    assert_eq!(offload.pass(NOW).await.unwrap(), 1);
    assert!(!node.store().bucket().unwrap().totals().failing);
    assert_eq!(read_all(&node, digest).await.unwrap(), data);
    assert_eq!(read_all(&node, digest_of(&new)).await.unwrap(), new);
}

#[tokio::test]
async fn a_copy_out_of_reach_elsewhere_is_not_lost_either() {
    let data = bytes_of(6, 400_000);
    let digest = digest_of(&data);
    let cluster = two_with_copies(&data).await;
    let node = &cluster.nodes[0].blobs;
    std::fs::remove_file(cluster.place.file_of(cluster.nodes[0].root.path(), &digest)).unwrap();
    assert_eq!(read_all(node, digest).await.unwrap(), data);
    assert_eq!(node.health().list(), [(digest, Damage::Waiting)]);
    endpoint(&cluster.place).fails_with(Fault::Internal);
    node.mend_all().await;
    assert_eq!(node.health().list(), [(digest, Damage::Waiting)]);
    let error = read_all(node, digest).await.unwrap_err();
    let word = helix_common::status::error_code(&crate::rpc::blob::to_status(error));
    assert_eq!(word, Some(ErrorCode::BucketUnreachable));
    endpoint(&cluster.place).fails_with(Fault::None);
    node.mend_all().await;
    assert_eq!(node.health().list(), []);
    // The mended copy is here, and goes again.
    assert_eq!((node.store().totals().large, node.store().totals().bucket), (1, 0));
    cluster.settle().await;
    assert_eq!(read_all(node, digest).await.unwrap(), data);
}

#[tokio::test]
async fn no_answer_of_any_kind_is_taken_for_damage() {
    let data = bytes_of(7, 400_000);
    let digest = digest_of(&data);
    let cluster = two_with_copies(&data).await;
    let node = &cluster.nodes[0].blobs;
    let mover = Mover::new(Arc::clone(node.store()), Arc::clone(node.store().bucket().unwrap()));
    for (fault, code) in [
        (Fault::Internal, ErrorCode::BucketUnreachable),
        (Fault::Silent, ErrorCode::BucketUnreachable),
        (Fault::Denied, ErrorCode::BucketRefused),
        (Fault::NoBucket, ErrorCode::BucketRefused),
    ] {
        endpoint(&cluster.place).fails_with(fault.clone());
        let alone = node.read(digest, 0, 0, Reach::Local).await.unwrap().next().await;
        assert!(matches!(alone, Err(BlobError::Bucket(_))), "{fault:?}: {alone:?}");
        let error = mover.check().await.unwrap_err();
        assert_eq!(error.code(), code, "{fault:?}: {error}");
        assert_eq!(node.health().list(), [], "{fault:?}");
        assert_eq!(node.store().size(&digest), Some(400_000), "{fault:?}");
    }
    endpoint(&cluster.place).fails_with(Fault::None);
    // Another bucket of that name: all is missing there, and nothing is lost.
    endpoint(&cluster.place).empty();
    let error = mover.check().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::BucketRefused);
    assert!(error.to_string().contains("not the bucket that this node's blobs went to"), "{error}");
    let alone = node.read(digest, 0, 0, Reach::Local).await.unwrap().next().await;
    assert!(matches!(alone, Err(BlobError::Bucket(_))), "{alone:?}");
    assert_eq!((node.health().list(), node.store().totals().bucket), (vec![], 1));
}

#[tokio::test]
async fn a_stalled_reader_goes_on_elsewhere() {
    let data = bytes_of(8, 3_000_000);
    let digest = digest_of(&data);
    let cluster = two_with_copies(&data).await;
    let peer = &cluster.nodes[1].blobs;
    let mover = Mover::new(Arc::clone(peer.store()), Arc::clone(peer.store().bucket().unwrap()));
    assert!(mover.bring_back(digest, room()).await.unwrap());
    let mut reading = cluster.nodes[0].blobs.read(digest, 0, 0, Reach::Cluster).await.unwrap();
    let mut out = reading.next().await.unwrap().unwrap().to_vec();
    assert_eq!(reading.peer(), None);
    endpoint(&cluster.place).fails_with(Fault::Silent);
    while let Some(chunk) = reading.next().await.unwrap() {
        out.extend_from_slice(&chunk);
    }
    assert_eq!((out == data, reading.peer()), (true, Some(cluster.nodes[1].id)));
    assert_eq!(cluster.nodes[0].blobs.health().list(), []);
}

#[tokio::test]
async fn an_object_that_is_missing_short_long_or_flipped_is_damage() {
    let data = bytes_of(9, 600_000);
    let digest = digest_of(&data);
    let cluster = two_with_copies(&data).await;
    let node = &cluster.nodes[0].blobs;
    let hurts: [fn(&Path); 6] = [
        |path| std::fs::remove_file(path).unwrap(),
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(600_000).unwrap(),
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(300_000).unwrap(),
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap(),
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(700_000).unwrap(),
        |path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[599_999] ^= 0x20;
            std::fs::write(path, bytes).unwrap();
        },
    ];
    for (at, hurt) in hurts.into_iter().enumerate() {
        hurt(&cluster.place.file_of(cluster.nodes[0].root.path(), &digest));
        assert_eq!(read_all(node, digest).await.unwrap(), data, "{at}: the peer has it");
        assert_eq!(node.store().size(&digest), None, "{at}: it is served no more");
        assert_eq!(node.health().totals().found, at as u64 + 1);
        node.mend_all().await;
        assert_eq!(node.health().totals().repaired, at as u64 + 1);
        cluster.settle().await;
        assert_eq!(node.read(digest, 0, 0, Reach::Local).await.unwrap().size(), 600_000);
        // What was damaged is kept as long as what was set aside.
        let kept = cluster.nodes[0].root.path().join("damaged").join(format!("{digest}.marker"));
        std::fs::remove_file(kept).unwrap();
        let mover = Mover::new(Arc::clone(node.store()), Arc::clone(node.store().bucket().unwrap()));
        assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), usize::from(at > 0));
    }
}

#[tokio::test]
async fn a_damaged_marker_is_found_at_start_and_the_blob_mended() {
    let (place, root) = (Place::bucket().await, tempfile::tempdir().unwrap());
    let data = bytes_of(10, 300_000);
    let digest = digest_of(&data);
    let (store, mover) = open(&place, root.path());
    mover.check().await.unwrap();
    upload(&store, &data).await;
    assert!(mover.go(digest).await.unwrap());
    drop((store, mover));
    let marker = marker_of(root.path(), &digest);
    let sound = std::fs::read(&marker).unwrap();
    for at in 0..=sound.len() {
        let mut bytes = sound.clone();
        match bytes.get_mut(at) {
            Some(byte) => *byte ^= 1,
            None => bytes.truncate(at / 2),
        }
        std::fs::create_dir_all(marker.parent().unwrap()).unwrap();
        std::fs::write(&marker, bytes).unwrap();
        let (store, mover) = open(&place, root.path());
        assert_eq!((store.size(&digest), store.health().totals().found), (None, 1), "byte {at}");
        assert_eq!(mover.remove_left_over(Duration::ZERO).await.unwrap(), 0, "its object may be all there is");
    }
}

#[tokio::test]
async fn wrong_keys_and_files_that_are_not_there_are_told() {
    let (place, root) = (Place::bucket().await, tempfile::tempdir().unwrap());
    let (store, mover) = open(&place, root.path());
    let secret = endpoint(&place).keys().1;
    std::fs::write(&secret, "another").unwrap();
    let error = mover.check().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::BucketRefused, "{error}");
    assert!(!error.to_string().contains("another"), "{error}");
    upload(&store, &bytes_of(1, 100_000)).await;
    // A new key is taken without a restart.
    std::fs::write(&secret, "not a word to anybody").unwrap();
    mover.check().await.unwrap();
    assert!(mover.go(digest_of(&bytes_of(1, 100_000))).await.unwrap());
    std::fs::write(&secret, " \n").unwrap();
    let opened = Bucket::open_with(&settings(endpoint(&place)), root.path(), "test.1", HASTE);
    let error = format!("{:#}", opened.err().unwrap());
    assert!(error.contains("blobs.s3.secret_access_key_file"), "{error}");
    let no_ca = S3 { ca_file: Some(root.path().join("none.pem")), ..settings(endpoint(&place)) };
    std::fs::write(&secret, "x").unwrap();
    let error = format!("{:#}", Bucket::open_with(&no_ca, root.path(), "test.1", HASTE).err().unwrap());
    assert!(error.contains("blobs.s3.ca_file"), "{error}");
}

#[tokio::test]
async fn a_node_with_blobs_in_a_bucket_does_not_start_without_it() {
    let data = bytes_of(11, 300_000);
    let cluster = two_with_copies(&data).await;
    let plane = crate::plane::recorded::Recorded::new(1, &cluster.ledger);
    let root = cluster.nodes[0].root.path();
    let error = Blobs::open_with(root, plane.clone(), LEASE, None).err().unwrap().to_string();
    assert!(error.contains("1 blobs") && error.contains("[blobs.s3]"), "{error}");
    // With one that is away it does.
    endpoint(&cluster.place).fails_with(Fault::Silent);
    let opened = Blobs::open_with(root, plane, LEASE, cluster.place.open(root)).unwrap();
    assert_eq!(opened.blobs.store().size(&digest_of(&data)), Some(300_000));
    // Of two names only one is this node's, and it outlives restarts.
    let names: Vec<_> =
        cluster.nodes.iter().map(|node| std::fs::read(node.root.path().join("bucket")).unwrap()).collect();
    assert_ne!(names[0], names[1]);
}

/// Takes TLS off what goes to an address, with a certificate of this authority for localhost; where it listens.
async fn unwrap_tls(authority: &Authority, to: std::net::SocketAddr) -> std::net::SocketAddr {
    let issued = authority.issue(Role::Coordinator, "1", &["localhost".to_owned()], VALID_FOR_DEFAULT).unwrap();
    let directory = tempfile::tempdir().unwrap();
    issued.save(directory.path(), "server").unwrap();
    let read = |name: &str| directory.path().join(name);
    let chain = CertificateDer::pem_file_iter(read("server.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(read("server-key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(chain, key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that trusts nobody here leaves in the middle.
                let Ok(mut outside) = acceptor.accept(socket).await else { return };
                let mut inside = tokio::net::TcpStream::connect(to).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_private_authority_is_trusted_when_it_is_named_and_not_else() {
    let (place, root) = (Place::bucket().await, tempfile::tempdir().unwrap());
    let authority = Authority::create("test").unwrap();
    authority.save(root.path()).unwrap();
    let address = unwrap_tls(&authority, endpoint(&place).address()).await;
    let secure = S3 {
        endpoint: Some(format!("https://localhost:{}", address.port())),
        allow_http: false,
        ca_file: Some(root.path().join("ca.pem")),
        ..settings(endpoint(&place))
    };
    let bucket = Bucket::open_with(&secure, root.path(), "test.1", HASTE).unwrap();
    bucket.check(true).await.unwrap();
    let strangers = S3 { ca_file: None, ..secure.clone() };
    let bucket = Bucket::open_with(&strangers, root.path(), "test.1", HASTE).unwrap();
    assert_eq!(bucket.check(false).await.unwrap_err().code(), ErrorCode::BucketUnreachable);
    // Nothing is ever said in the clear unless that is allowed.
    let before = endpoint(&place).asked();
    let clear = S3 { endpoint: Some(endpoint(&place).url()), ..strangers };
    let bucket = Bucket::open_with(&clear, root.path(), "test.1", HASTE).unwrap();
    assert!(bucket.check(false).await.is_err());
    assert_eq!(endpoint(&place).asked(), before);
}
