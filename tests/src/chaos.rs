//! `cargo chaos`: a real cluster on hosts of its own, broken for a while under load, healed, and judged.
//!
//! What must hold: clients' answers have one explanation, and nothing acknowledged is lost (`history`); each build has one
//! end, which is not the fault of its command; no attempt ran twice; logs and artifacts of successes are whole; nothing of a
//! build is left on a host; and all of it works again within moments of healing. A run in which a fault never met anything,
//! or hardly anything was asked of the cluster, proves nothing and says so.

mod history;
mod judge;
mod load;
mod nemesis;
mod site;
mod switch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::chaos::load::Load;
use crate::chaos::nemesis::Nemesis;
use crate::chaos::site::Site;
use crate::cluster::wait_for;

/// Agents' leases: short, so that losing one is part of a run.
const LEASE: Duration = Duration::from_secs(3);

/// How long the healed cluster may take to be whole again before it is given up.
const HEAL_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to end all builds once healed.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// Acknowledged submits a minute below which a run proves nothing.
const SUBMITS_A_MINUTE: u64 = 60;

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How long things are broken.
    pub duration: Duration,
    /// What the faults and the load follow from, as far as real processes let them.
    pub seed: u64,
    /// Clients at work.
    pub clients: u64,
}

/// What a run showed.
#[derive(Debug)]
pub struct Report {
    /// What must hold and did not.
    pub wrong: Vec<String>,
    /// Why the run proves nothing.
    pub void: Vec<String>,
    /// Lines for people.
    pub lines: Vec<String>,
}

/// Runs a plan. This process must have a network namespace to itself, and be root.
///
/// # Errors
/// When the cluster cannot be made or kept.
pub fn run(plan: Plan) -> anyhow::Result<Report> {
    let mut site = Site::start(3, 3, plan.seed)?;
    let lease = format!("worker_lease_ms={}", LEASE.as_millis());
    site.helix(&["cluster", "policy", "set", &lease])?;
    let counts = site.root().join("counts");
    std::fs::create_dir(&counts)?;
    let load = Load::new(&counts);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let clients = (0..plan.clients)
        .map(|number| Ok(runtime.spawn(Arc::clone(&load).client(site.endpoints()?, plan.seed << 8 | number))))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut nemesis = Nemesis::new(StdRng::seed_from_u64(plan.seed), LEASE);
    let begun = Instant::now();
    while begun.elapsed() < plan.duration {
        nemesis.strike(&mut site)?;
    }
    let healed = Instant::now();
    while !site.is_whole() {
        if healed.elapsed() > HEAL_LIMIT {
            site.keep();
            let text = format!("not whole {HEAL_LIMIT:?} after healing; see {}", site.root().display());
            return Ok(Report { wrong: vec![text], void: Vec::new(), lines: nemesis.done.journal });
        }
        for line in site.start_fallen()? {
            nemesis.done.journal.push(line);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let whole = healed.elapsed();
    load.stop();
    for client in clients {
        runtime.block_on(client)?;
    }
    let mut report = Report { wrong: Vec::new(), void: void(plan, &load, &nemesis), lines: nemesis.done.journal };
    report.wrong.extend(judge::judge(&runtime, &site, &load, SETTLE_LIMIT)?);
    wait_for("builds' processes to be gone", HEAL_LIMIT, || site.strangers().is_empty().then_some(()));
    report.wrong.extend(site.stop()?);
    let submitted = load.submitted.load(Ordering::Relaxed);
    let felt: BTreeMap<_, _> = nemesis.done.felt;
    report.lines.push(format!(
        "seed {}: {submitted} submits acknowledged, {} answers, faults {felt:?}; whole {whole:.1?} after healing; \
         longest time without an acknowledged submit {:.1?}",
        plan.seed,
        load.history().len(),
        load.longest_gap()
    ));
    if !report.wrong.is_empty() {
        site.keep();
        report.lines.push(format!("everything is kept in {}", site.root().display()));
    }
    runtime.shutdown_background();
    Ok(report)
}

/// Why a run proves nothing.
fn void(plan: Plan, load: &Load, nemesis: &Nemesis) -> Vec<String> {
    let mut why = Vec::new();
    let submitted = load.submitted.load(Ordering::Relaxed);
    let least = SUBMITS_A_MINUTE * plan.duration.as_secs() / 60;
    if submitted < least {
        why.push(format!("{submitted} submits were acknowledged, of {least} that make a run"));
    }
    let missed: Vec<_> = nemesis::Fault::ALL.iter().filter(|fault| !nemesis.done.felt.contains_key(fault)).collect();
    if !missed.is_empty() {
        why.push(format!("these faults never met anything: {missed:?}"));
    }
    why
}
