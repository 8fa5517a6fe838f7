//! Points that a working cluster does not come to: somebody has to be late, deposed, lost, or told to stop too early.

use std::fs;
use std::path::PathBuf;

use helix_failpoint::{Action, Point};
use helix_tests::cluster::{Member, PATIENCE, alive, wait_for};
use serde_json::Value;

use super::site::{Case, Site, Victim};
use super::{Scene, deaths, failures};

/// Deaths first, then what the disk can do.
fn cases(scene: Scene) -> Vec<Case> {
    [deaths(scene), failures(scene)].concat()
}

/// Waits until who was started comes to the point that is armed, and sees its end.
fn expect_death(site: &Site, case: Case) {
    let members = site.cluster.members();
    let pid = wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
    assert!(matches!(site.revive(case, pid, &members), Victim::Member(..)), "{case}");
}

/// Submits a build, and waits for its end.
fn build(site: &Site, line: &str) -> String {
    let id = wait_for("a build to be acknowledged", PATIENCE, || {
        let said = site.cluster.helix(&["submit", "-o", "quiet", "--no-output", "--", line]);
        (said.code == 0).then(|| said.stdout.trim().to_owned())
    });
    wait_for("a build to end", PATIENCE, || (site.statuses(None)[&id]["state"] == "succeeded").then_some(()));
    id
}

/// Asks one coordinator until it knows a build.
fn expect_known(site: &Site, member: &Member, id: &str) {
    let context = site.cluster.context_of(member);
    wait_for("the build to be known", PATIENCE, || {
        let said = site.cluster.helix_with(&context, &["status", id, "-o", "json"]);
        let status: Value = serde_json::from_str(&said.stdout).ok()?;
        (status["state"] == "succeeded").then_some(())
    });
}

/// Leader, and the two others.
fn roles(site: &Site) -> (Member, Vec<Member>) {
    let leader = site.cluster.leader();
    let others = site.cluster.all("coordinator").into_iter().filter(|member| member.id != leader.id).collect();
    (leader, others)
}

/// Makes one coordinator so late that what it lacks is in no log any more. It does not run, and whoever leads will send a snapshot.
fn make_late(site: &Site) -> Member {
    let (leader, others) = roles(site);
    let (late, other) = (others[0].clone(), others[1].clone());
    site.cluster.kill(&late);
    for round in 0..2 {
        build(site, "true");
        for member in [&leader, &other] {
            let file: PathBuf = site.cluster.root().join(format!("saved-{}-{round}", member.id));
            let context = site.cluster.context_of(member);
            let said = site.cluster.helix_with(&context, &["cluster", "snapshot", "save", file.to_str().unwrap()]);
            assert_eq!(said.code, 0, "{}", said.stderr);
        }
    }
    // A leader keeps in its log what a member that is away lacks; who followed then does not.
    let said = site.cluster.helix(&["cluster", "transfer-leader", &other.id]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    late
}

/// In the order in which one comes to them.
const STEPS: [Point; 6] = [
    Point::SnapshotReceive,
    Point::SnapshotReceived,
    Point::SnapshotTake,
    Point::SnapshotTaken,
    Point::StoreImported,
    Point::StoreSwitched,
];

#[test]
fn a_latecomer_dies_at_each_step_of_the_snapshot_that_it_is_sent() {
    let cases = cases(Scene::Latecomer);
    if cases.is_empty() {
        return;
    }
    let site = Site::start(3, 1);
    let (mut stopping, going_on): (Vec<_>, Vec<_>) =
        cases.into_iter().partition(|case| case.action == Action::Kill || case.stops());
    // Each start brings it to the next step, until it has what it was sent.
    stopping.sort_by_key(|case| (case.action != Action::Kill, STEPS.iter().position(|step| *step == case.point)));
    let mut late = None;
    for case in stopping {
        site.arm(case);
        if late.is_none() {
            site.cluster.start_again(late.insert(make_late(&site)));
        }
        expect_death(&site, case);
        eprintln!("{case}");
        if case.point == Point::StoreSwitched
            && let Some(member) = late.take()
        {
            expect_known(&site, &member, &build(&site, "true"));
        }
    }
    // An error on the way is the leader's to try again.
    for case in &going_on {
        site.arm(*case);
    }
    if !going_on.is_empty() {
        let late = make_late(&site);
        site.cluster.start_again(&late);
        for case in going_on {
            wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
        }
        expect_known(&site, &late, &build(&site, "true"));
    }
    site.end();
}

/// The last two of a latecomer's steps are those of every coordinator whose registry is written anew.
#[test]
fn a_coordinator_dies_at_each_step_of_writing_its_registry_anew() {
    let of_renewal = |case: &Case| matches!(case.point, Point::StoreImported | Point::StoreSwitched);
    let cases: Vec<Case> = cases(Scene::Latecomer).into_iter().filter(of_renewal).collect();
    if cases.is_empty() {
        return;
    }
    let site = Site::start_with(3, 1, &["coordinator.raft.registry_renew_bytes=0B"]);
    for case in cases {
        // A registry that was lost is made from snapshot and log, and written anew once it is there.
        let member = site.cluster.member("coordinator", "2");
        site.cluster.kill(&member);
        fs::remove_dir_all(member.data_dir.join("registry")).unwrap();
        site.arm(case);
        site.cluster.start_again(&member);
        expect_death(&site, case);
        expect_known(&site, &member, &build(&site, "true"));
        eprintln!("{case}");
    }
    site.end();
}

#[test]
fn a_deposed_leader_dies_giving_up_what_nobody_else_has() {
    let cases = cases(Scene::Deposed);
    if cases.is_empty() {
        return;
    }
    let site = Site::start(3, 1);
    for (number, case) in cases.into_iter().enumerate() {
        let (leader, others) = roles(&site);
        others.iter().for_each(|other| site.cluster.kill(other));
        let ghost = format!("ghost-{number}");
        let said = site.cluster.helix_with(
            &site.cluster.context_of(&leader),
            &["submit", "--connect-timeout", "500ms", "--id", &ghost, "--no-output", "--", "true"],
        );
        assert_ne!(said.code, 0, "one of three acknowledges nothing");
        site.cluster.kill(&leader);
        others.iter().for_each(|other| site.cluster.start_again(other));
        let id = build(&site, "true");
        site.arm(case);
        site.cluster.start_again(&leader);
        expect_death(&site, case);
        expect_known(&site, &leader, &id);
        assert!(!site.statuses(None).contains_key(&ghost), "what nobody acknowledged came back from one log");
        eprintln!("{case}");
    }
    site.end();
}

#[test]
fn a_coordinator_dies_sealing_the_log_of_a_lost_worker() {
    let cases = cases(Scene::LostWorker);
    if cases.is_empty() {
        return;
    }
    let site = Site::start(3, 1);
    site.set(&["worker_lease_ms=1s", "seal_lost_after_ms=500ms"]);
    for case in cases {
        let agent = site.cluster.member("agent", "agent-1");
        let id = site.cluster.submit("echo line 1; echo line 2; sleep 1000");
        let log = || site.cluster.helix(&["logs", &id, "--attempt", "1"]).stdout;
        wait_for("its lines", PATIENCE, || log().contains("line 2").then_some(()));
        site.arm(case);
        let members = site.cluster.members();
        site.cluster.kill(&agent);
        let pid = wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
        site.revive(case, pid, &members);
        let words = "what followed line 2, if anything did, was lost with worker agent-1";
        let said = wait_for("the log to be sealed", PATIENCE, || Some(log()).filter(|log| log.contains(words)));
        let lines = said.lines().filter(|line| line.starts_with("line ")).count();
        assert_eq!(lines, 2, "{said}");
        assert_eq!(site.cluster.helix(&["cancel", &id, "--no-wait"]).code, 0);
        site.cluster.start_again(&agent);
        site.cluster.wait_state(&id, "cancelled");
        eprintln!("{case}");
    }
    site.end();
}

#[test]
fn an_agent_dies_taking_an_order_back() {
    let cases = cases(Scene::Withdrawal);
    if cases.is_empty() {
        return;
    }
    let site = Site::start(1, 1);
    for case in cases {
        // It dies with an order that nobody has taken, and comes back as another life, as after a boot.
        let ordered = Case { point: Point::OrderWritten, action: Action::Kill };
        site.arm(ordered);
        let members = site.cluster.members();
        let id = site.cluster.submit(&mark(&site));
        let pid = wait_for("the agent to die", PATIENCE, || site.taken(ordered.point));
        wait_for("the agent to be dead", PATIENCE, || (!alive(pid)).then_some(()));
        let agent = members.into_iter().find(|member| member.pid == Some(pid)).unwrap();
        let instance = agent.data_dir.join("instance");
        // The beginning stays: it names the place of workdirs, which no boot moves.
        let text = fs::read_to_string(&instance).unwrap();
        let (place, rest) = text.split_at(8);
        fs::write(&instance, format!("{place}{}", rest.chars().rev().collect::<String>())).unwrap();
        site.arm(case);
        site.cluster.start_again(&agent);
        if case.action == Action::Kill {
            expect_death(&site, case);
        } else {
            wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
        }
        site.cluster.wait_state(&id, "succeeded");
        let ran = fs::read_to_string(site.cluster.root().join("ran")).unwrap();
        let ran: Vec<&str> = ran.lines().filter(|line| line.starts_with(&id)).collect();
        assert_eq!(ran, [format!("{id} 2")], "an order that was taken back was carried out");
        eprintln!("{case}");
    }
    site.end();
}

/// A build that leaves a line for each attempt that ran.
fn mark(site: &Site) -> String {
    format!("echo \"$HELIX_BUILD_ID $HELIX_ATTEMPT\" >> {}", site.cluster.root().join("ran").display())
}
