//! `cargo verify`: all that CI checks, without writing to the tree.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;

/// Everything that CI checks: formatting, lints, tests, docs, dependencies.
#[derive(Parser)]
struct Arguments {
    /// Leave out a check; may be repeated
    #[arg(long, value_name = "CHECK")]
    except: Vec<String>,
}

/// A check: its name, the program and arguments, a variable to set.
struct Check {
    name: &'static str,
    arguments: &'static [&'static str],
    variable: Option<(&'static str, &'static str)>,
}

const CHECKS: &[Check] = &[
    Check { name: "format", arguments: &["fmt", "--all", "--check"], variable: None },
    Check {
        name: "lint",
        arguments: &["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"],
        variable: None,
    },
    Check { name: "test", arguments: &["test", "--locked"], variable: None },
    Check {
        name: "doc",
        arguments: &["doc", "--quiet", "--locked", "--workspace", "--no-deps"],
        variable: Some(("RUSTDOCFLAGS", "--deny warnings")),
    },
    Check {
        name: "deny",
        arguments: &["deny", "--log-level", "error", "check", "bans", "licenses", "sources"],
        variable: None,
    },
];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(unknown) = arguments.except.iter().find(|name| CHECKS.iter().all(|check| check.name != **name)) {
        eprintln!("no check is called {unknown}");
        return ExitCode::from(2);
    }
    let mut failed = Vec::new();
    for check in CHECKS.iter().filter(|check| !arguments.except.iter().any(|name| name == check.name)) {
        println!("== {}: cargo {}", check.name, check.arguments.join(" "));
        let started = Instant::now();
        let mut command = Command::new(env!("CARGO"));
        command.args(check.arguments).envs(check.variable);
        let passed = command.status().is_ok_and(|status| status.success());
        println!(
            "== {}: {} in {} s",
            check.name,
            if passed { "passed" } else { "FAILED" },
            started.elapsed().as_secs()
        );
        if !passed {
            failed.push(check.name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {}", failed.join(", "));
    if failed.contains(&"deny") {
        println!("cargo deny comes with: cargo install cargo-deny --locked");
    }
    ExitCode::FAILURE
}
