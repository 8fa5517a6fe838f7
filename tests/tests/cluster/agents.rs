//! Agents that die, come back, lose their data, or are upgraded in the middle of builds.

use std::fs;
use std::process::{Command, Stdio};

use helix_tests::cluster::{Cluster, PATIENCE, Shape, wait_for};

fn one_agent() -> Cluster {
    Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap()
}

/// A build that says numbered lines and marks its start; it ends when it is told to.
fn counting(cluster: &Cluster) -> (String, std::path::PathBuf, std::path::PathBuf) {
    let starts = cluster.root().join("starts");
    let finish = cluster.root().join("finish");
    let line = format!(
        "echo x >> {}; i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; sleep 0.01; done; echo end $i",
        starts.display(),
        finish.display()
    );
    (line, starts, finish)
}

/// Asserts that a log has lines 1 to N once each and in order, and the end.
fn assert_whole(log: &str) {
    let numbers: Vec<u32> = log.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    assert!(numbers.len() > 10, "{log}");
    let expected: Vec<u32> = (1..=u32::try_from(numbers.len()).unwrap()).collect();
    assert_eq!(numbers, expected);
    assert!(log.contains(&format!("end {}", numbers.len())), "{log}");
}

fn lines_so_far(cluster: &Cluster, id: &str) -> usize {
    cluster.helix(&["logs", id]).stdout.lines().count()
}

#[test]
fn an_agent_killed_and_started_again_goes_on_with_its_builds() {
    let cluster = one_agent();
    let (line, starts, finish) = counting(&cluster);
    let id = cluster.submit(&line);
    let follower = cluster.command(&["logs", "-f", &id]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("some lines", PATIENCE, || (lines_so_far(&cluster, &id) > 20).then_some(()));
    let agent = cluster.member("agent", "agent-1");
    for _ in 0..2 {
        let now = lines_so_far(&cluster, &id);
        cluster.kill(&cluster.member("agent", "agent-1"));
        cluster.start_again(&agent);
        wait_for("more lines", PATIENCE, || (lines_so_far(&cluster, &id) > now + 20).then_some(()));
    }
    fs::write(&finish, "").unwrap();
    assert_eq!(cluster.helix(&["wait", &id]).code, 0);
    assert_eq!(fs::read_to_string(starts).unwrap(), "x\n", "the build ran once");
    assert_eq!(cluster.json(&["status", &id])["attempt"], 1);
    assert_whole(&cluster.helix(&["logs", &id]).stdout);
    let followed = follower.wait_with_output().unwrap();
    assert_whole(&String::from_utf8(followed.stdout).unwrap());
}

#[test]
fn an_agent_with_an_empty_data_directory_is_a_new_instance() {
    let cluster = one_agent();
    let (line, starts, finish) = counting(&cluster);
    let id = cluster.submit(&line);
    wait_for("the build to start", PATIENCE, || starts.exists().then_some(()));
    let before = cluster.json(&["workers", "show", "agent-1"])["instance"].clone();
    let agent = cluster.member("agent", "agent-1");
    cluster.kill(&agent);
    fs::remove_dir_all(&agent.data_dir).unwrap();
    cluster.start_again(&agent);
    wait_for("the second attempt", PATIENCE, || {
        (fs::read_to_string(&starts).unwrap_or_default().lines().count() == 2).then_some(())
    });
    assert_ne!(cluster.json(&["workers", "show", "agent-1"])["instance"], before);
    fs::write(&finish, "").unwrap();
    assert_eq!(cluster.helix(&["wait", &id]).code, 0);
    let status = cluster.json(&["status", &id]);
    assert_eq!(status["attempt"], 2);
    assert_eq!(status["tasks"][0]["attempts"][0]["reason"], "worker_lost");
}

#[test]
fn an_upgraded_agent_finds_its_builds() {
    let cluster = one_agent();
    let (line, starts, finish) = counting(&cluster);
    let id = cluster.submit(&line);
    wait_for("some lines", PATIENCE, || (lines_so_far(&cluster, &id) > 20).then_some(()));
    let agent = cluster.member("agent", "agent-1");
    let config = agent.argv.iter().skip_while(|word| *word != "--config").nth(1).unwrap();
    let detach = Command::new(&agent.argv[0]).args(["detach", "--config", config]).output().unwrap();
    assert!(detach.status.success(), "{}", String::from_utf8_lossy(&detach.stderr));
    wait_for("the agent to be gone", PATIENCE, || (!helix_tests::cluster::alive(agent.pid.unwrap())).then_some(()));
    assert_eq!(cluster.state(&id), "running");
    cluster.start_again(&agent);
    let now = lines_so_far(&cluster, &id);
    wait_for("more lines", PATIENCE, || (lines_so_far(&cluster, &id) > now + 20).then_some(()));
    fs::write(&finish, "").unwrap();
    assert_eq!(cluster.helix(&["wait", &id]).code, 0);
    assert_eq!(fs::read_to_string(starts).unwrap(), "x\n");
    assert_whole(&cluster.helix(&["logs", &id]).stdout);
}
