//! What nodes find when they start: certificates, configurations, a cluster that was initialised.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use helix_common::endpoints::Endpoints;
use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::tls::{TlsFiles, TlsStore};

use crate::chaos::site::host::ip;
use crate::chaos::site::{CLUSTER, Node, SEATS, Site, run};
use crate::cluster::programs;

/// A node whose clock is a year ahead still sees valid certificates, and one that is an hour behind sees none that is valid yet:
/// both are worth seeing.
const VALID_FOR: Duration = Duration::from_secs(3 * 365 * 24 * 3600);

/// Below which a coordinator takes nothing more, in bytes.
pub(in crate::chaos) const RESERVE: u64 = 64 << 20;

/// Few minutes see the log cut and the registry's file written anew, many times.
const SMALL: &str = "[raft]\nsnapshot_log_bytes = \"2MiB\"\nregistry_renew_bytes = \"1MiB\"\n";

/// How a coordinator begins.
pub(super) enum Beginning {
    /// As one of the first.
    Member,
    /// It waits to be added.
    Join,
}

impl Site {
    fn pki(&self) -> PathBuf {
        self.root().join("pki")
    }

    /// Where clients find coordinators: every seat, taken or not.
    fn endpoint_list() -> Vec<String> {
        (1..=SEATS).map(|seat| format!("https://{}:7420", ip(seat))).collect()
    }

    /// The clients' view of the cluster.
    ///
    /// # Errors
    /// When the operator's certificate cannot be read.
    pub(in crate::chaos) fn endpoints(&self) -> anyhow::Result<Endpoints> {
        let pki = self.pki();
        let files = TlsFiles {
            ca: pki.join(CA_FILE),
            cert: pki.join("operator-chaos.pem"),
            key: pki.join("operator-chaos-key.pem"),
            revoked: None,
        };
        Ok(Endpoints::new(&Self::endpoint_list(), TlsStore::load(files)?)?)
    }

    /// The authority, and a context for each of an operator's views: the whole cluster's, and each seat's alone.
    pub(super) fn lay_out_clients(&self) -> anyhow::Result<()> {
        let pki = self.pki();
        self.authority.save(&pki)?;
        self.authority.issue(Role::Operator, "chaos", &[], VALID_FOR_DEFAULT)?.save(&pki, "operator-chaos")?;
        let context = |endpoints: &[String]| {
            format!(
                "cluster = {CLUSTER:?}\nendpoints = {endpoints:?}\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
                pki.join(CA_FILE),
                pki.join("operator-chaos.pem"),
                pki.join("operator-chaos-key.pem")
            )
        };
        fs::write(self.root().join("context.toml"), context(&Self::endpoint_list()))?;
        for (seat, endpoint) in (1..).zip(Self::endpoint_list()) {
            fs::write(self.context_of(Node::Coordinator(seat)), context(&[endpoint]))?;
        }
        Ok(())
    }

    fn certify(&self, role: Role, name: &str, file: &str, host: u8) -> anyhow::Result<String> {
        let pki = self.pki();
        self.authority.issue(role, name, &[ip(host)], VALID_FOR)?.save(&pki, file)?;
        Ok(format!(
            "[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
            pki.join(CA_FILE),
            pki.join(format!("{file}.pem")),
            pki.join(format!("{file}-key.pem"))
        ))
    }

    /// Makes the coordinator that sits at a seat.
    pub(super) fn lay_out_coordinator(&self, seat: u8, beginning: &Beginning) -> anyhow::Result<()> {
        let node = Node::Coordinator(seat);
        let id = self.id(node).to_string();
        let tls = self.certify(Role::Coordinator, &id, &format!("coordinator-{id}"), seat)?;
        let data = self.data_dir(node);
        let text = format!(
            "data_dir = {data:?}\nadvertise = \"https://{0}:7420\"\n[listen]\ngrpc = \"{0}:7420\"\n\
             peer = \"{0}:7421\"\nhttp = \"{0}:7422\"\n{tls}{SMALL}",
            ip(seat)
        );
        fs::write(self.config(node), text)?;
        let mut init = Command::new(programs().join("helix-coordinator"));
        match beginning {
            Beginning::Member => {
                let members: Vec<String> =
                    self.coordinators().map(|node| format!("{}={}:7421", self.id(node), ip(node.host()))).collect();
                init.args(["init", "--cluster", CLUSTER, "--id", &id, "--members", &members.join(",")]);
                init.arg("--data-dir").arg(&data);
            }
            Beginning::Join => {
                init.args(["init", "--join", "--config"]).arg(self.config(node));
            }
        }
        run(&mut init)?;
        Ok(())
    }

    /// Makes an agent.
    pub(super) fn lay_out_agent(&self, node: Node) -> anyhow::Result<()> {
        let name = node.name();
        let tls = self.certify(Role::Agent, &name, &name, node.host())?;
        let text = format!(
            "name = {name:?}\ncoordinators = {:?}\ncapacity = 6\ndata_dir = {:?}\nisolation = \"none\"\n{tls}\
             [exec]\nallow_job_commands = true\n[podman]\nenabled = false\n",
            Self::endpoint_list(),
            self.data_dir(node)
        );
        fs::write(self.config(node), text)?;
        Ok(())
    }

    /// An authority for a cluster.
    pub(super) fn authority() -> anyhow::Result<Authority> {
        Ok(Authority::create(CLUSTER)?)
    }
}
