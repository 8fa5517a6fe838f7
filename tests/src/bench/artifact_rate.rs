//! Uploads of bytes that are named by their sha256: one of 1 GiB, and many small ones, by one client, beside docker-registry.
//!
//! Ours answers when two coordinators hold the bytes, checked and synced, over mutual TLS; the peer keeps one copy and has no TLS
//! here. Digests are made before the clock begins, on both sides. No two blobs are the same.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;
use helix_proto::v1;
use helix_proto::v1::blob_service_client::BlobServiceClient;
use helix_proto::v1::put_blob_request::Part;
use prost::bytes::Bytes;
use rand::Rng as _;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::Settings;
use super::drive::runtime;
use super::figure::{Figure, Goal, Pair, Row, Unit};
use super::limits;
use super::ours::Ours;
use super::registry::{self, Registry};
use crate::cluster::Shape;

/// Bytes that are sent at once.
const CHUNK: usize = 1 << 20;

/// Bytes of a small blob.
const SMALL: usize = 10 << 10;

/// Small blobs in one call of ours: together they have to be under 4 MiB.
const TOGETHER: usize = 256;

/// The peer is slow: of the small blobs it gets one in so many.
const PEERS_SHARE: usize = 5;

/// Bytes to upload: so many times a chunk, behind a few bytes that no other blob has.
pub(super) struct Blob {
    head: Bytes,
    chunk: Bytes,
    times: usize,
    sha256: [u8; 32],
}

impl Blob {
    fn new(chunk: usize, times: usize) -> Self {
        let mut random = rand::rng();
        let mut bytes = vec![0; chunk];
        random.fill(bytes.as_mut_slice());
        let head = Bytes::copy_from_slice(&random.random::<[u8; 16]>());
        let mut blob = Self { head, chunk: bytes.into(), times, sha256: [0; 32] };
        let mut hash = Sha256::new();
        blob.chunks().for_each(|chunk| hash.update(chunk));
        blob.sha256 = hash.finalize().into();
        blob
    }

    pub(super) fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        let rest = std::iter::repeat_n(&self.chunk[..], self.times);
        std::iter::once(&self.head[..]).chain(rest)
    }

    pub(super) fn size(&self) -> u64 {
        (self.head.len() + self.chunk.len() * self.times) as u64
    }

    pub(super) fn hex(&self) -> String {
        self.sha256.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What a turn came to: million bytes a second of the large one, small ones a second.
#[derive(Clone, Copy)]
struct Turn {
    large: f64,
    small: f64,
}

/// Measures.
///
/// # Errors
/// When an upload fails or is not there afterwards.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let (megabytes, small) = if settings.quick { (64, 512) } else { (1024, 10_000) };
    let described = registry::describe();
    let (mut large_pairs, mut small_pairs) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds(5, 2) {
        let large = Blob::new(CHUNK, megabytes);
        let small: Vec<Blob> = (0..small).map(|_| Blob::new(SMALL, 1)).collect();
        let peer = || described.as_ref().ok().map(|_| peer(&large, &small[..small.len() / PEERS_SHARE])).transpose();
        let early = if round % 2 == 1 { peer()? } else { None };
        let own = ours(&runtime, &large, &small)?;
        let other = if round % 2 == 0 { peer()? } else { early };
        large_pairs.push(Pair { ours: own.large, peer: other.map(|turn| turn.large) });
        small_pairs.push(Pair { ours: own.small, peer: other.map(|turn| turn.small) });
    }
    let limit = limits::disk_megabytes_per_second(&std::env::temp_dir())?;
    let large = Row::new(format!("one of {megabytes} MiB"), Unit::MegabytesPerSecond, large_pairs);
    Ok(Figure {
        name: "artifact-rate",
        peer: described.unwrap_or_else(|absent| absent),
        rows: vec![
            large.limit(limit, "one copy written to this disk one after the other, and synced").goal(Goal::Ratio(2.0)),
            Row::new(format!("{small} of 10 KiB"), Unit::PerSecond, small_pairs).goal(Goal::Ratio(2.0)),
        ],
        times: Vec::new(),
        history: "every blob was there afterwards, whole; ours on two coordinators".to_owned(),
        notes: vec![format!(
            "one client; small ones {TOGETHER} to a call on ours, one by one on the peer, which takes no more and gets a fifth of them"
        )],
    })
}

fn per_turn(large: &Blob, small: usize, marks: [Instant; 3]) -> Turn {
    let seconds = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64();
    Turn {
        large: large.size() as f64 / seconds(marks[0], marks[1]) / 1e6,
        small: small as f64 / seconds(marks[1], marks[2]),
    }
}

fn peer(large: &Blob, small: &[Blob]) -> anyhow::Result<Turn> {
    let registry = Registry::start()?;
    let mut client = registry.client()?;
    let began = Instant::now();
    client.put(large)?;
    let between = Instant::now();
    small.iter().try_for_each(|blob| client.put(blob))?;
    let turn = per_turn(large, small.len(), [began, between, Instant::now()]);
    for blob in std::iter::once(large).chain(small) {
        ensure!(client.has(blob)?, "docker-registry took {} and has it not", blob.hex());
    }
    Ok(turn)
}

fn ours(runtime: &Runtime, large: &Blob, small: &[Blob]) -> anyhow::Result<Turn> {
    let ours = Ours::start(&Shape { agents: 0, ..Shape::default() })?;
    let leader = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let channel = ours.channel(&leader, Traffic::Bulk)?;
    let calls: Vec<v1::PutSmallBlobsRequest> = small.chunks(TOGETHER).map(together).collect();
    let parts = parts(large);
    runtime.block_on(async {
        let mut client = BlobServiceClient::new(channel.clone()).max_decoding_message_size(8 << 20);
        let began = Instant::now();
        client.put_blob(tokio_stream::iter(parts)).await?;
        let between = Instant::now();
        for call in calls {
            client.put_small_blobs(call).await?;
        }
        let turn = per_turn(large, small.len(), [began, between, Instant::now()]);
        held(channel, large, small).await?;
        Ok(turn)
    })
}

fn parts(blob: &Blob) -> impl Iterator<Item = v1::PutBlobRequest> + Send + 'static {
    let header = v1::PutBlobHeader { sha256: blob.sha256.to_vec().into(), size: blob.size(), offset: 0, copies: 0 };
    let (head, chunk, times) = (blob.head.clone(), blob.chunk.clone(), blob.times);
    let data = std::iter::once(head).chain(std::iter::repeat_n(chunk, times)).map(Part::Data);
    std::iter::once(Part::Header(header)).chain(data).map(|part| v1::PutBlobRequest { part: Some(part) })
}

fn together(blobs: &[Blob]) -> v1::PutSmallBlobsRequest {
    let one = |blob: &Blob| v1::SmallBlob {
        sha256: blob.sha256.to_vec().into(),
        data: blob.chunks().flatten().copied().collect::<Vec<u8>>().into(),
    };
    v1::PutSmallBlobsRequest { blobs: blobs.iter().map(one).collect(), copies: 0 }
}

async fn held(channel: Channel, large: &Blob, small: &[Blob]) -> anyhow::Result<()> {
    let all: Vec<&Blob> = std::iter::once(large).chain(small).collect();
    let mut client = BlobServiceClient::new(channel);
    for some in all.chunks(TOGETHER) {
        let sha256 = some.iter().map(|blob| blob.sha256.to_vec().into()).collect();
        let found = client.head_blobs(v1::HeadBlobsRequest { sha256, local: false }).await?.into_inner().blobs;
        ensure!(found.len() == some.len(), "{} blobs were asked for, {} answered", some.len(), found.len());
        for (blob, found) in some.iter().zip(found) {
            let whole = found.present && found.size == blob.size() && found.holders.len() >= 2;
            ensure!(whole, "{} was taken and is not there: {found:?}", blob.hex());
        }
    }
    Ok(())
}
