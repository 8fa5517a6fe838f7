//! A build host whose disk fills up in the middle of a build.

use std::path::{Path, PathBuf};

use helix_tests::cluster::{Cluster, PATIENCE, Shape, wait_for};
use helix_tests::skip::skip;

/// A small file system; gone with this value.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path) -> Option<Self> {
        let mount =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(path).output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_build_that_fills_one_hosts_disk_runs_on_another() {
    let settings = ["disk.reserve_bytes=0", "disk.reserve_inodes=0", "limits.disk=watch"].map(str::to_owned).into();
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 2, capacity: 1, settings }).unwrap();
    let agent = cluster.member("agent", "agent-1");
    cluster.kill(&agent);
    std::fs::remove_dir_all(&agent.data_dir).unwrap();
    std::fs::create_dir(&agent.data_dir).unwrap();
    let Some(_small) = Small::mount(&agent.data_dir) else {
        return skip("a_build_that_fills_one_hosts_disk", "cannot mount a file system");
    };
    cluster.start_again(&agent);
    let shown = |name: &str| cluster.json(&["workers", "show", name]);
    wait_for("the agent to be back", PATIENCE, || (shown("agent-1")["healthy"] == true).then_some(()));
    assert!(shown("agent-1")["limits"].as_str().is_some_and(|limits| limits.contains("disk watched")));
    assert_eq!(cluster.helix(&["workers", "drain", "agent-2"]).code, 0);
    let id = cluster.submit("head -c 33554432 /dev/zero > large");
    let log = || cluster.helix(&["logs", &id, "--attempt", "all"]).stdout;
    wait_for("the small disk to be full", PATIENCE, || log().contains("disk_full").then_some(()));
    assert_ne!(cluster.state(&id), "failed", "it is ours to run it again");
    assert_eq!(cluster.helix(&["workers", "undrain", "agent-2"]).code, 0);
    assert_eq!(cluster.helix(&["wait", &id]).code, 0, "{}", log());
    let status = cluster.json(&["status", &id]);
    assert_eq!((&status["state"], &status["worker"]), (&"succeeded".into(), &"agent-2".into()), "{status}");
    // The host is as it was, but for what an agent always has.
    let left = || {
        let roots = std::fs::read_dir(agent.data_dir.join("work")).unwrap();
        roots.flat_map(|root| std::fs::read_dir(root.unwrap().path()).unwrap()).count()
    };
    wait_for("its workdir to be gone", PATIENCE, || (left() == 0).then_some(()));
}
