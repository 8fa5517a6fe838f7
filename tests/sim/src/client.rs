//! Clients: they submit, repeat what was not answered under the same id, take ids that are theirs already, and cancel.

use std::sync::Arc;

use helix_core::command::{self as cmd, Authority, Command};
use helix_core::{Rejection, Reply};
use helix_model::{BuildId, BuildSpec, Digest, Executor, OnWorkerLoss, Platform, Resources};

use super::Bug;
use super::host::MEMORY_MAX;
use super::random::Random;
use super::registry::Origin;
use super::world::{Event, World};

/// What a client wants.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Submit(BuildId, Arc<BuildSpec>),
    /// The same id with another spec.
    Steal(BuildId),
    Cancel(BuildId),
}

#[derive(Debug)]
pub(super) struct Client {
    name: String,
    /// What is still to be wanted, and when at the earliest.
    ops: Vec<(u64, Op)>,
    /// The request that is not answered yet, and when to repeat it.
    current: Option<(u64, Op, u64)>,
    requests: u64,
}

impl Client {
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        let mut ops = Vec::new();
        for build in 0..random.between(4, 14) {
            let id = BuildId::new(&format!("c{number}-{build}")).unwrap_or_else(|error| panic!("{error}"));
            let at = random.between(500, 45_000);
            let spec = Arc::new(any_spec(random));
            ops.push((at, Op::Submit(id.clone(), Arc::clone(&spec))));
            if random.chance(15) {
                ops.push((at + random.between(1, 20_000), Op::Submit(id.clone(), spec)));
            }
            if random.chance(10) {
                ops.push((at + random.between(1, 9_000), Op::Steal(id.clone())));
            }
            if random.chance(30) {
                ops.push((at + random.between(1, 12_000), Op::Cancel(id)));
            }
        }
        ops.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        Self { name: format!("client/c{number}"), ops, current: None, requests: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.ops.is_empty() && self.current.is_none()
    }
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
        executor: Some(if pushes { Executor::Podman } else { Executor::Exec }),
        command: (!pushes).then(|| helix_model::Command::Shell("make".to_owned())),
        push: if pushes { "registry/app:1".to_owned() } else { String::new() },
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

impl World {
    pub(super) fn client_tick(&mut self, client: usize) {
        let now = self.now;
        let this = &mut self.clients[client];
        if this.current.is_none() && this.ops.last().is_some_and(|(at, _)| *at <= now) {
            this.requests += 1;
            this.current = this.ops.pop().map(|(_, op)| (this.requests, op, now));
        }
        let request = this.requests;
        let repeat = this.current.as_mut().filter(|(_, _, again)| *again <= now).map(|(_, op, again)| {
            *again = now + 700;
            op.clone()
        });
        if let Some(op) = repeat
            && (self.healed || !self.random.chance(10))
        {
            let ms = self.random.between(1, 40);
            self.after(ms, Event::Request { client, request, op });
        }
        if !self.clients[client].is_done() {
            self.after(100, Event::ClientTick(client));
        }
    }

    pub(super) fn hear_client(&mut self, client: usize, request: u64, op: &Op) {
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
        };
        if self.bug == Some(Bug::AckBeforeCommit) && matches!(op, Op::Submit(..)) {
            self.after(1, Event::Answer { client, request, reply: Reply::Submitted });
        }
        self.propose(vec![(command, Origin::Request { client, request })]);
    }

    pub(super) fn client_hears(&mut self, client: usize, request: u64, reply: &Reply) {
        let current = &mut self.clients[client].current;
        let Some((_, op, _)) = current.take_if(|(number, _, _)| *number == request) else { return };
        let verdict = match (&op, reply) {
            (Op::Submit(build, _), Reply::Submitted | Reply::SameBuild | Reply::SamePurged(_)) => {
                self.oracle.submitted.insert(build.clone());
                Ok(())
            }
            (Op::Steal(_), Reply::Rejected(Rejection::IdTaken(_))) => Ok(()),
            (Op::Cancel(build), Reply::Done | Reply::Unchanged) => {
                self.oracle.cancelled.insert(build.clone());
                Ok(())
            }
            (Op::Cancel(_), Reply::Rejected(Rejection::WrongState { .. } | Rejection::BuildPurged(_))) => Ok(()),
            (op, reply) => Err(format!("{op:?} was answered with {reply:?}")),
        };
        self.check(verdict);
    }
}
