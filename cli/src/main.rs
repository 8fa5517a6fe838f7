//! `helix`: the command people and scripts use. One file per verb; this one only parses, dispatches and exits.

mod connection;
mod context;
mod dev;
mod download;
mod exit;
mod failure;
mod output;
mod screen;
mod unpack;
mod upload;
mod verb;

use clap::builder::Resettable;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::context::ContextOptions;
use crate::failure::Failure;
use crate::output::{ColorChoice, Format, Output};

/// Submit builds to a Helix Build cluster, watch them, end them, fetch what they made.
#[derive(Parser)]
#[command(name = "helix", version, propagate_version = true, max_term_width = 100)]
struct Arguments {
    #[command(flatten)]
    context: ContextOptions,

    /// How data is printed
    #[arg(
        short = 'o',
        long = "format",
        alias = "output-format",
        env = "HELIX_FORMAT",
        value_enum,
        default_value = "table",
        global = true
    )]
    format: Format,

    /// When to use colour (NO_COLOR is honoured)
    #[arg(long, env = "HELIX_COLOR", value_enum, default_value = "auto", global = true)]
    color: ColorChoice,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Submit a build, or many
    Submit(Box<verb::submit::SubmitArguments>),
    /// Show builds in detail
    Status(verb::status::StatusArguments),
    /// List builds, unfinished and recent first
    List(verb::list::ListArguments),
    /// Print a build's log
    Logs(verb::logs::LogsArguments),
    /// Wait until builds have ended; ends with the first bad build's exit code
    Wait(verb::wait::WaitArguments),
    /// Cancel builds and wait until they are seen dead
    Cancel(verb::cancel::CancelArguments),
    /// Submit a finished build again, as a new build
    Retry(verb::retry::RetryArguments),
    /// Say why a build waits, or where it ran
    Explain(verb::explain::ExplainArguments),
    /// List or fetch what a build made
    Artifacts(verb::artifacts::ArtifactsArguments),
    /// Remove finished builds with their logs and artifacts
    Purge(verb::purge::PurgeArguments),
    /// Keep a build from being purged
    Pin(verb::purge::PinArguments),
    /// Let a pinned build be purged again
    Unpin(verb::purge::PinArguments),
    /// Show, drain and remove workers
    Workers(verb::workers::WorkersArguments),
    /// Show, add and remove coordinators; the cluster's policy; backups
    Cluster(verb::cluster::ClusterArguments),
    /// Watch coordinators, workers and builds, drawn anew every two seconds
    Top(verb::top::TopArguments),
    /// Make a certificate authority and identities for a cluster
    Pki(verb::pki::PkiArguments),
    /// Keep a cluster for development running in the foreground
    Dev(dev::DevArguments),
    /// Look at context, certificates, coordinators, quorum and workers, and say what to do
    Doctor(verb::doctor::DoctorArguments),
    /// Print a completion script
    Completion(verb::completion::CompletionArguments),
    /// Print the versions of this command and of the cluster
    Version(verb::version::VersionArguments),
}

/// Reads the command line and the environment, in which an empty variable counts as none.
fn parse() -> Arguments {
    let mut command = Arguments::command();
    let empty = |argument: &Arg| {
        argument.get_env().is_some_and(|name| std::env::var_os(name).is_some_and(|value| value.is_empty()))
    };
    let ids: Vec<_> =
        command.get_arguments().filter(|argument| empty(argument)).map(|argument| argument.get_id().clone()).collect();
    for id in ids {
        command = command.mut_arg(id, |argument| argument.env(Resettable::Reset));
    }
    Arguments::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

fn main() -> std::process::ExitCode {
    let arguments = parse();
    let output = Output::new(arguments.format, arguments.color);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output.failed(&Failure::plain(format!("cannot start: {error}"))),
    };
    let result = runtime.block_on(dispatch(arguments, &output));
    runtime.shutdown_background();
    match result {
        Ok(code) => code.into(),
        Err(failure) => output.failed(&failure),
    }
}

async fn dispatch(arguments: Arguments, output: &Output) -> Result<exit::Code, Failure> {
    let context = arguments.context;
    match arguments.verb {
        Verb::Submit(submit) => verb::submit::run(*submit, &context, output).await,
        Verb::Status(status) => verb::status::run(status, &context, output).await,
        Verb::List(list) => verb::list::run(list, &context, output).await,
        Verb::Logs(logs) => verb::logs::run(logs, &context, output).await,
        Verb::Wait(wait) => verb::wait::run(wait, &context, output).await,
        Verb::Cancel(cancel) => verb::cancel::run(cancel, &context, output).await,
        Verb::Retry(retry) => verb::retry::run(retry, &context, output).await,
        Verb::Explain(explain) => verb::explain::run(explain, &context, output).await,
        Verb::Artifacts(artifacts) => verb::artifacts::run(artifacts, &context, output).await,
        Verb::Purge(purge) => verb::purge::run(purge, &context, output).await,
        Verb::Pin(pin) => verb::purge::run_pin(pin, true, &context, output).await,
        Verb::Unpin(pin) => verb::purge::run_pin(pin, false, &context, output).await,
        Verb::Workers(workers) => verb::workers::run(workers, &context, output).await,
        Verb::Cluster(cluster) => verb::cluster::run(cluster, &context, output).await,
        Verb::Top(top) => verb::top::run(top, &context, output).await,
        Verb::Pki(pki) => verb::pki::run(pki, output),
        Verb::Dev(arguments) => dev::run(arguments, output).await,
        Verb::Doctor(doctor) => verb::doctor::run(doctor, &context, output).await,
        Verb::Completion(completion) => verb::completion::run::<Arguments>(&completion, output),
        Verb::Version(version) => verb::version::run(&version, &context, output).await,
    }
}
