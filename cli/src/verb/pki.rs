//! `helix pki init|issue|show|revoke`: a certificate authority and identities for a cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use helix_common::identity::Role;
use helix_common::pki::{self, Authority, PkiError, Revoked, Serial};
use serde_json::json;

use crate::context::duration;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{Item, Output};

/// `helix pki`.
#[derive(Args)]
pub(crate) struct PkiArguments {
    #[command(subcommand)]
    verb: PkiVerb,
}

#[derive(Subcommand)]
enum PkiVerb {
    /// Make a certificate authority: ca.pem, and ca-key.pem, which stays where you issue
    Init {
        /// The cluster's name
        #[arg(long, value_name = "NAME")]
        cluster: String,
        /// The authority's directory
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
    /// Issue an identity: a certificate and its key
    Issue {
        /// What the identity may do
        #[arg(value_enum)]
        role: RoleName,
        /// Whom it is for: a coordinator's node id, a worker's name, a person or program
        name: String,
        /// DNS names and addresses that clients dial; for coordinators. May be repeated
        #[arg(long = "host", value_name = "NAME_OR_ADDRESS")]
        hosts: Vec<String>,
        /// How long it is valid
        #[arg(long, value_name = "DUR", value_parser = duration, default_value = "365d")]
        valid_for: Duration,
        /// The authority's directory
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Where to write the files [default: the authority's directory]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Replace an identity that is there; its certificate stays valid until it is revoked
        #[arg(long)]
        force: bool,
    },
    /// Show what a certificate says, and whether it is revoked
    Show {
        certificate: PathBuf,
        /// Where the list of revoked ones is [default: the certificate's directory]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Put a certificate on the authority's list of revoked ones; carry the list to the coordinators and reload them
    Revoke {
        certificate: PathBuf,
        /// The authority's directory
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleName {
    Coordinator,
    Agent,
    Client,
    Operator,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Coordinator => Self::Coordinator,
            RoleName::Agent => Self::Agent,
            RoleName::Client => Self::Client,
            RoleName::Operator => Self::Operator,
        }
    }
}

impl From<PkiError> for Failure {
    fn from(error: PkiError) -> Self {
        Self::plain(error.to_string())
    }
}

pub(crate) fn run(arguments: PkiArguments, output: &Output) -> Result<Code, Failure> {
    match arguments.verb {
        PkiVerb::Init { cluster, dir } => {
            Authority::create(&cluster)?.save(&dir)?;
            let path = dir.join(pki::CA_FILE).display().to_string();
            let json = json!({ "cluster": cluster, "ca": path });
            output.item(&Item { name: path.clone(), cells: Vec::new(), json }, &path);
        }
        PkiVerb::Issue { role, name, hosts, valid_for, dir, out, force } => {
            let role = Role::from(role);
            let issued = Authority::load(&dir)?.issue(role, &name, &hosts, valid_for)?;
            let (out, stem) = (out.unwrap_or(dir), format!("{}-{name}", role.as_str()));
            let there = [out.join(format!("{stem}.pem")), out.join(format!("{stem}-key.pem"))];
            if let Some(there) = there.iter().find(|path| !force && path.exists()) {
                let there = there.display();
                return Err(Failure::plain(format!(
                    "{there} exists already; --force replaces it, --out writes elsewhere, and `helix pki revoke` ends an old one"
                )));
            }
            let (cert, key) = issued.save(&out, &stem)?;
            let (cert, key) = (cert.display().to_string(), key.display().to_string());
            let json = json!({ "cert": cert, "key": key });
            output.item(&Item { name: cert.clone(), cells: Vec::new(), json }, &format!("{cert}\n{key}"));
        }
        PkiVerb::Show { certificate, dir } => {
            let beside = certificate.parent().unwrap_or(Path::new("")).to_owned();
            let list = dir.clone().unwrap_or(beside).join(pki::REVOKED_FILE);
            // A list that was named must be there; one that was not may be elsewhere.
            let list = if dir.is_some() || list.exists() { Some(Revoked::load(&list)?) } else { None };
            show(&read(&certificate)?, list.as_ref(), output)?;
        }
        PkiVerb::Revoke { certificate, dir } => {
            let serial = pki::show(&read(&certificate)?)?.serial;
            revoke(&dir, serial, output)?;
        }
    }
    Ok(Code::SUCCESS)
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::plain(format!("cannot read {}: {error}", path.display())))
}

fn show(pem: &str, list: Option<&Revoked>, output: &Output) -> Result<(), Failure> {
    let shown = pki::show(pem)?;
    let identity = match &shown.identity {
        Ok(identity) => identity.to_string(),
        Err(error) => format!("none: {error}"),
    };
    let time =
        |time: i64| jiff::Timestamp::from_second(time).map_or_else(|_| time.to_string(), |time| time.to_string());
    let not_before = time(shown.not_before.unix_timestamp());
    let not_after = time(shown.not_after.unix_timestamp());
    let revoked = list.map(|list| list.contains(&shown.serial));
    let revoked_word = match revoked {
        Some(true) => "yes",
        Some(false) => "no",
        None => "unknown: no list of revoked ones beside it; name its directory with --dir",
    };
    let json = json!({
        "revoked": revoked,
        "identity": identity,
        "serial": shown.serial.to_string(),
        "not_before": not_before,
        "not_after": not_after,
        "hosts": shown.names,
    });
    let text = format!(
        "identity   {identity}\nserial     {}\nvalid      {not_before} to {not_after}\nrevoked    {revoked_word}\nhosts      {}",
        shown.serial,
        shown.names.join(" ")
    );
    output.item(&Item { name: identity, cells: Vec::new(), json }, &text);
    Ok(())
}

fn revoke(dir: &Path, serial: Serial, output: &Output) -> Result<(), Failure> {
    let text = serial.to_string();
    pki::revoke(dir, &serial).map_err(|error| Failure::plain(error.to_string()))?;
    let path = dir.join(pki::REVOKED_FILE).display().to_string();
    let json = json!({ "serial": text, "list": path });
    output.item(&Item { name: text.clone(), cells: Vec::new(), json }, &format!("{text} is on {path}"));
    Ok(())
}
