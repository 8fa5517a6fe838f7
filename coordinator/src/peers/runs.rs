//! One process for each node: a copy of a data directory that runs beside the original has its id and its epoch, and would vote a
//! second time with its vote.
//!
//! Each process draws a random number when it starts, its run, which its consensus messages and its answers carry. One under a run that is
//! not known is followed by a question, to the node's address as the membership has it: who is there? The same run is known from
//! then on. Another run is another process of that node, and what came under the first is refused, before anything acts on it; the refusal
//! names the run that it refuses, and the process of that run, alone, stops.
//!
//! Why that never stops the only process: it holds the lock of its directory, so whoever used the directory before has ended or let go of
//! it when a message of the new run arrives, and no process answers the question that has let go. The question is asked after the
//! message has arrived, never before: an answer with another run is of another directory, or the message is a late one of a process that is no
//! more, which misses nothing.
//!
//! A node that cannot be asked (a link cut in one direction, an older program) is believed, as is an older program that names no run; the
//! question is asked again now and then. A process also asks at its own address, which is all there is in a cluster of one. Not noticed:
//! copies of which none can be reached at the node's address, and a copy of a whole machine's memory, which has the same run. Invariant: one
//! entry for a member, at most one question to it under way, and no message waits for longer than [`WAIT_MAX`].

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use helix_common::status::{metadata, status, with_metadata};
use helix_model::{ErrorCode, NodeId};
use helix_proto::raft;
use helix_proto::raft::raft_service_client::RaftServiceClient;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;

use super::{Peers, Purpose};

/// The key under which a refusal names the node of which there are two.
const COPY_OF: &str = "copy_of";

/// The key under which it names the run that it refuses.
const RUN: &str = "run";

/// The key under which it names where the other process answers.
const ADDRESS: &str = "address";

/// A message waits so long for the answer to who is there: many round trips, and no more than one or two elections.
const WAIT_MAX: Duration = Duration::from_millis(300);

/// The question itself is given up after this: a first connection over a slow link takes a few round trips.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// A node that could not be asked is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// One life of a coordinator's process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run(NonZeroU64);

impl Run {
    /// What no other process has.
    pub(super) fn draw() -> Self {
        Self(NonZeroU64::new(rand::random()).unwrap_or(NonZeroU64::MIN))
    }

    /// As a message has it; an older program does not say.
    pub(super) fn said(run: u64) -> Option<Self> {
        NonZeroU64::new(run).map(Self)
    }

    pub(super) fn to_wire(self) -> u64 {
        self.0.get()
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What is to be done about a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// It is taken.
    Take,
    /// The node is asked who is there, and the message waits.
    Ask,
    /// The node is asked who is there, and the message is taken meanwhile.
    TakeAndAsk,
    /// The message waits for a question that is under way.
    Wait,
    /// It is refused: another process answers for the node.
    Refuse,
}

/// Who is there, at a node's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// A process of the node.
    There(Run),
    /// Nobody who could say.
    Silent,
}

/// What is known about the processes of one node.
#[derive(Default, Debug)]
struct Known {
    /// The run that answered last.
    there: Option<Run>,
    /// The run that a question was about that nobody answered, and since when.
    believed: Option<(Run, Instant)>,
    /// The run that was found to be another's.
    refused: Option<Run>,
    /// Since when a question is under way.
    asking: Option<Instant>,
}

impl Known {
    fn judge(&self, run: Run, now: Instant) -> Verdict {
        if self.there == Some(run) {
            return Verdict::Take;
        }
        if self.refused == Some(run) {
            return Verdict::Refuse;
        }
        match (self.believed.filter(|(believed, _)| *believed == run), self.asking) {
            (Some(_), Some(_)) => Verdict::Take,
            (Some((_, since)), None) if now < since + ASK_AGAIN => Verdict::Take,
            (Some(_), None) => Verdict::TakeAndAsk,
            // Counted from the question: whoever sends may give up, and send again, before a wait of its own is over.
            (None, Some(since)) if now >= since + WAIT_MAX => Verdict::Take,
            (None, Some(_)) => Verdict::Wait,
            (None, None) => Verdict::Ask,
        }
    }

    /// The answer to a question that was asked after a message of `run` had arrived. Whether that is now known for another's.
    fn answered(&mut self, run: Run, answer: Answer, now: Instant) -> bool {
        self.asking = None;
        match answer {
            Answer::There(there) => {
                (self.there, self.believed) = (Some(there), None);
                if there == run {
                    return false;
                }
                self.refused = Some(run);
                true
            }
            Answer::Silent => {
                self.believed = Some((run, now));
                false
            }
        }
    }
}

/// What is known about the processes of the other nodes.
pub(super) struct Runs {
    own: Run,
    known: Mutex<BTreeMap<NodeId, Known>>,
    /// A question has ended.
    ended: watch::Sender<()>,
    /// The questions under way; they end with this.
    questions: Mutex<JoinSet<()>>,
}

impl Runs {
    pub(super) fn new(own: Run) -> Self {
        Self { own, known: Mutex::default(), ended: watch::Sender::new(()), questions: Mutex::default() }
    }

    pub(super) fn own(&self) -> Run {
        self.own
    }

    /// Members come and go; what is known of those that went is not kept.
    pub(super) fn keep(&self, is_member: impl Fn(NodeId) -> bool) {
        // A question under way marks its own end.
        self.known().retain(|node, known| known.asking.is_some() || is_member(*node));
    }

    /// What to do about a message of now. Notes a question that has to be asked.
    fn judge(&self, node: NodeId, run: Run) -> Verdict {
        let mut all = self.known();
        let known = all.entry(node).or_default();
        let now = Instant::now();
        let verdict = known.judge(run, now);
        if matches!(verdict, Verdict::Ask | Verdict::TakeAndAsk) {
            known.asking = Some(now);
        }
        verdict
    }

    fn answered(&self, node: NodeId, run: Run, answer: Answer) -> bool {
        let refused = self.known().entry(node).or_default().answered(run, answer, Instant::now());
        self.ended.send_replace(());
        refused
    }

    fn is_there(&self, node: NodeId, run: Run) -> bool {
        self.known().get(&node).is_some_and(|known| known.there == Some(run))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peers {
    /// Refuses what another process than the node's own sends, or answers, in its name. Waits while it is asked, never for long.
    pub(crate) async fn expect_one_run(&self, node: NodeId, run: u64) -> Result<(), Status> {
        // An older program does not say.
        let (runs, Some(run)) = (&self.inner.runs, Run::said(run)) else { return Ok(()) };
        if runs.is_there(node, run) {
            return Ok(());
        }
        // Whoever has none is about to be added, or unknown here yet, as a leader may be to a node that joins.
        let Some(address) = self.address(node) else { return Ok(()) };
        let mut ended = runs.ended.subscribe();
        let wait = tokio::time::sleep(WAIT_MAX);
        let mut wait = std::pin::pin!(wait);
        loop {
            match runs.judge(node, run) {
                Verdict::Take => return Ok(()),
                Verdict::Refuse => return Err(refusal(node, run, &address)),
                Verdict::TakeAndAsk => {
                    self.ask_who_is_there(node, run);
                    return Ok(());
                }
                Verdict::Ask => self.ask_who_is_there(node, run),
                Verdict::Wait => {}
            }
            tokio::select! {
                // The sender lives as long as this.
                _ = ended.changed() => {}
                () = &mut wait => return Ok(()),
            }
        }
    }

    fn ask_who_is_there(&self, node: NodeId, run: Run) {
        // The question must not keep what it ends with.
        let (peers, question) = (Arc::downgrade(&self.inner), self.question(node));
        let mut questions = self.inner.runs.questions.lock().unwrap_or_else(PoisonError::into_inner);
        while questions.try_join_next().is_some() {}
        questions.spawn(async move {
            let answer = question.await;
            if let Some(inner) = peers.upgrade() {
                Self { inner }.hear_who_is_there(node, run, answer);
            }
        });
    }

    /// Asks who is there at a node's address. Holds on to nothing of this.
    fn question(&self, node: NodeId) -> impl Future<Output = Result<raft::IdentifyResponse, String>> + Send + use<> {
        let channel = self.channel(node, Purpose::Heartbeat);
        // Whoever is there may have another epoch. That is said by messages that act, not by a question: it must stop nobody.
        let envelope = raft::Envelope { to_epoch: 0, ..self.envelope(node) };
        let request = raft::IdentifyRequest { envelope: Some(envelope) };
        async move {
            let mut service = RaftServiceClient::new(channel.map_err(|error| error.to_string())?);
            let answer = tokio::time::timeout(ANSWER_MAX, service.identify(request)).await;
            let answer = answer.map_err(|_| "it did not answer".to_owned())?;
            answer.map(tonic::Response::into_inner).map_err(|refusal| refusal.message().to_owned())
        }
    }

    fn run_in(&self, node: NodeId, answer: raft::IdentifyResponse) -> Result<Run, String> {
        let envelope = answer.envelope.unwrap_or_default();
        self.check_answer(node, Some(&envelope)).map_err(|refusal| refusal.message().to_owned())?;
        Run::said(envelope.from_run).ok_or_else(|| "it does not say".to_owned())
    }

    fn hear_who_is_there(&self, node: NodeId, run: Run, answer: Result<raft::IdentifyResponse, String>) {
        let said = answer.and_then(|answer| self.run_in(node, answer));
        let answer = said.as_ref().map_or(Answer::Silent, |there| Answer::There(*there));
        if let Err(why) = said {
            tracing::debug!(node = node.0, %run, why, "a node cannot be asked who it is; it is believed, and asked again");
        }
        if self.inner.runs.answered(node, run, answer) {
            let address = self.address(node).unwrap_or_default();
            // Late words of a process that is no more look the same; one that still runs says more when it stops.
            tracing::warn!(
                code = ErrorCode::WrongCluster.as_str(),
                node = node.0,
                %run,
                "node {node} spoke from another process than the one that answers at {address}: that is refused, and stops if it \
                 still runs, because its data directory or the other's is a copy"
            );
        }
    }

    /// Asks who is there at this node's own address: if that is another process of it, this node must stop.
    pub(crate) async fn expect_alone(&self) {
        let own = self.own();
        let Some(address) = self.address(own) else { return };
        match self.question(own).await.and_then(|answer| self.run_in(own, answer)) {
            Ok(there) if there != self.inner.runs.own() => self.fail_as_copy(&address),
            Ok(_) => {}
            Err(why) => tracing::debug!(why, address, "this node does not reach itself"),
        }
    }

    /// Says which process this is; not after it has let go of its data directory, which may be another's then.
    #[allow(clippy::result_large_err)]
    pub(crate) fn identify(&self, to: NodeId) -> Result<raft::Envelope, Status> {
        let envelope = self.envelope(to);
        if self.inner.dir.is_held() {
            Ok(envelope)
        } else {
            Err(status(ErrorCode::ShuttingDown, "this process has let go of its data directory"))
        }
    }

    /// Looks into a peer's refusal: when it is this very process that it refuses, this node must stop.
    pub(super) fn heed_copy(&self, refusal: &Status) {
        let (own, run) = (self.own(), self.inner.runs.own());
        let names = |key: &str, value: String| metadata(refusal, key).is_some_and(|it| it == value);
        if names(COPY_OF, own.to_string()) && names(RUN, run.to_string()) {
            self.fail_as_copy(&metadata(refusal, ADDRESS).unwrap_or_default());
        }
    }

    fn fail_as_copy(&self, address: &str) {
        let own = self.own();
        self.fail(format!(
            "another process with this node's id and epoch answers at {address}, where the cluster has node {own}: this data directory is a \
             copy of one in use, and both would vote with one vote. Do not start it again: wipe it. If the other is the copy, stop \
             that too, `helix cluster remove {own}`, and add the host under a new id"
        ));
    }

    /// The run that answered last for a node.
    #[cfg(test)]
    pub(crate) fn run_of(&self, node: NodeId) -> Option<Run> {
        self.inner.runs.known().get(&node)?.there
    }

    /// The run of this process.
    #[cfg(test)]
    pub(crate) fn own_run(&self) -> Run {
        self.inner.runs.own()
    }
}

fn refusal(node: NodeId, run: Run, address: &str) -> Status {
    let message = format!("another process of node {node} answers at {address}; the one of run {run} is not heard");
    let facts = [(COPY_OF, node.to_string()), (RUN, run.to_string()), (ADDRESS, address.to_owned())];
    with_metadata(ErrorCode::WrongCluster, message, facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(number: u64) -> Run {
        Run::said(number).unwrap()
    }

    const ORIGINAL: u64 = 1;
    const RESTARTED: u64 = 2;
    const COPY: u64 = 3;

    /// A node whose original has answered.
    fn known() -> (Known, Instant) {
        let (mut known, now) = (Known::default(), Instant::now());
        assert_eq!(known.judge(run(ORIGINAL), now), Verdict::Ask);
        assert!(!known.answered(run(ORIGINAL), Answer::There(run(ORIGINAL)), now));
        (known, now)
    }

    #[test]
    fn a_run_is_never_what_an_older_program_says() {
        assert_eq!(Run::said(0), None);
        let drawn = Run::draw();
        assert_eq!(Run::said(drawn.to_wire()), Some(drawn));
        assert_ne!(drawn, Run::draw());
        assert_eq!(run(ORIGINAL).to_string(), "0000000000000001");
    }

    #[test]
    fn who_is_known_is_taken_and_whoever_is_not_is_asked_about() {
        let (known, now) = known();
        assert_eq!(known.judge(run(ORIGINAL), now + ASK_AGAIN * 9), Verdict::Take);
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Ask);
    }

    #[test]
    fn one_that_started_again_takes_the_place_of_what_it_was() {
        let (mut known, now) = known();
        assert!(!known.answered(run(RESTARTED), Answer::There(run(RESTARTED)), now));
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Take);
        assert_eq!(known.judge(run(ORIGINAL), now), Verdict::Ask, "what it was is no more, or a copy");
    }

    #[test]
    fn a_copy_is_refused_and_the_original_is_not() {
        let (mut known, now) = known();
        assert!(known.answered(run(COPY), Answer::There(run(ORIGINAL)), now));
        assert_eq!(known.judge(run(COPY), now + ASK_AGAIN * 9), Verdict::Refuse);
        assert_eq!(known.judge(run(ORIGINAL), now), Verdict::Take);
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Ask);
    }

    #[test]
    fn the_original_is_refused_where_a_copy_has_its_address() {
        let (mut known, now) = known();
        assert!(!known.answered(run(COPY), Answer::There(run(COPY)), now));
        assert!(known.answered(run(ORIGINAL), Answer::There(run(COPY)), now));
        assert_eq!(known.judge(run(ORIGINAL), now), Verdict::Refuse);
    }

    #[test]
    fn a_node_that_started_again_while_it_was_asked_is_asked_about_anew() {
        let (mut known, now) = known();
        // The question about a late message of the original was answered by the original, which then ended.
        known.asking = Some(now);
        assert_eq!(
            known.judge(run(RESTARTED), now),
            Verdict::Wait,
            "the answer to an earlier question is none to this"
        );
        known.answered(run(COPY), Answer::There(run(ORIGINAL)), now);
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Ask);
    }

    #[test]
    fn one_that_cannot_be_asked_is_believed_and_asked_again_behind_its_messages() {
        let (mut known, now) = known();
        known.asking = Some(now);
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Wait, "for the same question");
        assert_eq!(known.judge(run(RESTARTED), now + WAIT_MAX), Verdict::Take, "even if no message waited so long");
        assert!(!known.answered(run(RESTARTED), Answer::Silent, now));
        assert_eq!(known.judge(run(RESTARTED), now), Verdict::Take);
        assert_eq!(known.judge(run(RESTARTED), now + ASK_AGAIN), Verdict::TakeAndAsk);
        known.asking = Some(now + ASK_AGAIN);
        assert_eq!(known.judge(run(RESTARTED), now + ASK_AGAIN), Verdict::Take, "and waits no more");
        assert_eq!(known.judge(run(COPY), now + ASK_AGAIN), Verdict::Wait);
        // Somebody else is there after all.
        assert!(known.answered(run(RESTARTED), Answer::There(run(ORIGINAL)), now + ASK_AGAIN));
        assert_eq!(known.judge(run(RESTARTED), now + ASK_AGAIN), Verdict::Refuse);
    }

    #[test]
    fn what_is_known_of_a_node_ends_with_its_membership() {
        let runs = Runs::new(run(9));
        assert_eq!(runs.judge(NodeId(2), run(ORIGINAL)), Verdict::Ask);
        assert_eq!(runs.judge(NodeId(2), run(ORIGINAL)), Verdict::Wait, "one question at a time");
        runs.keep(|_| false);
        assert_eq!(runs.judge(NodeId(2), run(ORIGINAL)), Verdict::Wait);
        runs.answered(NodeId(2), run(ORIGINAL), Answer::There(run(ORIGINAL)));
        runs.keep(|_| false);
        assert!(runs.known().is_empty());
    }
}
