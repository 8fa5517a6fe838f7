//! `helix-agent`: flags, configuration, and which of its few commands is meant.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use helix_agent::config::Config;
use helix_agent::{control, program};
use helix_common::{config as configuration, telemetry};

/// Runs builds for a Helix cluster.
#[derive(Debug, Parser)]
#[command(name = "helix-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Take and run builds (the default).
    Run,
    /// Let the running agent go for an upgrade; its builds go on.
    Detach,
    /// Look at the configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Validate it and print the effective values.
    Check,
}

#[derive(Clone, Debug, Args)]
struct Options {
    /// The configuration file (TOML).
    #[arg(long, value_name = "FILE", global = true, env = "HELIX_CONFIG")]
    config: Option<PathBuf>,
    /// The worker's name.
    #[arg(long, global = true)]
    name: Option<String>,
    /// A coordinator, https://HOST:PORT; may be repeated.
    #[arg(long, value_name = "URL", global = true)]
    coordinator: Vec<String>,
    /// Concurrent builds.
    #[arg(long, global = true)]
    capacity: Option<u32>,
    /// Where the agent keeps its state.
    #[arg(long, value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
    /// Any other key, such as exec.shell=bash; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    set: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("helix-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let config = load(&cli.options)?;
    match &cli.command {
        Some(Verb::Detach) => control::detach(&config.data_dir),
        Some(Verb::Config { verb: ConfigVerb::Check }) => {
            use std::io::Write as _;
            let text = configuration::effective(&config).context("cannot print the configuration")?;
            std::io::stdout().write_all(text.as_bytes()).context("cannot write")
        }
        Some(Verb::Run) | None => {
            let filter = Some(config.log.filter.as_str()).filter(|filter| !filter.is_empty());
            let telemetry = telemetry::init(filter, config.log.format)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("cannot start the runtime")?;
            let options = cli.options.clone();
            let ended = runtime.block_on(program::run(config, move || load(&options), telemetry));
            // A disk that hangs must not keep the process.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            ended
        }
    }
}

/// The configuration: flags over environment over file.
fn load(options: &Options) -> anyhow::Result<Config> {
    let mut overrides = toml::Table::new();
    let mut set = |key: &str, value: &str| configuration::set::<Config>(&mut overrides, key, value);
    for pair in &options.set {
        let (key, value) = pair.split_once('=').with_context(|| format!("--set {pair:?} is not KEY=VALUE"))?;
        set(key, value)?;
    }
    if let Some(name) = &options.name {
        set("name", name)?;
    }
    if !options.coordinator.is_empty() {
        set("coordinators", &options.coordinator.join(","))?;
    }
    if let Some(capacity) = options.capacity {
        set("capacity", &capacity.to_string())?;
    }
    if let Some(data_dir) = &options.data_dir {
        let text = data_dir.to_str().context("--data-dir is not UTF-8")?;
        set("data_dir", text)?;
    }
    let current = std::env::current_dir().context("the current directory is gone")?;
    let file = options.config.as_ref().map(|file| current.join(file));
    let config: Config = configuration::load(file.as_deref(), "HELIX", overrides)?;
    let directory = file.as_deref().and_then(Path::parent).unwrap_or(&current);
    Ok(config.check(directory)?)
}
