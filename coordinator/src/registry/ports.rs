//! The queues between a handle on the registry and the tasks behind it, and what goes through them.

use std::sync::Arc;
use std::time::Duration;

use helix_core::record::BuildRecord;
use helix_core::{Command, Reply};
use helix_model::{BuildId, Digest, NodeId};
use helix_proto::store;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    ENTRY_BYTES, ENTRY_COMMANDS, Leadership, MemberStep, MembershipError, ProposeError, RaftStatus, ReadError, Shared,
    StoreError,
};
use crate::codec::{command_to_wire, format_of};
use crate::node_dir::NodeIdentity;
use crate::raft::SavedSnapshot;

/// What a handle is made of; the tasks behind it hold the other ends.
pub(crate) struct Ports {
    pub(crate) identity: NodeIdentity,
    pub(crate) shared: Arc<Shared>,
    pub(crate) proposals: mpsc::Sender<Proposal>,
    pub(crate) barriers: mpsc::Sender<BarrierRequest>,
    pub(crate) lookups: mpsc::Sender<Lookup>,
    pub(crate) control: mpsc::Sender<Control>,
    pub(crate) names_blob: Box<dyn Fn(&Digest) -> bool + Send + Sync>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) status: watch::Receiver<RaftStatus>,
    pub(crate) failure: watch::Receiver<Option<String>>,
}

/// Who may take a proposal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Route {
    /// Whoever leads.
    Anywhere,
    /// It came from another coordinator: this node, or nobody.
    Forwarded,
    /// This node, while it leads in this term: what a leader decides follows from what it alone knows.
    InTerm(u64),
}

/// Commands on their way into the log, in order.
pub(crate) struct Proposal {
    pub(crate) commands: Vec<Command>,
    /// The same in their durable form, made once.
    pub(crate) wire: Vec<store::Command>,
    /// The lowest format whose readers understand them.
    pub(crate) format: u32,
    /// Their size in that form.
    pub(crate) bytes: usize,
    /// Who may take it.
    pub(crate) route: Route,
    pub(crate) reply: oneshot::Sender<Result<Vec<Reply>, ProposeError>>,
}

/// Somebody wants to read what is acknowledged by now.
pub(crate) type BarrierRequest = oneshot::Sender<Result<(), ReadError>>;

/// A question to the store's reading thread.
pub(crate) enum Lookup {
    Records { ids: Vec<BuildId>, reply: oneshot::Sender<Result<Vec<Arc<BuildRecord>>, StoreError>> },
    NamedBlobs { after: Option<Digest>, reply: oneshot::Sender<Result<Vec<Digest>, StoreError>> },
}

/// Rare requests to the task that owns consensus.
pub(crate) enum Control {
    Member { step: MemberStep, reply: oneshot::Sender<Result<(), MembershipError>> },
    Transfer { to: NodeId, reply: oneshot::Sender<Result<(), MembershipError>> },
    Snapshot { reply: oneshot::Sender<Result<SavedSnapshot, StoreError>> },
    Stop { deadline: Duration, reply: oneshot::Sender<()> },
}

/// What becomes of a proposal.
type Answer = oneshot::Receiver<Result<Vec<Reply>, ProposeError>>;

/// Commands in pieces that each fit into an entry.
pub(super) fn proposals(commands: Vec<Command>, route: Route) -> Vec<(Proposal, Answer)> {
    let mut out: Vec<(Proposal, Answer)> = Vec::new();
    for command in commands {
        let wire = command_to_wire(&command);
        let bytes = wire.encoded_len();
        let format = format_of(&wire);
        // What must wait for an upgrade holds nothing else up.
        let fits = |proposal: &Proposal| {
            proposal.bytes + bytes <= ENTRY_BYTES
                && proposal.commands.len() < ENTRY_COMMANDS
                && proposal.format == format
        };
        if !out.last().is_some_and(|(proposal, _)| fits(proposal)) {
            let (reply, answer) = oneshot::channel();
            out.push((Proposal { commands: Vec::new(), wire: Vec::new(), format, bytes: 0, route, reply }, answer));
        }
        if let Some((proposal, _)) = out.last_mut() {
            proposal.commands.push(command);
            proposal.wire.push(wire);
            proposal.bytes += bytes;
        }
    }
    out
}
