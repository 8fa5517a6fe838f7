//! `cargo bench-cluster`: what a cluster of three on this machine does beside programs that do the like.
//!
//! Ours always runs with three coordinators, every acknowledged write synced on a majority, and mutual TLS; a peer runs as its
//! users run it. Both are driven in turns, as `tests/README.md` says, and a figure counts only if what was acknowledged was found
//! afterwards. A peer that is not installed is said to be absent, with the step that installs it; nothing fails for it.

pub mod artifact_rate;
mod buildbot;
pub mod drive;
pub mod etcd;
pub mod fail_over;
pub mod figure;
pub mod footprint;
pub mod growth;
mod hyperqueue;
pub mod idle_agents;
pub mod isolation_start;
pub mod limits;
pub mod log_rate;
pub mod machine;
pub mod no_op;
pub mod ours;
pub mod placement;
mod plot;
mod python;
mod registry;
pub mod report;
mod slurm;
pub mod snapshot_stall;
pub mod soak;
pub mod submit;
pub mod worker_loss;

use std::path::PathBuf;

use anyhow::Context as _;

use self::figure::Figure;
use self::machine::Machine;

/// How a run is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Fewer and shorter rounds: to see that all works, not to quote.
    pub quick: bool,
    /// Where results go as files.
    pub out: Option<PathBuf>,
}

impl Settings {
    /// One number for whole runs, another for quick ones.
    #[must_use]
    pub fn rounds(&self, whole: usize, quick: usize) -> usize {
        if self.quick { quick } else { whole }
    }
}

type Measure = fn(&Settings) -> anyhow::Result<Figure>;

/// What can be measured, in the order in which all is.
pub const MEASURES: &[(&str, Measure)] = &[
    ("submit-latency", submit::latency),
    ("submit-rate", submit::rate),
    ("no-op-rate", no_op::rate),
    ("no-op-latency", no_op::latency),
    ("fail-over", fail_over::measure),
    ("worker-loss", worker_loss::measure),
    ("idle-agents", idle_agents::measure),
    ("placement", placement::measure),
    ("log-rate", log_rate::measure),
    ("artifact-rate", artifact_rate::measure),
    ("isolation-start", isolation_start::measure),
    ("footprint", footprint::measure),
    ("growth", growth::measure),
    ("snapshot-stall", snapshot_stall::measure),
    ("soak", soak::measure),
];

/// What takes ten minutes and more each, and is measured only where it is named.
pub const ON_REQUEST: &[&str] = &["growth", "snapshot-stall", "soak"];

/// Measures what is named, prints as it goes, and writes what `--out` asked for.
///
/// # Errors
/// When a run fails or its history check does: such a run has no figure.
pub fn run(names: &[&str], settings: &Settings) -> anyhow::Result<()> {
    let mut done = Vec::new();
    for (name, measure) in MEASURES.iter().filter(|(name, _)| names.contains(name)) {
        let machine = Machine::look();
        let figure = measure(settings).with_context(|| (*name).to_owned())?;
        figure.print(&machine);
        done.push((figure, machine));
        if let (Some(out), Some((figure, machine))) = (&settings.out, done.last()) {
            report::write_one(out, figure, machine, settings)?;
            // Each time: who ends it early has a table, too.
            report::write_table(out, &done, settings)?;
        }
    }
    Ok(())
}
