//! `cargo chaos`: a real cluster on hosts of its own, broken for a while under load, healed, and judged.
//!
//! What must hold: clients' answers have one explanation, and nothing acknowledged is lost (`history`); each build has one
//! end, which is not the fault of its command, and is dated when it was; no attempt ran twice; logs and artifacts of successes
//! are whole; what is not to disturb a running build does not (`nemesis/witness`); nothing of a build is left on a host; submits
//! are taken whenever a majority can work; and all of it works again within moments of healing. A run in which a fault never met
//! anything, or hardly anything was asked of the cluster, proves nothing and says so.

mod fault;
mod history;
mod judge;
mod load;
mod nemesis;
mod site;
mod story;
mod switch;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::chaos::fault::Fault;
use crate::chaos::judge::Judge;
use crate::chaos::load::{Load, Window};
use crate::chaos::nemesis::{Nemesis, RECOVERY_LIMIT, Scene};
use crate::chaos::site::Site;

/// Agents' leases: short, so that losing one is part of a run.
const LEASE: Duration = Duration::from_secs(5);

/// How long it may take to end all builds once healed.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// How often builds are judged in a run that is longer than that.
const SETTLE_EVERY: Duration = Duration::from_secs(6 * 60);

/// Builds that were submitted so long ago are asked for by no client any more; and log time differs from ours by less.
const OLD: Duration = Duration::from_secs(20);

/// How long what is left of builds may take to be gone then.
const CLEAR_LIMIT: Duration = Duration::from_secs(60);

/// How long no submit may be acknowledged although a majority of coordinators can work.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Acknowledged submits a minute below which a run proves nothing.
const SUBMITS_A_MINUTE: u64 = 60;

/// A run of so long meets every fault at least once, and goes on for as long again if it must.
const WHOLE_DECK: Duration = Duration::from_secs(5 * 60);

/// How to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long things are broken.
    pub duration: Duration,
    /// What the faults and the load follow from, as far as real processes let them.
    pub seed: u64,
    /// Clients at work.
    pub clients: u64,
    /// Faults by name, if it is not to be all of them.
    pub only: Vec<String>,
}

impl Plan {
    fn faults(&self) -> anyhow::Result<Vec<Fault>> {
        let named = |name: &String| Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == *name);
        let only =
            self.only.iter().map(|name| named(name).with_context(|| format!("{name} is none of {:?}", Fault::ALL)));
        let only: Vec<Fault> = only.collect::<anyhow::Result<_>>()?;
        Ok(if only.is_empty() { Fault::ALL.to_vec() } else { only })
    }

    /// Whether each fault has to meet something.
    fn is_whole(&self) -> bool {
        self.duration >= WHOLE_DECK || !self.only.is_empty()
    }
}

/// What a run showed.
#[derive(Default, Debug)]
pub struct Report {
    /// What must hold and did not.
    pub wrong: Vec<String>,
    /// Why the run proves nothing.
    pub void: Vec<String>,
    /// Lines for people.
    pub lines: Vec<String>,
}

/// Runs a plan, and says what it does while it does it. This process must have network and mounts to itself, and be root.
///
/// # Errors
/// When the cluster cannot be made or kept.
pub fn run(plan: &Plan, say: fn(&str)) -> anyhow::Result<Report> {
    let faults = plan.faults()?;
    let mut site = Site::start(3, 3, plan.seed)?;
    let lease = format!("worker_lease_ms={}", LEASE.as_millis());
    let reserve = format!("disk_reserve_bytes={}", site::layout::RESERVE);
    site.helix(&["cluster", "policy", "set", &lease, &reserve])?;
    let counts = site.root().join("counts");
    std::fs::create_dir(&counts)?;
    let load = Load::new(&counts);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let clients = (0..plan.clients)
        .map(|number| Ok(runtime.spawn(Arc::clone(&load).client(site.endpoints()?, plan.seed << 8 | number))))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut nemesis = Nemesis::new(plan.seed, LEASE, faults, say);
    let endpoints = site.endpoints()?;
    let mut judge = Judge::default();
    let mut scene = Scene { site: &mut site, load: Arc::clone(&load), endpoints, runtime: &runtime };
    let broken = rampage(plan, &mut nemesis, &mut scene, &mut judge);
    let whole = broken.and_then(|()| heal(&mut nemesis, &mut site));
    load.stop();
    for client in clients {
        runtime.block_on(client)?;
    }
    let mut report = Report { void: void(plan, &load, &nemesis), ..Report::default() };
    report.wrong.append(&mut nemesis.wrong);
    report.wrong.extend(stalls(&load, &nemesis.windows));
    match whole {
        Ok(()) => {
            judge.look(&runtime, &site, &load, Duration::MAX, SETTLE_LIMIT)?;
            report.wrong.extend(judge.conclude(&site, &load)?);
        }
        Err(error) => report.wrong.push(format!("{error:#}")),
    }
    report.wrong.extend(left(&site));
    report.wrong.extend(site.stop()?);
    report.lines = summary(plan, &load, &nemesis);
    if !report.wrong.is_empty() {
        site.keep();
        report.lines.extend(story::tell(&site, &load, &report.wrong));
    }
    runtime.shutdown_background();
    Ok(report)
}

/// Breaks things for as long as the plan says, and until each fault has met something if it is long enough for that.
fn rampage(plan: &Plan, nemesis: &mut Nemesis, scene: &mut Scene<'_>, judge: &mut Judge) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut settled = Instant::now();
    while begun.elapsed() < plan.duration {
        if settled.elapsed() >= SETTLE_EVERY {
            settle(nemesis, scene, judge)?;
            settled = Instant::now();
        }
        let fault = nemesis.deck.draw();
        nemesis.strike(scene, fault)?;
    }
    while plan.is_whole() && begun.elapsed() < plan.duration * 2 {
        let Some(fault) = nemesis.deck.draw_unmet() else { break };
        nemesis.strike(scene, fault)?;
    }
    Ok(())
}

/// Judges what was built so far, while clients go on, and purges it, so that a long run does not pile up builds without end.
fn settle(nemesis: &mut Nemesis, scene: &mut Scene<'_>, judge: &mut Judge) -> anyhow::Result<()> {
    nemesis.expect_whole(scene, "before builds are judged")?;
    let begun = Instant::now();
    let before = scene.load.start.elapsed().saturating_sub(OLD);
    let looked = judge.look(scene.runtime, scene.site, &scene.load, before, SETTLE_LIMIT)?;
    let age = scene.load.start.elapsed().saturating_sub(before) + OLD;
    let purged = scene.site.helix(&["purge", "--before", &format!("{}s", age.as_secs()), "-o", "quiet"])?;
    nemesis.write(&format!(
        "{looked} builds were judged within {:.1?}; {} were purged",
        begun.elapsed(),
        purged.trim()
    ));
    Ok(())
}

/// Waits until everything works, which must not take long.
fn heal(nemesis: &mut Nemesis, site: &mut Site) -> anyhow::Result<()> {
    let healed = Instant::now();
    while let Some(missing) = site.missing() {
        anyhow::ensure!(
            healed.elapsed() < CLEAR_LIMIT,
            "the cluster was not whole {CLEAR_LIMIT:?} after healing: {missing}"
        );
        for line in site.start_fallen()? {
            nemesis.write(&line);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let whole = healed.elapsed();
    nemesis.write(&format!("whole {whole:.1?} after healing"));
    if whole > RECOVERY_LIMIT {
        nemesis
            .wrong
            .push(format!("the cluster was whole {whole:.1?} after healing, and must be within {RECOVERY_LIMIT:?}"));
    }
    Ok(())
}

/// Processes of builds that are not gone long after all builds have ended.
fn left(site: &Site) -> Vec<String> {
    let deadline = Instant::now() + CLEAR_LIMIT;
    loop {
        let left = site.strangers();
        if left.is_empty() || Instant::now() > deadline {
            return left.into_iter().map(|process| format!("a process of a build is left: {process}")).collect();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Stretches without an acknowledged submit that no missing majority explains.
fn stalls(load: &Load, windows: &[Window]) -> Vec<String> {
    let excused = |gap: &Window| STALL_LIMIT + gap.within(windows);
    let wrong = load.gaps().into_iter().filter(|gap| gap.length() > excused(gap));
    wrong
        .map(|gap| {
            format!(
                "no submit was acknowledged from {:.1?} to {:.1?}, of which {:.1?} had no majority; {STALL_LIMIT:?} is the limit",
                gap.begin,
                gap.end,
                gap.within(windows)
            )
        })
        .collect()
}

/// Why a run proves nothing.
fn void(plan: &Plan, load: &Load, nemesis: &Nemesis) -> Vec<String> {
    let mut why = Vec::new();
    let submitted = load.submitted.load(Ordering::Relaxed);
    let least = SUBMITS_A_MINUTE * plan.duration.as_secs() / 60;
    if submitted < least {
        why.push(format!("{submitted} submits were acknowledged, of {least} that make a run"));
    }
    let missed = if plan.is_whole() { nemesis.deck.unmet() } else { nemesis.deck.drawn_unmet() };
    if !missed.is_empty() {
        why.push(format!("these faults never met anything: {missed:?}"));
    }
    why
}

fn summary(plan: &Plan, load: &Load, nemesis: &Nemesis) -> Vec<String> {
    let mut lines = vec!["fault, times it met something of times it was made, longest recovery:".to_owned()];
    for (fault, (made, met)) in nemesis.deck.tally() {
        let recovery = nemesis.recovery.get(fault).map_or("-".to_owned(), |took| format!("{took:.1?}"));
        lines.push(format!("  {:<20} {met:>3} of {made:>3}  {recovery}", format!("{fault:?}")));
    }
    let gaps = load.gaps();
    let longest = gaps.first().map(|gap| gap.length()).unwrap_or_default();
    let excused = gaps.first().map(|gap| gap.within(&nemesis.windows)).unwrap_or_default();
    lines.push(format!(
        "seed {}: {} faults, {} submits acknowledged, {} answers; longest time without an acknowledged submit {longest:.1?}, \
         of which {excused:.1?} without a majority",
        plan.seed,
        nemesis.deck.tally().values().map(|(_, met)| met).sum::<u32>(),
        load.submitted.load(Ordering::Relaxed),
        load.history().len(),
    ));
    lines
}
