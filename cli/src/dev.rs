//! `helix dev`: a whole cluster in the foreground, with certificates of its own, for development, demos and tests.

pub(crate) mod layout;
mod process;
mod ready;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::dev::layout::Layout;
use crate::dev::process::Fleet;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::Output;

/// How long everything may take to come up.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// `helix dev`.
#[derive(Args)]
pub(crate) struct DevArguments {
    /// Coordinators
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) coordinators: u16,
    /// Agents
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub(crate) agents: u16,
    /// Concurrent builds an agent takes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) capacity: u32,
    /// Where everything is kept, and found again [default: a temporary directory, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// First of the ports to use, three for each coordinator [default: free ones]
    #[arg(long, value_name = "P")]
    pub(crate) base_port: Option<u16>,
    /// How agents isolate exec builds
    #[arg(long, value_name = "MODE", default_value = "none")]
    pub(crate) isolation: String,
    /// Another key of every agent's configuration (agent.KEY=VALUE), or of every coordinator's (coordinator.KEY=VALUE). May be
    /// repeated
    #[arg(long = "set", value_name = "ROLE.KEY=VALUE", value_parser = setting)]
    pub(crate) settings: Vec<Setting>,
    /// Start again what dies
    #[arg(long)]
    pub(crate) restart: bool,
}

/// A key of the configuration of all members of a role.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) role: &'static str,
    pub(crate) key: String,
    pub(crate) value: String,
}

fn setting(text: &str) -> Result<Setting, String> {
    let wrong = || format!("{text:?} is neither agent.KEY=VALUE nor coordinator.KEY=VALUE");
    let (name, value) = text.split_once('=').ok_or_else(wrong)?;
    let (role, key) = name.split_once('.').filter(|(_, key)| !key.is_empty()).ok_or_else(wrong)?;
    let role = ["agent", "coordinator"].into_iter().find(|known| *known == role).ok_or_else(wrong)?;
    Ok(Setting { role, key: key.to_owned(), value: value.to_owned() })
}

/// The signals that end the cluster.
struct Ends {
    terminate: Signal,
    interrupt: Signal,
}

impl Ends {
    fn install() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

pub(crate) async fn run(arguments: DevArguments, output: &Output) -> Result<Code, Failure> {
    let broken = |error: std::io::Error| Failure::plain(format!("cannot start: {error}"));
    let mut ends = Ends::install().map_err(broken)?;
    // Held until the end: dropping it removes the directory.
    let temporary = match &arguments.data_dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("helix-dev-").tempdir().map_err(broken)?),
    };
    let root = match (&arguments.data_dir, &temporary) {
        (Some(directory), _) => absolute(directory).map_err(broken)?,
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => return Err(Failure::plain("no data directory")),
    };
    let layout = Layout::prepare(&root, &arguments)?;
    let mut fleet = Fleet::start(&layout, arguments.restart)?;
    let result = tokio::select! {
        result = serve(&layout, &mut fleet, output) => result,
        () = ends.asked() => Ok(()),
    };
    output.say("stopping");
    fleet.stop().await;
    drop(temporary);
    result.map(|()| Code::SUCCESS)
}

fn absolute(directory: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    directory.canonicalize()
}

/// Waits until the cluster is ready, says so, and minds the processes until the end.
async fn serve(layout: &Layout, fleet: &mut Fleet, output: &Output) -> Result<(), Failure> {
    let deadline = Instant::now() + READY_WITHIN;
    tokio::select! {
        result = ready::wait(layout, deadline) => result?,
        failure = fleet.mind(output, process::Phase::Starting) => return Err(failure),
    }
    let endpoints = layout.endpoints().join(",");
    output.line(&format!("ready context={} endpoints={endpoints}", layout.context_path().display()));
    Err(fleet.mind(output, process::Phase::Running).await)
}
