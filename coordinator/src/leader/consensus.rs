//! The seam to consensus: the few things of the registry that leading needs.
//!
//! The registry implements it for real; tests drive the loop with the pure core alone and choose what fails.

use std::future::Future;
use std::sync::Arc;

use helix_core::{Command, Effect, Reply, state::State};
use helix_model::LogTime;
use tokio::sync::{broadcast, watch};

use crate::registry::{Consistency, Leadership, ProposeError, ReadError, Registry};

/// What the leader's shell asks of consensus. Meanings are those of [`Registry`]'s functions of the same names.
pub trait Consensus: Clone + Send + Sync + 'static {
    /// Commits one command and answers what applying it said.
    fn propose(&self, command: Command) -> impl Future<Output = Result<Reply, ProposeError>> + Send;
    /// Commits several, in order.
    fn propose_all(&self, commands: Vec<Command>) -> impl Future<Output = Result<Vec<Reply>, ProposeError>> + Send;
    /// Commits what this node decided as the leader of a term, in that term alone.
    fn propose_in_term(
        &self,
        term: u64,
        commands: Vec<Command>,
    ) -> impl Future<Output = Result<Vec<Reply>, ProposeError>> + Send;
    /// Waits until this node has applied all that was acknowledged by anybody before.
    fn barrier(&self) -> impl Future<Output = Result<(), ReadError>> + Send;
    /// Reads the state; short, and never across an await.
    fn with_state<R>(&self, read: impl FnOnce(&State) -> R) -> R;
    /// What followed from each applied entry.
    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>>;
    /// Who leads.
    fn leadership(&self) -> watch::Receiver<Leadership>;
    /// The log clock.
    fn now(&self) -> LogTime;
    /// By how much that clock has leapt ahead of the time that passed, ever.
    fn leapt_ms(&self) -> u64;
    /// The cluster's name.
    fn cluster(&self) -> String;
}

impl Consensus for Registry {
    async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        Registry::propose(self, command).await
    }

    async fn propose_all(&self, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        Registry::propose_all(self, commands).await
    }

    async fn propose_in_term(&self, term: u64, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        Registry::propose_in_term(self, term, commands).await
    }

    async fn barrier(&self) -> Result<(), ReadError> {
        Registry::barrier(self, Consistency::Linearizable).await
    }

    fn with_state<R>(&self, read: impl FnOnce(&State) -> R) -> R {
        Registry::with_state(self, read)
    }

    fn effects(&self) -> broadcast::Receiver<Arc<[Effect]>> {
        Registry::effects(self)
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        Registry::leadership(self)
    }

    fn now(&self) -> LogTime {
        Registry::now(self)
    }

    fn leapt_ms(&self) -> u64 {
        Registry::leapt_ms(self)
    }

    fn cluster(&self) -> String {
        Registry::cluster(self).to_owned()
    }
}
