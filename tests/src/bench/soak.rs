//! How much disk a cluster takes while builds come and go for long and the registry keeps as many as policy says: it must come to an end.
//!
//! Turn by turn as many builds are run, and then what coordinators and agents have on disk is looked up: the rows' pairs are the curve.

use anyhow::{Context as _, ensure};
use helix_common::channel::Traffic;

use super::Settings;
use super::drive::{new_key, runtime};
use super::figure::{Figure, Goal, Pair, Row, Unit};
use super::footprint::disk_bytes;
use super::growth::submit;
use super::ours::{Ours, no_op, until_idle};
use crate::cluster::Shape;

/// Finished builds that the registry keeps.
const RETAINED: usize = 2_000;

/// How long the ids of those that went are remembered: far shorter than a run, or it would end before the first was forgotten.
const REMEMBERED: &str = "2m";

/// Bytes of the log between two snapshots: an eighth of what is usual, so that a run of minutes sees the log purged many times.
const SNAPSHOT_LOG_BYTES: &str = "16MiB";

/// How much more the second half of the turns may take than the first.
const GROWN: f64 = 1.1;

/// Measures.
///
/// # Errors
/// When a build does not succeed.
pub fn measure(settings: &Settings) -> anyhow::Result<Figure> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let often = format!("coordinator.raft.snapshot_log_bytes={SNAPSHOT_LOG_BYTES}");
    let ours = Ours::start(&Shape { capacity: 8, settings: vec![often], ..Shape::default() })?;
    ours.set_policy(&[&format!("retain_builds={RETAINED}"), &format!("tombstone_ms={REMEMBERED}")])?;
    let endpoint = ours.cluster.leader().grpc.context("a coordinator has an endpoint")?;
    let (bulk, control) = (ours.channel(&endpoint, Traffic::Bulk)?, ours.channel(&endpoint, Traffic::Control)?);
    // The log's first segment goes after some forty turns: each half has to see that.
    let (turns, builds) = (settings.rounds(96, 6), settings.rounds(4_000, 500));
    let largest = |role: &str| {
        let members = ours.cluster.all(role);
        let sizes = members.iter().map(|member| disk_bytes(&member.data_dir) / f64::from(1 << 20));
        Pair { ours: sizes.fold(0.0, f64::max), peer: None }
    };
    let (mut coordinators, mut agents) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        runtime.block_on(async {
            submit(&bulk, (0..builds).map(|_| new_key()).collect(), &no_op()).await?;
            until_idle(&control).await
        })?;
        let failed = ours.count("failed")?;
        ensure!(failed == 0, "{failed} builds failed");
        coordinators.push(largest("coordinator"));
        agents.push(largest("agent"));
    }
    let (first, second) = coordinators.split_at(turns / 2);
    let most = |pairs: &[Pair]| pairs.iter().map(|pair| pair.ours).fold(0.0, f64::max);
    let halves = vec![Pair { ours: most(second), peer: Some(most(first)) }];
    let kept = ours.count("succeeded")?;
    Ok(Figure {
        name: "soak",
        peer: "itself, in the first half".to_owned(),
        rows: vec![
            Row::new("disk of the largest coordinator, turn by turn", Unit::Mebibytes, coordinators),
            Row::new("disk of the largest agent, turn by turn", Unit::Mebibytes, agents),
            Row::new("most of the second half beside most of the first", Unit::Mebibytes, halves)
                .goal(Goal::Ratio(GROWN)),
        ],
        times: Vec::new(),
        history: format!("none of {} builds failed; {kept} are kept", turns * builds),
        notes: vec![format!(
            "{turns} turns of {builds} builds that say and make nothing; the registry keeps {RETAINED} and, for {REMEMBERED}, the ids of the others; a snapshot each {SNAPSHOT_LOG_BYTES} of the log"
        )],
    })
}
