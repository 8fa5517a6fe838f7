//! A cluster whose points can be armed, and what is done to it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use helix_failpoint::{Action, Armed, Point, VARIABLE, arm, taken};
use helix_tests::cluster::{Cluster, Member, PATIENCE, Shape, alive, wait_for};
use serde_json::Value;

use super::builds::{Build, Round};
use super::leftovers;

/// Rounds of builds after which a point is one that nobody comes to.
const ROUNDS_MAX: usize = 8;

/// What is done where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) point: Point,
    pub(super) action: Action,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.point.name(), self.action.word())
    }
}

impl Case {
    /// Whether who takes it ends.
    fn ends(self) -> bool {
        self.action == Action::Kill || self.stops()
    }

    /// Whether the process has to stop itself: what it said to be durable may not be, or it cannot go on in order.
    pub(super) fn stops(self) -> bool {
        use Point as P;
        self.action != Action::Kill
            && matches!(
                self.point,
                P::LogAppend
                    | P::LogFlushed
                    | P::VoteSave
                    | P::VoteSaved
                    | P::LogTruncate
                    | P::LogPurge
                    | P::StoreWrite
                    | P::StoreSync
                    | P::StoreImported
                    | P::StoreSwitched
                    | P::SnapshotFinish
                    | P::SnapshotWritten
                    | P::SnapshotSynced
                    | P::SnapshotRenamed
                    | P::SnapshotRetain
                    | P::SnapshotTake
                    | P::SnapshotTaken
            )
    }
}

/// Who took a point.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Victim {
    /// A process of the cluster, by role and id.
    Member(String, String),
    /// A runner, which nobody starts again.
    Runner,
}

/// A cluster under test.
pub(super) struct Site {
    pub(super) cluster: Cluster,
    points: tempfile::TempDir,
    serial: Cell<u32>,
    /// All builds that ended as they should.
    ended: Vec<Build>,
    /// How often each member's last words were an error of its disk.
    given_up: RefCell<BTreeMap<String, usize>>,
}

/// What is known of builds, by id.
pub(super) type Statuses = BTreeMap<String, Value>;

impl Site {
    pub(super) fn start(coordinators: u16, agents: u16) -> Self {
        Self::start_with(coordinators, agents, &[])
    }

    pub(super) fn start_with(coordinators: u16, agents: u16, settings: &[&str]) -> Self {
        let points = tempfile::tempdir().unwrap();
        let environment = [(VARIABLE, points.path().display().to_string())];
        let shape =
            Shape { coordinators, agents, capacity: 6, settings: settings.iter().map(|&it| it.to_owned()).collect() };
        let cluster = Cluster::start_with(&shape, &environment).unwrap();
        let site = Self { cluster, points, serial: Cell::new(0), ended: Vec::new(), given_up: RefCell::default() };
        // Many a runner dies, which is no fault of its host's; and the largest log is to be small.
        site.set(&["infra_retries=6", "retry_backoff_ms=50ms", "quarantine_after=0", "log_bytes_max=1MiB"]);
        site
    }

    pub(super) fn set(&self, values: &[&str]) {
        let said = self.cluster.helix(&[&["cluster", "policy", "set"], values].concat());
        assert_eq!(said.code, 0, "{}", said.stderr);
    }

    pub(super) fn points(&self) -> &std::path::Path {
        self.points.path()
    }

    pub(super) fn arm(&self, case: Case) -> u32 {
        self.serial.set(self.serial.get() + 1);
        arm(
            self.points.path(),
            case.point,
            Armed { action: case.action, passage: super::passage(), serial: self.serial.get() },
        )
        .unwrap();
        self.serial.get()
    }

    pub(super) fn taken(&self, point: Point) -> Option<i32> {
        taken(self.points.path(), point).unwrap().and_then(|pid| i32::try_from(pid).ok())
    }

    /// Arms points, has builds made until processes have taken them all, starts those again, and looks for all that was promised.
    pub(super) fn strike(&mut self, cases: &[Case]) {
        let began = Instant::now();
        let mut open = cases.to_vec();
        if cases.iter().any(|case| case.point == Point::SegmentDrop) {
            // A segment is dead from the start when its node dies before anything is in it.
            open.push(Case { point: Point::SegmentBegun, action: Action::Kill });
        }
        if open.iter().any(|case| case.point == Point::SegmentBegun) {
            // Who was started anew begins one with its first small blob.
            let coordinator = self.cluster.member("coordinator", "1");
            self.cluster.kill(&coordinator);
            self.cluster.start_again(&coordinator);
        }
        let name = cases.iter().map(|case| case.point.name().replace('.', "-")).collect::<Vec<_>>().join("-");
        let serials: Vec<u32> = open.iter().map(|case| self.arm(*case)).collect();
        let (mut rounds, mut victims, mut going_on) = (Vec::new(), Vec::new(), Vec::new());
        let mut members = self.cluster.members();
        while !open.is_empty() {
            assert!(rounds.len() < ROUNDS_MAX, "void: nobody came to {open:?}");
            let points: Vec<Point> = open.iter().map(|case| case.point).collect();
            let round = Round::submit(&self.cluster, &points, &name, &format!("{}-{}", serials[0], rounds.len()));
            points.into_iter().for_each(|point| self.provoke(point));
            wait_for(&format!("{open:?} to be taken"), PATIENCE, || {
                open.retain(|case| {
                    let Some(pid) = self.taken(case.point) else { return true };
                    let victim = self.revive(*case, pid, &members);
                    if !case.ends() && victim != Victim::Runner {
                        going_on.push((*case, pid));
                    }
                    victims.push(victim);
                    // Those before stay known by what they were: another may have taken its point and be gone already.
                    members.extend(self.cluster.members());
                    false
                });
                (open.is_empty() || round.has_ended(self)).then_some(())
            });
            rounds.push(round);
        }
        for round in rounds {
            self.ended.extend(round.check(self, &victims));
        }
        for (case, pid) in going_on {
            assert!(alive(pid), "{case}: who took it ended, although it could have tried again");
        }
        let cases: Vec<String> = cases.iter().map(ToString::to_string).collect();
        eprintln!("{}: {victims:?}, {:?}", cases.join(", "), began.elapsed());
    }

    /// Does what builds alone do not lead to.
    fn provoke(&self, point: Point) {
        let name = point.name();
        if name.starts_with("vote.") {
            let leader = self.cluster.leader();
            let other = self.cluster.all("coordinator").into_iter().find(|member| member.id != leader.id).unwrap();
            // It may be the one that dies.
            self.cluster.helix(&["cluster", "transfer-leader", &other.id]);
        }
        if name.starts_with("snapshot.") || ["log.purge", "log.purged", "store.sync", "store.synced"].contains(&name) {
            let file = self.cluster.root().join("saved");
            self.cluster.helix(&["cluster", "snapshot", "save", file.to_str().unwrap(), "--connect-timeout", "2s"]);
        }
    }

    /// Sees the end of who took a point, if it is to end, and starts it again.
    pub(super) fn revive(&self, case: Case, pid: i32, members: &[Member]) -> Victim {
        let member = members.iter().find(|member| member.pid == Some(pid));
        if case.ends() {
            wait_for(&format!("{pid} to end at {case}"), PATIENCE, || (!alive(pid)).then_some(()));
        }
        let Some(member) = member else { return Victim::Runner };
        if case.stops() {
            let said = self.given_up(member);
            let before = self.given_up.borrow_mut().insert(member.id.clone(), said).unwrap_or(0);
            assert!(said > before, "{case}: it does not say why it stopped");
        }
        if case.ends() {
            self.cluster.start_again(member);
        }
        Victim::Member(member.role.clone(), member.id.clone())
    }

    /// How often a coordinator's last words were an error of its disk.
    fn given_up(&self, member: &Member) -> usize {
        let count = |more: &str| {
            let path = self.cluster.root().join("logs").join(format!("{}-{}{more}.log", member.role, member.id));
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let last = |line: &&str| line.starts_with("helix-coordinator: ") && line.contains("os error");
            text.lines().filter(last).count()
        };
        count("") + count("-again")
    }

    /// Where the death of what a dead runner left cannot be proven, its worker is held until somebody vouches for it.
    pub(super) fn release(&self) {
        for agent in self.cluster.all("agent") {
            if self.cluster.helix(&["workers", "show", &agent.id, "-o", "json"]).stdout.contains("\"held\": true") {
                self.cluster.helix(&["workers", "remove", "--force", &agent.id]);
            }
        }
    }

    /// Every build, or those with a label, once somebody tells.
    pub(super) fn statuses(&self, label: Option<&str>) -> Statuses {
        let mut arguments = vec!["list", "--all", "--limit", "1000000", "-o", "jsonl"];
        arguments.extend(label.into_iter().flat_map(|label| ["--label", label]));
        let said = wait_for("a list of builds", PATIENCE, || {
            Some(self.cluster.helix(&arguments)).filter(|said| said.code == 0)
        });
        let status = |line: &str| {
            let status: Value = serde_json::from_str(line).unwrap();
            (status["build_id"].as_str().unwrap().to_owned(), status)
        };
        said.stdout.lines().map(status).collect()
    }

    /// Looks at everything once more, and for what must not be left.
    pub(super) fn end(self) {
        let statuses = self.statuses(None);
        self.ended.iter().for_each(|build| build.check_state(&statuses));
        leftovers::check(&self.cluster);
    }
}
