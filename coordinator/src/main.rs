//! `helix-coordinator`: the program. Reads arguments, and leaves the rest to the library.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use helix_common::config::set;
use helix_common::tls::TlsStore;
use helix_coordinator::config::Config;
use helix_coordinator::program::offline::{self, Recover, Restore};
use helix_coordinator::{node_dir, program};
use helix_model::NodeId;
use toml::Table;

#[cfg(target_arch = "x86_64")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A control node of Helix Build: keeps the registry of builds, decides who runs them, stores what they leave.
#[derive(Parser, Debug)]
#[command(name = "helix-coordinator", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Makes a node: writes cluster, node id and a random epoch into an empty directory, once.
    Init(Init),
    /// Runs the node (the default).
    Run(Run),
    /// Makes a node of a new cluster from a backup (`helix cluster snapshot save`). Every new member is made so, from the
    /// same file, with the same members, under an id that the old cluster never used.
    Restore(Restore),
    /// Makes this node a cluster of its own, when all other voters are lost for good; on the one whose log is the most
    /// recent. Without --lost it says how far this node's log is, and changes nothing.
    Recover(Recover),
    /// Looks at the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Subcommand, Debug)]
enum ConfigCommand {
    /// Checks it and prints the effective values.
    Check(Run),
}

#[derive(Args, Debug)]
struct Init {
    /// The cluster's name, as in its certificates; with --config the certificate's by default.
    #[arg(long, value_name = "NAME", required_unless_present = "config")]
    cluster: Option<String>,
    /// This node's number, at least 1, never used before in this cluster; with --config the certificate's by default.
    #[arg(long, value_name = "N", required_unless_present = "config")]
    id: Option<u64>,
    /// All first members, this one included, and where coordinators dial each (port 7421).
    #[arg(
        long,
        value_name = "ID=HOST:PORT,...",
        value_delimiter = ',',
        required_unless_present = "join",
        value_parser = program::member
    )]
    members: Vec<(NodeId, String)>,
    /// Joins a cluster that runs: the node waits until `helix cluster add` names it.
    #[arg(long, conflicts_with = "members")]
    join: bool,
    /// The directory, made if it does not exist; with --config the one that it names by default.
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    data_dir: Option<PathBuf>,
    /// The configuration that the node will run with.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Flags win over `HELIX_...` variables, these over the file.
#[derive(Args, Debug)]
struct Run {
    /// The configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the node keeps everything.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where clients and agents dial this node, as <https://HOST:PORT>.
    #[arg(long, value_name = "URL")]
    advertise: Option<String>,
    /// Listening address for clients and agents.
    #[arg(long, value_name = "ADDRESS")]
    listen_grpc: Option<SocketAddr>,
    /// Listening address for coordinators.
    #[arg(long, value_name = "ADDRESS")]
    listen_peer: Option<SocketAddr>,
    /// Listening address for health and metrics.
    #[arg(long, value_name = "ADDRESS")]
    listen_http: Option<SocketAddr>,
    /// Certificates of trusted authorities (PEM).
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// This node's certificate (PEM).
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Any other key of the configuration, such as log.format=json.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

fn main() -> ExitCode {
    match carry_out(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = in_one_line(&error);
            // Nothing is left to do about a closed stderr.
            let _ = writeln!(std::io::stderr(), "helix-coordinator: {line}");
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, each said once: many of ours name their cause already.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            line.push_str(if line.is_empty() { "" } else { ": " });
            line.push_str(&cause);
        }
    }
    line.replace('\n', " ")
}

fn carry_out(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Some(Command::Init(arguments)) => init(arguments),
        Some(Command::Restore(arguments)) => alone(offline::restore(arguments)),
        Some(Command::Recover(arguments)) => alone(offline::recover(arguments)),
        Some(Command::Config { command: ConfigCommand::Check(arguments) }) => check(&arguments),
        Some(Command::Run(arguments)) => run(arguments),
        None => run(cli.run),
    }
}

fn init(arguments: Init) -> anyhow::Result<()> {
    let members = program::members(arguments.members)?;
    let configured = match &arguments.config {
        Some(file) => {
            let config = Config::load(Some(file), Table::new())?;
            let identity = TlsStore::load(config.tls)?.own_identity().clone();
            let id = identity.node().with_context(|| format!("the certificate is {identity}, and no coordinator's"))?;
            Some((identity.cluster.as_str().to_owned(), id, config.data_dir))
        }
        None => None,
    };
    let (cluster, id, data_dir) = match configured {
        Some((cluster, id, data_dir)) => (
            arguments.cluster.unwrap_or(cluster),
            arguments.id.map_or(id, NodeId),
            arguments.data_dir.unwrap_or(data_dir),
        ),
        None => (
            arguments.cluster.context("--cluster is missing")?,
            NodeId(arguments.id.context("--id is missing")?),
            arguments.data_dir.context("--data-dir is missing")?,
        ),
    };
    helix_common::identity::Name::new("cluster", &cluster)?;
    let made = node_dir::init(&data_dir, &cluster, id, &members)?;
    say(&format!("node {} of cluster {} made in {}", made.node, made.cluster, data_dir.display()))?;
    if arguments.join {
        say(&format!("start it, and then: helix cluster add {} HOST:7421", made.node))?;
    }
    Ok(())
}

/// Does something for which no node may run.
fn alone(work: impl Future<Output = anyhow::Result<String>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("the runtime cannot start")?;
    say(runtime.block_on(work)?.trim_end())
}

fn check(arguments: &Run) -> anyhow::Result<()> {
    let config = Config::load(arguments.config.as_deref(), arguments.flags()?)?;
    say(helix_common::config::effective(&config)?.trim_end())
}

fn run(arguments: Run) -> anyhow::Result<()> {
    let flags = arguments.flags()?;
    let file = arguments.config;
    let reread = move || Config::load(file.as_deref(), flags.clone());
    let config = reread()?;
    let logging = helix_common::telemetry::init(config.log.filter.as_deref(), config.log.format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_threads)
        .thread_name("helix")
        .enable_all()
        .build()
        .context("the runtime cannot start")?;
    let ended = runtime.block_on(program::run(config, logging, reread));
    // What still runs is blocked in a system call: everything that matters has been ended in order before.
    runtime.shutdown_background();
    ended
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("standard output is closed")
}

impl Run {
    fn flags(&self) -> anyhow::Result<Table> {
        let mut given: Vec<(&str, String)> = Vec::new();
        for (key, path) in [
            ("data_dir", &self.data_dir),
            ("tls.ca", &self.tls_ca),
            ("tls.cert", &self.tls_cert),
            ("tls.key", &self.tls_key),
        ] {
            if let Some(path) = path {
                given.push((key, absolute(path)?));
            }
        }
        for (key, address) in
            [("listen.grpc", &self.listen_grpc), ("listen.peer", &self.listen_peer), ("listen.http", &self.listen_http)]
        {
            given.extend(address.map(|address| (key, address.to_string())));
        }
        given.extend(self.advertise.clone().map(|url| ("advertise", url)));
        given.extend(self.set.iter().map(|(key, value)| (key.as_str(), value.clone())));
        let mut flags = Table::new();
        for (key, value) in given {
            set::<Config>(&mut flags, key, &value)?;
        }
        Ok(flags)
    }
}

/// A path on the command line is relative to where the program was started, not to the file.
fn absolute(path: &Path) -> anyhow::Result<String> {
    let absolute = std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))?;
    absolute.into_os_string().into_string().map_err(|_| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    Ok((key.trim().to_owned(), value.to_owned()))
}
