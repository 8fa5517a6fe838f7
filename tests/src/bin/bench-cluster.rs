//! `cargo bench-cluster [NAME...] [--quick] [--out DIR]`: see `helix_tests::bench`.

#![allow(clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use helix_tests::bench::{MEASURES, ON_REQUEST, Settings, run};

/// Measures a cluster of three coordinators on this machine, beside peers where they are installed. Each name ends with a line
/// `NAME ours=N peer=N ratio=N.NN limit=N`; the ratio is ours to the peer's, the median of pairs taken in turns.
#[derive(Parser)]
struct Arguments {
    /// What to measure [default: all but growth, snapshot-stall and soak, which take ten minutes and more each]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(MEASURES.iter().map(|(name, _)| *name)))]
    names: Vec<String>,
    /// Fewer and shorter rounds: to see that all works, not to quote
    #[arg(long)]
    quick: bool,
    /// Write NAME.json, NAME.svg and results.md into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let names: Vec<&str> = match arguments.names.as_slice() {
        [] => MEASURES.iter().map(|(name, _)| *name).filter(|name| !ON_REQUEST.contains(name)).collect(),
        some => some.iter().map(String::as_str).collect(),
    };
    match run(&names, &Settings { quick: arguments.quick, out: arguments.out }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
