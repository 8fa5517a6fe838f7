//! `cargo sim`: runs the simulation, one seed or many, and tells the story of a failure.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use clap::Parser;
use helix_sim::{Bug, Failure, Summary};

/// Cores of coordinators and agents over a simulated log, with hosts, disks and clients, under faults.
#[derive(Parser)]
struct Options {
    /// Run this seed alone and print what it did.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Tell how the first failure came about: all about the build, worker or node that it names.
    #[arg(long)]
    explain: bool,
    /// Plant a bug, by its name in tests/README.md: the run shall fail.
    #[arg(long, value_parser = bug)]
    bug: Option<Bug>,
    /// Threads, each with a seed of its own; as many as there are cores if not given.
    #[arg(long)]
    threads: Option<usize>,
}

fn bug(name: &str) -> Result<Bug, String> {
    let known = Bug::ALL.iter().map(|(bug, _)| *bug).find(|bug| format!("{bug:?}") == name);
    known.ok_or_else(|| {
        let names: Vec<String> = Bug::ALL.iter().map(|(bug, _)| format!("{bug:?}")).collect();
        format!("it is one of {}", names.join(", "))
    })
}

type Verdict = Result<Summary, Box<Failure>>;

fn main() -> ExitCode {
    let options = Options::parse();
    let (from, count) = options.seed.map_or((options.from, options.seeds), |seed| (seed, 1));
    let start = Instant::now();
    let (mut held, mut sum) = (0u64, Summary::default());
    let failure = in_order(from..from.saturating_add(count), &options, |summary| {
        held += 1;
        sum += *summary;
    });
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!("{sum:#?}");
    println!("{held} seeds held, {:.0} seeds a minute", held as f64 / minutes.max(f64::MIN_POSITIVE));
    let Some(failure) = failure else {
        println!("digest of all that happened: {:016x}", sum.digest);
        return ExitCode::SUCCESS;
    };
    if options.explain {
        failure.story().iter().for_each(|line| println!("  {line}"));
        println!("seed {} failed at {} ms: {}", failure.seed, failure.at_ms, failure.why);
    } else {
        println!("{failure}");
    }
    println!("digest of all that happened: {:016x}", failure.digest);
    ExitCode::FAILURE
}

/// Runs seeds on all cores and hands over what each did in their order, up to the first that fails.
fn in_order(seeds: std::ops::Range<u64>, options: &Options, mut each: impl FnMut(&Summary)) -> Option<Box<Failure>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = options.threads.unwrap_or(cores).max(1);
    let (next, over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // A failure carries its whole trace: a few of them at a time.
        let (tx, rx) = mpsc::sync_channel::<(u64, Verdict)>(threads);
        for _ in 0..threads {
            let (tx, next, over, end, bug) = (tx.clone(), &next, &over, seeds.end, options.bug);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || tx.send((seed, helix_sim::run(seed, bug))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tx);
        let mut early: BTreeMap<u64, Verdict> = BTreeMap::new();
        let mut wanted = seeds.start;
        for (seed, verdict) in rx {
            early.insert(seed, verdict);
            while let Some(verdict) = early.remove(&wanted) {
                match verdict {
                    Ok(summary) => each(&summary),
                    Err(failure) => {
                        over.store(true, Ordering::Relaxed);
                        return Some(failure);
                    }
                }
                wanted += 1;
            }
        }
        None
    })
}
