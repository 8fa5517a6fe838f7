//! Coordinators that come and go. A seat is a host with a disk; who sits there has an id that was never used before.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::chaos::site::host::ip;
use crate::chaos::site::layout::Beginning;
use crate::chaos::site::{Node, SEATS, Site};
use crate::cluster::{PATIENCE, programs, wait_for};

/// How long a node that was removed may take to end by itself.
const LEAVE_LIMIT: Duration = Duration::from_secs(20);

/// How long `helix` goes on when a change of members is cut short.
const CHANGE_LIMIT: &str = "300s";

impl Site {
    /// The id of who sits there now.
    #[must_use]
    pub(in crate::chaos) fn id(&self, node: Node) -> u64 {
        self.ids.get(&node).copied().unwrap_or_default()
    }

    /// Whether somebody more can be seated.
    #[must_use]
    pub(in crate::chaos) fn has_room(&self) -> bool {
        self.coordinators().count() < usize::from(SEATS)
    }

    /// Starts a coordinator at a free seat that waits to be added.
    ///
    /// # Errors
    /// When it cannot be made, or there is no free seat.
    pub(in crate::chaos) fn seat(&mut self) -> anyhow::Result<Node> {
        let taken: Vec<Node> = self.coordinators().collect();
        let seat = (1..=SEATS).find(|seat| !taken.contains(&Node::Coordinator(*seat))).context("a free seat")?;
        let node = Node::Coordinator(seat);
        self.ids.insert(node, self.next_id);
        self.next_id += 1;
        self.lay_out_coordinator(seat, &Beginning::Join)?;
        self.nodes.push(node);
        self.nodes.sort();
        self.spawn(node)?;
        let peer: SocketAddr = format!("{}:7421", ip(seat)).parse()?;
        wait_for("a node that is to join to listen", PATIENCE, || {
            TcpStream::connect_timeout(&peer, Duration::from_secs(1)).ok()
        });
        Ok(node)
    }

    /// Begins to add a coordinator or to remove it; the command goes on by itself when it is cut short.
    ///
    /// # Errors
    /// When `helix` cannot be started.
    pub(in crate::chaos) fn begin_change(&self, verb: &str, node: Node) -> anyhow::Result<Child> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(programs().join("helix"));
        command.arg("--context").arg(self.root().join("context.toml"));
        command.args(["cluster", verb, &self.id(node).to_string(), "--connect-timeout", CHANGE_LIMIT]);
        if verb == "add" {
            command.arg(format!("{}:7421", ip(node.host())));
        }
        command.env_remove("HELIX_FORMAT").env_remove("HELIX_CONTEXT");
        Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
    }

    /// Clears the seat of a coordinator that was removed. Says so if it did not end by itself.
    ///
    /// # Errors
    /// When its data cannot be removed.
    pub(in crate::chaos) fn unseat(&mut self, node: Node) -> anyhow::Result<Option<String>> {
        self.nodes.retain(|other| *other != node);
        let deadline = Instant::now() + LEAVE_LIMIT;
        let mut ended = false;
        while !ended && Instant::now() < deadline {
            ended = match self.running.get_mut(&node) {
                Some(child) => child.try_wait()?.is_some(),
                None => true,
            };
            std::thread::sleep(Duration::from_millis(20));
        }
        let said = (!ended).then(|| {
            format!("coordinator {} was removed, and had not ended by itself after {LEAVE_LIMIT:?}", self.id(node))
        });
        self.kill(node)?;
        fs::remove_dir_all(self.data_dir(node))?;
        Ok(said)
    }
}
