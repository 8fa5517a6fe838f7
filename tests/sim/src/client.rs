//! Clients: they submit, repeat what was not answered under the same id, take ids that are theirs already, cancel, pin
//! and look. What they ask may arrive twice, late, or never, and so may what they are told.

use std::sync::Arc;

use helix_core::command::{self as cmd, Authority, Command};
use helix_core::record::Pinned;
use helix_core::{Known, Rejection, Reply, State};
use helix_model::{BuildId, BuildSpec, BuildState, Digest, Executor, OnWorkerLoss, Outputs, Platform, Resources};

use super::Bug;
use super::host::MEMORY_MAX;
use super::random::Random;
use super::registry::{NODES, Origin};
use super::world::{Event, World};

/// Clients of the cluster.
pub(super) const CLIENTS: usize = 3;

/// What a client wants.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Submit(BuildId, Arc<BuildSpec>),
    /// The same id with another spec.
    Steal(BuildId),
    Cancel(BuildId),
    Pin(BuildId),
    Look(BuildId),
}

/// What a client is told.
#[derive(Clone, Debug)]
pub(super) enum Answered {
    Reply(Reply),
    Seen(Stage),
}

/// How far a build is, for whoever looks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) enum Stage {
    #[default]
    Absent,
    There,
    Ended(BuildState),
}

#[derive(Debug)]
pub(super) struct Client {
    name: String,
    /// What is still to be wanted, and when at the earliest; the next one last.
    ops: Vec<(u64, Op)>,
    current: Option<Current>,
    requests: u64,
}

/// The request that is not answered yet.
#[derive(Debug)]
struct Current {
    request: u64,
    op: Op,
    asked_at: u64,
    again_at: u64,
    /// How far the build was for whoever was answered before this was asked.
    known: Stage,
}

impl Client {
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        let mut ops = Vec::new();
        for build in 0..random.between(4, 14) {
            let id = build_id(number, build);
            let at = random.between(500, 45_000);
            let spec = Arc::new(any_spec(random));
            ops.push((at, Op::Submit(id.clone(), Arc::clone(&spec))));
            if random.chance(15) {
                ops.push((at + random.between(1, 20_000), Op::Submit(id.clone(), spec)));
            }
            if random.chance(10) {
                ops.push((at + random.between(1, 9_000), Op::Steal(id.clone())));
            }
            if random.chance(5) {
                ops.push((at + random.between(1, 9_000), Op::Pin(id.clone())));
            }
            if random.chance(30) {
                ops.push((at + random.between(1, 12_000), Op::Cancel(id)));
            }
            let other = build_id(random.below(CLIENTS), random.between(0, 13));
            ops.push((random.between(1_000, 59_000), Op::Look(other)));
        }
        ops.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        Self { name: format!("client/c{number}"), ops, current: None, requests: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.ops.is_empty() && self.current.is_none()
    }

    /// Whether a request was asked for the first time before then.
    pub(super) fn was_sent_before(&self, request: u64, at: u64) -> bool {
        self.current.as_ref().is_some_and(|current| current.request == request && current.asked_at < at)
    }
}

fn build_id(client: usize, build: u64) -> BuildId {
    BuildId::new(&format!("c{client}-{build}")).unwrap_or_else(|error| panic!("{error}"))
}

fn any_spec(random: &mut Random) -> BuildSpec {
    let platform = |text| Platform::new(text).unwrap_or_else(|error| panic!("{error}"));
    let platforms = match random.below(10) {
        0..6 => vec![],
        6..8 => vec![platform("linux/amd64")],
        _ => vec![platform("linux/amd64"), platform("linux/arm64")],
    };
    let pushes = platforms.len() > 1 && random.chance(60);
    BuildSpec {
        repo_url: if random.chance(40) { "https://host/repository".to_owned() } else { String::new() },
        executor: Some(if pushes { Executor::Podman } else { Executor::Exec }),
        command: (!pushes).then(|| helix_model::Command::Shell("make".to_owned())),
        push: if pushes { "registry/app:1".to_owned() } else { String::new() },
        outputs: if !pushes && random.chance(60) { Outputs::Named(vec!["out".to_owned()]) } else { Outputs::None },
        platforms,
        priority: i32::from(random.chance(20)),
        retries: u32::from(random.chance(20)),
        on_worker_loss: if random.chance(20) { OnWorkerLoss::Fail } else { OnWorkerLoss::Rerun },
        timeout_ms: if random.chance(60) { random.between(3_000, 15_000) } else { 0 },
        resources: Resources {
            memory_bytes: if random.chance(40) { random.between(1, MEMORY_MAX) } else { 0 },
            ..Resources::default()
        },
        silence_timeout_ms: if random.chance(20) { 2_000 } else { 0 },
        ..BuildSpec::default()
    }
}

/// Tells specs apart; not a sha256, which nothing here needs.
fn digest(spec: &BuildSpec) -> Digest {
    let mut out = [0u8; 32];
    for (place, byte) in spec.canonical_bytes().iter().enumerate() {
        out[place % 32] = out[place % 32].wrapping_mul(31).wrapping_add(*byte);
    }
    Digest(out)
}

/// How far a build is, as a state has it.
fn stage(state: &State, id: &BuildId) -> Stage {
    match state.build(id) {
        None => Stage::Absent,
        Some(Known::Open(_)) => Stage::There,
        Some(Known::Finished(build)) => Stage::Ended(build.state),
        Some(Known::Purged(tombstone)) => Stage::Ended(tombstone.state),
    }
}

impl World {
    pub(super) fn client_tick(&mut self, client: usize) {
        let now = self.now;
        let this = &mut self.clients[client];
        if this.current.is_none()
            && let Some((_, op)) = this.ops.pop_if(|(at, _)| *at <= now)
        {
            this.requests += 1;
            let known = if let Op::Look(id) = &op { self.oracle.stage(id) } else { Stage::Absent };
            if let Op::Submit(id, _) = &op {
                self.oracle.wished.insert(id.clone());
            }
            let request = this.requests;
            self.trace.note(
                now,
                format_args!("client c{client} wants, as its request {request}: {}", super::words::wanted(&op)),
            );
            this.current = Some(Current { request, op, asked_at: now, again_at: now, known });
        }
        let repeat = this.current.as_mut().filter(|current| current.again_at <= now).map(|current| {
            current.again_at = now + 700;
            (current.request, current.op.clone())
        });
        if let Some((request, op)) = repeat {
            self.send_request(client, request, op);
        }
        if !self.clients[client].is_done() {
            self.after(100, Event::ClientTick(client));
        }
    }

    fn send_request(&mut self, client: usize, request: u64, op: Op) {
        let faulty = !self.healed;
        if faulty && self.random.chance(6) {
            // The network brings it once more, and late.
            let ms = self.random.between(40, 8_000);
            self.after(ms, Event::Request { client, request, op: op.clone() });
        }
        if !(faulty && self.random.chance(10)) {
            let ms = self.random.between(1, 40);
            self.after(ms, Event::Request { client, request, op });
        }
    }

    pub(super) fn hear_client(&mut self, client: usize, request: u64, op: &Op) {
        if let Op::Look(id) = op {
            return self.look(client, request, id);
        }
        if self.registry.leader.is_none() {
            return;
        }
        let submitted_by = self.clients[client].name.clone();
        let authority = Authority::Owner(submitted_by.clone());
        let submit = |build: &BuildId, spec: Arc<BuildSpec>| {
            let (build, spec_digest) = (build.clone(), digest(&spec));
            let submitted_by = submitted_by.clone();
            Command::SubmitBuild(cmd::SubmitBuild { build, spec, spec_digest, submitted_by, retry_of: None })
        };
        let command = match op {
            Op::Submit(build, spec) => submit(build, Arc::clone(spec)),
            Op::Steal(build) => submit(build, Arc::new(BuildSpec { priority: -7, ..BuildSpec::default() })),
            Op::Cancel(build) => {
                Command::CancelBuild(cmd::CancelBuild { build: build.clone(), authority, reason: String::new() })
            }
            Op::Pin(build) => Command::PinBuild(cmd::PinBuild { build: build.clone(), authority, pinned: Pinned::Yes }),
            Op::Look(_) => return,
        };
        if !self.acknowledged_early(client, request, &command) {
            self.propose(vec![(command, Origin::Request { client, request })]);
        }
    }

    /// A read at any node: it asks the leader how far the log is, and answers when it is as far.
    fn look(&mut self, client: usize, request: u64, id: &BuildId) {
        let node = self.random.below(NODES);
        let serves = self.registry.nodes[node].up && self.registry.nodes[node].joined;
        let stale = self.bug == Some(Bug::StaleRead);
        if !serves || (!self.registry.is_led() && !stale) {
            return;
        }
        if !stale {
            self.catch_up(node);
        }
        let seen = stage(&self.registry.nodes[node].state, id);
        self.answer_client(client, request, Answered::Seen(seen));
    }

    /// Sends a client an answer, which may be lost.
    pub(super) fn answer_client(&mut self, client: usize, request: u64, answer: Answered) {
        if self.healed || !self.random.chance(10) {
            let ms = self.random.between(1, 40);
            self.after(ms, Event::Answer { client, request, answer });
        }
    }

    pub(super) fn client_hears(&mut self, client: usize, request: u64, answer: &Answered) {
        let current = &mut self.clients[client].current;
        let Some(Current { op, known, .. }) = current.take_if(|current| current.request == request) else { return };
        let now = self.now;
        self.trace.note(
            now,
            format_args!("client c{client} is told, of its request {request}: {}", super::words::answered(answer)),
        );
        let verdict = match (&op, answer) {
            (Op::Look(id), Answered::Seen(seen)) => self.oracle.saw(id, known, *seen),
            (Op::Submit(id, _), Answered::Reply(Reply::Submitted | Reply::SameBuild | Reply::SamePurged(_))) => {
                self.oracle.submitted.insert(id.clone());
                Ok(())
            }
            (Op::Steal(_), Answered::Reply(Reply::Rejected(Rejection::IdTaken(_)))) => Ok(()),
            (Op::Cancel(id), Answered::Reply(Reply::Done | Reply::Unchanged)) => {
                self.oracle.cancelled.insert(id.clone());
                self.oracle.judge_cancelled(id)
            }
            (Op::Pin(id), Answered::Reply(Reply::Done | Reply::Unchanged)) => {
                self.oracle.pinned.insert(id.clone());
                Ok(())
            }
            (
                Op::Cancel(_),
                Answered::Reply(Reply::Rejected(Rejection::WrongState { .. } | Rejection::BuildPurged(_))),
            )
            | (Op::Pin(_), Answered::Reply(Reply::Rejected(Rejection::BuildPurged(_)))) => Ok(()),
            (op, answer) => Err(format!(
                "client c{client} asked to {} and was told: {}",
                super::words::wanted(op),
                super::words::answered(answer)
            )),
        };
        self.check(verdict);
    }
}
