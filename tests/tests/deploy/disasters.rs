//! The parts of the runbook that make another cluster of the one that is there: members come and go, a backup is restored, a
//! majority is lost. Each walk has a cluster of its own, and a build that runs all the while.

use serde_json::Value;

use crate::hosts::Hosts;
use crate::walk::{FROM_NOTHING, HOSTS, Walk, json, let_go, long_build, must};

const ADD: &str = "Add a control node";
const REMOVE: &str = "Remove a control node";
const BACK_UP: &str = "Back up";
const RESTORE: &str = "Restore a backup";
const LOST: &str = "Two of three control nodes are lost for good";

/// The sections that are carried out here.
pub(crate) const PARTS: &[&str] = &[ADD, REMOVE, BACK_UP, RESTORE, LOST];

/// The members, all of them healthy and with a vote.
fn voters(hosts: &Hosts) -> Vec<u64> {
    let settled = "until helix cluster status -o json | grep -q '\"healthy\": *true' && \
                   ! helix cluster status -o json | grep -q '\"healthy\": *false'; do sleep 0.1; done";
    must(hosts, "admin", "members that are healthy", settled);
    let status = json(hosts, "helix cluster status -o json");
    let members = status["members"].as_array().unwrap();
    assert!(members.iter().all(|member| member["role"] != "learner"), "{status}");
    members.iter().map(|member| member["id"].as_u64().unwrap()).collect()
}

/// Coordinators die at once, and their disks with them.
fn lose(hosts: &Hosts, lost: &[&str]) {
    for host in lost {
        let script = "kill -KILL $(cat /var/lib/units/helix-coordinator.pid)\n\
                      while systemctl is-active helix-coordinator; do sleep 0.1; done\n\
                      rm -rf /var/lib/helix/coordinator";
        must(hosts, host, "losing a coordinator", script);
    }
}

/// What the first chapter's build made is there, and new ones are built.
fn serves(hosts: &Hosts) {
    let script = "cd ~/helix; rm -f first.out; helix artifacts get first -O first.out; grep -qx made first.out\n\
                  helix logs first | grep 'on build-'";
    must(hosts, "admin", "what was built before", script);
    let new = "helix submit --follow --id new -- 'echo new; echo made > \"$HELIX_OUTPUT\"'";
    let said = must(hosts, "admin", "a new build", new).output;
    assert!(said.contains("\nnew\n") || said.starts_with("new\n"), "{said}");
    assert_eq!(json(hosts, "helix cluster status -o json")["load"], Value::from(0));
}

#[test]
fn members_come_and_go_and_a_backup_becomes_a_cluster_as_the_runbook_says() {
    let name = "members_come_and_go_and_a_backup_becomes_a_cluster_as_the_runbook_says";
    let all = [HOSTS, &["control-4", "control-5", "control-6", "control-7"]].concat();
    let Some(walk) = Walk::begin(name, &all) else { return };
    let hosts = &walk.hosts;
    walk.part(FROM_NOTHING);
    let worker = long_build(hosts, "long");
    walk.part(ADD);
    assert_eq!(voters(hosts), [1, 2, 3, 4]);
    walk.part(REMOVE);
    assert_eq!(voters(hosts), [1, 3, 4]);

    walk.part(BACK_UP);
    must(hosts, "admin", "a build behind the backup", "helix submit --id late --no-output --wait -- true");
    lose(hosts, &["control-1", "control-3", "control-4"]);
    walk.part(RESTORE);
    assert_eq!(voters(hosts), [5, 6, 7]);
    for host in ["control-5", "control-6", "control-7"] {
        must(hosts, host, "missing no blob", "test ! -e /var/lib/helix/coordinator/missing-blobs.txt");
    }
    must(hosts, "admin", "what the backup does not have", "! helix status late");
    let_go(hosts, &worker, "long");
    serves(hosts);
}

#[test]
fn the_one_node_that_is_left_becomes_a_cluster_as_the_runbook_says() {
    let name = "the_one_node_that_is_left_becomes_a_cluster_as_the_runbook_says";
    let Some(walk) = Walk::begin(name, &[HOSTS, &["control-4"]].concat()) else { return };
    let hosts = &walk.hosts;
    walk.part(FROM_NOTHING);
    let worker = long_build(hosts, "long");
    // What the lost ones alone have is lost: the third has to have heard.
    let heard = "cd ~/.config/helix; sed '/control-[12]/d' context.toml > third.toml\n\
                 until helix --context third.toml status long --stale | grep -q running; do sleep 0.1; done";
    must(hosts, "admin", "a third that knows", heard);
    lose(hosts, &["control-1", "control-2"]);
    let said = walk.part(LOST);
    for words in ["quorum_may_live: ", "--lost 1,2", "kept: everything up to entry", "Nodes 1, 2 are retired for ever"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(voters(hosts), [3]);
    walk.part(ADD);
    assert_eq!(voters(hosts), [3, 4]);
    let_go(hosts, &worker, "long");
    // Two of three hold what was built; the third may not have been one of them.
    must(hosts, "admin", "what was built before", "helix status first | grep succeeded");
    must(hosts, "admin", "a new build", "helix submit --follow --no-output -- true");
}
