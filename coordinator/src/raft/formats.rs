//! Which command formats may be put into the log: those that every member knows; the oldest of them decides.
//!
//! A node that meets an entry it does not know stops. So whoever leads proposes nothing newer than the oldest member, be
//! it voter or learner, can read: what an older form says as well is put into it, the rest is refused until the member is
//! upgraded. What a member knows is what it said when it made itself known to the registry, and what its messages say
//! since; the lower of both counts. Invariant: "upgrade pending" means that nothing was put into the log.

use helix_model::NodeId;

use crate::codec::{command_from_wire, format_of, lower};
use crate::peers::Peers;
use crate::registry::{Proposal, ProposeError, Shared};

/// The highest format that every member knows, and who stands in the way of more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Ceiling {
    pub(super) format: u32,
    /// The oldest member and its version.
    pub(super) by: (NodeId, String),
}

/// Leaves of a batch what every member knows: see [`Ceiling::hold`].
pub(super) fn hold(batch: &mut Vec<Proposal>, shared: &Shared, peers: &Peers) {
    // Nearly all: these need no look at who is a member.
    if batch.iter().any(|proposal| proposal.format > 1) {
        Ceiling::of(peers.format(), shared, peers).hold(batch);
    }
}

impl Ceiling {
    /// As this node, which knows `own`, sees it.
    pub(super) fn of(own: u32, shared: &Shared, peers: &Peers) -> Self {
        let members = shared.members();
        let state = shared.state();
        let version = |id| state.node(id).map_or_else(String::new, |row| row.version.clone());
        let mut ceiling = Self { format: own, by: (peers.own(), version(peers.own())) };
        for id in members.into_keys().filter(|id| *id != peers.own()) {
            let said = state.node(id).map(|row| row.format).filter(|format| *format > 0);
            // One that said nothing in either way never ran in this cluster: it has nothing that it could be too old for,
            // and if it is, it says so when it is started.
            let Some(format) = said.into_iter().chain(peers.format_of(id)).min() else { continue };
            if format < ceiling.format {
                ceiling = Self { format, by: (id, version(id)) };
            }
        }
        ceiling
    }

    /// Puts what is beyond into an older form, where that says the same, and answers the rest back.
    fn hold(&self, batch: &mut Vec<Proposal>) {
        for mut proposal in std::mem::take(batch) {
            match self.fit(&mut proposal) {
                Ok(()) => batch.push(proposal),
                // Whoever went away does not want to know.
                Err(error) => drop(proposal.reply.send(Err(error))),
            }
        }
    }

    fn fit(&self, proposal: &mut Proposal) -> Result<(), ProposeError> {
        if proposal.format <= self.format {
            return Ok(());
        }
        proposal.wire.iter_mut().for_each(|command| lower(command, self.format));
        let needed = proposal.wire.iter().map(format_of).max().unwrap_or(1);
        if needed > self.format {
            let (node, version) = self.by.clone();
            return Err(ProposeError::UpgradePending { node, version, known: self.format, needed });
        }
        let commands = proposal.wire.iter().cloned().map(command_from_wire).collect::<Result<_, _>>();
        proposal.commands = commands.map_err(|error| ProposeError::Storage(error.to_string()))?;
        proposal.format = needed;
        Ok(())
    }
}
