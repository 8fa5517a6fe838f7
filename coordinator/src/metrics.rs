//! What is counted and measured, in the form Prometheus scrapes.
//!
//! Durations are observed where they pass; everything that can be read from elsewhere is read at the scrape, so
//! that nothing has to be kept in step.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use helix_model::BuildState;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry as Exposition;

use crate::leader::LeaderMetrics;
use crate::registry::{BOUNDS_US, Counters, Histogram as Durations};
use crate::rpc::services::Services;

/// Commands take a fsync and a round trip: from a tenth of a millisecond to seconds.
const COMMIT_SECONDS: [f64; 14] = [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];

/// All of it. Clones share it.
#[derive(Clone, Debug)]
pub struct Metrics {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // A lock, because encoding wants the whole; scrapes are rare.
    exposition: Mutex<Exposition>,
    commit_seconds: Histogram,
    builds: Family<ByState, Number>,
    gauges: Gauges,
}

type Number = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByState {
    state: String,
}

macro_rules! gauges {
    ($($name:ident: $help:literal,)*) => {
        #[derive(Debug, Default)]
        struct Gauges { $($name: Number,)* }

        impl Gauges {
            fn register(&self, exposition: &mut Exposition) {
                $(exposition.register(concat!("helix_", stringify!($name)), $help, self.$name.clone());)*
            }
        }
    };
}

gauges! {
    workers: "Workers known, in whatever condition",
    capacity: "Sum of the workers' capacities",
    load: "Attempts that run",
    leader: "1 on the leader, 0 elsewhere",
    raft_term: "Raft term",
    raft_last_log_index: "Index of the last log entry",
    raft_applied_index: "Index of the last applied log entry",
    raft_snapshot_index: "Index that the newest snapshot covers",
    raft_log_bytes: "Bytes of the Raft log on disk",
    registry_bytes: "Bytes of the registry's store on disk",
    registry_pending_rows: "Rows that wait to be written to the registry's store",
    blob_bytes: "Bytes of blobs this node holds",
    blobs: "Blobs this node holds",
    blobs_in_bucket: "Those of them that lie in a bucket",
    blob_bytes_in_bucket: "Their bytes",
    blobs_to_offload: "Large blobs on this node's disk, which may go to the bucket; 0 without one",
    bucket_errors: "Requests to the bucket that failed after their retries, since the start",
    bucket_failing: "1 while the bucket does not answer or refuses, 0 otherwise",
    blob_segment_syncs: "Fsyncs of the segments that small blobs share",
    blobs_damaged: "Blobs this node found damaged and looks for a good copy of",
    blobs_lost: "Blobs that this node found damaged, or misses as the leader, and that have no good copy anywhere",
    blobs_short: "Blobs of which the coordinators that answer hold fewer copies than policy says, on the leader",
    blobs_found_damaged: "Blobs this node found damaged since its start",
    blobs_repaired: "Damaged blobs this node replaced by a good copy since its start",
    blobs_scrubbed: "Blobs this node read again to check them since its start",
    blob_bytes_scrubbed: "Their bytes",
    blob_scrub_passes: "Passes over all blobs since its start",
    live_logs: "Unsealed build logs this node holds",
    live_log_bytes: "Bytes of unsealed build logs this node holds",
    log_readers: "Logs being read through this node",
    disk_free_bytes: "Bytes left on the data directory's file system",
}

impl Metrics {
    /// Everything there is, with what consensus and the leader's loop measure.
    #[must_use]
    pub fn new(counters: Arc<Counters>, leader: &LeaderMetrics) -> Self {
        let mut exposition = Exposition::default();
        let commit_seconds = Histogram::new(COMMIT_SECONDS);
        let builds = Family::<ByState, Number>::default();
        let gauges = Gauges::default();
        exposition.register("helix_builds", "Builds kept, by state", builds.clone());
        let help = "From proposing a client's command to its answer";
        exposition.register("helix_commit_seconds", help, commit_seconds.clone());
        gauges.register(&mut exposition);
        leader.register(&mut exposition);
        exposition.register_collector(Box::new(Consensus { counters }));
        Self { inner: Arc::new(Inner { exposition: Mutex::new(exposition), commit_seconds, builds, gauges }) }
    }

    /// A client's command was answered after so long.
    pub fn committed(&self, after: Duration) {
        self.inner.commit_seconds.observe(after.as_secs_f64());
    }

    /// Everything as text, gauges as of now.
    #[must_use]
    pub fn encode(&self, services: &Services) -> String {
        self.read(services);
        let mut text = String::new();
        let exposition = self.inner.exposition.lock().unwrap_or_else(PoisonError::into_inner);
        if encode(&mut text, &exposition).is_err() {
            tracing::error!("metrics cannot be written as text");
        }
        text
    }

    fn read(&self, services: &Services) {
        let (registry, gauges) = (&services.registry, &self.inner.gauges);
        let totals = registry.with_state(|state| state.totals());
        for (state, count) in [
            (BuildState::Queued, totals.queued),
            (BuildState::Running, totals.running),
            (BuildState::Succeeded, totals.succeeded),
            (BuildState::Failed, totals.failed),
            (BuildState::Cancelled, totals.cancelled),
        ] {
            self.inner.builds.get_or_create(&ByState { state: state.as_str().to_owned() }).set(count);
        }
        gauges.workers.set(totals.workers);
        gauges.capacity.set(totals.capacity);
        gauges.load.set(totals.load);
        gauges.disk_free_bytes.set(services.disk.free_bytes());
        gauges.leader.set(u64::from(registry.leadership().borrow().is_leader));
        let blobs = services.blobs.store().totals();
        gauges.blobs.set(blobs.small + blobs.large + blobs.bucket);
        gauges.blob_bytes.set(blobs.small_bytes + blobs.large_bytes + blobs.bucket_bytes);
        gauges.blobs_in_bucket.set(blobs.bucket);
        gauges.blob_bytes_in_bucket.set(blobs.bucket_bytes);
        if let Some(bucket) = services.blobs.store().bucket() {
            let totals = bucket.totals();
            gauges.blobs_to_offload.set(blobs.large);
            gauges.bucket_errors.set(totals.errors);
            gauges.bucket_failing.set(u64::from(totals.failing));
        }
        gauges.blob_segment_syncs.set(blobs.segment_syncs);
        let health = services.blobs.health().totals();
        gauges.blobs_damaged.set(health.waiting);
        gauges.blobs_lost.set(health.lost.max(registry.counters().blobs_missing.get()));
        gauges.blobs_short.set(registry.counters().blobs_short.get());
        gauges.blobs_found_damaged.set(health.found);
        gauges.blobs_repaired.set(health.repaired);
        gauges.blobs_scrubbed.set(health.scrubbed);
        gauges.blob_bytes_scrubbed.set(health.scrubbed_bytes);
        gauges.blob_scrub_passes.set(health.passes);
        let (logs, bytes) = services.logs.live_totals();
        gauges.live_logs.set(logs);
        gauges.live_log_bytes.set(bytes);
        gauges.log_readers.set(services.logs.readers());
        let raft = registry.status();
        gauges.raft_term.set(raft.term);
        gauges.raft_last_log_index.set(raft.last_log_index);
        gauges.raft_applied_index.set(raft.applied_index);
        gauges.raft_snapshot_index.set(raft.snapshot_index);
        let counters = registry.counters();
        gauges.raft_log_bytes.set(counters.log_bytes.get());
        gauges.registry_bytes.set(counters.store_bytes.get());
        gauges.registry_pending_rows.set(counters.store_pending.get());
    }
}

/// What consensus counts, read at each scrape.
struct Consensus {
    counters: Arc<Counters>,
}

impl fmt::Debug for Consensus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Consensus")
    }
}

impl Collector for Consensus {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let counters = &*self.counters;
        for (name, help, durations) in [
            ("helix_fsync_seconds", "Flushes of the Raft log to disk", &counters.fsync),
            (
                "helix_raft_commit_seconds",
                "From taking commands in hand to their replies, on the leader",
                &counters.commit,
            ),
            ("helix_registry_write_seconds", "Batches written to the registry's store", &counters.store_write),
        ] {
            encode_durations(&mut encoder, name, help, durations)?;
        }
        for (name, help, number) in [
            ("helix_commands", "Commands committed by this node as the leader", &counters.commands),
            ("helix_entries", "Log entries they were in", &counters.entries),
            ("helix_forwarded_commands", "Commands sent on to the leader", &counters.forwarded),
            ("helix_reads", "Linearizable reads", &counters.reads),
            ("helix_read_rounds", "Rounds of confirming leadership for them", &counters.read_rounds),
            ("helix_raft_log_appended_bytes", "Bytes appended to the Raft log", &counters.log_appended_bytes),
            ("helix_snapshots", "Snapshots written", &counters.snapshots),
            ("helix_snapshots_installed", "Snapshots received and installed", &counters.snapshots_installed),
            ("helix_elections_won", "Elections this node won", &counters.elections_won),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&number.get(), None)?;
        }
        Ok(())
    }
}

fn encode_durations(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    durations: &Durations,
) -> Result<(), fmt::Error> {
    let bounds = BOUNDS_US.iter().map(|us| Duration::from_micros(*us).as_secs_f64()).chain([f64::MAX]);
    let counts = durations.buckets();
    let total = counts.iter().sum();
    let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    metric.encode_histogram::<NoLabelSet>(durations.sum().as_secs_f64(), total, &buckets, None)
}
