//! Large logs and artifacts go through while the programs stay small.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helix_tests::cluster::{Cluster, Shape, peak_resident_kib};
use helix_tests::skip::skip;
use sha2::{Digest, Sha256};

const DAEMON_KIB_MAX: u64 = 256 * 1024;
const RUNNER_KIB_MAX: u64 = 16 * 1024;

/// The largest peak of any runner of this cluster, watched until told to stop.
fn watch_runners(cluster: &Cluster, stop: &AtomicBool) -> u64 {
    let mut peak = 0;
    while !stop.load(Ordering::Relaxed) {
        for (pid, line) in cluster.processes() {
            if line.split(' ').next().is_some_and(|program| program.ends_with("helix-runner")) {
                peak = peak.max(peak_resident_kib(pid).unwrap_or(0));
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    peak
}

#[test]
fn a_hundred_megabytes_of_log_and_a_gibibyte_of_artifact() {
    let cluster = Cluster::start(&Shape { agents: 1, ..Shape::default() }).unwrap();
    let stop = AtomicBool::new(false);
    let line = "yes 'a line of eighty characters, which is what people who write logs think is usual.' \
                | head -c 100000000; head -c 1073741824 /dev/zero > \"$HELIX_OUTPUT\"";
    let runner_peak = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch_runners(&cluster, &stop));
        let said = cluster.helix(&["submit", "--wait", "--", line]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        stop.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    let log = cluster.root().join("log");
    let status = cluster.command(&["logs", "last"]).stdout(fs::File::create(&log).unwrap()).status().unwrap();
    assert!(status.success());
    let text = fs::read(&log).unwrap();
    let said = text.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"a line of")).count();
    assert_eq!(said, 100_000_000 / 81 + 1, "every line is there once");
    let artifact = cluster.root().join("artifact");
    assert_eq!(cluster.helix(&["artifacts", "get", "last", "-O", artifact.to_str().unwrap()]).code, 0);
    assert_eq!(fs::metadata(&artifact).unwrap().len(), 1 << 30);
    let reported = cluster.json(&["status", "last"])["digest"].as_str().unwrap().to_owned();
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(&artifact).unwrap(), &mut hasher).unwrap();
    let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found, reported);
    for member in cluster.members() {
        let peak = peak_resident_kib(member.pid.unwrap()).unwrap();
        assert!(peak < DAEMON_KIB_MAX, "{} {} had {peak} KiB resident", member.role, member.id);
    }
    if !rustix::process::geteuid().is_root() {
        return skip("a runner's size", "only root may see which process belongs to which cluster");
    }
    assert!(runner_peak > 0 && runner_peak < RUNNER_KIB_MAX, "a runner had {runner_peak} KiB resident");
}
