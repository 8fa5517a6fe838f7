//! Coordinators that join a cluster of tests after it began: with a certificate, a configuration, and `init --join`.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use helix_common::ports;

use crate::cluster::{Cluster, Member, PATIENCE, programs, wait_for};

/// A node that waits to be added.
#[derive(Clone, Debug)]
pub struct Joining {
    /// Its process.
    pub member: Member,
    /// HOST:PORT of its coordinators' port.
    pub peer: String,
}

/// Makes a node with the authority in `pki`, which may be another cluster's, and starts it. `init` is what `init` is given
/// beside the configuration.
///
/// # Errors
/// When a program refuses.
pub fn wait_to_be_added(cluster: &Cluster, id: u64, pki: &Path, init: &[&str]) -> anyhow::Result<Joining> {
    let made = prepare(cluster, id, pki)?;
    run(Command::new(programs().join("helix-coordinator")).arg("init").args(init).arg("--config").arg(&made.config))?;
    Ok(start(cluster, &made))
}

/// A node of which there is everything but its data.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its process, which does not run.
    pub member: Member,
    /// HOST:PORT of its coordinators' port.
    pub peer: String,
    /// Its configuration.
    pub config: PathBuf,
}

/// Gives a node a certificate, ports and a configuration.
///
/// # Errors
/// When a program refuses.
pub fn prepare(cluster: &Cluster, id: u64, pki: &Path) -> anyhow::Result<Prepared> {
    let root = cluster.root();
    run(Command::new(programs().join("helix"))
        .args(["pki", "issue", "coordinator", &id.to_string(), "--force"])
        .args(["--host", "localhost", "--dir", &pki.display().to_string()]))?;
    let port = ports::free(3)?;
    let data_dir = root.join(format!("coordinator-{id}-joining"));
    let config = root.join("config").join(format!("coordinator-{id}-joining.toml"));
    let grpc = format!("https://127.0.0.1:{port}");
    let text = format!(
        "data_dir = {data_dir:?}\nadvertise = {grpc:?}\n[listen]\ngrpc = '127.0.0.1:{port}'\npeer = '127.0.0.1:{}'\n\
         http = '127.0.0.1:{}'\n[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
        port + 1,
        port + 2,
        pki.join("ca.pem"),
        pki.join(format!("coordinator-{id}.pem")),
        pki.join(format!("coordinator-{id}-key.pem")),
    );
    fs::write(&config, text)?;
    let program = programs().join("helix-coordinator");
    let argv = ["run", "--config", &config.display().to_string()].map(str::to_owned);
    let member = Member {
        role: "coordinator".to_owned(),
        id: id.to_string(),
        pid: None,
        argv: std::iter::once(program.display().to_string()).chain(argv).collect(),
        grpc: Some(grpc),
        data_dir,
    };
    Ok(Prepared { member, peer: format!("127.0.0.1:{}", port + 1), config })
}

/// Starts a node that has its data.
///
/// # Panics
/// When it does not listen.
pub fn start(cluster: &Cluster, made: &Prepared) -> Joining {
    cluster.adopt(made.member.clone());
    cluster.start_again(&made.member);
    // Who listens can be asked who it is.
    wait_for("the node to listen", PATIENCE, || TcpStream::connect(&made.peer).ok());
    let member = cluster.member("coordinator", &made.member.id);
    Joining { member, peer: made.peer.clone() }
}

/// Runs a program that must succeed.
///
/// # Errors
/// What it said, when it does not.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?} does not start"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
