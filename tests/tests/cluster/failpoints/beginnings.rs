//! Small files that are written once in the life of a node or a host: who died writing one begins anew and leaves nothing.

use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use helix_failpoint::{Action, VARIABLE};
use helix_tests::cluster::{PATIENCE, programs, wait_for};
use helix_tests::joining::{Prepared, prepare};

use super::leftovers::temporaries;
use super::site::{Case, Site};
use super::{Scene, deaths, failures};

/// Every small file's points, with all that can happen there.
fn cases() -> Vec<Case> {
    [deaths(Scene::Beginning), failures(Scene::Beginning)].concat()
}

fn init(site: &Site, node: &Prepared) -> Output {
    let members = format!("{}={}", node.member.id, node.peer);
    let mut command = Command::new(programs().join("helix-coordinator"));
    command.args(["init", "--members", &members, "--config"]).arg(&node.config).env(VARIABLE, site.points());
    command.output().unwrap()
}

#[test]
fn a_node_that_dies_being_made_can_be_made_again() {
    let cases = cases();
    if cases.is_empty() {
        return;
    }
    let site = Site::start(1, 1);
    for (number, case) in cases.into_iter().enumerate() {
        let id = 11 + number as u64;
        let node = prepare(&site.cluster, id, &site.cluster.root().join("pki")).unwrap();
        site.arm(case);
        let output = init(&site, &node);
        assert!(site.taken(case.point).is_some(), "void: init does not come to {case}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match case.action {
            Action::Kill => assert_eq!(output.status.signal(), Some(9), "{case}: {said}"),
            Action::FailedDisk | Action::FullDisk => {
                assert!(output.status.code() == Some(1) && said.contains("os error"))
            }
        }
        // It was made, or can be: never something in between.
        let made = node.member.data_dir.join("node.json").exists();
        let again = init(&site, &node);
        assert_eq!(again.status.success(), !made, "{case}: {}", String::from_utf8_lossy(&again.stderr));

        // Its first start notes that it has a log.
        site.arm(case);
        site.cluster.adopt(node.member.clone());
        site.cluster.start_again(&node.member);
        wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
        let (status, said) = site.cluster.outcome(&node.member);
        assert!(!status.success() && (case.action == Action::Kill || said.contains("os error")), "{case}: {said}");
        site.cluster.start_again(&node.member);
        wait_for("the node to listen", PATIENCE, || TcpStream::connect(&node.peer).ok());
        assert_eq!(temporaries(&node.member.data_dir), Vec::<std::path::PathBuf>::new(), "{case}");
        site.cluster.kill(&site.cluster.member("coordinator", &node.member.id));
        eprintln!("{case}");
    }
}

#[test]
fn a_host_whose_agent_dies_at_its_first_start_is_taken_in() {
    let cases = cases();
    if cases.is_empty() {
        return;
    }
    let site = Site::start(1, 1);
    for case in cases {
        let agent = site.cluster.member("agent", "agent-1");
        site.cluster.kill(&agent);
        std::fs::remove_dir_all(&agent.data_dir).unwrap();
        site.arm(case);
        site.cluster.start_again(&agent);
        wait_for(&format!("{case} to be taken"), PATIENCE, || site.taken(case.point));
        let (status, said) = site.cluster.outcome(&agent);
        assert!(!status.success() && (case.action == Action::Kill || said.contains("os error")), "{case}: {said}");
        site.cluster.start_again(&agent);
        let id = site.cluster.submit("true");
        site.cluster.wait_state(&id, "succeeded");
        assert_eq!(temporaries(&agent.data_dir), Vec::<std::path::PathBuf>::new(), "{case}");
        eprintln!("{case}");
    }
    site.end();
}
