//! `cargo sim`: runs the simulation, one seed or many, and says how to replay a failure.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

/// Coordinators' cores over a simulated log, with agents, hosts and clients, under faults.
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
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (from, count) = options.seed.map_or((options.from, options.seeds), |seed| (seed, 1));
    let start = Instant::now();
    for seed in from..from.saturating_add(count) {
        match helix_sim::run(seed, None) {
            Ok(summary) if options.seed.is_some() => println!("seed {seed} held: {summary:?}"),
            Ok(_) => {}
            Err(failure) => {
                println!("{failure}");
                return ExitCode::FAILURE;
            }
        }
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!("{count} seeds held, {:.0} seeds a minute", count as f64 / minutes.max(f64::MIN_POSITIVE));
    ExitCode::SUCCESS
}
