//! `cargo chaos`: breaks a real cluster for a while and judges what is left of its promises.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use helix_tests::chaos::{self, Plan};
use helix_tests::cluster::programs;

/// Set in the namespaces of a run's own.
const INSIDE: &str = "HELIX_CHAOS_INSIDE";

/// Three coordinators and three agents on hosts of their own, under load and faults. Needs root.
#[derive(Parser)]
struct Options {
    /// How long things are broken
    #[arg(long, default_value_t = 5)]
    minutes: u64,
    /// Which faults come when; real processes do not repeat a run exactly [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Clients at work
    #[arg(long, default_value_t = 8)]
    clients: u64,
    /// This fault and no other; may be repeated
    #[arg(long, value_name = "FAULT")]
    only: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if std::env::var_os(INSIDE).is_none() {
        // Built before, where the network is the usual one.
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--"])
            .arg(std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into()))
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .env("HELIX_BIN_DIR", programs())
            .exec();
        eprintln!("unshare cannot be started: {error}");
        return ExitCode::FAILURE;
    }
    let seed = options.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    println!("seed {seed}");
    let duration = Duration::from_secs(options.minutes * 60);
    let plan = Plan { duration, seed, clients: options.clients, only: options.only };
    match chaos::run(&plan, |line| println!("{line}")) {
        Ok(report) => {
            for line in &report.lines {
                println!("{line}");
            }
            for line in &report.wrong {
                println!("WRONG {line}");
            }
            for line in &report.void {
                println!("VOID {line}");
            }
            if report.wrong.is_empty() && report.void.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}
